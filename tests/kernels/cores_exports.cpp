// The lending of cores by single operations, for test_cores.py.

#include "cores.h"

using pw::Cores;

extern "C" {
void* cores_new(int own, const int32_t* numbers, int count, void* lines) { return new Cores(own, numbers, count, (pw::CoreLine*)lines); }
int cores_ask(void* c) { return ((Cores*)c)->ask(); }
void cores_seize(void* c) { ((Cores*)c)->seize(); }
int cores_take(void* c, int i) { return ((Cores*)c)->take(i); }
void cores_give(void* c, int i) { ((Cores*)c)->give(i); }
int cores_is_wanted(void* c, int i) { return ((Cores*)c)->is_wanted(i); }
void cores_note(void* c, int thread, int64_t step_ns, int64_t waited_ns) { ((Cores*)c)->note(thread, step_ns, waited_ns); }
int cores_gather(void* c) {
    std::vector<int> threads;
    ((Cores*)c)->gather(false, threads);
    ((Cores*)c)->give_back(threads);
    return int(threads.size());
}
void cores_rest(void* c) { ((Cores*)c)->rest(); }
}

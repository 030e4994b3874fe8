// Steps of many short phases on a few threads, beside whatever else has the cores, for test_threads.py.
//
// Prints how many steps it ran and how many pieces other threads than the caller's did, or says what was wrong and
// fails. The cores of all threads but the first are lent, and their owner asks for them all the time.

#include <cstdio>
#include <memory>
#include <random>

#include "threads.h"

using namespace pw;

constexpr int PHASES = 40, MOST_ITEMS = 97;

struct Step {
    std::atomic<int> times[PHASES][MOST_ITEMS] = {};  // that an item was done
    std::atomic<int> done[PHASES] = {};
    int alone = 0;  // phases that only the caller's thread does
};

int wrong(const char* what) {
    std::printf("%s\n", what);
    std::exit(1);
}

int main(int, char** arguments) {
    const int own = std::atoi(arguments[1]), lent = std::atoi(arguments[2]), steps = std::atoi(arguments[3]);
    std::vector<CoreLine> lines(MOST_CORES);
    std::vector<int32_t> numbers, theirs;
    const int cores = int(std::thread::hardware_concurrency());
    for (int i = 0; i < own + lent; i++) numbers.push_back(i % cores + i / cores * 64);  // beyond the last: pinned nowhere
    for (int i = own; i < own + lent; i++) theirs.push_back(numbers[i]);
    Cores mine(own, numbers.data(), own + lent, lines.data());
    std::unique_ptr<Cores> owner;
    if (lent) owner.reset(new Cores(lent, theirs.data(), lent, lines.data()));
    std::atomic<bool> over{false};
    std::thread asking([&] {
        std::minstd_rand random(1);
        while (!over && owner) {
            if (owner->ask()) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
            owner->rest();
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        }
    });
    std::atomic<long> helped{0};
    std::minstd_rand random(2);
    std::thread caller([&] {  // of its own, as an engine's: a process's first thread is not pinned
        Threads threads(mine);
        for (int s = 0; s < steps; s++) {
            auto step = std::make_unique<Step>();  // freed at its end: nobody may touch it any more
            int items[PHASES], piece[PHASES];
            for (int p = 0; p < PHASES; p++) items[p] = p % 7 == 3 ? 1 : int(random() % MOST_ITEMS), piece[p] = 1 + int(random() % 4);
            threads.run([&, at = step.get()](int thread) {
                for (int p = 0; p < PHASES; p++) {
                    if (p && !threads.is_late(thread) && at->done[p - 1] < items[p - 1]) wrong("a phase began before the last was over");
                    if (p % 7 == 3) {
                        threads.first_alone(thread, [&] { at->alone++, at->done[p]++; });
                        continue;
                    }
                    threads.share(thread, items[p], piece[p], [&](int begin, int end) {
                        if (p && at->done[p - 1] < items[p - 1]) wrong("a piece was done before its phase had begun");
                        for (int i = begin; i < end; i++) at->times[p][i]++, at->done[p]++;
                        helped += thread > 0;
                    });
                    if (!threads.is_late(thread) && at->done[p] < items[p]) wrong("a phase was left before it was over");
                }
            }, s % 17 == 16);
            for (int p = 0; p < PHASES; p++)
                for (int i = 0; i < items[p] && p % 7 != 3; i++)
                    if (step->times[p][i] != 1) wrong("an item was not done once");
            if (step->alone != PHASES / 7 + (PHASES % 7 > 3)) wrong("the caller's own phases were not done once");
        }
    });
    caller.join();
    over = true;
    asking.join();
    std::printf("%d %ld\n", steps, helped.load());
}

// The cores that a worker's threads keep to, and how the workers of one host lend each other theirs.
//
// A worker holds its own cores while it has work. One that its owner does not hold may be used by any other worker for
// a step. An owner that wants it back has it after the piece of work that runs on it: its borrower's thread leaves the
// step, and the others do the rest. Shared memory has a line for every core of the host:
//
//     owner   the worker that it belongs to; 0: not lent
//     user    the worker that uses it now, and ASKED while the owner waits for it; 0: nobody
//
//     0 -take-> B -give-> 0
//               B -ask-> B|ASKED -give-> owner
//                        B|ASKED -seize-> owner     after PATIENCE: B was killed or stopped, or is very slow
//
// Only the owner asks and seizes. Workers are known by the number of their first own core, plus one.
//
// A core may be busy with processes that know nothing of this. A thread there would wait for most of every step, and keep
// those processes from being put on another core. So one that waited so sits out the next steps.

#pragma once

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace pw {

constexpr int MOST_CORES = 4096;

struct alignas(64) CoreLine {
    std::atomic<uint32_t> owner, user;
};

// Keeps the calling thread on these cores; does nothing where the system does not allow it.
inline void pin_to_cores(const int32_t* begin, const int32_t* end) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    for (; begin < end; begin++) CPU_SET(*begin, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
#endif
}

inline int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// How long the thread that made it was ready to run while its core had others to run, in all; 0 where nobody counts.
class CoreWait {
   public:
    CoreWait() : file_(open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC)) {}
    ~CoreWait() {
        if (file_ >= 0) close(file_);
    }
    CoreWait(const CoreWait&) = delete;

    int64_t ns() const {
        char text[64];
        const ssize_t size = file_ < 0 ? -1 : pread(file_, text, sizeof(text) - 1, 0);
        if (size <= 0) return 0;
        text[size] = 0;
        const char* second = std::strchr(text, ' ');  // nanoseconds run, nanoseconds waited, times
        return second ? std::strtoll(second, nullptr, 10) : 0;
    }

   private:
    const int file_;
};

inline bool is_first_thread() {
#if defined(__linux__)
    return gettid() == getpid();
#else
    return false;
#endif
}

class Cores {
   public:
    // Without `lines`: the threads divide the cores, or go where the system puts them if there are none. With them, a
    // thread for each core: of the first `own` cores always, of the others when they are lent.
    Cores(int own, const int32_t* numbers, int count, CoreLine* lines)
        : own_(own), numbers_(numbers, numbers + count), lines_(lines), me_(lines ? numbers[0] + 1 : 0), out_until_(most_threads()) {
        for (int i = 0; lines && i < count; i++) {
            give(i);  // what an earlier life of this worker may have left
            if (i < own) line(i).owner.store(me_, std::memory_order_release);
        }
    }

    ~Cores() { rest(); }

    int own() const { return own_; }
    int most_threads() const { return lines_ ? int(numbers_.size()) : own_; }

    // Two threads that the system puts on one core take turns at every barrier, and it sees nothing to move.
    void pin(int thread) const {
        const int64_t cores = numbers_.size(), threads = most_threads();
        if (cores) pin_to_cores(numbers_.data() + cores * thread / threads, numbers_.data() + cores * (thread + 1) / threads);
    }

    // Thread 0 is whoever calls. A process's first thread has other work, and is left where the system puts it.
    void pin_caller() const {
        static thread_local bool is_pinned = false;
        if (is_pinned || is_first_thread()) return;
        pin(0);
        is_pinned = true;
    }

    // The threads of a step: those of the own cores, 0 first, and of others that nobody uses. alone: 0 only.
    void gather(bool alone, std::vector<int>& threads) {
        if (lines_) claim();
        threads.assign(1, 0);
        if (alone) return;
        const int64_t now = now_ns();
        for (int i = 1; i < most_threads(); i++) {
            if (out_until_[i].load(std::memory_order_relaxed) > now) continue;
            if (i >= own_ && !(line(i).owner.load(std::memory_order_relaxed) && take(i))) continue;
            threads.push_back(i);
            borrowed_ += i >= own_;
        }
    }

    // How long this thread was in a step, and how much of it it waited for its core. One that waited nearly all the time
    // sits out for so long that trying again costs a twentieth.
    void note(int thread, int64_t step_ns, int64_t waited_ns) {
        if (step_ns > WORTH_NOTING && waited_ns > step_ns * 4 / 5)
            out_until_[thread].store(now_ns() + std::min(20 * waited_ns, LONGEST_OUT), std::memory_order_relaxed);
    }

    // Gives back what is still borrowed.
    void give_back(const std::vector<int>& threads) {
        for (int thread : threads)
            if (thread >= own_) give(thread);
    }

    // Nothing will be computed for a while: the own cores may be lent.
    void rest() {
        for (int i = 0; lines_ && i < own_; i++) give(i);
    }

    // Whether a borrowed core's owner wants it.
    bool is_wanted(int thread) const { return thread >= own_ && line(thread).user.load(std::memory_order_relaxed) != me_; }

    // Gives a borrowed core back before the step's end.
    void give_early(int thread) {
        give(thread);
        returned_.fetch_add(1, std::memory_order_relaxed);
    }

    // Cores that were borrowed, summed over steps; and of these, those given back before the step's end.
    int64_t borrowed() const { return borrowed_.load(std::memory_order_relaxed); }
    int64_t returned() const { return returned_.load(std::memory_order_relaxed); }

    // Uses a core that nobody uses.
    bool take(int i) {
        uint32_t nobody = 0;
        return line(i).user.compare_exchange_strong(nobody, me_, std::memory_order_acq_rel);
    }

    // Has no effect on a core that is no longer this worker's.
    void give(int i) {
        CoreLine& l = line(i);
        uint32_t user = l.user.load(std::memory_order_acquire);
        while ((user & ~ASKED) == me_ && !l.user.compare_exchange_weak(user, user & ASKED ? l.owner.load(std::memory_order_relaxed) : 0, std::memory_order_acq_rel)) {}
    }

    // Takes the own cores or asks for them; how many are still to be waited for.
    int ask() {
        int missing = 0;
        for (int i = 0; i < own_; i++) {
            CoreLine& l = line(i);
            uint32_t user = l.user.load(std::memory_order_acquire), now = user;
            while (user != me_ && !(user & ASKED)) {
                now = user ? user | ASKED : me_;
                if (l.user.compare_exchange_weak(user, now, std::memory_order_acq_rel)) break;
                now = user;
            }
            missing += now != me_;
        }
        return missing;
    }

    void seize() {
        for (int i = 0; i < own_; i++) line(i).user.store(me_, std::memory_order_release);
    }

   private:
    static constexpr uint32_t ASKED = 1u << 31;
    static constexpr std::chrono::milliseconds PATIENCE{50};
    static constexpr std::chrono::microseconds NAP{20};
    static constexpr int64_t WORTH_NOTING = 1'000'000, LONGEST_OUT = 1'000'000'000;

    CoreLine& line(int i) const { return lines_[numbers_[i]]; }

    // Holds all own cores when it returns.
    void claim() {
        if (!ask()) return;
        const auto end = std::chrono::steady_clock::now() + PATIENCE;
        while (ask()) {
            if (std::chrono::steady_clock::now() > end) return seize();
            std::this_thread::sleep_for(NAP);
        }
    }

    const int own_;
    const std::vector<int32_t> numbers_;
    CoreLine* const lines_;
    const uint32_t me_;
    std::vector<std::atomic<int64_t>> out_until_;  // of each thread, on the monotonic clock
    std::atomic<int64_t> borrowed_{0}, returned_{0};
};

}  // namespace pw

// A few threads that run the phases of a step together.
//
// Every thread begins with its own contiguous share of a phase's items, so that what it fetches ahead is its own, claims
// it piece by piece, and then helps the others: one which the system took off its core holds up only the piece it has.
// Waiting spins for a short while, then sleeps in the kernel: threads that spin on a core that another process
// needs make both slow.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pw {

inline void pause_a_little() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins up to `spins` times, then sleeps until `value` is no longer `old`.
inline void wait_while_equal(std::atomic<uint32_t>& value, uint32_t old, int spins) {
    for (int i = 0; i < spins; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause_a_little();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

class Threads {
   public:
    explicit Threads(int count) : count_(count), claimed_(count) {
        for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
    }

    ~Threads() {
        stopping_ = true;
        wake();
        for (std::thread& worker : workers_) worker.join();
    }

    int count() const { return count_; }

    // Runs body(thread) on every thread, the caller's being number 0; returns when all are done. alone: on the
    // caller's only, for work that is shorter than waking the others.
    void run(const std::function<void(int)>& body, bool alone = false) {
        active_ = alone ? 1 : count_;
        if (active_ == 1) return body(0);
        body_ = &body;
        wake();
        body(0);
        barrier();
    }

    // Inside run: returns when every thread has arrived. `arrived_` counts, `turn_` says which barrier it is.
    void barrier() {
        if (active_ == 1) return;
        uint32_t turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
            arrived_.store(0, std::memory_order_relaxed);
            for (Claimed& claimed : claimed_) claimed.items.store(0, std::memory_order_relaxed);
            // A full fence: with a plain store, notify_all may look for sleepers before the store is seen by one who
            // is about to sleep, and nobody ever wakes that thread.
            turn_.fetch_add(1, std::memory_order_seq_cst);
            turn_.notify_all();
        } else {
            wait_while_equal(turn_, turn, BARRIER_SPINS);
        }
    }

    // First item of `thread` when `items` are shared out.
    int first_item(int thread, int items) const { return int(int64_t(items) * thread / active_); }

    // Inside run, on every thread: calls body(begin, end) for pieces of [0, items), then `last` once, then waits for
    // the others.
    template <class Body, class Last>
    void share(int thread, int items, int piece, Body body, Last last) {
        for (int i = 0; i < active_; i++) {
            const int owner = (thread + i) % active_, end = first_item(owner + 1, items);
            for (;;) {
                int begin = first_item(owner, items) + (active_ == 1 ? 0 : claimed_[owner].items.fetch_add(piece, std::memory_order_relaxed));
                if (begin >= end) break;
                body(begin, active_ == 1 || begin + piece > end ? end : begin + piece);
                if (active_ == 1) break;
            }
        }
        last();
        barrier();
    }

    template <class Body>
    void share(int thread, int items, int piece, Body body) {
        share(thread, items, piece, body, [] {});
    }

   private:
    static constexpr int BARRIER_SPINS = 2000, IDLE_SPINS = 1000;

    void wake() {
        start_.fetch_add(1, std::memory_order_seq_cst);
        start_.notify_all();
    }

    void work(int thread) {
        uint32_t seen = 0;
        for (;;) {
            wait_while_equal(start_, seen, IDLE_SPINS);
            seen++;
            if (stopping_) return;
            (*body_)(thread);
            barrier();
        }
    }

    const int count_;
    int active_ = 1;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> start_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
    struct alignas(64) Claimed {
        std::atomic<int> items{0};
    };
    std::vector<Claimed> claimed_;
    std::vector<std::thread> workers_;
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

inline bool is_first_thread() {
#if defined(__linux__)
    return gettid() == getpid();
#else
    return false;
#endif
}

}  // namespace pw

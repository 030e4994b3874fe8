// A few threads that run the phases of a step together.
//
// Every thread begins with its own contiguous share of a phase's items, so that what it fetches ahead is its own, claims
// it piece by piece, and then helps the others: one which the system took off its core holds up only the piece it has.
// For the same reason a thread whose core is wanted back can leave at any piece. Waiting spins for a short while, then
// sleeps in the kernel: threads that spin on a core that another process needs make both slow.

#pragma once

#include <functional>

#include "cores.h"

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
    explicit Threads(Cores& cores) : cores_(cores), seats_(cores.most_threads()), claimed_(cores.most_threads()), workers_(cores.most_threads()) {}

    ~Threads() {
        stopping_ = true;
        for (size_t i = 0; i < workers_.size(); i++) {
            if (!workers_[i].joinable()) continue;
            wake(int(i));
            workers_[i].join();
        }
    }

    // Threads that may ever take part, and those that began the step at hand.
    int most() const { return int(seats_.size()); }
    int count() const { return count_; }

    // Runs body(0), body(1), ... on the threads of the cores that are to be had, body(0) on the caller's; returns when all
    // are done. alone: on the caller's only, for work that is shorter than waking the others.
    void run(const std::function<void(int)>& body, bool alone = false) {
        cores_.pin_caller();
        cores_.gather(alone, taking_part_);
        count_ = int(taking_part_.size());
        present_.store(count_, std::memory_order_relaxed);
        body_ = &body;
        for (int i = 1; i < count_; i++) {
            std::thread& worker = workers_[taking_part_[i]];
            seats_[taking_part_[i]].index = i;
            if (!worker.joinable()) worker = std::thread([this, thread = taking_part_[i]] { work(thread); });
            wake(taking_part_[i]);
        }
        body(0);
        barrier();
        cores_.give_back(taking_part_);
    }

    // Inside run: returns when every thread has arrived. `arrived_` counts, `turn_` says which barrier it is.
    void barrier() {
        if (count_ == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_relaxed);
        if (!arrive()) wait_while_equal(turn_, turn, BARRIER_SPINS);
    }

    // First item of `thread` when `items` are shared out.
    int first_item(int thread, int items) const { return int(int64_t(items) * thread / count_); }

    // Inside run, on every thread: calls body(begin, end) for pieces of [0, items), then `last` once, then waits for
    // the others.
    template <class Body, class Last>
    void share(int thread, int items, int piece, Body body, Last last) {
        for (int i = 0; i < count_; i++) {
            const int owner = (thread + i) % count_, end = first_item(owner + 1, items);
            for (;;) {
                if (thread && cores_.is_wanted(taking_part_[thread])) leave(thread);
                int begin = first_item(owner, items) + (count_ == 1 ? 0 : claimed_[owner].items.fetch_add(piece, std::memory_order_relaxed));
                if (begin >= end) break;
                body(begin, count_ == 1 || begin + piece > end ? end : begin + piece);
                if (count_ == 1) break;
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
    struct Left {};

    // Whether this thread was the last. How many there are must be read before: the last one changes it.
    bool arrive() {
        const int present = present_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < present) return false;
        arrived_.store(0, std::memory_order_relaxed);
        present_.store(present - left_.exchange(0, std::memory_order_relaxed), std::memory_order_relaxed);
        for (Claimed& claimed : claimed_) claimed.items.store(0, std::memory_order_relaxed);
        // A full fence: with a plain store, notify_all may look for sleepers before the store is seen by one who is
        // about to sleep, and nobody ever wakes that thread.
        turn_.fetch_add(1, std::memory_order_seq_cst);
        turn_.notify_all();
        return true;
    }

    // Ends this thread's part in the step; the others do what it has not claimed. The core is given first: once the
    // thread has arrived, the step may end and the next one borrow the core again.
    [[noreturn]] void leave(int thread) {
        cores_.give_early(taking_part_[thread]);
        left_.fetch_add(1, std::memory_order_relaxed);
        arrive();
        throw Left{};
    }

    void wake(int thread) {
        seats_[thread].start.fetch_add(1, std::memory_order_seq_cst);
        seats_[thread].start.notify_one();
    }

    void work(int thread) {
        cores_.pin(thread);
        const int spins = thread < cores_.own() ? IDLE_SPINS : 0;  // on another's core none
        const CoreWait wait;
        int64_t waited_before = wait.ns();
        for (uint32_t seen = 0;;) {
            wait_while_equal(seats_[thread].start, seen++, spins);
            if (stopping_) return;
            const int64_t began = now_ns();
            try {
                (*body_)(seats_[thread].index);
                barrier();
            } catch (const Left&) {
            }
            const int64_t waited = wait.ns();
            cores_.note(thread, now_ns() - began, waited - waited_before);
            waited_before = waited;
        }
    }

    struct alignas(64) Seat {
        std::atomic<uint32_t> start{0};
        int index = 0;  // in the step at hand
    };
    struct alignas(64) Claimed {
        std::atomic<int> items{0};
    };

    Cores& cores_;
    int count_ = 1;
    std::vector<int> taking_part_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<bool> stopping_{false};
    std::atomic<int> present_{1}, left_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
    std::vector<Seat> seats_;
    std::vector<Claimed> claimed_;  // of each share
    std::vector<std::thread> workers_;
};

}  // namespace pw

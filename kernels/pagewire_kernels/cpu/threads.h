// A few threads that run the phases of a step together.
//
// Every thread begins with its own contiguous share of a phase's items, so that what it fetches ahead is its own, claims
// it piece by piece, and then helps the others. A phase is over when all of its pieces are done, whoever did them: nobody
// waits for a thread that holds none. So a thread may come late, leave because its core is wanted back, or step aside
// between two pieces for whatever else wants to run on its core, and come back into the phase that the others have got
// to. Waiting spins for a short while, then sleeps in the kernel.

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

// A clock that takes some nanoseconds to read; a third of a nanosecond is its unit, or a whole one.
inline int64_t ticks() {
#if defined(__x86_64__)
    return int64_t(__builtin_ia32_rdtsc());
#else
    return now_ns();
#endif
}

class Threads {
   public:
    explicit Threads(Cores& cores) : cores_(cores), seats_(cores.most_threads()), claimed_(cores.most_threads()), workers_(cores.most_threads()) {}

    ~Threads() {
        stopping_ = true;
        for (size_t i = 0; i < workers_.size(); i++) {
            if (!workers_[i].joinable()) continue;
            wake(seats_[i]);
            workers_[i].join();
        }
    }

    // Threads that may ever take part, and those that are called to the step at hand.
    int most() const { return int(seats_.size()); }
    int count() const { return count_; }

    // Runs body(0), body(1), ... on the threads of the cores that are to be had, body(0) on the caller's; returns when
    // body(0) has, and no other thread is in it. One that has not begun by then does not. Whatever must be done belongs
    // into a share. alone: on the caller's only, for work that is shorter than waking the others.
    void run(const std::function<void(int)>& body, bool alone = false) {
        cores_.pin_caller();
        cores_.gather(alone, taking_part_);
        count_ = int(taking_part_.size());
        body_ = &body;
        const uint32_t first_turn = turn_.load(std::memory_order_relaxed);
        for (int i = 0; i < count_; i++) {
            const int thread = taking_part_[i];
            Seat& seat = seats_[thread];
            seat.index = i, seat.turn = first_turn;
            if (i == 0) continue;
            seat.place.store(CALLED, std::memory_order_release);
            if (!workers_[thread].joinable()) workers_[thread] = std::thread([this, thread] { work(thread); });
            wake(seat);
        }
        body(0);
        for (int i = 1; i < count_; i++) dismiss(seats_[taking_part_[i]]);
        cores_.give_back(taking_part_);
    }

    // First item of `thread` when `items` are shared out.
    int first_item(int thread, int items) const { return int(int64_t(items) * thread / count_); }

    // Inside run, on every thread: calls body(begin, end) for pieces of [0, items), and `last` once on the threads that
    // were there in time; returns when all items are done.
    template <class Body, class Last>
    void share(int thread, int items, int piece, Body body, Last last) {
        if (items == 0) return;
        Seat& seat = seat_of(thread);
        const uint32_t turn = seat.turn++;
        if (count_ == 1) {
            for (int begin = 0; begin < items; begin += piece) {
                if (aside_is_due(seat)) step_aside(seat, true);
                body(begin, std::min(begin + piece, items));
            }
            return last();
        }
        if (is_over(turn)) return;
        for (int i = 0; i < count_; i++) {
            const int owner = (thread + i) % count_, first = first_item(owner, items), end = first_item(owner + 1, items);
            for (;;) {
                if (thread && cores_.is_wanted(taking_part_[thread])) leave(thread);
                if (aside_is_due(seat)) away(thread, seat, [&] { step_aside(seat, thread == 0); });
                const int claimed = claim(owner, turn, first, end, piece);
                if (claimed < 0) break;
                const int done = std::min(claimed + piece, end);
                body(claimed, done);
                finish(turn, done - claimed, items);
            }
            if (is_over(turn)) return;
        }
        last();
        await(thread, seat, turn);
    }

    template <class Body>
    void share(int thread, int items, int piece, Body body) {
        share(thread, items, piece, body, [] {});
    }

    // Inside run, on every thread: body() on the caller's, while the others wait.
    template <class Body>
    void first_alone(int thread, Body body) {
        Seat& seat = seat_of(thread);
        const uint32_t turn = seat.turn++;
        if (thread) return await(thread, seat, turn);
        body();
        if (count_ > 1) finish(turn, 1, 1);
    }

    // Whether the others are further than this thread, so that the phase which it would begin is over.
    bool is_late(int thread) { return count_ > 1 && is_over(seat_of(thread).turn); }

   private:
    static constexpr int PHASE_SPINS = 2000, IDLE_SPINS = 1000, SPINS_TO_ASIDE = 250;
    static constexpr int64_t ASIDE_EVERY = 100'000, LONG = 3'000'000;  // ticks: some 30 microseconds, and a millisecond
    struct Left {};

    // Where a thread is. Only the caller's takes it OUT of a step, and not while it is IN.
    enum Place : uint32_t {
        OUT,     // of the step, or of its own will
        CALLED,  // it may come
        IN,
        AWAY,    // off its core, or waiting: it touches nothing
    };

    struct alignas(64) Seat {
        std::atomic<uint32_t> start{0}, place{OUT};
        int index = 0;            // in the step at hand
        uint32_t turn = 0;        // the phase that comes next for it
        int64_t aside_after = 0;  // ticks
    };
    struct alignas(64) Claimed {
        std::atomic<uint64_t> items{0};  // of the phase in the upper half: none can be claimed for another
    };

    Seat& seat_of(int thread) { return seats_[taking_part_[thread]]; }

    bool is_over(uint32_t turn) const { return turn_.load(std::memory_order_acquire) != turn; }

    // First item of a piece of `owner`'s share, or -1.
    int claim(int owner, uint32_t turn, int first, int end, int piece) {
        std::atomic<uint64_t>& items = claimed_[owner].items;
        uint64_t now = items.load(std::memory_order_relaxed);
        while (uint32_t(now >> 32) == turn && first + int(uint32_t(now)) < end)
            if (items.compare_exchange_weak(now, now + piece, std::memory_order_acq_rel)) return first + int(uint32_t(now));
        return -1;
    }

    // `items` more of the phase's are done: the last of them end it.
    void finish(uint32_t turn, int items, int of) {
        if (done_.fetch_add(items, std::memory_order_acq_rel) + items < of) return;
        done_.store(0, std::memory_order_relaxed);
        for (Claimed& claimed : claimed_) claimed.items.store(uint64_t(turn + 1) << 32, std::memory_order_relaxed);
        // A full fence: with a plain store, notify_all may look for sleepers before the store is seen by one who is
        // about to sleep, and nobody ever wakes that thread.
        turn_.fetch_add(1, std::memory_order_seq_cst);
        turn_.notify_all();
    }

    void await(int thread, Seat& seat, uint32_t turn) {
        if (is_over(turn)) return;
        away(thread, seat, [&] {
            for (int spins = 0; !is_over(turn); spins++) {
                if (spins > PHASE_SPINS) return turn_.wait(turn, std::memory_order_acquire);
                if (spins % SPINS_TO_ASIDE == SPINS_TO_ASIDE - 1 && aside_is_due(seat)) step_aside(seat, thread == 0);
                pause_a_little();
            }
        });
    }

    // body() while nobody waits for this thread, and the step may end without it.
    template <class Body>
    void away(int thread, Seat& seat, Body body) {
        if (thread == 0) return body();
        seat.place.store(AWAY, std::memory_order_seq_cst);
        seat.place.notify_one();
        body();
        uint32_t place = AWAY;
        if (!seat.place.compare_exchange_strong(place, IN, std::memory_order_acq_rel)) throw Left{};
    }

    // Whether this thread has had its core to itself for a while.
    static bool aside_is_due(const Seat& seat) { return ticks() > seat.aside_after; }

    // Lets whatever else wants this core have it. The system would take it in the middle of a piece, for which the others
    // then wait. The caller's thread does not do so often beside those who want it for long: a step needs one that goes on.
    static void step_aside(Seat& seat, bool is_first) {
        const int64_t began = ticks();
        std::this_thread::yield();
        const int64_t ended = ticks(), took = ended - began;
        seat.aside_after = ended + std::max(ASIDE_EVERY, is_first ? (took > LONG ? 20 : 2) * took : 0);
    }

    // Ends this thread's part in the step; the others do what it has not claimed. The core is given first: once the
    // thread is out, the step may end and the next one borrow the core again.
    [[noreturn]] void leave(int thread) {
        cores_.give_early(taking_part_[thread]);
        throw Left{};
    }

    // Returns when the thread is out of the step: at once where it has not come, or is away.
    void dismiss(Seat& seat) {
        for (uint32_t place = seat.place.load(std::memory_order_acquire); place != OUT;) {
            if (place != IN) {
                if (seat.place.compare_exchange_strong(place, OUT, std::memory_order_acq_rel)) return;
                continue;
            }
            wait_while_equal(seat.place, IN, PHASE_SPINS);
            place = seat.place.load(std::memory_order_acquire);
        }
    }

    static void wake(Seat& seat) {
        seat.start.fetch_add(1, std::memory_order_seq_cst);
        seat.start.notify_one();
    }

    void work(int thread) {
        cores_.pin(thread);
        const int spins = thread < cores_.own() ? IDLE_SPINS : 0;  // on another's core none
        Seat& seat = seats_[thread];
        const CoreWait wait;
        int64_t waited_before = wait.ns();
        for (uint32_t seen = 0;;) {
            wait_while_equal(seat.start, seen, spins);
            if (stopping_) return;
            seen = seat.start.load(std::memory_order_acquire);
            uint32_t place = CALLED;
            if (!seat.place.compare_exchange_strong(place, IN, std::memory_order_acq_rel)) continue;
            const int64_t began = now_ns();
            try {
                (*body_)(seat.index);
            } catch (const Left&) {
            }
            place = IN;
            if (seat.place.compare_exchange_strong(place, OUT, std::memory_order_seq_cst)) seat.place.notify_one();
            const int64_t waited = wait.ns();
            cores_.note(thread, now_ns() - began, waited - waited_before);
            waited_before = waited;
        }
    }

    Cores& cores_;
    int count_ = 1;
    std::vector<int> taking_part_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int> done_{0};       // items of the phase at hand
    alignas(64) std::atomic<uint32_t> turn_{0};  // which phase it is
    std::vector<Seat> seats_;
    std::vector<Claimed> claimed_;  // of each share
    std::vector<std::thread> workers_;
};

}  // namespace pw

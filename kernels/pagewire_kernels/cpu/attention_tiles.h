// The two products of attention, queries times keys and weights times values, on the pages where they lie.

#pragma once

#include "kv_pages.h"

namespace pw {

template <int M, int V, class T>
__attribute__((noinline)) void attention_tile(bool more, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, const Ahead& ahead, float* c, int64_t ldc) {
    tile_float<M, V>(more, a, lda, b0, b1, ldb, steps, ahead, c, ldc);
}

constexpr Ahead NOTHING_AHEAD = {nullptr, nullptr, 0};

// c[rows][16 V] (+)= a b for any number of rows.
template <int V, class T>
inline void attention_product(bool more, int rows, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, const Ahead& ahead, float* c, int64_t ldc) {
    using Tile = void (*)(bool, const RowOf<T>*, int64_t, const T*, const T*, int64_t, int, const Ahead&, float*, int64_t);
#if defined(__AVX512F__)
    static constexpr Tile tiles[] = {attention_tile<1, V, T>, attention_tile<2, V, T>, attention_tile<3, V, T>, attention_tile<4, V, T>, attention_tile<5, V, T>, attention_tile<6, V, T>, attention_tile<7, V, T>, attention_tile<8, V, T>, attention_tile<9, V, T>, attention_tile<10, V, T>, attention_tile<11, V, T>, attention_tile<12, V, T>};
#elif defined(__AVX2__)
    static constexpr Tile tiles[] = {attention_tile<1, V, T>, attention_tile<2, V, T>, attention_tile<3, V, T>, attention_tile<4, V, T>, attention_tile<5, V, T>, attention_tile<6, V, T>};
#elif defined(__ARM_NEON)
    static constexpr Tile tiles[] = {attention_tile<1, V, T>, attention_tile<2, V, T>, attention_tile<3, V, T>};
#else
    static constexpr Tile tiles[] = {attention_tile<1, V, T>, attention_tile<2, V, T>};
#endif
    for (int row = 0; row < rows; row += ROWS) {
        int count = rows - row < ROWS ? rows - row : ROWS;
        tiles[count - 1](more, a + row * lda, lda, b0, b1, ldb, steps, row ? NOTHING_AHEAD : ahead, c + row * ldc, ldc);
    }
}

#if defined(__AMX_TILE__)
#include "attention_amx.h"
#endif

#if defined(__AVX512F__)

// So few rows do not keep the multipliers busy with two vectors of sums each: with four they do, and read a span at once.
// Every sum is made in the same order as by attention_product.
constexpr int FEW_QUERIES = 6;

// score[M][SPAN] = q times the keys of `pages`. Fetches as much of `next`.
template <int M, class T>
__attribute__((noinline)) void few_scores(const RowOf<T>* q, int64_t dim, const T* const* pages, const T* const* next, float* score) {
    F16 acc[M][PAGES];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < PAGES; v++) acc[m][v] = splat(0.0f);
    for (int64_t s = 0; s < dim / PAIR<T>; s++) {
        decltype(load_step(pages[0])) w[PAGES];
#pragma GCC unroll 4
        for (int v = 0; v < PAGES; v++) w[v] = load_step(pages[v] + s * PAGE * PAIR<T>), prefetch(next[v] + s * PAGE * PAIR<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < PAGES; v++) acc[m][v] = multiply(acc[m][v], w[v], q + m * dim + PAIR<T> * s);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < PAGES; v++) store(score + m * SPAN + v * PAGE, acc[m][v]);
}

// sum[M][dim] = sum * shrink + weight times the values of `tokens` in `pages`, in the 16 V dimensions from `d` on: sums stay
// in registers for the whole span. half: the last pair of tokens, the second of which does not count, where their number
// is odd. Fetches as much of `next`, if there is one.
template <int M, int V, class T>
__attribute__((noinline)) void span_values(const RowOf<T>* weight, int64_t dim, int64_t d, const T* const* pages, const T* const* next, int64_t tokens, const T* half, const float* shrink, float* sum) {
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = splat(0.0f);
    auto step = [&](const T* b, const RowOf<T>* x) __attribute__((always_inline)) {
        decltype(load_step(b)) w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) w[v] = load_step(b + v * 16 * PAIR<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = multiply(acc[m][v], w[v], x + m * SPAN);
    };
    for (int64_t at = 0; at < tokens; at += PAGE) {
        const T *b = pages[at / PAGE] + d * PAIR<T>, *fetched = next ? next[at / PAGE] + d * PAIR<T> : nullptr;
        const int64_t steps = (tokens - at < PAGE ? tokens - at : PAGE) / PAIR<T>;
        for (int64_t s = 0; s < steps; s++, b += dim * PAIR<T>) {
#pragma GCC unroll 4
            for (int v = 0; fetched && v < V; v++) prefetch(fetched + (s * dim + v * 16) * PAIR<T>);
            step(b, weight + at + s * PAIR<T>);
        }
    }
    if (tokens % PAIR<T>) step(half + d * PAIR<T>, weight + tokens - 1);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) {
            float* to = sum + m * dim + d + v * 16;
            store(to, fma(load(to), splat(shrink[m]), acc[m][v]));
        }
}

template <class T>
using FewScores = void (*)(const RowOf<T>*, int64_t, const T* const*, const T* const*, float*);
template <class T>
using SpanValues = void (*)(const RowOf<T>*, int64_t, int64_t, const T* const*, const T* const*, int64_t, const T*, const float*, float*);
template <class T>
constexpr FewScores<T> FEW_SCORES[] = {few_scores<1, T>, few_scores<2, T>, few_scores<3, T>, few_scores<4, T>, few_scores<5, T>, few_scores<6, T>};
template <class T>
constexpr SpanValues<T> FEW_VALUES[] = {span_values<1, 4, T>, span_values<2, 4, T>, span_values<3, 4, T>, span_values<4, 4, T>, span_values<5, 4, T>, span_values<6, 4, T>};
template <class T>
constexpr SpanValues<T> VALUES[] = {span_values<1, 2, T>, span_values<2, 2, T>, span_values<3, 2, T>, span_values<4, 2, T>, span_values<5, 2, T>, span_values<6, 2, T>, span_values<7, 2, T>, span_values<8, 2, T>, span_values<9, 2, T>, span_values<10, 2, T>, span_values<11, 2, T>, span_values<12, 2, T>};

#endif

}  // namespace pw

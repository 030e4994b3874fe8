// Linear layers over packed weights: y[row] = W x[row], any number of rows, from one to a whole prompt.
//
// Weights are packed in strips of 32 outputs, so that a strip is one contiguous stream:
//
//     F32   [N/32][K][2][16]             one k a step
//     BF16  [N/32][K/2][2][16][2]        two k a step (the operand of vdpbf16ps)
//     INT8  [N/32][K/4][2][16][4]        four k a step (vpdpbusd)
//     INT4  [N/32][K/8][2][16][4]        eight k a step: low nibbles hold k..k+3, high nibbles k+4..k+7, all + 8
//
// A tile keeps rows x 32 sums in registers and walks k once. Every output is one sum in ascending k, whatever the
// number of rows: a row's result does not depend on its batch.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "vec.h"

namespace pw {

// How rows of bf16 numbers are kept, and how they are written.
#if defined(__AVX2__) && !defined(__AVX512F__)
struct Wide {  // as float32: to widen them for every strip anew was half of a tile's instructions
    float value;
};
using Bf16Row = Wide;
PW_INLINE void put(Wide* p, F16 x) { store(&p->value, rounded_to_bf16(x)); }
inline void copy(Wide* to, const uint16_t* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i].value = bf16_to_float(from[i]);
}
#else
using Bf16Row = uint16_t;
#endif
template <class T>
using RowOf = std::conditional_t<sizeof(T) == 2, Bf16Row, T>;

PW_INLINE void put(float* p, F16 x) { store(p, x); }
PW_INLINE void put(uint16_t* p, F16 x) { store_bf16(p, x); }
template <class T>
inline void copy(T* to, const T* from, int64_t n) {
    std::memcpy(to, from, n * sizeof(T));
}

constexpr int STRIP = 32;

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT8_GROUPED = 3, INT4 = 4 };

struct Linear {
    int32_t kind;
    int32_t n, k;   // outputs (a multiple of 32 as packed), inputs (a multiple of the group or of 8 as packed)
    int32_t group;  // inputs that share a scale; grouped kinds only
    const uint8_t* weight;
    const float* scales;  // INT8: [n]; grouped: [n/32][k/group][32]
    const int32_t* sums;  // INT8: -128 * sum of each output's weights, [n]; grouped INT8: [n/32][k/group][32]
    const float* bias;    // [n] or null
};

// Rows as a layer reads them. One of these is filled, as the layer's kind wants.
struct Rows {
    const float* f32;
    const Bf16Row* bf16;
    const int8_t* int8;     // shifted by 128 (as unsigned) where SHIFTED and the kind is INT8*
    const float* scales;    // INT8: [rows]; grouped: [rows][k/group]
    const int32_t* sums;    // INT4: sum of each group's int8 values, [rows][k/group]
    int64_t stride;         // elements from row to row
    int64_t group_stride;   // scales (and sums) from row to row
};

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int ALONE_AHEAD = 1024;
#else
constexpr int ALONE_AHEAD = 8192;
#endif

PW_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// What a tile fetches while it computes: two cache lines a step, in two streams. Spread over the steps, so that memory
// is busy all the time and no load waits behind a burst. Functions that are called take it by reference: by value it is
// copied in one load of two members just written, which waits until every store before them has reached the cache.
struct Ahead {
    const char *p, *q;
    int64_t stride;  // 0: nothing
    PW_INLINE void operator()() { prefetch(p), prefetch(q), p += stride, q += stride; }
};

PW_INLINE uint32_t load32(const void* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// What sums of 16 outputs over int8 begin with: their `sums`, negative as packed, where rows are SHIFTED.
PW_INLINE I16 first_sums(const int32_t* sums) {
    I16 r = splat(int32_t(0));
    if (SHIFTED) std::memcpy(&r, sums, 64);
    return r;
}

// One step of a tile: one k of float rows, two of bf16 rows.
template <class T>
constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "tiles_avx2.h"
#else

PW_INLINE F16 load_step(const float* b) { return load(b); }
PW_INLINE Weights load_step(const uint16_t* b) { return load_weights(b); }
PW_INLINE F16 multiply(F16 acc, F16 w, const float* x) { return fma(w, splat(*x), acc); }
PW_INLINE F16 multiply(F16 acc, Weights w, const uint16_t* x) { return dot_bf16(acc, w, load32(x)); }

// c[M][16 V] = rows x (steps of b0, b1), on top of what c holds if `more`.
template <int M, int V, class T>
PW_INLINE void tile_float(bool more, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = more ? load(c + m * ldc + 16 * v) : splat(0.0f);
    for (int s = 0; s < steps; s++) {
        auto w0 = load_step(b0 + s * ldb), w1 = V > 1 ? load_step(b1 + s * ldb) : w0;
        if (ahead.stride) ahead();
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const T* x = a + m * lda + PAIR<T> * s;
            acc[m][0] = multiply(acc[m][0], w0, x);
            if (V > 1) acc[m][V - 1] = multiply(acc[m][V - 1], w1, x);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(c + m * ldc + 16 * v, acc[m][v]);
}

// Row scales and output scales over the whole of k.
template <int M>
PW_INLINE void tile_int8(const Linear& w, int strip, const Rows& x, int64_t row, Ahead ahead, float* c) {
    I16 acc[M][2];
    const uint8_t* b = w.weight + int64_t(strip) * w.k * STRIP;
    const int8_t* a = x.int8 + row * x.stride;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        acc[m][0] = first_sums(w.sums + strip * STRIP);
        acc[m][1] = first_sums(w.sums + strip * STRIP + 16);
    }
    for (int s = 0; s < w.k / 4; s++, b += 128) {
        Weights w0 = load_weights(b), w1 = load_weights(b + 64);
        ahead();
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            int32_t xs = int32_t(load32(a + m * x.stride + 4 * s));
            acc[m][0] = dot_int8(acc[m][0], w0, xs);
            acc[m][1] = dot_int8(acc[m][1], w1, xs);
        }
    }
    F16 scale0 = load(w.scales + strip * STRIP), scale1 = load(w.scales + strip * STRIP + 16);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
        F16 scale = splat(x.scales[row + m]);
        store(c + m * STRIP, to_float(acc[m][0]) * scale0 * scale);
        store(c + m * STRIP + 16, to_float(acc[m][1]) * scale1 * scale);
    }
}

// One scale for each group of inputs, of the row and of the output; sums of a group are exact integers.
template <int M, bool NIBBLES>
PW_INLINE void tile_grouped(const Linear& w, int strip, const Rows& x, int64_t row, Ahead ahead, float* c) {
    F16 acc[M][2];
    int groups = w.k / w.group, per_step = NIBBLES ? 8 : 4;
    const uint8_t* b = w.weight + int64_t(strip) * (w.k / per_step) * 128;
    const int8_t* a = x.int8 + row * x.stride;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = splat(0.0f);
    for (int g = 0; g < groups; g++) {
        I16 part[M][2];
        int64_t at = (int64_t(strip) * groups + g) * STRIP;
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            if (NIBBLES) {
                part[m][0] = part[m][1] = splat(int32_t(-8 * x.sums[(row + m) * x.group_stride + g]));
            } else {
                part[m][0] = first_sums(w.sums + at), part[m][1] = first_sums(w.sums + at + 16);
            }
        }
        for (int s = 0; s < w.group / per_step; s++, b += 128) {
            Weights w0 = load_weights(b), w1 = load_weights(b + 64);
            ahead();
            const int8_t* at_k = a + g * w.group + s * per_step;
            if (NIBBLES) {
                Weights l0 = low_nibbles(w0), l1 = low_nibbles(w1), h0 = high_nibbles(w0), h1 = high_nibbles(w1);
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    int32_t low = int32_t(load32(at_k + m * x.stride)), high = int32_t(load32(at_k + m * x.stride + 4));
                    part[m][0] = dot_nibbles(dot_nibbles(part[m][0], l0, low), h0, high);
                    part[m][1] = dot_nibbles(dot_nibbles(part[m][1], l1, low), h1, high);
                }
            } else {
#pragma GCC unroll 16
                for (int m = 0; m < M; m++) {
                    int32_t xs = int32_t(load32(at_k + m * x.stride));
                    part[m][0] = dot_int8(part[m][0], w0, xs);
                    part[m][1] = dot_int8(part[m][1], w1, xs);
                }
            }
        }
        F16 scale0 = load(w.scales + at), scale1 = load(w.scales + at + 16);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            F16 scale = splat(x.scales[(row + m) * x.group_stride + g]);
            acc[m][0] = fma(to_float(part[m][0]), scale0 * scale, acc[m][0]);
            acc[m][1] = fma(to_float(part[m][1]), scale1 * scale, acc[m][1]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) store(c + m * STRIP, acc[m][0]), store(c + m * STRIP + 16, acc[m][1]);
}

#endif

inline int64_t strip_bytes(const Linear& w) {
    static const int bits[] = {32, 16, 8, 8, 4};
    return int64_t(w.k) * STRIP * bits[w.kind] / 8;
}

#if defined(__AMX_TILE__)
#include "tiles_amx.h"
#else
constexpr int MATRIX_ROWS = 0;
PW_INLINE int parts_of_k(const Linear&, int64_t) { return 1; }
inline void begin_strip(const Linear&, int, int64_t) {}
PW_INLINE bool by_matrix(const Linear&, int64_t) { return false; }
inline void rest_matrix() {}
inline void tile_by_matrix(const Linear&, int, const Rows&, int64_t, int, int, int, const Ahead&, float*) {}
#endif

// At most, of `count`.
inline int rows_per_tile(const Linear& w, int64_t count) {
    if (by_matrix(w, count)) return MATRIX_ROWS;
    return w.kind <= BF16 ? ROWS : w.kind == INT8 ? ROWS_INT8 : ROWS_GROUPED;
}

template <int M>
__attribute__((noinline)) void tile_of(const Linear& w, int strip, const Rows& x, int64_t row, const Ahead& ahead, float* c) {
    if (w.kind == F32) {
        const float* b = (const float*)w.weight + int64_t(strip) * w.k * STRIP;
        return tile_float<M, 2>(false, x.f32 + row * x.stride, x.stride, b, b + 16, 32, w.k, ahead, c, STRIP);
    }
    if (w.kind == BF16) {
        const uint16_t* b = (const uint16_t*)w.weight + int64_t(strip) * w.k * STRIP;
        return tile_float<M, 2>(false, x.bf16 + row * x.stride, x.stride, b, b + 32, 64, w.k / 2, ahead, c, STRIP);
    }
    if constexpr (M <= ROWS_INT8)
        if (w.kind == INT8) return tile_int8<M>(w, strip, x, row, ahead, c);
    if constexpr (M <= ROWS_GROUPED) {
        if (w.kind == INT8_GROUPED) return tile_grouped<M, false>(w, strip, x, row, ahead, c);
        if (w.kind == INT4) return tile_grouped<M, true>(w, strip, x, row, ahead, c);
    }
    __builtin_unreachable();
}

// c[rows][32]: one strip for rows [row, row + rows) of `count`, rows <= rows_per_tile(w, count); of k the given part, on top
// of what c holds of the parts before it.
inline void tile(const Linear& w, int strip, const Rows& x, int64_t row, int rows, int count, int part, int parts, const Ahead& ahead, float* c) {
    if (by_matrix(w, count)) return tile_by_matrix(w, strip, x, row, rows, part, parts, ahead, c);
    using Tile = void (*)(const Linear&, int, const Rows&, int64_t, const Ahead&, float*);
#if defined(__AVX512F__)
    static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>, tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};
#elif defined(__AVX2__)
    static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>, tile_of<5>, tile_of<6>};
#elif defined(__ARM_NEON)
    static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>, tile_of<3>};
#else
    static constexpr Tile tiles[] = {tile_of<1>, tile_of<2>};
#endif
    tiles[rows - 1](w, strip, x, row, ahead, c);
}

// Rows that strip_times_rows is called with at most.
constexpr int BLOCK = 128;

// Calls done(row, rows, c) with c[rows][32] for every tile of a strip over `count` rows.
// The first tile takes the strip from memory; a single one fetches a little ahead of itself, and several share the
// fetching of the next strip, whose turn comes when the last is done.
template <class Done>
PW_INLINE void strip_times_rows(const Linear& w, int strip, const Rows& x, int64_t first, int count, Done done) {
    alignas(64) float sums[(MATRIX_ROWS ? BLOCK : ROWS) * STRIP];
    const int most = rows_per_tile(w, count), tiles = (count + most - 1) / most, parts = parts_of_k(w, count);
    const int64_t bytes = strip_bytes(w), bytes_per_step = 128;
    const char* at = (const char*)w.weight + strip * bytes;
    begin_strip(w, strip, count);
    for (int part = 0; part < parts; part++)
        for (int i = 0, row = 0; i < tiles; i++) {
            int rows = (count - row) / (tiles - i) + ((count - row) % (tiles - i) != 0);
            if (by_matrix(w, count)) rows = std::min(count - row, most);  // whole tiles, and one that is not
            const char* from = tiles == 1 ? at + ALONE_AHEAD : at + bytes + (part * tiles + i) * bytes / (parts * tiles);
            const Ahead ahead = {from, from + 64, tiles == 1 ? bytes_per_step : bytes_per_step / tiles + 1};
            float* c = sums + (parts > 1 ? row * STRIP : 0);
            tile(w, strip, x, first + row, rows, count, part, parts, ahead, c);
            if (part == parts - 1) done(first + row, rows, c);
            row += rows;
        }
}

}  // namespace pw

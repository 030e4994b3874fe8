// The tiles for AVX2, whose sixteen registers hold the sums of six rows and half a strip (16 outputs), two vectors of
// weights or rows, and little else. Of one or two rows they hold the whole strip's, and memory is read in one stream.
// Included by linear.h only. Every output is the same sum in the same order as there.

#pragma once

template <class T>
struct Even;  // the first k of a step, which of float32 weights is the only one
template <>
struct Even<float> {
    static PW_INLINE __m256 weight(const float* b) { return _mm256_loadu_ps(b); }
};
template <>
struct Even<uint16_t> {
    static PW_INLINE __m256 weight(const uint16_t* b) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)b), 16)); }
};
struct Odd {
    static PW_INLINE __m256 weight(const uint16_t* b) {
        return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)b), _mm256_set1_epi32(int32_t(0xffff0000))));
    }
};

// sum += w x, in its register: a compiler that is free to choose writes over w or x instead, and then has to keep sums
// in memory, which took half as long again.
PW_INLINE void add_product(__m256& sum, __m256 w, __m256 x) { asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(w), "x"(x)); }

template <int M, class Part, class T>
PW_INLINE void multiply_rows(F16 (&acc)[M], const float* a, int64_t lda, const T* b) {
    const __m256 w0 = Part::weight(b), w1 = Part::weight(b + 8 * PAIR<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const __m256 x = _mm256_broadcast_ss(a + m * lda);
        add_product(acc[m].a, w0, x);
        add_product(acc[m].b, w1, x);
    }
}

template <int M, class T>
PW_INLINE void half_float(bool more, const float* a, int64_t lda, const T* b, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    F16 acc[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) acc[m] = more ? load(c + m * ldc) : splat(0.0f);
    for (int s = 0; s < steps; s++, a += PAIR<T>, b += ldb) {
        if (ahead.stride) ahead();
        multiply_rows<M, Even<T>>(acc, a, lda, b);
        if constexpr (PAIR<T> == 2) {
            multiply_rows<M, Odd>(acc, a + 1, lda, b);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) store(c + m * ldc, acc[m]);
}

template <int M>
constexpr bool FEW = M <= 2;

template <int M, class T>
PW_INLINE void whole_float(bool more, const float* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    F16 low[M], high[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) low[m] = more ? load(c + m * ldc) : splat(0.0f), high[m] = more ? load(c + 16 + m * ldc) : splat(0.0f);
    for (int s = 0; s < steps; s++, a += PAIR<T>, b0 += ldb, b1 += ldb) {
        if (ahead.stride) ahead();
        multiply_rows<M, Even<T>>(low, a, lda, b0);
        multiply_rows<M, Even<T>>(high, a, lda, b1);
        if constexpr (PAIR<T> == 2) {
            multiply_rows<M, Odd>(low, a + 1, lda, b0);
            multiply_rows<M, Odd>(high, a + 1, lda, b1);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) store(c + m * ldc, low[m]), store(c + 16 + m * ldc, high[m]);
}

template <int M, int V, class T>
PW_INLINE void tile_float(bool more, const RowOf<T>* rows, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    const float* a = (const float*)rows;
    if constexpr (FEW<M> && V > 1) return whole_float<M>(more, a, lda, b0, b1, ldb, steps, ahead, c, ldc);
    half_float<M>(more, a, lda, b0, ldb, steps, ahead, c, ldc);
    if (V > 1) half_float<M>(more, a, lda, b1, ldb, steps, {nullptr, nullptr, 0}, c + 16, ldc);
}

#if defined(__AVXVNNI__)

// sum += four products for each of 8 outputs; u unsigned, s signed. As assembly for the same reason.
PW_INLINE void add_quads(__m256i& sum, __m256i u, __m256i s) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(s)); }

PW_INLINE __m256i quad(const int8_t* x) { return _mm256_set1_epi32(int32_t(load32(x))); }

// sums[M] += four k of rows, which are SHIFTED, x 16 outputs
template <int M>
PW_INLINE void step_int8(I16 (&sums)[M], const int8_t* a, int64_t lda, const uint8_t* b) {
    const __m256i w0 = _mm256_loadu_si256((const __m256i*)b), w1 = _mm256_loadu_si256((const __m256i*)b + 1);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const __m256i x = quad(a + m * lda);
        add_quads(sums[m].a, x, w0), add_quads(sums[m].b, x, w1);
    }
}

#else

// Four products for each of 8 outputs. Neither sums of two overflow, |w| <= 128 and |x| <= 127, nor x's sign: it is
// never -128.
PW_INLINE __m256i dot_int8_8(__m256i acc, __m256i w, __m256i magnitude, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// sums[M] += four k of rows x 16 outputs
template <int M>
PW_INLINE void step_int8(I16 (&sums)[M], const int8_t* a, int64_t lda, const uint8_t* b) {
    const __m256i w0 = _mm256_loadu_si256((const __m256i*)b), size0 = _mm256_abs_epi8(w0);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m].a = dot_int8_8(sums[m].a, w0, size0, _mm256_set1_epi32(int32_t(load32(a + m * lda))));
    const __m256i w1 = _mm256_loadu_si256((const __m256i*)b + 1), size1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m].b = dot_int8_8(sums[m].b, w1, size1, _mm256_set1_epi32(int32_t(load32(a + m * lda))));
}

#endif

// `parts` halves of a strip, the first of them being `half`.
template <int M, int PARTS>
PW_INLINE void part_int8(const Linear& w, int strip, int half, const Rows& x, int64_t row, Ahead ahead, float* c) {
    I16 sums[PARTS][M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
        for (int p = 0; p < PARTS; p++) sums[p][m] = first_sums(w.sums + strip * STRIP + 16 * (half + p));
    const uint8_t* b = w.weight + int64_t(strip) * w.k * STRIP + 64 * half;
    const int8_t* a = x.int8 + row * x.stride;
    for (int s = 0; s < w.k / 4; s++, a += 4, b += 128) {
        if (!half) ahead();
#pragma GCC unroll 2
        for (int p = 0; p < PARTS; p++) step_int8<M>(sums[p], a, x.stride, b + 64 * p);
    }
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; p++) {
        const int at = 16 * (half + p);
        const F16 scale = load(w.scales + strip * STRIP + at);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) store(c + m * STRIP + at, to_float(sums[p][m]) * scale * splat(x.scales[row + m]));
    }
}

template <int M>
PW_INLINE void tile_int8(const Linear& w, int strip, const Rows& x, int64_t row, Ahead ahead, float* c) {
    if constexpr (FEW<M>) return part_int8<M, 2>(w, strip, 0, x, row, ahead, c);
    part_int8<M, 1>(w, strip, 0, x, row, ahead, c);
    part_int8<M, 1>(w, strip, 1, x, row, ahead, c);
}

PW_INLINE __m256i nibbles(__m256i w, bool high) { return _mm256_and_si256(high ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15)); }

#if defined(__AVXVNNI__)

// sums[M] += 32 k of rows x 16 outputs
template <int M>
PW_INLINE void nibbles_32(I16 (&sums)[M], const int8_t* a, int64_t lda, const uint8_t* b) {
    for (int s = 0; s < 4; s++, a += 8, b += 128)
        for (int high = 0; high < 2; high++) {
            const __m256i w0 = nibbles(_mm256_loadu_si256((const __m256i*)b), high), w1 = nibbles(_mm256_loadu_si256((const __m256i*)b + 1), high);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const __m256i x = quad(a + m * lda + 4 * high);
                add_quads(sums[m].a, w0, x), add_quads(sums[m].b, w1, x);
            }
        }
}

#else

// sum += four products for each of 16 outputs, as sums of two. As assembly for the same reason.
PW_INLINE void add_pairs(I16& sum, __m256i w0, __m256i w1, const int8_t* x) {
    __m256i t, p;
    asm("vpbroadcastd %[x], %[t]\n\t"
        "vpmaddubsw %[t], %[w0], %[p]\n\t"
        "vpaddw %[p], %[a], %[a]\n\t"
        "vpmaddubsw %[t], %[w1], %[t]\n\t"
        "vpaddw %[t], %[b], %[b]"
        : [a] "+x"(sum.a), [b] "+x"(sum.b), [t] "=&x"(t), [p] "=&x"(p)
        : [x] "m"(*(const char(*)[4])x), [w0] "x"(w0), [w1] "x"(w1));
}

// sums[M] += 32 k of rows x 16 outputs, whose sums of nibbles fit 16 bits: at most 8 * 2 * 15 * 127.
template <int M>
PW_INLINE void nibbles_32(I16 (&sums)[M], const int8_t* a, int64_t lda, const uint8_t* b) {
    I16 pairs[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) pairs[m] = splat(int32_t(0));
    for (int s = 0; s < 4; s++, a += 8, b += 128)
        for (int high = 0; high < 2; high++) {
            const __m256i w0 = nibbles(_mm256_loadu_si256((const __m256i*)b), high), w1 = nibbles(_mm256_loadu_si256((const __m256i*)b + 1), high);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) add_pairs(pairs[m], w0, w1, a + m * lda + 4 * high);
        }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        sums[m].a = _mm256_add_epi32(sums[m].a, _mm256_madd_epi16(pairs[m].a, ones));
        sums[m].b = _mm256_add_epi32(sums[m].b, _mm256_madd_epi16(pairs[m].b, ones));
    }
}

#endif

// The float sums stay in `c`: they are touched once for each group.
template <int M, bool NIBBLES>
PW_INLINE void tile_grouped(const Linear& w, int strip, const Rows& x, int64_t row, Ahead ahead, float* c) {
    const int groups = w.k / w.group, bytes = w.group / (NIBBLES ? 8 : 4) * 128;  // of the whole strip's group
    for (int g = 0; g < groups; g++)
        for (int half = 0; half < 2; half++) {
            const uint8_t* b = w.weight + (int64_t(strip) * groups + g) * bytes + 64 * half;
            const int8_t* a = x.int8 + row * x.stride + g * w.group;
            I16 sums[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) sums[m] = NIBBLES ? splat(int32_t(-8 * x.sums[(row + m) * x.group_stride + g])) : first_sums(w.sums + (int64_t(strip) * groups + g) * STRIP + 16 * half);
            for (int i = 0; !half && i < bytes; i += 128) ahead();
            if (NIBBLES)
                for (int k = 0; k < w.group; k += 32) nibbles_32<M>(sums, a + k, x.stride, b + k / 8 * 128);
            else
                for (int k = 0; k < w.group; k += 4) step_int8<M>(sums, a + k, x.stride, b + k / 4 * 128);
            const F16 scale = load(w.scales + (int64_t(strip) * groups + g) * STRIP + 16 * half);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                float* out = c + m * STRIP + 16 * half;
                store(out, fma(to_float(sums[m]), scale * splat(x.scales[(row + m) * x.group_stride + g]), g ? load(out) : splat(0.0f)));
            }
        }
}

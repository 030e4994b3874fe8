// Sixteen float lanes on any CPU, and the three dot products that weights go through.
//
// One struct, F16, whatever the registers are: one zmm, two ymm, four NEON registers, or an array that is
// the portable fallback and the oracle of the tests. `ROWS` is the number of batch rows whose accumulators fit
// the register file beside two weight vectors.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PW_INLINE inline __attribute__((always_inline))

namespace pw {

constexpr int LANES = 16;

inline float bf16_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)

constexpr int ROWS = 12, ROWS_INT8 = 12, ROWS_GROUPED = 6;

struct F16 {
    __m512 v;
};
struct I16 {
    __m512i v;
};
struct Weights {  // 64 bytes of packed weights
    __m512i v;
};

PW_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PW_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
PW_INLINE F16 splat(float x) { return {_mm512_set1_ps(x)}; }
PW_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
PW_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PW_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PW_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
PW_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PW_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PW_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
PW_INLINE F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PW_INLINE F16 times_power_of_two(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
PW_INLINE float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
PW_INLINE float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
PW_INLINE bool any_nan(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q); }
PW_INLINE F16 load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
PW_INLINE __m256i to_bf16(F16 a) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#endif
}
PW_INLINE void store_bf16(uint16_t* p, F16 a) { _mm256_storeu_si256((__m256i*)p, to_bf16(a)); }
// Round to nearest, saturate to [-128, 127].
PW_INLINE void store_int8(int8_t* p, F16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v))); }
PW_INLINE F16 absolute(F16 a) { return {_mm512_abs_ps(a.v)}; }
// a where x >= least, else 0.
PW_INLINE F16 keep(F16 a, F16 x, float least) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least), _CMP_GE_OQ), a.v)}; }

PW_INLINE I16 splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
PW_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
PW_INLINE Weights load_weights(const void* p) { return {_mm512_loadu_si512(p)}; }
PW_INLINE Weights low_nibbles(Weights w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
PW_INLINE Weights high_nibbles(Weights w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }

// acc[lane] += w[lane][0] * x[0] + w[lane][1] * x[1]; x: two bf16.
PW_INLINE F16 dot_bf16(F16 acc, Weights w, uint32_t x) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32((int)x))};
#else
    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w.v, 16));
    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w.v, _mm512_set1_epi32((int)0xffff0000)));
    acc.v = _mm512_fmadd_ps(even, _mm512_castsi512_ps(_mm512_set1_epi32((int)(x << 16))), acc.v);
    return {_mm512_fmadd_ps(odd, _mm512_castsi512_ps(_mm512_set1_epi32((int)(x & 0xffff0000u))), acc.v)};
#endif
}
#if defined(__AVX512VNNI__)
// As assembly: around the intrinsic GCC 12 copies every accumulator, which halves the speed of a tile.
PW_INLINE I16 dot_bytes(I16 acc, __m512i u, __m512i s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u), "v"(s));
    return acc;
}
#endif
// acc[lane] += sum over 4 of u[lane][i] * s[i]; u unsigned (< 16: nibbles), s signed.
PW_INLINE I16 dot_nibbles(I16 acc, Weights u, int32_t s) {
#if defined(__AVX512VNNI__)
    return dot_bytes(acc, u.v, _mm512_set1_epi32(s));
#else
    __m512i pairs = _mm512_maddubs_epi16(u.v, _mm512_set1_epi32(s));  // |sum| <= 2 * 15 * 128: never saturates
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
// acc[lane] += sum over 4 of w[lane][i] * x[i]; both signed. SHIFTED: x is taken as unsigned x + 128, and the
// caller subtracts 128 * sum(w).
#if defined(__AVX512VNNI__)
constexpr bool SHIFTED = true;
PW_INLINE I16 dot_int8(I16 acc, Weights w, int32_t x) { return dot_bytes(acc, _mm512_set1_epi32(x), w.v); }
#else
constexpr bool SHIFTED = false;
PW_INLINE I16 dot_int8(I16 acc, Weights w, int32_t x) {
    // 16-bit products: sign-extended even and odd bytes, so that nothing saturates.
    __m512i xs = _mm512_set1_epi32(x);
    __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(w.v, 8), 8), _mm512_srai_epi16(_mm512_slli_epi16(xs, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(w.v, 8), _mm512_srai_epi16(xs, 8));
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}
#endif

#elif defined(__AVX2__)

constexpr int ROWS = 6, ROWS_INT8 = 6, ROWS_GROUPED = 6;  // with half a strip: tiles_avx2.h

struct F16 {
    __m256 a, b;
};
struct I16 {
    __m256i a, b;
};

PW_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PW_INLINE void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
PW_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PW_INLINE F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PW_INLINE F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PW_INLINE F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PW_INLINE F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PW_INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PW_INLINE F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PW_INLINE F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PW_INLINE __m256 round8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PW_INLINE F16 round(F16 x) { return {round8(x.a), round8(x.b)}; }
PW_INLINE __m256 power8(__m256 x, __m256 n) {  // n in [-126, 127]
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
PW_INLINE F16 times_power_of_two(F16 x, F16 n) { return {power8(x.a, n.a), power8(x.b, n.b)}; }
PW_INLINE F16 absolute(F16 x) {
    __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
PW_INLINE F16 keep(F16 a, F16 x, float least) {  // a where x >= least, else 0
    __m256 limit = _mm256_set1_ps(least);
    return {_mm256_and_ps(a.a, _mm256_cmp_ps(x.a, limit, _CMP_GE_OQ)), _mm256_and_ps(a.b, _mm256_cmp_ps(x.b, limit, _CMP_GE_OQ))};
}
PW_INLINE __m256 bf16_8(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
PW_INLINE F16 load_bf16(const uint16_t* p) { return {bf16_8(p), bf16_8(p + 8)}; }
PW_INLINE __m256i rounded_bf16_8(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
PW_INLINE void store_bf16(uint16_t* p, F16 x) {
    __m256i packed = _mm256_packus_epi32(rounded_bf16_8(x.a), rounded_bf16_8(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
PW_INLINE F16 rounded_to_bf16(F16 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(rounded_bf16_8(x.a), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bf16_8(x.b), 16))};
}
PW_INLINE void store_int8(int8_t* p, F16 x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

PW_INLINE I16 splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PW_INLINE F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
#if defined(__AVXVNNI__)
constexpr bool SHIFTED = true;
#else
constexpr bool SHIFTED = false;
#endif
PW_INLINE float sum(F16 x) {
    __m256 half = _mm256_add_ps(x.a, x.b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PW_INLINE float largest(F16 x) {
    __m256 half = _mm256_max_ps(x.a, x.b);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
PW_INLINE bool any_nan(F16 x, F16 y) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q)));
}

#else
#include "vec_portable.h"
#endif

// out[i] = the largest of x[i], for up to 16 of them; the rest of out[16] may be anything.
PW_INLINE void largest_of_each(const F16 (&x)[16], int count, float* out) {
#if defined(__AVX512F__)
    if (count == 16) {  // halves what is left to compare, four times, for all of them at once
        __m512 by8[8], by4[4], by2[2];
        for (int i = 0; i < 8; i++) by8[i] = _mm512_max_ps(_mm512_unpacklo_ps(x[i].v, x[i + 8].v), _mm512_unpackhi_ps(x[i].v, x[i + 8].v));
        for (int i = 0; i < 4; i++) by4[i] = _mm512_max_ps(_mm512_unpacklo_ps(by8[i], by8[i + 4]), _mm512_unpackhi_ps(by8[i], by8[i + 4]));
        for (int i = 0; i < 2; i++)
            by2[i] = _mm512_max_ps(_mm512_shuffle_f32x4(by4[i], by4[i + 2], 0x88), _mm512_shuffle_f32x4(by4[i], by4[i + 2], 0xdd));
        const __m512 all = _mm512_max_ps(_mm512_shuffle_f32x4(by2[0], by2[1], 0x88), _mm512_shuffle_f32x4(by2[0], by2[1], 0xdd));
        return _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), all));
    }
#endif
    for (int i = 0; i < count; i++) out[i] = largest(x[i]);
}

// One of each of 16 pairs of bf16 numbers; the others are not touched, as another thread may be writing them.
PW_INLINE void store_half_pairs(uint16_t* pairs, bool second, F16 a) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(to_bf16(a));
    if (second) _mm512_mask_storeu_epi16(pairs, 0xaaaaaaaa, _mm512_slli_epi32(wide, 16));
    else _mm512_mask_storeu_epi16(pairs, 0x55555555, wide);
#else
    uint16_t numbers[16];
    store_bf16(numbers, a);
    for (int i = 0; i < 16; i++) pairs[2 * i + second] = numbers[i];
#endif
}

constexpr float EXP_LEAST = -87.0f;  // below it e^x is no normal float, and exactly 0 here

// e^x for x <= 88, relative error below 2e-7. Cephes' reduction: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r.
PW_INLINE F16 exponential(F16 any) {
    F16 x = max(any, splat(EXP_LEAST));
    F16 n = round(x * splat(1.44269504088896341f));
    F16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return keep(times_power_of_two(p, n), any, EXP_LEAST);
}

// 2^x for x <= 127, relative error below 3e-6: for numbers that are rounded to bf16. Exactly 0 for x <= -150. The
// polynomial is the best one of its degree on [-0.5, 0.5] (relative error; Lawson's iteration).
PW_INLINE F16 power_of_two(F16 x) {
#if defined(__AVX512F__)
    x = max(splat(-1000.0f), x);  // in this order no number stays none
    F16 n = round(x), r = x - n;
    F16 p = splat(9.5701020637e-3f);
    p = fma(p, r, splat(5.5917863187e-2f));
    p = fma(p, r, splat(2.4024744849e-1f));
    p = fma(p, r, splat(6.9312181439e-1f));
    p = fma(p, r, splat(9.9999926143e-1f));
    return times_power_of_two(p, n);
#else
    return exponential(x * splat(0.69314718056f));
#endif
}

}  // namespace pw

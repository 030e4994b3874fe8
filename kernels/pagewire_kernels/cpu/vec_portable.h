// NEON, and the plain C++ that any other CPU runs and that the tests take for the truth. Included by vec.h only.

#if defined(__ARM_NEON) && defined(__aarch64__)

constexpr int ROWS = 3, ROWS_INT8 = 3, ROWS_GROUPED = 2;

struct F16 {
    float32x4_t v[4];
};
struct I16 {
    int32x4_t v[4];
};
struct Weights {
    uint8x16_t v[4];
};

#define PW_EACH(EXPRESSION)                                  \
    F16 r;                                                   \
    for (int i = 0; i < 4; i++) r.v[i] = (EXPRESSION);       \
    return r;

PW_INLINE F16 load(const float* p) { PW_EACH(vld1q_f32(p + 4 * i)) }
PW_INLINE void store(float* p, F16 a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
PW_INLINE F16 splat(float x) { PW_EACH(vdupq_n_f32(x)) }
PW_INLINE F16 operator+(F16 a, F16 b) { PW_EACH(vaddq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 operator-(F16 a, F16 b) { PW_EACH(vsubq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 operator*(F16 a, F16 b) { PW_EACH(vmulq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 operator/(F16 a, F16 b) { PW_EACH(vdivq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 fma(F16 a, F16 b, F16 c) { PW_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])) }
PW_INLINE F16 max(F16 a, F16 b) { PW_EACH(vmaxq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 min(F16 a, F16 b) { PW_EACH(vminq_f32(a.v[i], b.v[i])) }
PW_INLINE F16 round(F16 a) { PW_EACH(vrndnq_f32(a.v[i])) }
PW_INLINE F16 absolute(F16 a) { PW_EACH(vabsq_f32(a.v[i])) }
PW_INLINE F16 keep(F16 a, F16 x, float least) {  // a where x >= least, else 0
    PW_EACH(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v[i]), vcgeq_f32(x.v[i], vdupq_n_f32(least)))))
}
PW_INLINE F16 times_power_of_two(F16 a, F16 n) {
    PW_EACH(vmulq_f32(a.v[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23))))
}
PW_INLINE F16 load_bf16(const uint16_t* p) { PW_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))) }
PW_INLINE void store_bf16(uint16_t* p, F16 a) {
    for (int i = 0; i < 4; i++) {
        uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
        uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
    }
}
PW_INLINE void store_int8(int8_t* p, F16 a) {
    int16x8_t low = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.v[0])), vqmovn_s32(vcvtnq_s32_f32(a.v[1])));
    int16x8_t high = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.v[2])), vqmovn_s32(vcvtnq_s32_f32(a.v[3])));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
PW_INLINE float sum(F16 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
PW_INLINE float largest(F16 a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
PW_INLINE bool any_nan(F16 a, F16 b) {
    uint32x4_t numbers = vdupq_n_u32(~0u);
    for (int i = 0; i < 4; i++) numbers = vandq_u32(numbers, vandq_u32(vceqq_f32(a.v[i], a.v[i]), vceqq_f32(b.v[i], b.v[i])));
    return !vminvq_u32(numbers);
}

PW_INLINE I16 splat(int32_t x) {
    I16 r;
    for (int i = 0; i < 4; i++) r.v[i] = vdupq_n_s32(x);
    return r;
}
PW_INLINE F16 to_float(I16 a) { PW_EACH(vcvtq_f32_s32(a.v[i])) }
PW_INLINE Weights load_weights(const void* p) {
    Weights w;
    for (int i = 0; i < 4; i++) w.v[i] = vld1q_u8((const uint8_t*)p + 16 * i);
    return w;
}
PW_INLINE Weights low_nibbles(Weights w) {
    for (int i = 0; i < 4; i++) w.v[i] = vandq_u8(w.v[i], vdupq_n_u8(15));
    return w;
}
PW_INLINE Weights high_nibbles(Weights w) {
    for (int i = 0; i < 4; i++) w.v[i] = vshrq_n_u8(w.v[i], 4);
    return w;
}
PW_INLINE F16 dot_bf16(F16 acc, Weights w, uint32_t x) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const bfloat16x8_t pair = vreinterpretq_bf16_u32(vdupq_n_u32(x));
    for (int i = 0; i < 4; i++) acc.v[i] = vbfdotq_f32(acc.v[i], vreinterpretq_bf16_u8(w.v[i]), pair);
#else
    float32x4_t even = vreinterpretq_f32_u32(vdupq_n_u32(x << 16)), odd = vreinterpretq_f32_u32(vdupq_n_u32(x & 0xffff0000u));
    for (int i = 0; i < 4; i++) {
        uint32x4_t pair = vreinterpretq_u32_u8(w.v[i]);
        acc.v[i] = vfmaq_f32(acc.v[i], vreinterpretq_f32_u32(vshlq_n_u32(pair, 16)), even);
        acc.v[i] = vfmaq_f32(acc.v[i], vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u))), odd);
    }
#endif
    return acc;
}
PW_INLINE int32x4_t dot_quads(int32x4_t acc, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, a, b);
#else
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
PW_INLINE I16 dot_nibbles(I16 acc, Weights u, int32_t s) {
    int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(s));
    for (int i = 0; i < 4; i++) acc.v[i] = dot_quads(acc.v[i], vreinterpretq_s8_u8(u.v[i]), x);
    return acc;
}
constexpr bool SHIFTED = false;
PW_INLINE I16 dot_int8(I16 acc, Weights w, int32_t x) { return dot_nibbles(acc, w, x); }

#undef PW_EACH

#else

constexpr int ROWS = 2, ROWS_INT8 = 2, ROWS_GROUPED = 2;

struct F16 {
    float v[16];
};
struct I16 {
    int32_t v[16];
};
struct Weights {
    uint8_t v[64];
};

#define PW_EACH(EXPRESSION)                                   \
    F16 r;                                                    \
    for (int i = 0; i < 16; i++) r.v[i] = (EXPRESSION);       \
    return r;

PW_INLINE F16 load(const float* p) { PW_EACH(p[i]) }
PW_INLINE void store(float* p, F16 a) { std::memcpy(p, a.v, 64); }
PW_INLINE F16 splat(float x) { PW_EACH(x) }
PW_INLINE F16 operator+(F16 a, F16 b) { PW_EACH(a.v[i] + b.v[i]) }
PW_INLINE F16 operator-(F16 a, F16 b) { PW_EACH(a.v[i] - b.v[i]) }
PW_INLINE F16 operator*(F16 a, F16 b) { PW_EACH(a.v[i] * b.v[i]) }
PW_INLINE F16 operator/(F16 a, F16 b) { PW_EACH(a.v[i] / b.v[i]) }
PW_INLINE F16 fma(F16 a, F16 b, F16 c) { PW_EACH(a.v[i] * b.v[i] + c.v[i]) }
PW_INLINE F16 max(F16 a, F16 b) { PW_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
PW_INLINE F16 min(F16 a, F16 b) { PW_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
PW_INLINE F16 round(F16 a) { PW_EACH(std::nearbyint(a.v[i])) }
PW_INLINE F16 absolute(F16 a) { PW_EACH(std::fabs(a.v[i])) }
PW_INLINE F16 keep(F16 a, F16 x, float least) { PW_EACH(x.v[i] >= least ? a.v[i] : 0.0f) }
PW_INLINE F16 times_power_of_two(F16 a, F16 n) { PW_EACH(std::ldexp(a.v[i], int(n.v[i]))) }
PW_INLINE F16 load_bf16(const uint16_t* p) { PW_EACH(bf16_to_float(p[i])) }
PW_INLINE void store_bf16(uint16_t* p, F16 a) {
    for (int i = 0; i < 16; i++) p[i] = float_to_bf16(a.v[i]);
}
PW_INLINE void store_int8(int8_t* p, F16 a) {
    for (int i = 0; i < 16; i++) p[i] = int8_t(std::fmax(-128.0f, std::fmin(127.0f, std::nearbyint(a.v[i]))));
}
PW_INLINE float sum(F16 a) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += a.v[i];
    return total;
}
PW_INLINE float largest(F16 a) {
    float most = a.v[0];
    for (int i = 1; i < 16; i++) most = a.v[i] > most ? a.v[i] : most;
    return most;
}
PW_INLINE bool any_nan(F16 a, F16 b) {
    bool found = false;
    for (int i = 0; i < 16; i++) found |= a.v[i] != a.v[i] || b.v[i] != b.v[i];
    return found;
}
PW_INLINE I16 splat(int32_t x) {
    I16 r;
    for (int i = 0; i < 16; i++) r.v[i] = x;
    return r;
}
PW_INLINE F16 to_float(I16 a) { PW_EACH(float(a.v[i])) }
PW_INLINE Weights load_weights(const void* p) {
    Weights w;
    std::memcpy(w.v, p, 64);
    return w;
}
PW_INLINE Weights low_nibbles(Weights w) {
    for (int i = 0; i < 64; i++) w.v[i] &= 15;
    return w;
}
PW_INLINE Weights high_nibbles(Weights w) {
    for (int i = 0; i < 64; i++) w.v[i] >>= 4;
    return w;
}
PW_INLINE F16 dot_bf16(F16 acc, Weights w, uint32_t x) {
    uint16_t pairs[32];
    std::memcpy(pairs, w.v, 64);
    for (int i = 0; i < 16; i++)
        acc.v[i] += bf16_to_float(pairs[2 * i]) * bf16_to_float(uint16_t(x)) + bf16_to_float(pairs[2 * i + 1]) * bf16_to_float(uint16_t(x >> 16));
    return acc;
}
PW_INLINE I16 dot_int8(I16 acc, Weights w, int32_t x) {
    for (int i = 0; i < 64; i++) acc.v[i / 4] += int32_t(int8_t(w.v[i])) * int8_t(uint32_t(x) >> (8 * (i % 4)));
    return acc;
}
PW_INLINE I16 dot_nibbles(I16 acc, Weights u, int32_t s) { return dot_int8(acc, u, s); }
constexpr bool SHIFTED = false;

#undef PW_EACH
#endif

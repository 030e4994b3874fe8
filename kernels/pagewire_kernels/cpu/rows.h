// What happens to rows between the linear layers: RMS norm, quantisation, rotary embedding.

#pragma once

#include "linear.h"

namespace pw {

// Sum of squares in a fixed order. n a multiple of 16.
PW_INLINE float mean_square(const float* x, int n) {
    F16 sums = splat(0.0f);
    for (int i = 0; i < n; i += 16) {
        F16 v = load(x + i);
        sums = fma(v, v, sums);
    }
    return sum(sums) / float(n);
}

// out = x / rms(x) * weight
PW_INLINE void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    F16 inverse = splat(1.0f / std::sqrt(mean_square(x, n) + eps));
    for (int i = 0; i < n; i += 16) store(out + i, load(x + i) * inverse * load(weight + i));
}

// The form in which a linear layer of `kind` reads its rows, with room for `capacity` rows.
struct RowBuffer {
    int kind = F32;
    int64_t stride = 0, groups = 0;
    int group = 0;
    float* f32 = nullptr;
    Bf16Row* bf16 = nullptr;
    int8_t* int8 = nullptr;
    float* scales = nullptr;
    int32_t* sums = nullptr;

    Rows rows() const { return {f32, bf16, int8, scales, sums, stride, groups}; }
};

PW_INLINE float largest_absolute(const float* x, int64_t n) {
    F16 most = splat(0.0f);
    for (int64_t i = 0; i < n; i += 16) most = max(most, absolute(load(x + i)));
    return largest(most);
}

// Symmetric int8: x is about scale * q. n a multiple of 16.
PW_INLINE float quantize(const float* x, int64_t n, int8_t* q) {
    float most = largest_absolute(x, n);
    F16 inverse = splat(most > 0 ? 127.0f / most : 0.0f);
    for (int64_t i = 0; i < n; i += 16) store_int8(q + i, load(x + i) * inverse);
    return most / 127.0f;
}

PW_INLINE int32_t sum_of(const int8_t* q, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += q[i];
    return total;
}

// Unsigned q + 128 for the instruction that multiplies unsigned by signed.
PW_INLINE void shift(int8_t* q, int64_t n) {
    for (int64_t i = 0; i < n; i++) q[i] = int8_t(uint8_t(q[i]) ^ 0x80);
}

// Row `row` of the buffer := x[0..n), zeros up to the stride. x has room for the stride, which is a multiple of 16.
inline void put_row(const RowBuffer& b, int64_t row, float* x, int64_t n) {
    for (int64_t i = n; i < b.stride; i++) x[i] = 0.0f;
    if (b.kind == F32) {
        std::memcpy(b.f32 + row * b.stride, x, b.stride * sizeof(float));
    } else if (b.kind == BF16) {
        for (int64_t i = 0; i < b.stride; i += 16) put(b.bf16 + row * b.stride + i, load(x + i));
    } else if (b.kind == INT8) {
        int8_t* q = b.int8 + row * b.stride;
        b.scales[row] = quantize(x, b.stride, q);
        if (SHIFTED) shift(q, b.stride);
    } else {
        for (int64_t g = 0; g < b.groups; g++) {
            int8_t* q = b.int8 + row * b.stride + g * b.group;
            b.scales[row * b.groups + g] = quantize(x + g * b.group, b.group, q);
            if (b.kind == INT4) b.sums[row * b.groups + g] = sum_of(q, b.group);
            if (b.kind == INT8_GROUPED && SHIFTED) shift(q, b.group);
        }
    }
}

// Rotates the two halves of a head (GPT-NeoX order). cos_sin: [D/2] cosines, then [D/2] sines.
inline void rotate(float* head, const float* cos_sin, int64_t dim) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos_sin[i] - b * cos_sin[half + i];
        head[half + i] = b * cos_sin[i] + a * cos_sin[half + i];
    }
}

}  // namespace pw

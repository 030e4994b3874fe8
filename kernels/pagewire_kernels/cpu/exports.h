// The C interface: what Python calls through ctypes. Included once, by step.cpp.

#pragma once

#include <sys/mman.h>

#include <chrono>
#include <cstdlib>

// Which row of w [n][k] row `row` of the packed form is; -1: padding. Strips have 32 outputs; see linear.h. `interleave`: n is two halves
// (gate, up) that go into a strip 16 by 16; each half has n / 2 rows, padded to `half` with zeros.
static inline int64_t pw_source(int64_t n, int64_t half, int64_t row) {
    if (!half) return row < n ? row : -1;
    int64_t strip = row / 32, lane = row % 32, in_half = strip * 16 + lane % 16;
    if (in_half >= n / 2) return -1;
    return lane < 16 ? in_half : n / 2 + in_half;
}

// Rows of `w` that make up a strip; null where it is padding.
template <class T>
static inline void pw_strip(const T* w, int64_t n, int64_t k, int64_t half, int64_t strip, const T** rows) {
    for (int64_t lane = 0; lane < 32; lane++) {
        int64_t from = pw_source(n, half, strip * 32 + lane);
        rows[lane] = from >= 0 ? w + from * k : nullptr;
    }
}

// Groups of `step` inputs of each of the 32 rows, side by side.
template <int STEP, class T>
static inline void pw_weave(const T** rows, int64_t k, int64_t packed_k, T* out) {
    const int64_t whole = std::find(rows, rows + 32, nullptr) == rows + 32 ? k / STEP * STEP : 0;
    for (int64_t i = 0; i < whole; i += STEP)
        for (int64_t lane = 0; lane < 32; lane++, out += STEP) std::memcpy(out, rows[lane] + i, STEP * sizeof(T));
    for (int64_t i = whole; i < packed_k; i += STEP)
        for (int64_t lane = 0; lane < 32; lane++)
            for (int64_t j = i; j < i + STEP; j++) *out++ = rows[lane] && j < k ? rows[lane][j] : T(0);
}

// Scales [n][k / group] -> [n / 32][k / group][32], zeros for padding.
static inline void pw_pack_scales(const float* scales, int64_t n, int64_t packed_n, int64_t half, int64_t source_groups, int64_t groups, float* out) {
    for (int64_t strip = 0; strip < packed_n / 32; strip++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t lane = 0; lane < 32; lane++) {
                int64_t from = pw_source(n, half, strip * 32 + lane);
                *out++ = from >= 0 && g < source_groups ? scales[from * source_groups + g] : 0.0f;
            }
}

// Only these are visible: two variants in one process must not share their inline functions.
#pragma GCC visibility push(default)
extern "C" {

// Increased whenever a structure or a packed layout changes.
int pw_abi() { return 8; }

// lines: null, or pw_core_lines_bytes() of memory that begins as zeros and that all workers of the host share.
void* pw_cores(int own, const int32_t* numbers, int count, void* lines) { return new pw::Cores(own, numbers, count, (pw::CoreLine*)lines); }
void pw_cores_free(void* cores) { delete (pw::Cores*)cores; }
void pw_cores_rest(void* cores) { ((pw::Cores*)cores)->rest(); }
int64_t pw_cores_borrowed(void* cores) { return ((pw::Cores*)cores)->borrowed(); }
int64_t pw_cores_returned(void* cores) { return ((pw::Cores*)cores)->returned(); }
int64_t pw_core_lines_bytes() { return pw::MOST_CORES * sizeof(pw::CoreLine); }

void* pw_runner(void* cores, int64_t small_step) { return new pw::Runner(*(pw::Cores*)cores, small_step); }
void pw_runner_free(void* runner) { delete (pw::Runner*)runner; }
int pw_step(void* runner, const pw::Model* model, const pw::Batch* batch) { return ((pw::Runner*)runner)->step(*model, *batch); }

// Asks for huge pages where the system has them: weights and pages of KV are walked through once a step, and every
// 4 KiB of them would cost a walk of the page table.
void pw_use_huge_pages(void* p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2 << 20, begin = (uintptr_t(p) + huge - 1) / huge * huge, end = (uintptr_t(p) + bytes) / huge * huge;
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Has the system provide the pages of [p, p + bytes), whatever others write there meanwhile.
void pw_touch(void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 4096) __atomic_fetch_or((uint8_t*)p + i, 0, __ATOMIC_RELAXED);
}

// Memory for weights.
void* pw_allocate(int64_t bytes) {
    const int64_t huge = 2 << 20, whole = (bytes + huge - 1) / huge * huge;
    void* p = std::aligned_alloc(huge, whole);
    if (p) pw_use_huge_pages(p, whole);
    return p;
}
void pw_release(void* p) { std::free(p); }

void pw_pack_f32(const float* w, int64_t n, int64_t k, int64_t packed_n, int64_t packed_k, int64_t half, float* out) {
    const float* rows[32];
    for (int64_t strip = 0; strip < packed_n / 32; strip++) {
        pw_strip(w, n, k, half, strip, rows);
        pw_weave<1>(rows, k, packed_k, out + strip * 32 * packed_k);
    }
}

void pw_pack_bf16(const uint16_t* w, int64_t n, int64_t k, int64_t packed_n, int64_t packed_k, int64_t half, uint16_t* out) {
    const uint16_t* rows[32];
    for (int64_t strip = 0; strip < packed_n / 32; strip++) {
        pw_strip(w, n, k, half, strip, rows);
        pw_weave<2>(rows, k, packed_k, out + strip * 32 * packed_k);
    }
}

// group 0: one scale a row. out_sums holds -128 * the sum of each group's weights.
void pw_pack_int8(const int8_t* w, const float* scales, int64_t n, int64_t k, int64_t packed_n, int64_t packed_k, int64_t half, int64_t group,
                  int8_t* out, float* out_scales, int32_t* out_sums) {
    const int64_t width = group ? group : packed_k, groups = packed_k / width;
    const int8_t* rows[32];
    for (int64_t strip = 0; strip < packed_n / 32; strip++) {
        pw_strip(w, n, k, half, strip, rows);
        pw_weave<4>(rows, k, packed_k, out + strip * 32 * packed_k);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t lane = 0; lane < 32; lane++) {
                int32_t sum = 0;
                for (int64_t i = g * width; rows[lane] && i < std::min((g + 1) * width, k); i++) sum += rows[lane][i];
                *out_sums++ = -128 * sum;
            }
    }
    pw_pack_scales(scales, n, packed_n, half, group ? (k + group - 1) / group : 1, groups, out_scales);
}

// Values in [-8, 7], one a byte -> nibbles.
void pw_pack_int4(const int8_t* w, const float* scales, int64_t n, int64_t k, int64_t packed_n, int64_t packed_k, int64_t half, int64_t group,
                  uint8_t* out, float* out_scales) {
    const int8_t* rows[32];
    for (int64_t strip = 0; strip < packed_n / 32; strip++) {
        pw_strip(w, n, k, half, strip, rows);
        for (int64_t i = 0; i < packed_k; i += 8)
            for (int64_t lane = 0; lane < 32; lane++)
                for (int64_t j = i; j < i + 4; j++) {
                    auto nibble = [&](int64_t at) { return uint8_t((rows[lane] && at < k ? rows[lane][at] : 0) + 8); };
                    *out++ = uint8_t(nibble(j) | nibble(j + 4) << 4);
                }
    }
    pw_pack_scales(scales, n, packed_n, half, (k + group - 1) / group, packed_k / group, out_scales);
}

// See kv_move.h. to_wire 1: cache -> wire, 0: wire -> cache. checksum: of the wire's bytes, xxh3.h, or null; they must be
// enough for it.
void pw_move_kv(const pw::Model* m, const int64_t* slots, int64_t tokens, int32_t first, int32_t last, uint8_t* wire, int64_t bytes,
                int32_t to_wire, uint64_t* checksum) {
    pw::Xxh3 sum(wire, bytes);
    pw::Xxh3* const wanted = checksum ? &sum : nullptr;
    to_wire ? pw::move_kv<true>(*m, slots, tokens, first, last, wire, wanted) : pw::move_kv<false>(*m, slots, tokens, first, last, wire, wanted);
    if (checksum) *checksum = sum.digest();
}

// ---------------------------------------------------------------- physical limits, for benchmarks

// Bytes per second that the threads read from `bytes` of memory, best of `rounds`.
double pw_read_bandwidth(void* runner, const uint8_t* data, int64_t bytes, int rounds) {
    using namespace pw;
    double best = 0;
    std::vector<float> kept(((Runner*)runner)->threads().most());
    for (int round = 0; round < rounds; round++) {
        auto started = std::chrono::steady_clock::now();
        Threads& threads = ((Runner*)runner)->threads();
        const int64_t piece = 1 << 20;
        threads.run([&](int thread) {
            threads.share(thread, int(bytes / piece), 4, [&](int begin, int end) {
                F16 a = splat(0.0f), b = a, c = a, d = a;
                const float* p = (const float*)(data + begin * piece);
                for (int64_t i = 0; i < (end - begin) * piece / 4; i += 64)
                    a = max(a, load(p + i)), b = max(b, load(p + i + 16)), c = max(c, load(p + i + 32)), d = max(d, load(p + i + 48));
                kept[thread] = largest(max(max(a, b), max(c, d)));
            });
        });
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        best = std::max(best, double(bytes) / seconds);
    }
    return best;
}

// Multiplications and additions per second of the tile of `kind` on operands in the first-level cache.
double pw_peak(void* runner, int kind, int rounds) {
    using namespace pw;
    const int k = 256, rows = rows_per_tile({kind, STRIP, k, 64, nullptr, nullptr, nullptr, nullptr}, 64), repeats = 2000;
    Threads& threads = ((Runner*)runner)->threads();
    double best = 0;
    for (int round = 0; round < rounds; round++) {
        auto started = std::chrono::steady_clock::now();
        threads.run([&](int thread) {
            std::vector<float> weight(STRIP * k, 0.0f), x(rows * k, 0.0f), scales(STRIP * k, 1.0f), c(rows * STRIP);
            std::vector<int32_t> sums(STRIP * k, 0);
            Linear w = {kind, STRIP, k, 64, (uint8_t*)weight.data(), scales.data(), sums.data(), nullptr};
            Rows r = {x.data(), (Bf16Row*)x.data(), (int8_t*)x.data(), scales.data(), sums.data(), k, k / 64};
            begin_strip(w, 0, 64);
            threads.share(thread, repeats * threads.count(), repeats / 100, [&](int begin, int end) {
                for (int i = begin; i < end; i++) tile(w, 0, r, 0, rows, 64, 0, 1, {nullptr, nullptr, 0}, c.data());
            });
            rest_matrix();
        });
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        best = std::max(best, 2.0 * STRIP * k * rows * repeats * threads.count() / seconds);
    }
    return best;
}

const char* pw_variant() {
#if defined(__AMX_TILE__)
    return "amx";
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    return "avx512-bf16-vnni";
#elif defined(__AVX512VNNI__)
    return "avx512-vnni";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__AVXVNNI__)
    return "avx2-vnni";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "neon-bf16";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "portable";
#endif
}

}  // extern "C"
#pragma GCC visibility pop

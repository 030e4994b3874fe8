// Tiles of the matrix unit (AMX): up to 32 rows times the 32 outputs of a strip, in four tiles of 16 x 16 sums. Where
// groups have scales, 16 rows times 16 outputs: the unit makes the integers of a group, vectors scale and add them.
//
// The packed weights are its second operand as they lie: a row of one holds what 16 outputs take of two k (bf16) or of
// four (int8), and the next lies 128 bytes on. One instruction takes 32 k of bf16, or 64 of int8, of 16 rows. It adds
// the products of those 32 to each other before it adds them to the sum, so that a row alone goes the same way as many.

constexpr int MATRIX_ROWS = 32;

// Linux gives a process the unit's registers when it asks; all its threads, and those it forks, have them then.
__attribute__((constructor)) static void ask_for_matrix() { syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

// Sums of integers are exact, so that few rows may go the other way, where that is faster. Those of bf16 go this one,
// whatever their number.
constexpr int LEAST_INT8 = 16, LEAST_GROUPED = 48;
PW_INLINE bool by_matrix(const Linear& w, int64_t rows) {
    if (w.kind == BF16) return w.k % 32 == 0;
    if (w.kind == INT8) return w.k % 64 == 0 && rows >= LEAST_INT8;
    return w.kind >= INT8_GROUPED && w.group % 32 == 0 && rows >= LEAST_GROUPED;
}

// What the eight tiles of this thread are; see its uses. A change clears them.
inline thread_local int matrix_shape = 0;

inline void shape_matrix(int shape, const int (&rows)[8], const int (&bytes)[8]) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } tiles;
    for (int t = 0; t < 8; t++) tiles.rows[t] = uint8_t(rows[t]), tiles.bytes[t] = uint16_t(rows[t] ? bytes[t] : 0);
    asm volatile("ldtilecfg %0" ::"m"(tiles));  // GCC 12's intrinsic names eight bytes of it only
    matrix_shape = shape;
}

// For `rows` times a strip: sums of two times sixteen rows and outputs, rows, weights.
inline void shape_for_strip(int rows) {
    if (matrix_shape == rows) return;
    const int first = rows < 16 ? rows : 16, second = rows - first;
    shape_matrix(rows, {first, first, second, second, first, second, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64});
}

// For attention of up to 16 rows: sums of four pages or of 64 dimensions; queries, keys, weights, values.
inline void shape_for_attention(int rows) {
    if (matrix_shape == -rows) return;
    shape_matrix(-rows, {rows, rows, rows, rows, rows, 16, rows, 8}, {64, 64, 64, 64, 64, 64, 32, 64});
}

// Registers of 8 KiB that the next thread on this core need not have saved for it.
inline void rest_matrix() {
    if (matrix_shape) _tile_release();
    matrix_shape = 0;
}

// What was written is in memory: the intrinsics that load a tile do not tell the compiler that they read.
PW_INLINE void written() { asm volatile("" ::: "memory"); }

// c[rows][32] = rows x (steps of 2048 bytes of b), on top of what c holds if `more`. Fetches `per_step` bytes a step.
template <bool WHOLE, bool BYTES>
PW_INLINE void matrix_product(bool more, int rows, const char* a, int64_t lda, const char* b, int steps, const char* fetched, int64_t per_step, float* c) {
    const char* a1 = a + 16 * lda;
    float *c1 = c + 16, *c2 = c + 16 * STRIP, *c3 = c2 + 16;
    const int64_t ldc = STRIP * sizeof(float);
    shape_for_strip(rows);
    written();
    if (more) {
        _tile_loadd(0, c, ldc);
        _tile_loadd(1, c1, ldc);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if constexpr (WHOLE) {
        if (more) {
            _tile_loadd(2, c2, ldc);
            _tile_loadd(3, c3, ldc);
        } else {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int s = 0; s < steps; s++, a += 64, a1 += 64, b += 2048) {
        for (const char* end = fetched + per_step; fetched < end; fetched += 64) prefetch(fetched);
        _tile_loadd(4, a, lda);
        _tile_loadd(6, b, 128);
        if constexpr (BYTES) {
            _tile_dpbusd(0, 4, 6);
        } else {
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_loadd(7, b + 64, 128);
        if constexpr (BYTES) {
            _tile_dpbusd(1, 4, 7);
        } else {
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (WHOLE) {
            _tile_loadd(5, a1, lda);
            if constexpr (BYTES) {
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            } else {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, c, ldc);
    _tile_stored(1, c1, ldc);
    if (WHOLE) {
        _tile_stored(2, c2, ldc);
        _tile_stored(3, c3, ldc);
    }
}

// How many parts k of bf16 is divided into for `rows`: one part of a strip stays in the first-level cache beside a tile's
// rows while all tiles go over it, where the whole strip would come from the second level for each. Not where rows are
// so long that those of a block lie in more pages than there are translations at hand.
constexpr int STEPS_OF_PART = 9, MOST_IN_PARTS = 2048;
PW_INLINE int parts_of_k(const Linear& w, int64_t rows) {
    return w.kind == BF16 && w.k % 32 == 0 && rows > MATRIX_ROWS && w.k <= MOST_IN_PARTS ? (w.k / 32 + STEPS_OF_PART - 1) / STEPS_OF_PART : 1;
}

template <bool BYTES>
PW_INLINE void matrix_rows_times(bool more, int rows, const char* a, int64_t lda, const char* b, int steps, const Ahead& ahead, float* c) {
    const int64_t per_step = (ahead.stride * 16 + 63) / 64 * 64;
    if (rows > 16) {
        matrix_product<true, BYTES>(more, rows, a, lda, b, steps, ahead.p, per_step, c);
    } else {
        matrix_product<false, BYTES>(more, rows, a, lda, b, steps, ahead.p, per_step, c);
    }
}

// As the unit does it, for so few rows that memory is what they wait for, which vectors keep busier: the products of even
// and of odd k are summed each, in 16 steps from zero, and both added to the sum.
template <int M>
PW_INLINE void few_rows_times(const uint16_t* a, int64_t lda, const char* b, int steps, Ahead ahead, float* c) {
    F16 acc[M][2];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = splat(0.0f);
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    for (int s = 0; s < steps; s++, a += 32) {
        F16 even[M][2], odd[M][2];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) even[m][0] = even[m][1] = odd[m][0] = odd[m][1] = splat(0.0f);
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; pair++, b += 128) {
            const __m512i w[2] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 64)};
            if (ahead.stride) ahead();
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                const __m512i x = _mm512_set1_epi32(int(load32(a + m * lda + 2 * pair)));
                const F16 x_even = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}, x_odd = {_mm512_castsi512_ps(_mm512_and_si512(x, high))};
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    even[m][v] = fma({_mm512_castsi512_ps(_mm512_slli_epi32(w[v], 16))}, x_even, even[m][v]);
                    odd[m][v] = fma({_mm512_castsi512_ps(_mm512_and_si512(w[v], high))}, x_odd, odd[m][v]);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 2; v++) acc[m][v] = acc[m][v] + (even[m][v] + odd[m][v]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) store(c + m * STRIP, acc[m][0]), store(c + m * STRIP + 16, acc[m][1]);
}

// Integers of a strip -> what they stand for: the same as tile_int8's.
inline void scale_sums(const Linear& w, int strip, const Rows& x, int64_t row, int rows, float* c) {
    const I16 first = first_sums(w.sums + strip * STRIP), second = first_sums(w.sums + strip * STRIP + 16);
    const F16 scale0 = load(w.scales + strip * STRIP), scale1 = load(w.scales + strip * STRIP + 16);
    for (int m = 0; m < rows; m++) {
        const I16 s0 = {_mm512_add_epi32(_mm512_loadu_si512(c + m * STRIP), first.v)};
        const I16 s1 = {_mm512_add_epi32(_mm512_loadu_si512(c + m * STRIP + 16), second.v)};
        const F16 scale = splat(x.scales[row + m]);
        store(c + m * STRIP, to_float(s0) * scale0 * scale);
        store(c + m * STRIP + 16, to_float(s1) * scale1 * scale);
    }
}

// A strip of nibbles as the int8 that they stand for, in the order of INT8's; all tiles of a block read it.
struct UnpackedStrip {
    std::unique_ptr<char, decltype(&std::free)> p{nullptr, std::free};
    int64_t size = 0;

    void fill(const Linear& w, int strip) {
        const int64_t bytes = int64_t(w.k) * STRIP;
        if (size < bytes) p.reset((char*)std::aligned_alloc(64, size = bytes));
        const uint8_t* packed = w.weight + strip * strip_bytes(w);
        const __m512i eight = _mm512_set1_epi8(8);
        for (char* to = p.get(); to < p.get() + bytes; to += 256, packed += 128)
            for (int half = 0; half < 128; half += 64) {
                const Weights nibbles = load_weights(packed + half);
                _mm512_store_si512(to + half, _mm512_sub_epi8(low_nibbles(nibbles).v, eight));
                _mm512_store_si512(to + 128 + half, _mm512_sub_epi8(high_nibbles(nibbles).v, eight));
            }
    }
};
inline thread_local UnpackedStrip unpacked_strip;

// Before the tiles of a strip.
inline void begin_strip(const Linear& w, int strip, int64_t rows) {
    if (w.kind == INT4 && by_matrix(w, rows)) unpacked_strip.fill(w, strip);
}

// For 16 outputs at a time of int8 with scales of groups: sums, rows, weights, `bytes` of k each.
inline void shape_for_groups(int rows, int bytes) {
    if (matrix_shape == 64 * bytes + rows) return;
    shape_matrix(64 * bytes + rows, {rows, rows, 0, 0, rows, rows, bytes / 4, bytes / 4}, {64, 64, 0, 0, bytes, bytes, 64, 64});
}

// c[16][32], half of it: rows (up to 16) times the 16 outputs from b on, a group at a time, as tile_grouped does it.
// Rows beyond the last get something. Fetches `per_group` bytes a group.
template <bool NIBBLES>
PW_INLINE void grouped_product(const Linear& w, int strip, int half, const Rows& x, int64_t row, const char* b, const char* fetched, int64_t per_group, float* c) {
    const int groups = w.k / w.group, width = std::min(w.group, 64);
    const char* a = (const char*)x.int8 + row * x.stride;
    const float *scales = w.scales + int64_t(strip) * groups * STRIP + 16 * half, *row_scales = x.scales + row * x.group_stride;
    const int32_t* sums = NIBBLES ? nullptr : w.sums + int64_t(strip) * groups * STRIP + 16 * half;
    alignas(64) int32_t part[2][16][16];
    F16 acc[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) acc[m] = splat(0.0f);
    // The unit is a group ahead: what it stores cannot be read at once.
    for (int g = 0; g <= groups; g++) {
        if (g < groups) {
            for (const char* end = fetched + per_group; fetched < end; fetched += 64) prefetch(fetched);
            _tile_zero(0);
            for (int k = 0; k < w.group; k += width, a += width, b += width * STRIP) {
                _tile_loadd(4, a, x.stride);
                _tile_loadd(6, b, 128);
                if constexpr (NIBBLES) {
                    _tile_dpbssd(0, 4, 6);
                } else {
                    _tile_dpbusd(0, 4, 6);
                }
            }
            _tile_stored(0, part[g % 2], 64);
        }
        if (g == 0) continue;
        const F16 scale = load(scales);
        I16 first;
        if (!NIBBLES) first = first_sums(sums), sums += STRIP;
#pragma GCC unroll 16
        for (int m = 0; m < 16; m++) {
            I16 sum = {_mm512_load_si512(part[(g - 1) % 2][m])};
            if (!NIBBLES) sum = {_mm512_add_epi32(sum.v, first.v)};
            acc[m] = fma(to_float(sum), scale * splat(row_scales[m * x.group_stride]), acc[m]);
        }
        scales += STRIP, row_scales++;
    }
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) store(c + m * STRIP, acc[m]);
}

template <bool NIBBLES>
__attribute__((noinline)) void grouped_by_matrix(const Linear& w, int strip, const Rows& x, int64_t row, int rows, const char* b, const Ahead& ahead, float* c) {
    const int64_t packed_steps = w.group / (NIBBLES ? 8 : 4), per_group = (ahead.stride * packed_steps + 63) / 64 * 64;
    for (int done = 0; done < rows; done += 16) {
        shape_for_groups(std::min(rows - done, 16), std::min(w.group, 64));
        written();
        for (int half = 0; half < 2; half++)
            grouped_product<NIBBLES>(w, strip, half, x, row + done, b + 64 * half, ahead.p, done || half ? 0 : per_group, c + done * STRIP + 16 * half);
    }
}

// Part `part` of `parts` of k.
inline void tile_by_matrix(const Linear& w, int strip, const Rows& x, int64_t row, int rows, int part, int parts, const Ahead& ahead, float* c) {
    const char* b = (const char*)w.weight + strip * strip_bytes(w);
    if (w.kind == INT4) return grouped_by_matrix<true>(w, strip, x, row, rows, unpacked_strip.p.get(), ahead, c);
    if (w.kind == INT8_GROUPED) return grouped_by_matrix<false>(w, strip, x, row, rows, b, ahead, c);
    if (w.kind == BF16) {
        const uint16_t* a = x.bf16 + row * x.stride;
        const int steps = w.k / 32, first = steps * part / parts, n = steps * (part + 1) / parts - first;
        if (parts == 1 && rows == 1) return few_rows_times<1>(a, x.stride, b, steps, ahead, c);
        if (parts == 1 && rows == 2) return few_rows_times<2>(a, x.stride, b, steps, ahead, c);
        return matrix_rows_times<false>(part > 0, rows, (const char*)(a + 32 * first), 2 * x.stride, b + 2048 * first, n, ahead, c);
    }
    matrix_rows_times<true>(false, rows, (const char*)(x.int8 + row * x.stride), x.stride, b, w.k / 64, ahead, c);
    scale_sums(w, strip, x, row, rows, c);
}

// Tiles of the matrix unit (AMX): up to 32 rows times the 32 outputs of a strip, in four tiles of 16 x 16 sums.
//
// The packed weights are its second operand as they lie: a row of one holds what 16 outputs take of two k (bf16) or of
// four (int8), and the next lies 128 bytes on. One instruction takes 32 k of bf16, or 64 of int8, of 16 rows. It adds
// the products of those 32 to each other before it adds them to the sum, so that a row alone goes the same way as many.

constexpr int MATRIX_ROWS = 32;

// Linux gives a process the unit's registers when it asks; all its threads, and those it forks, have them then.
__attribute__((constructor)) static void ask_for_matrix() { syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }

// Sums of int8 are exact, so that few rows may go the other way. Those of bf16 go this one, whatever their number.
PW_INLINE bool by_matrix(const Linear& w, int64_t rows) { return (w.kind == BF16 && w.k % 32 == 0) || (w.kind == INT8 && w.k % 64 == 0 && rows >= 16); }

// What the eight tiles of this thread are; see its uses. A change clears them.
inline thread_local int matrix_shape = 0;

inline void shape_matrix(int shape, const int (&rows)[8], const int (&bytes)[8]) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } tiles;
    for (int t = 0; t < 8; t++) tiles.rows[t] = uint8_t(rows[t]), tiles.bytes[t] = uint16_t(rows[t] ? bytes[t] : 0);
    _tile_loadconfig(&tiles);
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

// c[rows][32] = rows x (steps of 2048 bytes of b).
template <bool WHOLE, bool BYTES>
PW_INLINE void matrix_product(int rows, const char* a, int64_t lda, const char* b, int steps, Ahead ahead, float* c) {
    const char* a1 = a + 16 * lda;
    float *c1 = c + 16, *c2 = c + 16 * STRIP, *c3 = c2 + 16;
    const int64_t ldc = STRIP * sizeof(float);
    int64_t fetched = 0;
    shape_for_strip(rows);
    _tile_zero(0);
    _tile_zero(1);
    if (WHOLE) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < steps; s++, a += 64, a1 += 64, b += 2048) {
        for (int64_t end = fetched + ahead.stride * 16; fetched < end; fetched += 64) prefetch(ahead.p + fetched);
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

template <bool BYTES>
inline void matrix_rows_times(int rows, const char* a, int64_t lda, const char* b, int steps, Ahead ahead, float* c) {
    if (rows > 16) {
        matrix_product<true, BYTES>(rows, a, lda, b, steps, ahead, c);
    } else {
        matrix_product<false, BYTES>(rows, a, lda, b, steps, ahead, c);
    }
}

// As the unit does it, for so few rows that memory is what they wait for, which vectors keep busier: the products of even
// and of odd k are summed each, in 16 steps from zero, and both added to the sum.
constexpr int ROWS_BY_HAND = 2;

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

inline void tile_by_matrix(const Linear& w, int strip, const Rows& x, int64_t row, int rows, const Ahead& ahead, float* c) {
    const char* b = (const char*)w.weight + strip * strip_bytes(w);
    if (w.kind == BF16 && rows <= ROWS_BY_HAND) {
        const uint16_t* a = x.bf16 + row * x.stride;
        if (rows == 1) few_rows_times<1>(a, x.stride, b, w.k / 32, ahead, c);
        if (rows == 2) few_rows_times<2>(a, x.stride, b, w.k / 32, ahead, c);
    } else if (w.kind == BF16) {
        matrix_rows_times<false>(rows, (const char*)(x.bf16 + row * x.stride), 2 * x.stride, b, w.k / 32, ahead, c);
    } else {
        matrix_rows_times<true>(rows, (const char*)(x.int8 + row * x.stride), x.stride, b, w.k / 64, ahead, c);
        scale_sums(w, strip, x, row, rows, c);
    }
}

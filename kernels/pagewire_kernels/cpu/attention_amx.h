// The two products of attention over bf16 by the matrix unit (see tiles_amx.h): 16 query rows at a time, or those there are.
//
// A page of keys is its second operand as it lies, 32 dimensions at a time; a page of values 8 pairs of tokens. Sums go the
// same way for one row and for many. Rows beyond the last of a tile hold anything, and nothing comes of them.

PW_INLINE void fetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

PW_INLINE void fetch_keys(const uint16_t* page, int64_t d) { fetch((const char*)(page + d * PAGE), 64 * PAGE); }

// score[rows][SPAN] = q times the keys of as many pages, for up to 16 rows. Fetches as much of `next`, if there is one.
PW_INLINE void matrix_scores(const uint16_t* q, int64_t dim, const uint16_t* const* pages, const uint16_t* const* next, int num_pages, float* score) {
    const int64_t ldc = SPAN * sizeof(float);
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32) {
        _tile_loadd(4, q + d, 2 * dim);
        if (next) fetch_keys(next[0], d);
        _tile_loadd(5, pages[0] + d * PAGE, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (num_pages > 1) {
            if (next) fetch_keys(next[1], d);
            _tile_loadd(5, pages[1] + d * PAGE, 64);
            _tile_dpbf16ps(1, 4, 5);
        }
        if (num_pages > 2) {
            if (next) fetch_keys(next[2], d);
            _tile_loadd(5, pages[2] + d * PAGE, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (num_pages > 3) {
            if (next) fetch_keys(next[3], d);
            _tile_loadd(5, pages[3] + d * PAGE, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, score, ldc);
    _tile_stored(1, score + PAGE, ldc);
    _tile_stored(2, score + 2 * PAGE, ldc);
    _tile_stored(3, score + 3 * PAGE, ldc);
}

// sum[rows][dim] = sum * shrink + weight[rows][SPAN] times the values of whole pages, for up to 16 rows.
PW_INLINE void matrix_values(const uint16_t* weight, int rows, int64_t dim, const uint16_t* const* pages, const uint16_t* const* next, int num_pages, const float* shrink, float* sum) {
    const int64_t ldc = dim * sizeof(float), ldb = 4 * dim;
    for (int m = 0; m < rows; m++) {
        if (shrink[m] == 1.0f) continue;  // most: the greatest score is found early
        for (int64_t d = 0; d < dim; d += 16) store(sum + m * dim + d, load(sum + m * dim + d) * splat(shrink[m]));
    }
    written();
    for (int64_t d = 0; d < dim; d += 64) {
        const int64_t vectors = std::min<int64_t>((dim - d) / 16, 4);
        float* c = sum + d;
        _tile_loadd(0, c, ldc);
        _tile_loadd(1, c + 16, ldc);
        if (vectors > 2) {
            _tile_loadd(2, c + 32, ldc);
            _tile_loadd(3, c + 48, ldc);
        }
        for (int i = 0; i < num_pages; i++) {
            const uint16_t* b = pages[i] + 2 * d;
            const char* then = next ? (const char*)(next[i] + d * PAGE) : nullptr;
            _tile_loadd(6, weight + i * PAGE, 2 * SPAN);
            if (then) fetch(then, 512);
            _tile_loadd(7, b, ldb);
            _tile_dpbf16ps(0, 6, 7);
            if (then) fetch(then + 512, 512);
            _tile_loadd(7, b + 32, ldb);
            _tile_dpbf16ps(1, 6, 7);
            if (vectors > 2) {
                if (then) fetch(then + 1024, 512);
                _tile_loadd(7, b + 64, ldb);
                _tile_dpbf16ps(2, 6, 7);
                if (then) fetch(then + 1536, 512);
                _tile_loadd(7, b + 96, ldb);
                _tile_dpbf16ps(3, 6, 7);
            }
        }
        _tile_stored(0, c, ldc);
        _tile_stored(1, c + 16, ldc);
        if (vectors > 2) {
            _tile_stored(2, c + 32, ldc);
            _tile_stored(3, c + 48, ldc);
        }
    }
}

// The first `tokens` of a page of values, and zeros: what was never written there may be no number.
inline void cut_page(const uint16_t* page, int64_t dim, int64_t tokens, uint16_t* out) {
    const int64_t whole = tokens / 2;
    std::memcpy(out, page, whole * dim * 4);
    std::memset(out + whole * dim * 2, 0, (PAGE / 2 - whole) * dim * 4);
    if (tokens % 2)
        for (int64_t d = 0; d < dim; d++) out[whole * dim * 2 + 2 * d] = page[whole * dim * 2 + 2 * d];
}

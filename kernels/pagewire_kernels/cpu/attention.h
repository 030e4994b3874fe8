// Paged attention, for one query row or a tile of them, straight from the block table.
//
// A page holds 16 tokens of one kv head; a block holds block_size / 16 of them for each kv head:
//
//     cache  [layer][K, V][block][kv head][page][16 * D elements]
//     K page [D][16] float32, [D/2][16][2] bf16: one load gives a pair of dimensions of 16 tokens
//     V page [16][D] float32, [8][D][2] bf16:    one load gives a pair of tokens in 16 dimensions
//
// so both products are the tiles of linear.h. Softmax runs online over spans of 64 tokens that begin at multiples of
// 64 (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, 2205.14135), so a row's sum has the same order
// whether it decodes alone or sits in a tile of a prompt.

#pragma once

#include "linear.h"

namespace pw {

constexpr int PAGE = 16, SPAN = 64, QUERY_ROWS = 48;

struct Cache {
    void* data;
    int64_t num_blocks, num_kv_heads, block_size, head_dim;

    // Element offset of the page that holds `position` of a sequence.
    int64_t page(int layer, int which, const int32_t* table, int kv_head, int64_t position) const {
        int64_t block = table[position / block_size], in_block = position % block_size / PAGE;
        int64_t unit = ((int64_t(layer) * 2 + which) * num_blocks + block) * num_kv_heads + kv_head;
        return (unit * (block_size / PAGE) + in_block) * PAGE * head_dim;
    }
};

template <class T>
inline void write_key(T* page, int token, const float* key, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d++) put(page + (d / PAIR<T>)*PAGE * PAIR<T> + token * PAIR<T> + d % PAIR<T>, key[d]);
}

template <class T>
inline void write_value(T* page, int token, const float* value, int64_t head_dim) {
    T* row = page + (token / PAIR<T>)*head_dim * PAIR<T> + token % PAIR<T>;
    for (int64_t d = 0; d < head_dim; d++) put(row + d * PAIR<T>, value[d]);
}

template <int M, int V, class T>
__attribute__((noinline)) void attention_tile(bool more, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    tile_float<M, V>(more, a, lda, b0, b1, ldb, steps, ahead, c, ldc);
}

constexpr Ahead NOTHING_AHEAD = {nullptr, nullptr, 0};

// c[rows][16 V] (+)= a b for any number of rows.
template <int V, class T>
inline void attention_product(bool more, int rows, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, Ahead ahead, float* c, int64_t ldc) {
    using Tile = void (*)(bool, const RowOf<T>*, int64_t, const T*, const T*, int64_t, int, Ahead, float*, int64_t);
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

// What one tile needs; a thread has one of these.
template <class T>
struct AttentionScratch {
    alignas(64) RowOf<T> query[QUERY_ROWS * 512];
    alignas(64) float score[QUERY_ROWS * SPAN];
    alignas(64) RowOf<T> weight[QUERY_ROWS * SPAN];
    alignas(64) float part[QUERY_ROWS * 512];
    alignas(64) float sum[QUERY_ROWS * 512];
    alignas(64) T masked[2 * 512];
    float most[QUERY_ROWS], total[QUERY_ROWS];
    int64_t from[QUERY_ROWS], to[QUERY_ROWS];  // the keys that a row sees
};

constexpr int MAX_HEAD_DIM = 512;

struct Attention {
    Cache cache;
    int num_heads;
    float scale;
};

// Scores of a span -> probabilities relative to the row's greatest score so far. Returns what older sums shrink by.
template <class T>
PW_INLINE float soften(float* score, RowOf<T>* weight, int64_t span, int64_t width, float scale, int64_t from, int64_t to, float& most, float& total) {
    for (int64_t i = 0; i < width && span + i < from; i++) score[i] = -INFINITY;
    for (int64_t i = to > span ? to - span : 0; i < width; i++) score[i] = -INFINITY;
    F16 best = splat(-INFINITY);
    for (int64_t i = 0; i < width; i += 16) {
        F16 s = load(score + i) * splat(scale);
        store(score + i, s);
        best = max(best, s);
    }
    float now = largest(best);
    if (now < most) now = most;
    if (now == -INFINITY) {
        for (int64_t i = 0; i < width; i++) weight[i] = {};
        return 1.0f;
    }
    F16 sums = splat(0.0f);
    for (int64_t i = 0; i < width; i += 16) {
        F16 p = exponential(load(score + i) - splat(now));
        put(weight + i, p);
        sums = sums + p;
    }
    float shrink[16];
    store(shrink, exponential(splat(most - now)));
    most = now;
    total = total * shrink[0] + pw::sum(sums);
    return shrink[0];
}

// Rows of one tile: query rows first..first+count of the flattened (token, head of the group) order of a chunk that
// starts at batch row `row` and position `position`. q [rows][H][D]; out [rows][H * D] with `out_stride`.
template <class T, class Out>
inline void attend(const Attention& a, int layer, int window, int kv_head, const int32_t* table, const RowOf<T>* q, int64_t row, int64_t position,
                   int first, int count, AttentionScratch<T>& s, Out* out, int64_t out_stride) {
    const int64_t dim = a.cache.head_dim;
    const int group = a.num_heads / int(a.cache.num_kv_heads);
    const T* data = (const T*)a.cache.data;
    int64_t begin = INT64_MAX, end = 0;
    for (int i = 0; i < count; i++) {
        int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
        std::memcpy(s.query + i * dim, q + ((row + token) * a.num_heads + head) * dim, dim * sizeof(*q));
        s.to[i] = position + token + 1;
        s.from[i] = window && s.to[i] > window ? s.to[i] - window : 0;
        s.most[i] = -INFINITY, s.total[i] = 0;
        begin = s.from[i] < begin ? s.from[i] : begin;
        end = s.to[i] > end ? s.to[i] : end;
    }
    std::memset(s.sum, 0, count * dim * sizeof(float));
    for (int64_t span = begin / SPAN * SPAN; span < end; span += SPAN) {
        int64_t tokens = end - span < SPAN ? end - span : SPAN, width = (tokens + PAGE - 1) / PAGE * PAGE;
        // Each product fetches the page that it will need a span later.
        auto later = [&](int which, int64_t at) {
            const int64_t position = span + SPAN + at;
            return (const char*)(position < end ? data + a.cache.page(layer, which, table, kv_head, position) : nullptr);
        };
        for (int64_t at = 0; at < width; at += 2 * PAGE) {
            const T* page = data + a.cache.page(layer, 0, table, kv_head, span + at);
            const int steps = int(dim / PAIR<T>);
            const char *p = later(0, at), *q = later(0, at + PAGE);
            const Ahead ahead = {p, q ? q : p, p ? 64 : 0};
            if (at + PAGE < width) {
                const T* next = data + a.cache.page(layer, 0, table, kv_head, span + at + PAGE);
                attention_product<2>(false, count, s.query, dim, page, next, PAGE * PAIR<T>, steps, ahead, s.score + at, SPAN);
            } else {
                attention_product<1>(false, count, s.query, dim, page, page, PAGE * PAIR<T>, steps, ahead, s.score + at, SPAN);
            }
        }
        float shrink[QUERY_ROWS];
        for (int i = 0; i < count; i++)
            shrink[i] = soften<T>(s.score + i * SPAN, s.weight + i * SPAN, span, width, a.scale, s.from[i], s.to[i], s.most[i], s.total[i]);
        for (int64_t at = 0; at < tokens; at += PAGE) {
            const T* page = data + a.cache.page(layer, 1, table, kv_head, span + at);
            int in_page = int(tokens - at < PAGE ? tokens - at : PAGE), steps = in_page / PAIR<T>;
            const bool odd = in_page % PAIR<T>;  // half of the last pair was never written: it may hold anything
            const T* last = page + int64_t(steps) * dim * PAIR<T>;
            if (odd)
                for (int64_t d = 0; d < dim; d++) s.masked[2 * d] = last[2 * d], s.masked[2 * d + 1] = 0;
            const RowOf<T>* p = s.weight + at;
            const char* fetched = later(1, at);
            for (int64_t d = 0; d < dim; d += 32) {
                const char* part = fetched + d * PAGE * int64_t(sizeof(T));
                const Ahead ahead = {part, part + 64, fetched ? 128 : 0};
                const int64_t next = d * PAIR<T> + 16 * PAIR<T>;
                if (d + 16 < dim) {
                    attention_product<2>(at > 0, count, p, SPAN, page + d * PAIR<T>, page + next, dim * PAIR<T>, steps, ahead, s.part + d, dim);
                    if (odd) attention_product<2>(true, count, p + 2 * steps, SPAN, s.masked + 2 * d, s.masked + next, 0, 1, NOTHING_AHEAD, s.part + d, dim);
                } else {
                    attention_product<1>(at > 0, count, p, SPAN, page + d * PAIR<T>, page, dim * PAIR<T>, steps, ahead, s.part + d, dim);
                    if (odd) attention_product<1>(true, count, p + 2 * steps, SPAN, s.masked + 2 * d, s.masked, 0, 1, NOTHING_AHEAD, s.part + d, dim);
                }
            }
        }
        for (int i = 0; i < count; i++)
            for (int64_t d = 0; d < dim; d += 16)
                store(s.sum + i * dim + d, fma(load(s.sum + i * dim + d), splat(shrink[i]), load(s.part + i * dim + d)));
    }
    for (int i = 0; i < count; i++) {
        int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
        F16 inverse = splat(1.0f / s.total[i]);
        for (int64_t d = 0; d < dim; d += 16) put(out + (row + token) * out_stride + head * dim + d, load(s.sum + i * dim + d) * inverse);
    }
}

}  // namespace pw

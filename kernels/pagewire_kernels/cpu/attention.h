// Paged attention, for one query row or a tile of them, straight from the block table.
//
// Softmax runs online over spans of 64 tokens that begin at multiples of 64 (Milakov and Gimelshein, arXiv 1805.02867;
// FlashAttention, 2205.14135), so a row's sum has the same order whether it decodes alone or sits in a tile of a prompt.

#pragma once

#include "attention_tiles.h"

namespace pw {

// Of a tile, a multiple of 16. Pages are read from the second cache once for all of them.
#if defined(__AMX_TILE__)
constexpr int QUERY_ROWS = 96;
#else
constexpr int QUERY_ROWS = 48;
#endif

// What one tile needs; a thread has one of these.
template <class T>
struct AttentionScratch {
    alignas(64) RowOf<T> query[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) float score[QUERY_ROWS * SPAN];
    alignas(64) RowOf<T> weight[QUERY_ROWS * SPAN];
    alignas(64) float part[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) float sum[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) T masked[2 * MAX_HEAD_DIM];
#if defined(__AMX_TILE__)
    alignas(64) uint16_t cut[PAGE * MAX_HEAD_DIM];
#endif
    alignas(64) float most[QUERY_ROWS];
    alignas(64) float total[QUERY_ROWS * LANES];  // a row's is the sum of its lanes
    int64_t from[QUERY_ROWS], to[QUERY_ROWS];  // the keys that a row sees
};

struct Attention {
    Cache cache;
    int num_heads;
    float scale;
};

// The greatest of a row's scores of the span at `span`, by lane, those of keys that it does not see being made -inf.
PW_INLINE F16 greatest_scores(float* score, int64_t span, int64_t width, int64_t from, int64_t to) {
    for (int64_t i = 0; i < width && span + i < from; i++) score[i] = -INFINITY;
    for (int64_t i = to > span ? to - span : 0; i < width; i++) score[i] = -INFINITY;
    F16 best = load(score);
    for (int64_t i = 16; i < width; i += 16) best = max(best, load(score + i));
    return best;
}

// Scores of a span -> probabilities relative to the greatest score so far, for `count` rows from `first` on, a multiple of
// 16. score, weight [count][SPAN]. shrink [count]: what the older sums of each row are to be multiplied by.
template <class T>
PW_INLINE void soften(AttentionScratch<T>& s, int first, int count, float* score, RowOf<T>* weight, int64_t span, int64_t width, float scale, float* shrink) {
    alignas(64) float now[QUERY_ROWS];
    float* most = s.most + first;
    for (int i = 0; i < count; i += 16) {
        F16 best[16];
        const int rows = std::min(count - i, 16);
        for (int r = 0; r < rows; r++) best[r] = greatest_scores(score + (i + r) * SPAN, span, width, s.from[first + i + r], s.to[first + i + r]);
        largest_of_each(best, rows, now + i);
        const F16 before = load(most + i), then = max(before, splat(scale) * load(now + i));
        store(now + i, then), store(shrink + i, exponential(before - then));
    }
    for (int i = 0; i < count; i++) {
        const bool none = now[i] == -INFINITY;
        most[i] = now[i];
        if (none) shrink[i] = 1.0f;  // no key seen yet: every weight is e^-inf
        constexpr bool ROUNDED = sizeof(T) == 2;  // powers of two then do
        const float unit = ROUNDED ? 1.44269504088896341f : 1.0f;
        float* total = s.total + (first + i) * LANES;
        F16 sums = load(total) * splat(shrink[i]), offset = splat(none ? 0.0f : -now[i] * unit);
        for (int64_t j = i * SPAN; j < i * SPAN + width; j += 16) {
            const F16 x = fma(load(score + j), splat(scale * unit), offset), p = ROUNDED ? power_of_two(x) : exponential(x);
            put(weight + j, p);
            sums = sums + p;
        }
        store(total, sums);
    }
}

// The position with which attention of a row at `position` begins.
inline int64_t first_key(int64_t position, int window) { return window && position + 1 > window ? (position + 1 - window) / SPAN * SPAN : 0; }

// Rows of one tile: query rows first..first+count of the flattened (token, head of the group) order of a chunk that
// starts at batch row `row` and position `position`. q [rows][H][D]; out [rows][H * D] with `out_stride`. Fetches `then`,
// the first pages of the tile after this one, or null, while it computes the last of its own.
template <class T, class Out>
inline void attend(const Attention& a, int layer, int window, int kv_head, const int32_t* table, const RowOf<T>* q, int64_t row, int64_t position,
                   int first, int count, const T* const* then, AttentionScratch<T>& s, Out* out, int64_t out_stride) {
    const int64_t dim = a.cache.head_dim;
    const int group = a.num_heads / int(a.cache.num_kv_heads);
    int64_t end = 0;
    for (int i = 0; i < count; i++) {
        int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
        std::memcpy(s.query + i * dim, q + ((row + token) * a.num_heads + head) * dim, dim * sizeof(*q));
        s.to[i] = position + token + 1;
        s.from[i] = window && s.to[i] > window ? s.to[i] - window : 0;
        s.most[i] = -INFINITY, store(s.total + i * LANES, splat(0.0f));
        end = s.to[i] > end ? s.to[i] : end;
    }
    std::memset(s.sum, 0, count * dim * sizeof(float));
    const int64_t start = first_key(position + first / group, window), values = a.cache.num_blocks * a.cache.num_kv_heads * a.cache.block_size * dim;
    KeyPages<T> walk(a.cache, layer, table, kv_head, start);
    const T *keys[PAGES], *next_keys[PAGES];
    walk.next(end - start, next_keys);
    for (int64_t span = start; span < end; span += SPAN) {
        const int64_t tokens = std::min<int64_t>(end - span, SPAN), width = (tokens + PAGE - 1) / PAGE * PAGE;
        // Each product fetches the page that will be needed a span later.
        std::copy(next_keys, next_keys + PAGES, keys);
        if (span + SPAN < end) walk.next(end - span - SPAN, next_keys);
        else if (then) std::copy(then, then + PAGES, next_keys);
        const T *v[PAGES], *next_v[PAGES];
        for (int i = 0; i < PAGES; i++) v[i] = keys[i] + values, next_v[i] = next_keys[i] + values;
        alignas(64) float shrink[QUERY_ROWS];
#if defined(__AMX_TILE__)
        if constexpr (sizeof(T) == 2) {
            if (dim % 32 == 0) {
                // The unit has the scores of the next 16 rows to make while vectors soften those of these. All are made
                // where those before them were: what a tile needs hardly fits into the first cache.
                const int pages = int(width / PAGE);
                if (tokens % PAGE) cut_page(v[pages - 1], dim, tokens % PAGE, s.cut), v[pages - 1] = s.cut;
                shape_for_attention(std::min(count, 16));
                int i = 0;
                while (s.to[std::min(i + 16, count) - 1] <= span) i += 16;  // they see none of these keys
                const T* const* ahead = next_v;
                float* score = s.score + i % 32 * SPAN;
                matrix_scores(s.query + i * dim, dim, keys, next_keys, pages, score);
                for (; i < count; i += 16) {
                    float* then_score = s.score + (i + 16) % 32 * SPAN;
                    if (i + 16 < count) matrix_scores(s.query + (i + 16) * dim, dim, keys, nullptr, pages, then_score);
                    const int rows = std::min(count - i, 16);
                    soften(s, i, rows, score, s.weight, span, width, a.scale, shrink);
                    matrix_values(s.weight, rows, dim, v, ahead, pages, shrink, s.sum + i * dim);
                    ahead = nullptr, score = then_score;
                }
                continue;
            }
        }
#endif
        const int64_t pairs = tokens % PAGE / PAIR<T>;
        const bool odd = tokens % PAIR<T>;  // half of the last pair was never written: it may hold anything
        if (odd) {
            const T* last = v[tokens / PAGE] + pairs * dim * PAIR<T>;
            for (int64_t d = 0; d < dim; d++) s.masked[2 * d] = last[2 * d], s.masked[2 * d + 1] = 0;
        }
#if defined(__AVX512F__)
        if (count <= FEW_QUERIES && dim % 64 == 0) {
            FEW_SCORES<T>[count - 1](s.query, dim, keys, next_keys, s.score);
            soften(s, 0, count, s.score, s.weight, span, width, a.scale, shrink);
            for (int64_t d = 0; d < dim; d += 64) FEW_VALUES<T>[count - 1](s.weight, dim, d, v, next_v, tokens, s.masked, shrink, s.sum);
            continue;
        }
#endif
        for (int64_t at = 0; at < width; at += 2 * PAGE) {
            const int i = int(at / PAGE), steps = int(dim / PAIR<T>);
            const Ahead ahead = {(const char*)next_keys[i], (const char*)next_keys[i + 1], 64};
            if (at + PAGE < width) {
                attention_product<2>(false, count, s.query, dim, keys[i], keys[i + 1], PAGE * PAIR<T>, steps, ahead, s.score + at, SPAN);
            } else {
                attention_product<1>(false, count, s.query, dim, keys[i], keys[i], PAGE * PAIR<T>, steps, ahead, s.score + at, SPAN);
            }
        }
        soften(s, 0, count, s.score, s.weight, span, width, a.scale, shrink);
#if defined(__AVX512F__)
        if (dim % 32 == 0) {
            for (int i = 0; i < count; i += ROWS)
                for (int64_t d = 0; d < dim; d += 32)
                    VALUES<T>[std::min(count - i, ROWS) - 1](s.weight + i * SPAN, dim, d, v, i ? nullptr : next_v, tokens, s.masked, shrink + i, s.sum + i * dim);
            continue;
        }
#endif
        for (int64_t at = 0; at < tokens; at += PAGE) {
            const T *page = v[at / PAGE], *fetched = next_v[at / PAGE];
            const bool last = tokens - at < PAGE;
            const int steps = int(last ? pairs : PAGE / PAIR<T>);
            const RowOf<T>* p = s.weight + at;
            for (int64_t d = 0; d < dim; d += 32) {
                const char* part = (const char*)fetched + d * PAGE * int64_t(sizeof(T));
                const Ahead ahead = {part, part + 64, 128};
                const int64_t next = d * PAIR<T> + 16 * PAIR<T>;
                if (d + 16 < dim) {
                    attention_product<2>(at > 0, count, p, SPAN, page + d * PAIR<T>, page + next, dim * PAIR<T>, steps, ahead, s.part + d, dim);
                    if (odd && last) attention_product<2>(true, count, p + 2 * steps, SPAN, s.masked + 2 * d, s.masked + next, 0, 1, NOTHING_AHEAD, s.part + d, dim);
                } else {
                    attention_product<1>(at > 0, count, p, SPAN, page + d * PAIR<T>, page, dim * PAIR<T>, steps, ahead, s.part + d, dim);
                    if (odd && last) attention_product<1>(true, count, p + 2 * steps, SPAN, s.masked + 2 * d, s.masked, 0, 1, NOTHING_AHEAD, s.part + d, dim);
                }
            }
        }
        for (int i = 0; i < count; i++)
            for (int64_t d = 0; d < dim; d += 16)
                store(s.sum + i * dim + d, fma(load(s.sum + i * dim + d), splat(shrink[i]), load(s.part + i * dim + d)));
    }
    for (int i = 0; i < count; i++) {
        int64_t token = (first + i) / group, head = kv_head * group + (first + i) % group;
        F16 inverse = splat(1.0f / sum(load(s.total + i * LANES)));
        for (int64_t d = 0; d < dim; d += 16) put(out + (row + token) * out_stride + head * dim + d, load(s.sum + i * dim + d) * inverse);
    }
}

}  // namespace pw

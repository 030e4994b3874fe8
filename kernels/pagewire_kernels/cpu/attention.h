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

constexpr int PAGE = 16, SPAN = 64, PAGES = SPAN / PAGE;
constexpr int QUERY_ROWS = 48, MAX_HEAD_DIM = 512;  // of a tile; the first is a multiple of 16

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

// Goes through the key pages of one sequence and kv head, a span at a time.
template <class T>
class KeyPages {
   public:
    KeyPages(const Cache& cache, int layer, const int32_t* table, int kv_head, int64_t position)
        : table_(table + position / cache.block_size), in_block_(position % cache.block_size / PAGE), of_block_(cache.block_size / PAGE),
          page_(PAGE * cache.head_dim), head_(kv_head * of_block_ * page_), block_(cache.num_kv_heads * of_block_ * page_),
          layer_((const T*)cache.data + int64_t(layer) * 2 * cache.num_blocks * block_) {}

    // The pages of the next `tokens` tokens, the first of them once more in the place of those that are missing to a span.
    void next(int64_t tokens, const T** pages) {
        for (int i = 0; i < PAGES; i++) {
            if (i && i * PAGE >= tokens) {
                pages[i] = pages[0];
                continue;
            }
            pages[i] = layer_ + *table_ * block_ + head_ + in_block_ * page_;
            if (++in_block_ == of_block_) in_block_ = 0, table_++;
        }
    }

   private:
    const int32_t* table_;
    int64_t in_block_;
    const int64_t of_block_, page_, head_, block_;
    const T* const layer_;
};

// head_dim: a multiple of 16.
template <class T>
inline void write_key(T* page, int token, const float* key, int64_t head_dim) {
    T row[MAX_HEAD_DIM];
    for (int64_t d = 0; d < head_dim; d += 16) put(row + d, load(key + d));
    for (int64_t d = 0; d < head_dim; d += PAIR<T>) std::memcpy(page + d * PAGE + token * PAIR<T>, row + d, PAIR<T> * sizeof(T));
}

inline void write_value(float* page, int token, const float* value, int64_t head_dim) {
    std::memcpy(page + token * head_dim, value, head_dim * sizeof(float));
}

inline void write_value(uint16_t* page, int token, const float* value, int64_t head_dim) {
    uint16_t* pairs = page + token / 2 * head_dim * 2;
    for (int64_t d = 0; d < head_dim; d += 16) store_half_pairs(pairs + 2 * d, token % 2, load(value + d));
}

template <int M, int V, class T>
__attribute__((noinline)) void attention_tile(bool more, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, const Ahead& ahead, float* c, int64_t ldc) {
    tile_float<M, V>(more, a, lda, b0, b1, ldb, steps, ahead, c, ldc);
}

constexpr Ahead NOTHING_AHEAD = {nullptr, nullptr, 0};

// c[rows][16 V] (+)= a b for any number of rows.
template <int V, class T>
inline void attention_product(bool more, int rows, const RowOf<T>* a, int64_t lda, const T* b0, const T* b1, int64_t ldb, int steps, const Ahead& ahead, float* c, int64_t ldc) {
    using Tile = void (*)(bool, const RowOf<T>*, int64_t, const T*, const T*, int64_t, int, const Ahead&, float*, int64_t);
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
    alignas(64) RowOf<T> query[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) float score[QUERY_ROWS * SPAN];
    alignas(64) RowOf<T> weight[QUERY_ROWS * SPAN];
    alignas(64) float part[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) float sum[QUERY_ROWS * MAX_HEAD_DIM];
    alignas(64) T masked[2 * MAX_HEAD_DIM];
    alignas(64) float most[QUERY_ROWS];
    alignas(64) float total[QUERY_ROWS * LANES];  // a row's is the sum of its lanes
    int64_t from[QUERY_ROWS], to[QUERY_ROWS];  // the keys that a row sees
};

#if defined(__AVX512F__)

// So few rows do not keep the multipliers busy with two vectors of sums each: with four they do, and read a span at once.
// Every sum is made in the same order as by attention_product.
constexpr int FEW_QUERIES = 6;

// score[M][SPAN] = q times the keys of `pages`. Fetches as much of `next`.
template <int M, class T>
__attribute__((noinline)) void few_scores(const RowOf<T>* q, int64_t dim, const T* const* pages, const T* const* next, float* score) {
    F16 acc[M][PAGES];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < PAGES; v++) acc[m][v] = splat(0.0f);
    for (int64_t s = 0; s < dim / PAIR<T>; s++) {
        decltype(load_step(pages[0])) w[PAGES];
#pragma GCC unroll 4
        for (int v = 0; v < PAGES; v++) w[v] = load_step(pages[v] + s * PAGE * PAIR<T>), prefetch(next[v] + s * PAGE * PAIR<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < PAGES; v++) acc[m][v] = multiply(acc[m][v], w[v], q + m * dim + PAIR<T> * s);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < PAGES; v++) store(score + m * SPAN + v * PAGE, acc[m][v]);
}

// sum[M][dim] = sum * shrink + weight times the values of `tokens` in `pages`, in the 16 V dimensions from `d` on: sums stay
// in registers for the whole span. half: the last pair of tokens, the second of which does not count, where their number
// is odd. Fetches as much of `next`, if there is one.
template <int M, int V, class T>
__attribute__((noinline)) void span_values(const RowOf<T>* weight, int64_t dim, int64_t d, const T* const* pages, const T* const* next, int64_t tokens, const T* half, const float* shrink, float* sum) {
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = splat(0.0f);
    auto step = [&](const T* b, const RowOf<T>* x) __attribute__((always_inline)) {
        decltype(load_step(b)) w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) w[v] = load_step(b + v * 16 * PAIR<T>);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[m][v] = multiply(acc[m][v], w[v], x + m * SPAN);
    };
    for (int64_t at = 0; at < tokens; at += PAGE) {
        const T *b = pages[at / PAGE] + d * PAIR<T>, *fetched = next ? next[at / PAGE] + d * PAIR<T> : nullptr;
        const int64_t steps = (tokens - at < PAGE ? tokens - at : PAGE) / PAIR<T>;
        for (int64_t s = 0; s < steps; s++, b += dim * PAIR<T>) {
#pragma GCC unroll 4
            for (int v = 0; fetched && v < V; v++) prefetch(fetched + (s * dim + v * 16) * PAIR<T>);
            step(b, weight + at + s * PAIR<T>);
        }
    }
    if (tokens % PAIR<T>) step(half + d * PAIR<T>, weight + tokens - 1);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) {
            float* to = sum + m * dim + d + v * 16;
            store(to, fma(load(to), splat(shrink[m]), acc[m][v]));
        }
}

template <class T>
using FewScores = void (*)(const RowOf<T>*, int64_t, const T* const*, const T* const*, float*);
template <class T>
using SpanValues = void (*)(const RowOf<T>*, int64_t, int64_t, const T* const*, const T* const*, int64_t, const T*, const float*, float*);
template <class T>
constexpr FewScores<T> FEW_SCORES[] = {few_scores<1, T>, few_scores<2, T>, few_scores<3, T>, few_scores<4, T>, few_scores<5, T>, few_scores<6, T>};
template <class T>
constexpr SpanValues<T> FEW_VALUES[] = {span_values<1, 4, T>, span_values<2, 4, T>, span_values<3, 4, T>, span_values<4, 4, T>, span_values<5, 4, T>, span_values<6, 4, T>};
template <class T>
constexpr SpanValues<T> VALUES[] = {span_values<1, 2, T>, span_values<2, 2, T>, span_values<3, 2, T>, span_values<4, 2, T>, span_values<5, 2, T>, span_values<6, 2, T>, span_values<7, 2, T>, span_values<8, 2, T>, span_values<9, 2, T>, span_values<10, 2, T>, span_values<11, 2, T>, span_values<12, 2, T>};

#endif

struct Attention {
    Cache cache;
    int num_heads;
    float scale;
};

// The greatest of a row's scores of the span at `span`, those of keys that it does not see being made -inf.
PW_INLINE float greatest_score(float* score, int64_t span, int64_t width, int64_t from, int64_t to) {
    for (int64_t i = 0; i < width && span + i < from; i++) score[i] = -INFINITY;
    for (int64_t i = to > span ? to - span : 0; i < width; i++) score[i] = -INFINITY;
    F16 best = load(score);
    for (int64_t i = 16; i < width; i += 16) best = max(best, load(score + i));
    return largest(best);
}

// Scores of a span -> probabilities relative to the greatest score so far, for `count` rows. shrink [QUERY_ROWS]: what the
// older sums of each row are to be multiplied by.
template <class T>
PW_INLINE void soften(AttentionScratch<T>& s, int count, int64_t span, int64_t width, float scale, float* shrink) {
    alignas(64) float now[QUERY_ROWS];
    for (int i = 0; i < count; i++) now[i] = std::max(s.most[i], scale * greatest_score(s.score + i * SPAN, span, width, s.from[i], s.to[i]));
    for (int i = 0; i < count; i += 16) store(shrink + i, exponential(load(s.most + i) - load(now + i)));
    for (int i = 0; i < count; i++) {
        const float* score = s.score + i * SPAN;
        const bool none = now[i] == -INFINITY;
        s.most[i] = now[i];
        if (none) shrink[i] = 1.0f;  // no key seen yet: every weight is e^-inf
        constexpr bool ROUNDED = sizeof(T) == 2;  // powers of two then do
        const float unit = ROUNDED ? 1.44269504088896341f : 1.0f;
        F16 sums = load(s.total + i * LANES) * splat(shrink[i]), offset = splat(none ? 0.0f : -now[i] * unit);
        for (int64_t j = 0; j < width; j += 16) {
            const F16 x = fma(load(score + j), splat(scale * unit), offset), p = ROUNDED ? power_of_two(x) : exponential(x);
            put(s.weight + i * SPAN + j, p);
            sums = sums + p;
        }
        store(s.total + i * LANES, sums);
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
        const int64_t pairs = tokens % PAGE / PAIR<T>;
        const bool odd = tokens % PAIR<T>;  // half of the last pair was never written: it may hold anything
        if (odd) {
            const T* last = keys[tokens / PAGE] + values + pairs * dim * PAIR<T>;
            for (int64_t d = 0; d < dim; d++) s.masked[2 * d] = last[2 * d], s.masked[2 * d + 1] = 0;
        }
        alignas(64) float shrink[QUERY_ROWS];
#if defined(__AVX512F__)
        if (count <= FEW_QUERIES && dim % 64 == 0) {
            FEW_SCORES<T>[count - 1](s.query, dim, keys, next_keys, s.score);
            soften(s, count, span, width, a.scale, shrink);
            const T *v[PAGES], *next_v[PAGES];
            for (int i = 0; i < PAGES; i++) v[i] = keys[i] + values, next_v[i] = next_keys[i] + values;
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
        soften(s, count, span, width, a.scale, shrink);
#if defined(__AVX512F__)
        if (dim % 32 == 0) {
            const T *v[PAGES], *next_v[PAGES];
            for (int i = 0; i < PAGES; i++) v[i] = keys[i] + values, next_v[i] = next_keys[i] + values;
            for (int i = 0; i < count; i += ROWS)
                for (int64_t d = 0; d < dim; d += 32)
                    VALUES<T>[std::min(count - i, ROWS) - 1](s.weight + i * SPAN, dim, d, v, i ? nullptr : next_v, tokens, s.masked, shrink + i, s.sum + i * dim);
            continue;
        }
#endif
        for (int64_t at = 0; at < tokens; at += PAGE) {
            const T *page = keys[at / PAGE] + values, *fetched = next_keys[at / PAGE] + values;
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

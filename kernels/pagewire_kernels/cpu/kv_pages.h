// Where a token's key and value are in the KV cache, and how they are written there.
//
// A page holds 16 tokens of one kv head; a block holds block_size / 16 of them for each kv head:
//
//     cache  [layer][K, V][block][kv head][page][16 * D elements]
//     K page [D][16] float32, [D/2][16][2] bf16: one load gives a pair of dimensions of 16 tokens
//     V page [16][D] float32, [8][D][2] bf16:    one load gives a pair of tokens in 16 dimensions
//
// so both products of attention are the tiles of linear.h.

#pragma once

#include "linear.h"

namespace pw {

constexpr int PAGE = 16, SPAN = 64, PAGES = SPAN / PAGE;  // tokens; attention goes through the keys a span at a time
constexpr int MAX_HEAD_DIM = 512;

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

}  // namespace pw

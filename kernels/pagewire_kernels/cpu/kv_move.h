// KV between the pages of attention.h and rows [tokens][kv heads][D], the form that it has on the wire.
//
// Keys of a page are a matrix of 4-byte words, turned on its side; values are rows (float32) or pairs of rows woven
// into each other (bf16). Whole pages take the fast way, which goes at about half the speed of memcpy; word by word,
// with the place of each computed anew, it was a tenth. Pages lie anywhere in the pool, where no prefetcher follows: each
// is asked for while the one before it is moved (6 -> 10 GB/s where none is in a cache).

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xxh3.h"

namespace pw {

struct Move {
    uint8_t* page;   // of one kv head
    uint8_t* rows;   // of its first token
    int64_t stride;  // bytes from a token's row to the next one's
    int first, count;  // tokens of the page
    int64_t bytes;     // of a row
};

typedef uint32_t Words __attribute__((vector_size(16)));

#if defined(__clang__)
#define PW_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PW_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif
PW_INLINE Words weave_low(Words a, Words b) { return PW_SHUFFLE(a, b, 0, 4, 1, 5); }
PW_INLINE Words weave_high(Words a, Words b) { return PW_SHUFFLE(a, b, 2, 6, 3, 7); }
PW_INLINE Words join_low(Words a, Words b) { return PW_SHUFFLE(a, b, 0, 1, 4, 5); }
PW_INLINE Words join_high(Words a, Words b) { return PW_SHUFFLE(a, b, 2, 3, 6, 7); }

PW_INLINE void move_word(uint32_t* page, uint8_t* row, bool to_wire) {
    to_wire ? std::memcpy(row, page, 4) : std::memcpy(page, row, 4);
}

// to[j][i] = from[i][j] of 4 x 4 words; strides in bytes.
PW_INLINE void turn(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    Words a[4];
    for (int i = 0; i < 4; i++) std::memcpy(&a[i], (const uint8_t*)from + i * from_stride, 16);
    const Words low01 = weave_low(a[0], a[1]), high01 = weave_high(a[0], a[1]), low23 = weave_low(a[2], a[3]), high23 = weave_high(a[2], a[3]);
    const Words b[4] = {join_low(low01, low23), join_high(low01, low23), join_low(high01, high23), join_high(high01, high23)};
    for (int i = 0; i < 4; i++) std::memcpy((uint8_t*)to + i * to_stride, &b[i], 16);
}

// page [bytes / 4][16] words.
template <bool TO_WIRE>
inline void move_keys(const Move& m) {
    uint32_t* page = (uint32_t*)m.page;
    const int64_t words = m.bytes / 4;
    if (m.count < PAGE) {
        for (int t = 0; t < m.count; t++)
            for (int64_t w = 0; w < words; w++) move_word(page + w * PAGE + m.first + t, m.rows + t * m.stride + w * 4, TO_WIRE);
        return;
    }
    for (int64_t w = 0; w < words; w += 4)
        for (int t = 0; t < PAGE; t += 4) {
            uint32_t* corner = page + w * PAGE + t;
            uint8_t* row = m.rows + t * m.stride + w * 4;
            if (TO_WIRE) turn(corner, PAGE * 4, row, m.stride);
            else turn(row, m.stride, corner, PAGE * 4);
        }
}

// page [16][bytes].
template <bool TO_WIRE>
inline void move_rows(const Move& m) {
    for (int t = 0; t < m.count; t++) {
        uint8_t *page = m.page + (m.first + t) * m.bytes, *row = m.rows + t * m.stride;
        TO_WIRE ? std::memcpy(row, page, m.bytes) : std::memcpy(page, row, m.bytes);
    }
}

// page [8][bytes / 2][2] halves.
template <bool TO_WIRE>
inline void move_pairs(const Move& m) {
    const int64_t halves = m.bytes / 2;
    for (int t = 0; t < m.count; t++) {
        const int token = m.first + t;
        uint16_t *pair = (uint16_t*)m.page + token / 2 * halves * 2, *row = (uint16_t*)(m.rows + t * m.stride);
        if (token % 2 || t + 1 == m.count) {
            for (int64_t d = 0; d < halves; d++) TO_WIRE ? row[d] = pair[d * 2 + token % 2] : pair[d * 2 + token % 2] = row[d];
            continue;
        }
        uint16_t* __restrict next = (uint16_t*)(m.rows + ++t * m.stride);
        uint16_t* __restrict even = row;
        uint32_t* __restrict both = (uint32_t*)pair;
        for (int64_t d = 0; d < halves; d++) {
            if (TO_WIRE) even[d] = uint16_t(both[d]), next[d] = uint16_t(both[d] >> 16);
            else both[d] = uint32_t(even[d]) | uint32_t(next[d]) << 16;
        }
    }
}

// Asks for a page that is moved soon.
template <bool TO_WIRE>
PW_INLINE void ask_for(const uint8_t* page, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(page + at, !TO_WIRE, 2);
}

// The tokens at `slots` (block * block_size + offset), layers [first, last), in wire layout [layers][2][tokens][kv heads][D].
// sum: of the wire's bytes, or null.
template <bool TO_WIRE>
inline void move_kv(const Model& model, const int64_t* slots, int64_t tokens, int first, int last, uint8_t* wire, Xxh3* sum) {
    const int64_t bytes = int64_t(model.head_dim) * (model.half ? 2 : 4), stride = model.kv_heads * bytes;
    for (int64_t plane = int64_t(first) * 2; plane < int64_t(last) * 2; plane++)
        for (int64_t t = 0, count; t < tokens; t += count) {
            const int first_of_page = int(slots[t] % PAGE);  // a block is whole pages
            const int64_t most = std::min<int64_t>(PAGE - first_of_page, tokens - t);
            for (count = 1; count < most && slots[t + count] == slots[t] + count; count++) {}
            const int64_t next = slots[std::min(t + count, tokens - 1)];
            const int64_t begin = ((plane - first * 2) * tokens + t) * stride, end = begin + count * stride;
            if (sum && !TO_WIRE) sum->reach(end);
            for (int64_t h = 0; h < model.kv_heads; h++) {
                const auto page_of = [&](int64_t slot) {
                    const int64_t unit = (plane * model.num_blocks + slot / model.block_size) * model.kv_heads + h;
                    const int64_t page = unit * (model.block_size / PAGE) + slot % model.block_size / PAGE;
                    return (uint8_t*)model.cache + page * PAGE * bytes;
                };
                ask_for<TO_WIRE>(page_of(next), PAGE * bytes);
                const Move m = {page_of(slots[t]), wire + begin + h * bytes, stride, first_of_page, int(count), bytes};
                if (plane % 2 == 0) move_keys<TO_WIRE>(m);
                else if (model.half) move_pairs<TO_WIRE>(m);
                else move_rows<TO_WIRE>(m);
            }
            if (sum && TO_WIRE) sum->reach(end);
        }
}

}  // namespace pw

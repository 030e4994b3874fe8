// XXH3-64 of bytes while they are being moved: what `reach` sums up is still in the first cache, where a second pass over
// a whole chunk would fetch it again. The function is that of the xxHash specification (doc/xxhash_spec.md, "XXH3
// Algorithm", large inputs), with the default secret and seed 0.

#pragma once

#include <cstdint>
#include <cstring>

namespace pw {

class Xxh3 {
   public:
    // data: `size` bytes, of which each is read only when it has been reached. Fewer than 241 have other formulas.
    Xxh3(const uint8_t* data, int64_t size) : data_(data), size_(size), blocks_((size - 1) / BLOCK) {}

    // The first `bytes` are there.
    void reach(int64_t bytes) {
        for (; done_ < blocks_ && (done_ + 1) * BLOCK <= bytes; done_++) {
            add(data_ + done_ * BLOCK, STRIPES);
            scramble();
        }
    }

    // All of them are there.
    uint64_t digest() {
        reach(size_);
        add(data_ + blocks_ * BLOCK, (size_ - 1 - blocks_ * BLOCK) / STRIPE);
        add(data_ + size_ - STRIPE, SECRET + sizeof(SECRET) - STRIPE - 7);
        uint64_t sum = uint64_t(size_) * PRIME64_1;
        for (int i = 0; i < 8; i += 2) {
            const uint8_t* key = SECRET + 11 + i * 8;
            const unsigned __int128 product = (unsigned __int128)(sums_[i] ^ word(key)) * (sums_[i + 1] ^ word(key + 8));
            sum += uint64_t(product) ^ uint64_t(product >> 64);
        }
        sum ^= sum >> 37;
        sum *= 0x165667919E3779F9u;
        return sum ^ sum >> 32;
    }

   private:
    static constexpr uint32_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
    static constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u,
                              PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u;
    static constexpr int64_t STRIPE = 64, STRIPES = 16, BLOCK = STRIPES * STRIPE;
    alignas(64) static constexpr uint8_t SECRET[192] = {
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
        0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
        0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
        0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
        0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
        0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
        0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
        0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
        0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
        0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
        0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
        0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
    };

    static uint64_t word(const uint8_t* p) {
        uint64_t value;
        std::memcpy(&value, p, 8);
        return value;
    }

    // sums[i ^ 1] += value[i]; sums[i] += low half of keyed[i] * high half: compilers do not find this by themselves.
    PW_INLINE void add(const uint8_t* stripe, const uint8_t* secret) {
#if defined(__AVX512F__)
        const __m512i value = _mm512_loadu_si512(stripe), keyed = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        const __m512i sums = _mm512_add_epi64(_mm512_load_si512(sums_), _mm512_shuffle_epi32(value, _MM_PERM_BADC));
        _mm512_store_si512(sums_, _mm512_add_epi64(sums, product));
#elif defined(__AVX2__)
        for (int i = 0; i < 8; i += 4) {
            const __m256i value = _mm256_loadu_si256((const __m256i*)(stripe + i * 8));
            const __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i*)(secret + i * 8)));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            __m256i* sums = (__m256i*)(sums_ + i);
            *sums = _mm256_add_epi64(_mm256_add_epi64(*sums, _mm256_shuffle_epi32(value, 0x4e)), product);
        }
#else
        for (int i = 0; i < 8; i++) {
            const uint64_t value = word(stripe + i * 8), keyed = value ^ word(secret + i * 8);
            sums_[i ^ 1] += value;
            sums_[i] += (keyed & 0xffffffffu) * (keyed >> 32);
        }
#endif
    }

    PW_INLINE void add(const uint8_t* stripes, int64_t count) {
        for (int64_t i = 0; i < count; i++) add(stripes + i * STRIPE, SECRET + i * 8);
    }

    void scramble() {
        const uint8_t* key = SECRET + sizeof(SECRET) - STRIPE;
        for (int i = 0; i < 8; i++) sums_[i] = (sums_[i] ^ sums_[i] >> 47 ^ word(key + i * 8)) * PRIME32_1;
    }

    const uint8_t* const data_;
    const int64_t size_, blocks_;  // the last stripe is never part of a whole block
    int64_t done_ = 0;             // blocks
    alignas(64) uint64_t sums_[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
};

}  // namespace pw

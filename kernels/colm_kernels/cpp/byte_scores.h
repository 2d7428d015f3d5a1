// Scores of int8 keys by products of bytes (VNNI). Include after a vec_avx512.h.
//
// Keys stay bytes. A query is two or three signed digits of base 256 a feature, in units of its own: about 24 bits, as
// fp32 has of its largest feature, or 16, which hold a bf16 one and what is down to 1/256 of it. Sums of bytes' products
// are exact, so their order means nothing.
#pragma once
#ifdef __AVX512VNNI__
#include <cstring>

namespace {

// sum + products of four neighbouring bytes in each word; those of `a` have no sign. GCC 12 copies every sum of the
// intrinsic from register to register, and some through memory.
inline __m512i add_products(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// Sums of each digit's products as one number. 256 times the highest digit's stays within 32 bits.
inline Vec join_digits(const __m512i (&sums)[2]) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), sums[0]));
}
inline Vec join_digits(const __m512i (&sums)[3]) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums[2], 8), sums[1]);
    return fma(_mm512_cvtepi32_ps(upper), splat(256.0f), _mm512_cvtepi32_ps(sums[0]));
}

template <int D, int kDigits>  // the lowest digit first
struct ByteScores {
    static constexpr int kWords = D / 4;  // of four features

    struct Query {
        int32_t digits[kDigits][kWords];
        float unit;              // what 1 in the lowest digit is worth
        int32_t start[kDigits];  // of a digit's sum: keys are read as key + 128, since one factor has no sign
    };

    static void prepare(const float* query, Query* to) {
        Vec best = zero();
        for (int d = 0; d < D; d += kLanes) best = max_magnitude(best, magnitude(load(query + d)));
        const uint32_t bits = _mm512_reduce_max_epu32(_mm512_castps_si512(best));
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        if (bits == 0 || bits >= 0x7f800000) {
            memset(to, 0, sizeof *to);
            to->unit = largest - largest;  // 0, or NaN
            return;
        }
        constexpr float kMost = kDigits == 3 ? 127 * 65536 : 127 * 256;  // so that rounding up leaves the highest digit a byte
        const float lift = largest < 0x1p-60f ? 0x1p60f : 1.0f;  // the quotient below must be finite
        to->unit = largest * lift / kMost / lift;
        const Vec factor = splat(kMost / (largest * lift)), lifted = splat(lift);
        __m512i sums[kDigits] = {};
        for (int d = 0; d < D; d += kLanes) {
            __m512i rest = _mm512_cvtps_epi32(mul(mul(load(query + d), lifted), factor));
#pragma GCC unroll 3
            for (int i = 0; i < kDigits; ++i) {
                const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
                rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
                sums[i] = _mm512_add_epi32(sums[i], digit);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to->digits[i] + d / 4), _mm512_cvtepi32_epi8(digit));
            }
        }
        for (int i = 0; i < kDigits; ++i) to->start[i] = -128 * _mm512_reduce_add_epi32(sums[i]);
    }

    // Transposes keys by words: panels of (kWords, kLanes tokens).
    static void pack(const int8_t* keys, const int64_t* offsets, int num_padded, int32_t* packed) {
        const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(0x80808080));
        for (int first = 0; first < num_padded; first += kLanes) {
            for (int word = 0; word < kWords; word += kLanes) {
                constexpr int kLast = kWords % kLanes;
                Vec part[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    const int8_t* from = keys + offsets[first + i] + 4 * word;
                    part[i] = word + kLanes <= kWords ? load(reinterpret_cast<const float*>(from))
                                                      : load_first_words(from, kLast);
                }
                transpose(part);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    if (word + i >= kWords) break;
                    _mm512_storeu_si512(packed + first * kWords + (word + i) * kLanes,
                                        _mm512_xor_si512(_mm512_castps_si512(part[i]), flip));
                }
            }
        }
    }

    // scores[row][token] = query(row) . key(token) * scales[token] for kRows rows; num_padded is a multiple of two vectors.
    template <int kRows, int kStride, class Ask>
    static void score(const Query* queries, const int32_t* packed, const float* scales, int num_padded, float* scores,
                      Ask ask) {
        constexpr int kVecs = kRows > 2 ? 1 : 2;  // of tokens at once: sums for all of the arithmetic's latency
        for (int token = 0; token < num_padded; token += kVecs * kLanes) {
            __m512i sums[kRows][kDigits][kVecs];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
                for (int i = 0; i < kDigits; ++i) {
#pragma GCC unroll 2
                    for (int j = 0; j < kVecs; ++j) sums[row][i][j] = _mm512_set1_epi32(queries[row].start[i]);
                }
            }
            for (int word = 0; word < kWords; ++word) {
                for (int i = word; i < kVecs * kLanes; i += kWords) ask();
                __m512i keys[kVecs];
#pragma GCC unroll 2
                for (int j = 0; j < kVecs; ++j) {
                    keys[j] = _mm512_loadu_si512(packed + ((token / kLanes + j) * kWords + word) * kLanes);
                }
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
                    for (int i = 0; i < kDigits; ++i) {
                        const __m512i digits = _mm512_set1_epi32(queries[row].digits[i][word]);
#pragma GCC unroll 2
                        for (int j = 0; j < kVecs; ++j) {
                            sums[row][i][j] = add_products(sums[row][i][j], keys[j], digits);
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
                for (int j = 0; j < kVecs; ++j) {
                    __m512i each[kDigits];
#pragma GCC unroll 3
                    for (int i = 0; i < kDigits; ++i) each[i] = sums[row][i][j];
                    const int at = token + j * kLanes;
                    const Vec sum = join_digits(each);
                    store(scores + row * kStride + at, mul(mul(sum, splat(queries[row].unit)), load(scales + at)));
                }
            }
        }
    }
};

// What Decode calls the arithmetic of the scores.
template <int kNumDigits>
struct ByteWords {
    static constexpr int kPerWord = 4, kDigits = kNumDigits;
};

}  // namespace
#endif

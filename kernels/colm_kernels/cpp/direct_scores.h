// Scores of keys as they lie, where a CPU has no products of bf16 pairs or of bytes. Include after vec_avx2.h.
//
// With eight lanes, transposing and widening a block of keys takes as long as multiplying it by a few queries. So a key is
// widened in registers and multiplied where it was read, and sums run across lanes once a score. Every score has one
// order of sums, whatever rows and tokens are beside it.
#pragma once
#ifndef __AVX512F__
#include <cstring>

namespace {

constexpr int kTokensAtOnce = 8;  // a vector of scores; two keys of them share each read of a query

// Lane i of the result is the sum of the lanes of key i. Two keys a vector: pairs[i] holds parts of 2i and 2i + 1.
inline Vec join_two(Vec a, Vec b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
inline Vec join_pairs_of_keys(const Vec* pairs) {
    Vec four[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const Vec ab = pairs[2 * i], cd = pairs[2 * i + 1];
        four[i] = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    return add(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

// Keys of fp32 or bf16, or int8 beside queries of fp32: products of fp32.
template <class In, int D>
struct DirectScores {
    static constexpr int kParts = sizeof(In) == 2 ? 2 : 1;  // vectors that one read is widened to
    static_assert(D % (kParts * kLanes) == 0);

    struct Query {
        alignas(32) float features[D];  // in the order in which a key's are widened
    };

    static void prepare(const float* query, Query* to) {
        for (int d = 0; d < D; ++d) {
            const int from = kParts == 1 ? d : d / (2 * kLanes) * (2 * kLanes) + d % kLanes * 2 + d / kLanes % 2;
            to->features[d] = query[from];
        }
    }

    static void widen(const uint16_t* key, Vec (&to)[kParts]) { split_pairs(load_pairs(key), &to[0], &to[kParts - 1]); }
    template <class Number>
    static void widen(const Number* key, Vec (&to)[kParts]) {
        to[0] = load_as_float(key);
    }

    // scores[row][token] = query(row) . key(token), times scales[token] where keys are int8, of kRows rows and num_padded
    // tokens; two keys at a time, for which it asks.
    template <int kRows, int kStride, class Ask>
    __attribute__((noinline)) static void score(const Query* queries, const In* keys, const int64_t* offsets, const float* scales,
                      int num_padded, float* scores, Ask ask) {
        for (int token = 0; token < num_padded; token += kTokensAtOnce) {
            Vec pairs[kRows][kTokensAtOnce / 2];
#pragma GCC unroll 1
            for (int i = 0; i < kTokensAtOnce / 2; ++i) {
                const In *first = keys + offsets[token + 2 * i], *second = keys + offsets[token + 2 * i + 1];
                ask(2);
                Vec acc[kRows][2];
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) acc[row][0] = acc[row][1] = zero();
#pragma GCC unroll 16
                for (int d = 0; d < D; d += kParts * kLanes) {
                    Vec a[kParts], b[kParts];
                    widen(first + d, a);
                    widen(second + d, b);
#pragma GCC unroll 2
                    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
                        for (int row = 0; row < kRows; ++row) {
                            const Vec query = load(queries[row].features + d + part * kLanes);
                            add_product(acc[row][0], a[part], query);
                            add_product(acc[row][1], b[part], query);
                        }
                    }
                }
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) pairs[row][i] = join_two(acc[row][0], acc[row][1]);
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                const Vec sums = join_pairs_of_keys(pairs[row]);
                if constexpr (sizeof(In) == 1) {
                    store(scores + row * kStride + token, mul(sums, load(scales + token)));
                } else {
                    store(scores + row * kStride + token, sums);
                }
            }
        }
    }
};

// Keys of int8 beside queries of bf16: products of 16-bit numbers. A query is whole numbers in units of its own, about 16
// bits, which hold a bf16 one and what is down to 1/256 of it. Sums of their products with bytes are exact.
template <int D>
struct ShortScores {
    static constexpr int kStep = 2 * kLanes;
    static_assert(D % kStep == 0 && D <= 256, "the largest sum fits in 32 bits");

    struct Query {
        alignas(32) int16_t features[D];
        float unit;  // what 1 is worth
    };

    static void prepare(const float* query, Query* to) {
        Vec best = zero();
        for (int d = 0; d < D; d += kLanes) best = max_magnitude(best, magnitude(load(query + d)));
        alignas(32) uint32_t lanes[kLanes];
        store(reinterpret_cast<float*>(lanes), best);
        uint32_t bits = 0;
        for (uint32_t each : lanes) bits = each > bits ? each : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        if (bits == 0 || bits >= 0x7f800000) {
            memset(to, 0, sizeof *to);
            to->unit = largest - largest;  // 0, or NaN
            return;
        }
        constexpr float kMost = 32767;
        const float lift = largest < 0x1p-60f ? 0x1p60f : 1.0f;  // the quotient below must be finite
        to->unit = largest * lift / kMost / lift;
        const Vec factor = splat(kMost / (largest * lift)), lifted = splat(lift);
        for (int d = 0; d < D; d += kLanes) {
            const __m256i whole = _mm256_cvtps_epi32(mul(mul(load(query + d), lifted), factor));
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to->features + d), words);
        }
    }

    static __m256i widen(const int8_t* key) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(key)));
    }

    static __m256i join_two(__m256i a, __m256i b) {
        return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }

    // scores[row][token] = query(row) . key(token) * scales[token] of kRows rows; two keys at a time, for which it asks.
    template <int kRows, int kStride, class Ask>
    __attribute__((noinline)) static void score(const Query* queries, const int8_t* keys, const int64_t* offsets, const float* scales,
                      int num_padded, float* scores, Ask ask) {
        for (int token = 0; token < num_padded; token += kTokensAtOnce) {
            __m256i pairs[kRows][kTokensAtOnce / 2];
#pragma GCC unroll 1
            for (int i = 0; i < kTokensAtOnce / 2; ++i) {
                const int8_t *first = keys + offsets[token + 2 * i], *second = keys + offsets[token + 2 * i + 1];
                ask(2);
                __m256i acc[kRows][2];
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) acc[row][0] = acc[row][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
                for (int d = 0; d < D; d += kStep) {
                    const __m256i a = widen(first + d), b = widen(second + d);
#pragma GCC unroll 4
                    for (int row = 0; row < kRows; ++row) {
                        const auto* from = reinterpret_cast<const __m256i*>(queries[row].features + d);
                        const __m256i query = _mm256_loadu_si256(from);
                        add_products(acc[row][0], a, query);
                        add_products(acc[row][1], b, query);
                    }
                }
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) pairs[row][i] = join_two(acc[row][0], acc[row][1]);
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                __m256i four[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const __m256i ab = pairs[row][2 * i], cd = pairs[row][2 * i + 1];
                    four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
                }
                const __m256i sum = _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                                                     _mm256_permute2x128_si256(four[0], four[1], 0x31));
                store(scores + row * kStride + token,
                      mul(mul(_mm256_cvtepi32_ps(sum), splat(queries[row].unit)), load(scales + token)));
            }
        }
    }
};

// What Decode calls the arithmetic of the latter.
struct ShortWords {
    static constexpr int kPerWord = 4, kDigits = 2;
};

template <class Op, class In, int D>
struct DirectScoresOf {
    using Type = DirectScores<In, D>;
};
template <int D>
struct DirectScoresOf<ShortWords, int8_t, D> {
    using Type = ShortScores<D>;
};

}  // namespace
#endif

// Sums of weighted int8 values by products of bytes (VNNI). Include after a vec_avx512.h.
//
// Values stay bytes. A row's weights in a block of tokens, each times its token's scale, are two or three digits of base
// 256 without sign, in units of the largest of them: about 16 or 24 bits. Sums of bytes' products are exact, so their
// order means nothing.
#pragma once
#ifdef __AVX512VNNI__
#include <cstring>
#include "byte_scores.h"

namespace {

// A row of the output is in the order that products leave it in, until `arrange`: words of four columns are transposed
// as a matrix of four by four.
template <int D, int kDigits, int kBlock>
struct ByteValues {
    struct Weights {
        uint8_t digits[kDigits][kBlock];
        float unit;  // what 1 in the lowest digit is worth
    };
    static_assert(sizeof(Weights) <= kBlock * sizeof(float), "digits take the place of the weights");

    // Takes the first `count` weights, each times its token's scale. False, and they are left so multiplied, if one is
    // negative or not finite, or all are tiny.
    static bool prepare(float* weights, const float* scales, int count) {
        Vec each[kBlock / kLanes];
        __m512i best = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < kBlock / kLanes; ++i) {
            const __mmask16 seen = first(count - i * kLanes);
            each[i] = _mm512_maskz_mul_ps(seen, load(weights + i * kLanes), load(scales + i * kLanes));
            best = _mm512_max_epu32(best, _mm512_castps_si512(each[i]));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(best);
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        if (bits >= 0x7f800000 || (bits != 0 && largest < 0x1p-100f)) {
            for (int i = 0; i < kBlock / kLanes; ++i) store(weights + i * kLanes, each[i]);
            return false;
        }
        // So that rounding up leaves the highest digit a byte.
        constexpr float kMost = kDigits == 3 ? 255 * 65536 : 255 * 256;
        auto* to = reinterpret_cast<Weights*>(weights);
        const Vec factor = splat(bits == 0 ? 0.0f : kMost / largest);
#pragma GCC unroll 4
        for (int i = 0; i < kBlock / kLanes; ++i) {
            __m512i rest = _mm512_cvtps_epi32(mul(each[i], factor));
#pragma GCC unroll 3
            for (int digit = 0; digit < kDigits; ++digit, rest = _mm512_srli_epi32(rest, 8)) {
                auto* at = reinterpret_cast<__m128i*>(to->digits[digit] + i * kLanes);
                _mm_storeu_si128(at, _mm512_cvtepi32_epi8(rest));
            }
        }
        to->unit = largest / kMost;
        return true;
    }

    // output[row] = output[row] * decay[row] + sum over tokens of weights[row][token] * value(token), for kRows rows. Reads
    // up to 3 tokens past the last one; hidden ones weigh nothing. Asks twice a token for 64 columns.
    template <int kRows, class Ask>
    static void add(const float* weights, const int8_t* values, const int64_t* offsets, int count, const float* decay,
                    float* output, Ask ask) {
        const int num_padded = (count + 3) / 4 * 4;
        const auto value = [&](int token) {
            ask(1);
            return values + offsets[token];
        };
        const auto of = [&](int row) { return reinterpret_cast<const Weights*>(weights + row * kBlock); };
        for (int column = 0; column < D; column += 4 * kLanes) {
            // Columns 8 to 15 of every 16, or 0 to 7, at a time: their sums fit in the registers.
            for (int half = 0; half < 2; ++half) {
                __m512i sums[kRows][2][kDigits];
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 6
                    for (int i = 0; i < 2 * kDigits; ++i) sums[row][i / kDigits][i % kDigits] = _mm512_setzero_si512();
                }
                for (int token = 0; token < num_padded; token += 4) {
                    __m512i part[4];
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(value(token + i) + column);
                    const auto pair = [&](__m512i a, __m512i b) {
                        return half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
                    };
                    const __m512i a = pair(part[0], part[1]), b = pair(part[2], part[3]);
                    const __m512i words[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
#pragma GCC unroll 4
                    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
                        for (int i = 0; i < kDigits; ++i) {
                            int32_t four;
                            memcpy(&four, of(row)->digits[i] + token, sizeof four);
                            const __m512i digits = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                            for (int j = 0; j < 2; ++j) {
                                sums[row][j][i] = add_products(sums[row][j][i], digits, words[j]);
                            }
                        }
                    }
                }
#pragma GCC unroll 4
                for (int row = 0; row < kRows; ++row) {
                    const Vec factor = splat(decay[row]), unit = splat(of(row)->unit);
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j) {
                        float* to = output + row * D + column + (2 * half + j) * kLanes;
                        store(to, fma(join_digits(sums[row][j]), unit, mul(load(to), factor)));
                    }
                }
            }
        }
    }

    // A row of the output, from the order of the products into that of the head dim, or back.
    static void arrange(float* row) {
        for (int column = 0; column < D; column += 4 * kLanes) {
            Vec part[4];
            for (int i = 0; i < 4; ++i) part[i] = load(row + column + i * kLanes);
            const Vec a = _mm512_shuffle_f32x4(part[0], part[1], 0x88), b = _mm512_shuffle_f32x4(part[2], part[3], 0x88);
            const Vec c = _mm512_shuffle_f32x4(part[0], part[1], 0xdd), d = _mm512_shuffle_f32x4(part[2], part[3], 0xdd);
            store(row + column, _mm512_shuffle_f32x4(a, b, 0x88));
            store(row + column + kLanes, _mm512_shuffle_f32x4(c, d, 0x88));
            store(row + column + 2 * kLanes, _mm512_shuffle_f32x4(a, b, 0xdd));
            store(row + column + 3 * kLanes, _mm512_shuffle_f32x4(c, d, 0xdd));
        }
    }
};

}  // namespace
#endif

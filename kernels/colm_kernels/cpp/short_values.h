// Sums of weighted int8 values by products of 16-bit numbers, where a CPU has no products of bytes. Include after
// vec_avx2.h.
//
// Two tokens' values of a column are brought side by side once for all rows, and meet two weights in one instruction. A
// row's weights in a block of tokens, each times its token's scale, are whole numbers in units of the largest of them,
// about 15 bits. Sums of their products are exact, so their order means nothing.
#pragma once
#ifndef __AVX512F__
#include <cstring>
#include "direct_values.h"

namespace {

template <int D, int kBlock>
struct ShortValues {
    static constexpr int kStep = 2 * kLanes;  // columns that one read is widened to
    static constexpr float kMost = 32767;
    static_assert(D % kStep == 0);
    static_assert(kBlock % kStep == 0 && kBlock * 32767LL * 128 < 1LL << 31, "the largest sum fits in 32 bits");

    struct Weights {
        int16_t numbers[kBlock];
        float unit;  // what 1 is worth
    };
    static_assert(sizeof(Weights) <= kBlock * sizeof(float), "they take the place of the weights");

    // Takes the first `count` weights, each times its token's scale. False, and they are left so multiplied, if one is
    // negative or not finite, or all are tiny.
    static bool prepare(float* weights, const float* scales, int count) {
        Vec each[kBlock / kLanes], best = zero();
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; i += kLanes) {
            const Vec weight = mul(load(weights + i), load(scales + i));
            each[i / kLanes] = count == kBlock ? weight : keep_first(weight, count - i, zero());
            best = max_magnitude(best, each[i / kLanes]);
        }
        alignas(32) uint32_t lanes[kLanes];
        store(reinterpret_cast<float*>(lanes), best);
        uint32_t bits = 0;
        for (uint32_t lane : lanes) bits = lane > bits ? lane : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        if (bits >= 0x7f800000 || (bits != 0 && largest < 0x1p-100f)) {
            for (int i = 0; i < kBlock; i += kLanes) store(weights + i, each[i / kLanes]);
            return false;
        }
        auto* to = reinterpret_cast<Weights*>(weights);
        const Vec factor = splat(bits == 0 ? 0.0f : kMost / largest);
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; i += kStep) {
            const __m256i low = _mm256_cvtps_epi32(mul(each[i / kLanes], factor));
            const __m256i high = _mm256_cvtps_epi32(mul(each[i / kLanes + 1], factor));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->numbers + i),
                                _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
        }
        to->unit = largest / kMost;
        return true;
    }

    // output[row] = output[row] * decay[row] + sum over tokens of weights[row][token] * value(token), for kRows rows. Reads
    // one token past an odd number; hidden ones weigh nothing. Asks for as many tokens as there are, or some more.
    template <int kRows, class Ask>
    __attribute__((noinline)) static void add(const float* weights, const int8_t* values, const int64_t* offsets,
                                              int count, const float* decay, float* output, Ask ask) {
        // Columns at once whose sums fit in the registers.
        constexpr int kMany = kRows == 1 ? 4 : kRows < 4 ? 2 : 1;
        constexpr int kSteps = D % (kMany * kStep) == 0 ? kMany : 1, kShare = kAskTokens * (D / (kSteps * kStep));
        static_assert(kShare % 2 == 0);
        const auto of = [&](int row) { return reinterpret_cast<const Weights*>(weights + row * kBlock); };
        for (int column = 0; column < D; column += kSteps * kStep) {
            __m256i sums[kRows][kSteps][2];
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
                for (int i = 0; i < 2 * kSteps; ++i) sums[row][i / 2][i % 2] = _mm256_setzero_si256();
            }
#pragma GCC unroll 1
            for (int begin = 0; begin < count; begin += kShare) {
                ask(kAskTokens);
                const int end = count - begin < kShare ? count : begin + kShare;
#pragma GCC unroll 1
                for (int token = begin; token < end; token += 2) {
                    const int8_t *first = values + offsets[token] + column, *second = values + offsets[token + 1] + column;
#pragma GCC unroll 4
                    for (int step = 0; step < kSteps; ++step) {
                        const __m256i a = widen(first + step * kStep), b = widen(second + step * kStep);
                        // Columns 0 to 3 and 8 to 11 of the step, then the others.
                        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
#pragma GCC unroll 4
                        for (int row = 0; row < kRows; ++row) {
                            __m256i(&sum)[2] = sums[row][step];
                            add_weighted(sum[0], sum[1], of(row)->numbers + token, low, high);
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                const Vec factor = splat(decay[row]), unit = splat(of(row)->unit);
#pragma GCC unroll 4
                for (int step = 0; step < kSteps; ++step) {
                    const __m256i a = sums[row][step][0], b = sums[row][step][1];
                    const __m256i halves[2] = {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        float* to = output + row * D + column + step * kStep + i * kLanes;
                        store(to, fma(_mm256_cvtepi32_ps(halves[i]), unit, mul(load(to), factor)));
                    }
                }
            }
        }
    }

    // Columns of the output are in their order already.
    static void arrange(float*) {}

  private:
    // As of DirectValues; products of two neighbouring numbers meet in one sum.
    static void add_weighted(__m256i& x, __m256i& y, const int16_t* weights, __m256i a, __m256i b) {
        __m256i factor, products;
        asm("vpbroadcastd %4, %2\n\tvpmaddwd %5, %2, %3\n\tvpaddd %3, %0, %0\n\tvpmaddwd %6, %2, %2\n\tvpaddd %2, %1, %1"
            : "+&x"(x), "+x"(y), "=&x"(factor), "=&x"(products)
            : "m"(*reinterpret_cast<const int16_t(*)[2]>(weights)), "x"(a), "x"(b));
    }

    static __m256i widen(const int8_t* from) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
};

}  // namespace
#endif

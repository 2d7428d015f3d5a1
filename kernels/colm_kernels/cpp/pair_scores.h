// Scores of bf16 keys by products of pairs (VDPBF16PS), read untransposed where they lie. Include after a vec_avx512.h.
#pragma once
#ifdef __AVX512BF16__
#include "tile.h"

namespace {

template <int D>
struct PairScores {
    // Pairs of elements, 32 a vector; a vector that the head dim fills by half ends in zeros.
    static constexpr int kVecs = (D + 31) / 32;

    static __m512bh load_pairs_of(const uint16_t* from, int vec) {
        from += vec * 32;
        if (vec * 32 + 32 <= D) return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return reinterpret_cast<__m512bh>(_mm512_zextsi256_si512(half));
    }

    // scores[row][key] = query(row) . key for kRows rows, one dot product along the head dim at a time. Calls `ask` once a
    // key.
    template <int kRows, int kStride, class Ask>
    static void score(const uint16_t* queries, const uint16_t* keys, const int64_t* offsets, int num_padded, float* scores,
                      Ask ask) {
        for (int key = 0; key < num_padded; key += kLanes) {
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                Vec acc[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    if (row == 0) ask();
                    const uint16_t* from = keys + offsets[key + i];
                    acc[i] = zero();
#pragma GCC unroll 4
                    for (int vec = 0; vec < kVecs; ++vec) {
                        const __m512bh query = load_pairs_of(queries + row * D, vec);
                        acc[i] = Bf16Words::multiply_add(acc[i], load_pairs_of(from, vec), query);
                    }
                }
                store(scores + row * kStride + key, reduce_each(acc, [](Vec a, Vec b) { return add(a, b); }));
            }
        }
    }
};

}  // namespace
#endif

// Sums of weighted values, where a CPU has 16 registers of eight lanes. Include after vec_avx2.h.
//
// Products are written out and functions are not inlined, so that GCC 12 keeps the sums in registers.
#pragma once
#ifndef __AVX512F__

namespace {

// Tokens whose memory is asked for at a time, while values are weighted.
constexpr int kAskTokens = 2;

template <class In, int D>
struct DirectValues {
    static constexpr int kVecs = 2;  // that one read is widened to
    static_assert(D % (kVecs * kLanes) == 0);

    // Two vectors; those of bf16 have the even elements, then the odd ones.
    static void widen(const uint16_t* from, Vec* a, Vec* b) { split_pairs(load_pairs(from), a, b); }
    template <class Number>
    static void widen(const Number* from, Vec* a, Vec* b) {
        *a = load_as_float(from);
        *b = load_as_float(from + kLanes);
    }

    // The weight is read again for each pair of sums, so that no register keeps it beside them.
    static void add_weighted(Vec& x, Vec& y, const float& weight, Vec a, Vec b) {
        Vec factor;
        asm("vbroadcastss %3, %2\n\tvfmadd231ps %4, %2, %0\n\tvfmadd231ps %5, %2, %1"
            : "+&x"(x), "+x"(y), "=&x"(factor)
            : "m"(weight), "x"(a), "x"(b));
    }

    // output[row] = output[row] * decay[row] + sum over tokens of weights[row][token] * value(token), for kRows rows. Asks
    // for as many tokens as there are, or some more.
    template <int kRows, int kStride, class Ask>
    __attribute__((noinline)) static void add(const float* weights, const In* values, const int64_t* offsets, int count,
                                              const float* decay, float* output, Ask ask) {
        // As many sums as arithmetic's latency needs.
        constexpr int kMany = kRows == 1 ? 4 : kRows < 4 ? 2 : 1;
        constexpr int kPairs = D % (kMany * kVecs * kLanes) == 0 ? kMany : D % (2 * kVecs * kLanes) == 0 && kMany > 1 ? 2 : 1;
        constexpr int kColumns = kPairs * kVecs * kLanes, kShare = kAskTokens * (D / kColumns);
        for (int column = 0; column < D; column += kColumns) {
            Vec even[kRows][kPairs], odd[kRows][kPairs];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                const Vec factor = splat(decay[i]);
#pragma GCC unroll 4
                for (int j = 0; j < kPairs; ++j) {
                    const float* at = output + i * D + column + j * kVecs * kLanes;
                    even[i][j] = mul(load(at), factor);
                    odd[i][j] = mul(load(at + kLanes), factor);
                }
            }
#pragma GCC unroll 1
            for (int first = 0; first < count; first += kShare) {
                ask(kAskTokens);
                const int end = count - first < kShare ? count : first + kShare;
#pragma GCC unroll 1
                for (int token = first; token < end; ++token) {
                    const In* from = values + offsets[token] + column;
#pragma GCC unroll 4
                    for (int j = 0; j < kPairs; ++j) {
                        Vec a, b;
                        widen(from + j * kVecs * kLanes, &a, &b);
#pragma GCC unroll 4
                        for (int i = 0; i < kRows; ++i) {
                            add_weighted(even[i][j], odd[i][j], weights[i * kStride + token], a, b);
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
                for (int j = 0; j < kPairs; ++j) {
                    float* at = output + i * D + column + j * kVecs * kLanes;
                    store(at, even[i][j]);
                    store(at + kLanes, odd[i][j]);
                }
            }
        }
    }
};

}  // namespace
#endif

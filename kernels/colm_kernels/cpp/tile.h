// The register tile of both products of attention. Include after a vec_*.h.
#pragma once
#include <cstdint>

namespace {

// fp32 arithmetic: one number a word.
struct FloatWords {
    using Word = float;
    static constexpr int kPerWord = 1;
    static Vec broadcast(const Word* p) { return splat(*p); }
    static Vec load_words(const Word* p) { return load(p); }
    static Vec multiply_add(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
};

#ifdef __AVX512BF16__
// bf16 products with fp32 sums: a word holds two neighbours along the summed dimension.
struct Bf16Words {
    using Word = uint32_t;
    static constexpr int kPerWord = 2;
    static __m512bh broadcast(const Word* p) {
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(*p)));
    }
    static __m512bh load_words(const Word* p) {
        __m512i words = _mm512_loadu_si512(p);
        asm("" : "+v"(words));  // or GCC loads them again for every row
        return reinterpret_cast<__m512bh>(words);
    }
    static Vec multiply_add(Vec acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

struct Nothing {
    void operator()(int64_t) const {}
};

// C (kRows x kVecs vectors) = A B, or C * decay + A B with one factor a row. A is row-major, B has one row of words per
// step of `depth`. Strides are constants so that every address is a displacement from one pointer. `meanwhile` is called
// at every step. `largest`, where given, has a vector a row: it becomes the lanewise maximum of itself and that row of C.
template <class Op, int kRows, int kVecs, int kStrideA, int kStrideB, int kStrideC, bool kAccumulate,
          class Meanwhile = Nothing>
__attribute__((always_inline)) inline void multiply_tile(const typename Op::Word* a, const typename Op::Word* b,
                                                         int64_t depth, float* c, const float* decay,
                                                         Meanwhile meanwhile = {}, Vec* largest = nullptr) {
    Vec acc[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) acc[i][j] = zero();
    }
    for (int64_t step = 0; step < depth; ++step) {
        meanwhile(step);
        decltype(Op::load_words(b)) row[kVecs];
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) row[j] = Op::load_words(b + step * kStrideB + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const auto scalar = Op::broadcast(a + i * kStrideA + step);
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) acc[i][j] = Op::multiply_add(acc[i][j], scalar, row[j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        const Vec factor = kAccumulate ? splat(decay[i]) : zero();
        if (largest != nullptr) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) largest[i] = max(acc[i][j], largest[i]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) {
            float* to = c + i * kStrideC + j * kLanes;
            store(to, kAccumulate ? fma(load(to), factor, acc[i][j]) : acc[i][j]);
        }
    }
}

}  // namespace

// Sixteen fp32 lanes. See abi.h for why everything is in an unnamed namespace.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace {

using Vec = __m512;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline void add_product(Vec& sum, Vec a, Vec b) { sum = fma(a, b, sum); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
inline Vec magnitude(Vec x) { return _mm512_abs_ps(x); }

// The larger of two magnitudes, compared by their bits: NaN is above infinity, infinity above finite numbers.
inline Vec max_magnitude(Vec a, Vec b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// The first `count` lanes of x, the others from y.
inline Vec keep_first(Vec x, int count, Vec y) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1), y, x);
}

inline Vec load_as_float(const float* p) { return load(p); }
inline Vec load_as_float(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_as_float(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline Vec load_halves(const uint16_t* p) {  // fp16
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The whole numbers in bits kBit .. kBit + 3 of every word, in two's complement: looked up, since a permutation reads
// the 4 lowest bits of its indices alone.
template <int kBit>
inline Vec load_nibbles(const unsigned char* p) {
    const Vec values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), kBit), values);
}

// The first `count` words; the others are zero, and their memory is not touched.
inline Vec load_first_words(const void* p, int count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p));
}

// The elements of every 32-bit word as fp32: one of fp32, two of bf16, four of int8; the lowest ones first.
inline void split_words(Vec words, Vec (&to)[1]) { to[0] = words; }
inline void split_words(Vec words, Vec (&to)[2]) {
    const __m512i bits = _mm512_castps_si512(words);
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
inline void split_words(Vec words, Vec (&to)[4]) {
    const __m512i bits = _mm512_castps_si512(words);
    to[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bits, 24), 24));
    to[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bits, 16), 24));
    to[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bits, 8), 24));
    to[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 24));
}

// Two bf16 a lane, widened: elements 0, 2, .. and 1, 3, ..
inline void split_pairs(Vec pairs, Vec* even, Vec* odd) {
    const __m512i bits = _mm512_castps_si512(pairs);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
// The way back: elements 0 .. 15, then 16 .. 31.
inline void join_pairs(Vec even, Vec odd, Vec* low, Vec* high) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *low = _mm512_permutex2var_ps(even, order, odd);
    *high = _mm512_permutex2var_ps(even, _mm512_add_epi32(order, _mm512_set1_epi32(8)), odd);
}
inline Vec load_pairs(const uint16_t* p) { return load(reinterpret_cast<const float*>(p)); }

inline __m256i round_to_bf16(Vec x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    // Rounding could carry a NaN's payload into infinity.
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

// As it would be read back after it was stored at such a pointer.
inline Vec rounded_for(const float*, Vec x) { return x; }
inline Vec rounded_for(const uint16_t*, Vec x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bf16(x)), 16));
}

inline void store_from_float(float* p, Vec x) { store(p, x); }
inline void store_from_float(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(x));
}

// Only the first `count` lanes, at least none and at most all of them. Memory past them is not touched; a load fills the rest with zeros.
inline __mmask16 first(int64_t count) {
    return count <= 0 ? 0 : count < kLanes ? static_cast<__mmask16>((1u << count) - 1) : 0xffff;
}
inline Vec load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline Vec load_some(const uint16_t* p, int64_t count) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load_some(const int8_t* p, int64_t count) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), p)));
}
inline void store_some(float* p, Vec x, int64_t count) { _mm512_mask_storeu_ps(p, first(count), x); }
inline void store_some(uint16_t* p, Vec x, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), round_to_bf16(x)); }
// Rounded half to even; within -128 .. 127.
inline void store_some(int8_t* p, Vec x, int64_t count) {
    _mm_mask_storeu_epi8(p, first(count), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

// 2^f for f in [0, 1): minimax polynomials, relative error 8.2e-8 (1.41e-7 once computed in fp32), or 2.6e-6 where
// weights end up beside bf16 numbers. The finer one is 1 at 0: what a row has gathered is multiplied by 2^0 at every
// block of keys that leaves its maximum alone.
template <bool kCoarse>
inline Vec exp2_fraction(Vec f) {
    if constexpr (kCoarse) {
        Vec p = splat(1.353416791e-02f);
        p = fma(p, f, splat(5.201146062e-02f));
        p = fma(p, f, splat(2.414427569e-01f));
        p = fma(p, f, splat(6.930038345e-01f));
        return fma(p, f, splat(1.000002593e+00f));
    } else {
        Vec p = splat(1.866952633e-03f);
        p = fma(p, f, splat(9.017480537e-03f));
        p = fma(p, f, splat(5.579951406e-02f));
        p = fma(p, f, splat(2.401645929e-01f));
        p = fma(p, f, splat(6.931512952e-01f));
        return fma(p, f, splat(1.0f));
    }
}

// 2^x for x <= 0; 0 for -infinity. scalef multiplies by 2^floor(x) and underflows by itself.
template <bool kCoarse>
inline Vec exp2(Vec x) {
    return _mm512_scalef_ps(exp2_fraction<kCoarse>(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF)), x);
}

// In place: lane j of row i becomes lane i of row j. Rows are any 32-bit words.
inline void transpose(Vec* r) {
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    // r[4i + j]: within each 128-bit part, column j of that part, rows 4i .. 4i+3.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Vec a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        const Vec c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
        t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// Lane i of the result is the lanes of r[i], joined by `join`.
template <class Join>
inline Vec reduce_each(const Vec* r, Join join) {
    Vec s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Vec* q = r + 4 * i;
        const Vec ab = join(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
        const Vec cd = join(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
        s[i] = join(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    const Vec x = join(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
    const Vec y = join(_mm512_shuffle_f32x4(s[2], s[3], 0x88), _mm512_shuffle_f32x4(s[2], s[3], 0xdd));
    return join(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

}  // namespace

// Eight fp32 lanes; the same names as vec_avx512.h. See abi.h for why everything is in an unnamed namespace.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace {

using Vec = __m256;
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// GCC 12 moves sums of the intrinsic from register to register, and then some through memory.
inline void add_product(Vec& sum, Vec a, Vec b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
// sum + products of 16-bit numbers, two neighbours in each word. Of the intrinsics GCC 12 takes all products first.
inline void add_products(__m256i& sum, __m256i a, __m256i b) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
}
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline float sum_of_lanes(Vec x) {
    alignas(32) float lanes[kLanes];
    store(lanes, x);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
inline Vec magnitude(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

// The larger of two magnitudes, compared by their bits: NaN is above infinity, infinity above finite numbers.
inline Vec max_magnitude(Vec a, Vec b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// The first `count` lanes of x, the others from y.
inline Vec keep_first(Vec x, int count, Vec y) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}

inline Vec load_as_float(const float* p) { return load(p); }
inline Vec load_as_float(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_as_float(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline Vec load_halves(const uint16_t* p) {  // fp16
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The whole numbers in bits kBit .. kBit + 3 of every word, in two's complement.
template <int kBit>
inline Vec load_nibbles(const unsigned char* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 28 - kBit), 28));
}

// bf16 numbers from anywhere.
inline Vec widen_each(uint16_t a, uint16_t b, uint16_t c, uint16_t d, uint16_t e, uint16_t f, uint16_t g, uint16_t h) {
    __m128i low = _mm_cvtsi32_si128(a), high = _mm_cvtsi32_si128(e);
    low = _mm_insert_epi16(_mm_insert_epi16(_mm_insert_epi16(low, b, 1), c, 2), d, 3);
    high = _mm_insert_epi16(_mm_insert_epi16(_mm_insert_epi16(high, f, 1), g, 2), h, 3);
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_unpacklo_epi64(low, high));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// The first `count` words; the others are zero, and their memory is not touched.
inline Vec load_first_words(const void* p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(static_cast<const float*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}

// The elements of every 32-bit word as fp32: one of fp32, two of bf16, four of int8; the lowest ones first.
inline void split_words(Vec words, Vec (&to)[1]) { to[0] = words; }
inline void split_words(Vec words, Vec (&to)[2]) {
    const __m256i bits = _mm256_castps_si256(words);
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
inline void split_words(Vec words, Vec (&to)[4]) {
    const __m256i bits = _mm256_castps_si256(words);
    to[0] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bits, 24), 24));
    to[1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bits, 16), 24));
    to[2] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bits, 8), 24));
    to[3] = _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 24));
}

// Two bf16 a lane, widened: elements 0, 2, .. and 1, 3, ..
inline void split_pairs(Vec pairs, Vec* even, Vec* odd) {
    const __m256i bits = _mm256_castps_si256(pairs);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
// The way back: elements 0 .. 7, then 8 .. 15.
inline void join_pairs(Vec even, Vec odd, Vec* low, Vec* high) {
    const Vec a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    *low = _mm256_permute2f128_ps(a, b, 0x20);
    *high = _mm256_permute2f128_ps(a, b, 0x31);
}
inline Vec load_pairs(const uint16_t* p) { return load(reinterpret_cast<const float*>(p)); }

// The bf16 number nearest to each lane, half to even, in the upper half of the lane; what is in the lower half is to be
// dropped.
inline __m256i round_to_upper_half(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // Rounding could carry a NaN's payload into infinity.
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
}

// As it would be read back after it was stored at such a pointer.
inline Vec rounded_for(const float*, Vec x) { return x; }
inline Vec rounded_for(const uint16_t*, Vec x) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    return _mm256_castsi256_ps(_mm256_and_si256(round_to_upper_half(x), upper));
}

inline void store_from_float(float* p, Vec x) { store(p, x); }
inline void store_from_float(uint16_t* p, Vec x) {
    const __m256i high = _mm256_srli_epi32(round_to_upper_half(x), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

inline void store_from_float(int8_t* p, Vec x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// Only the first `count` lanes, at most all of them. Memory past them is not touched; a load fills the rest with zeros.
template <class In>
inline Vec load_some(const In* p, int64_t count) {
    if (count >= kLanes) return load_as_float(p);
    In whole[kLanes] = {};
    __builtin_memcpy(whole, p, count * sizeof(In));
    return load_as_float(whole);
}
// Integers are rounded half to even; within -128 .. 127.
template <class Out>
inline void store_some(Out* p, Vec x, int64_t count) {
    if (count >= kLanes) return store_from_float(p, x);
    Out whole[kLanes];
    store_from_float(whole, x);
    __builtin_memcpy(p, whole, count * sizeof(Out));
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

// 2^x for x <= 0; 0 below the normal range and for -infinity. The integer part goes straight into the exponent.
template <bool kCoarse>
inline Vec exp2(Vec x) {
    const Vec lowest = splat(-126.0f);
    // NaN passes the clamp: max returns its second operand when one is NaN.
    const Vec clamped = _mm256_max_ps(lowest, x);
    const Vec whole = _mm256_floor_ps(clamped);
    const Vec p = exp2_fraction<kCoarse>(_mm256_sub_ps(clamped, whole));
    // The bits of 1.0 plus `whole` steps of the exponent are 2^whole; multiplying keeps NaN a NaN.
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const Vec result = mul(p, _mm256_castsi256_ps(exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), result);
}

// In place: lane j of row i becomes lane i of row j. Rows are any 32-bit words.
inline void transpose(Vec* r) {
    Vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Vec low = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        r[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
        r[j] = low;
    }
}

// Lane i of the result is the lanes of r[i], joined by `join`.
template <class Join>
inline Vec reduce_each(const Vec* r, Join join) {
    Vec s[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const Vec* q = r + 4 * i;
        const Vec ab = join(_mm256_unpacklo_ps(q[0], q[1]), _mm256_unpackhi_ps(q[0], q[1]));
        const Vec cd = join(_mm256_unpacklo_ps(q[2], q[3]), _mm256_unpackhi_ps(q[2], q[3]));
        s[i] = join(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    return join(_mm256_permute2f128_ps(s[0], s[1], 0x20), _mm256_permute2f128_ps(s[0], s[1], 0x31));
}

}  // namespace

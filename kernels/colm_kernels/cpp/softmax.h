// One step of the online softmax. Include after a vec_*.h.
#pragma once
#include <cfloat>
#include <cstdint>
#include "tile.h"

namespace {

// Stores two vectors of weights, for the scores from i on, as the words that the product with V reads.
template <class Op>
inline void store_weights(float* scores, int i, Vec a, Vec b) {
    if constexpr (Op::kPerWord == 1) {
        store(scores + i, a);
        store(scores + i + kLanes, b);
    } else {
#ifdef __AVX512BF16__
        // In place: these words end before the scores not yet read.
        _mm512_storeu_si512(scores + i / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
#endif
    }
}

// Replace the scores of up to kLanes rows by their weights exp(scale * (score - row maximum)), in place, `num_padded` a
// row (a multiple of two vectors); those at num_visible[row] and past it are zero. The scale is applied here, in fp32,
// with log2(e) in it. `maximum`, `sum` and `decay` have kLanes entries; decay becomes the factor by which a row's output
// so far must be multiplied.
//
// `largest`, where given, has the lanewise maximum of each row's scores. Weights `num_ahead` and further past the visible
// ones are not read, so they may be left as they are.
template <class Op, bool kCoarse>
inline void soften(float* scores, int64_t stride, int num_rows, const int* num_visible, int num_padded,
                   float scale_log2, float* maximum, float* sum, float* decay, const Vec* largest = nullptr,
                   int num_ahead = 1 << 30) {
    const Vec lowest = splat(-FLT_MAX), factor = splat(scale_log2);
    Vec each[kLanes];
    for (int row = 0; largest != nullptr && row < num_rows; ++row) each[row] = largest[row];
    for (int row = 0; largest == nullptr && row < num_rows; ++row) {
        const float* from = scores + row * stride;
        const int visible = num_visible[row], whole = visible / kLanes * kLanes;
        // max returns its second operand when one is NaN; the weights below bring NaN back.
        Vec best[4] = {lowest, lowest, lowest, lowest};
        int i = 0;
        for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) best[j] = max(load(from + i + j * kLanes), best[j]);
        }
        for (; i < whole; i += kLanes) best[0] = max(load(from + i), best[0]);
        if (whole < visible) best[1] = max(keep_first(load(from + whole), visible - whole, lowest), best[1]);
        each[row] = max(max(best[0], best[1]), max(best[2], best[3]));
    }
    for (int row = num_rows; row < kLanes; ++row) each[row] = lowest;
    const Vec old_maximum = load(maximum);
    const Vec new_maximum = max(reduce_each(each, [](Vec a, Vec b) { return max(a, b); }), old_maximum);
    const Vec shrink = exp2<false>(mul(sub(old_maximum, new_maximum), factor));
    store(maximum, new_maximum);
    store(decay, shrink);

    for (int row = 0; row < num_rows; ++row) {
        float* at = scores + row * stride;
        const int visible = num_visible[row], whole = visible / (2 * kLanes) * (2 * kLanes);
        const Vec shift = splat(-maximum[row] * scale_log2);
        Vec total[2] = {zero(), zero()};
        for (int i = 0; i < whole; i += 2 * kLanes) {
            const Vec a = exp2<kCoarse>(fma(load(at + i), factor, shift));
            const Vec b = exp2<kCoarse>(fma(load(at + i + kLanes), factor, shift));
            total[0] = add(total[0], a);
            total[1] = add(total[1], b);
            store_weights<Op>(at, i, a, b);
        }
        const int end = num_padded - visible < num_ahead ? num_padded : visible + num_ahead;
        for (int i = whole; i < end; i += 2 * kLanes) {
            Vec pair[2];
            for (int j = 0; j < 2; ++j) {
                const int left = visible - i - j * kLanes;
                const int count = left < 0 ? 0 : left < kLanes ? left : kLanes;
                pair[j] = keep_first(exp2<kCoarse>(fma(load(at + i + j * kLanes), factor, shift)), count, zero());
                total[j] = add(total[j], pair[j]);
            }
            store_weights<Op>(at, i, pair[0], pair[1]);
        }
        each[row] = add(total[0], total[1]);
    }
    for (int row = num_rows; row < kLanes; ++row) each[row] = zero();
    store(sum, fma(load(sum), shrink, reduce_each(each, [](Vec a, Vec b) { return add(a, b); })));
}

}  // namespace

// AVX-512 F, BW, DQ, VL; bf16 inputs are widened to fp32 as they are packed.
#include "vec_avx512.h"
#include "decode.h"
#include "linear.h"
#include "norm.h"
#include "panel.h"
#include "prefill.h"
#include "quantise.h"
#include "quantised_panel.h"
#include "rotary.h"
#include "row_scores.h"
#include "swiglu.h"

namespace {

PrefillKernel prefill(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? prefill_of_dim<FloatWords, uint16_t>(head_dim) : prefill_of_dim<FloatWords, float>(head_dim);
}

RowScoresKernel row_scores(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? row_scores_of_dim<FloatWords, uint16_t>(head_dim)
                              : row_scores_of_dim<FloatWords, float>(head_dim);
}

DecodeKernel decode(int32_t, int32_t page_dtype, int64_t head_dim) {
    switch (page_dtype) {
        case kBfloat16: return decode_of_dim<FloatWords, uint16_t>(head_dim);
        case kInt8: return decode_of_dim<FloatWords, int8_t>(head_dim);
        default: return decode_of_dim<FloatWords, float>(head_dim);
    }
}

LinearKernel linear(int32_t dtype) {
    return dtype == kBfloat16 ? Linear<uint16_t, Widened>::kernel() : Linear<float, Widened>::kernel();
}

LinearKernel panel(int32_t dtype) {
    return dtype == kBfloat16 ? Panel<WidePairs, uint16_t, 8>::kernel() : Panel<FloatWords, float, 8>::kernel();
}

LinearKernel quantised(int32_t dtype, int64_t format) {
    return dtype == kBfloat16 ? quantised_of<WideTerms<uint16_t>, 8>(format) : quantised_of<WideTerms<float>, 8>(format);
}

PackedKernel packed(int32_t) { return {}; }

template <class Args, template <class> class Kernel>
RowsKernel<Args> rows(int32_t dtype) {
    return {dtype == kBfloat16 ? Kernel<uint16_t>::run : Kernel<float>::run};
}

}  // namespace

const Variant kAvx512Variant = {
    prefill, row_scores, decode, linear, panel, quantised, packed, rows<NormArgs, Norm>, rows<RotaryArgs, Rotary>, rows<SwigluArgs, Swiglu>,
    rows<QuantiseArgs, Quantise>, rows<DequantiseArgs, Dequantise>,
};

// AVX2 and FMA; bf16 inputs are widened to fp32 as they are packed.
#include "vec_avx2.h"
#include "decode.h"
#include "linear.h"
#include "norm.h"
#include "packed.h"
#include "panel.h"
#include "prefill.h"
#include "quantise.h"
#include "quantised_panel.h"
#include "rotary.h"
#include "row_scores.h"
#include "swiglu.h"
#include "wide_panel.h"

namespace {

PrefillKernel prefill(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? prefill_of_dim<FloatWords, uint16_t>(head_dim) : prefill_of_dim<FloatWords, float>(head_dim);
}

RowScoresKernel row_scores(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? row_scores_of_dim<FloatWords, uint16_t>(head_dim)
                              : row_scores_of_dim<FloatWords, float>(head_dim);
}

DecodeKernel decode(int32_t dtype, int32_t page_dtype, int64_t head_dim) {
    switch (page_dtype) {
        case kBfloat16: return decode_of_dim<FloatWords, uint16_t>(head_dim);
        case kInt8:
            return dtype == kBfloat16 ? decode_of_dim<ShortWords, int8_t>(head_dim)
                                      : decode_of_dim<FloatWords, int8_t>(head_dim);
        default: return decode_of_dim<FloatWords, float>(head_dim);
    }
}

LinearKernel linear(int32_t dtype) {
    return dtype == kBfloat16 ? Linear<uint16_t, Widened>::kernel() : Linear<float, Widened>::kernel();
}

LinearKernel panel(int32_t dtype) {
    return dtype == kBfloat16 ? WidePanel::kernel() : Panel<FloatWords, float, 2>::kernel();
}

LinearKernel quantised(int32_t dtype, int64_t format) {
    return dtype == kBfloat16 ? quantised_of<WideTerms<uint16_t>, 2>(format) : quantised_of<WideTerms<float>, 2>(format);
}

PackedKernel packed(int32_t dtype) {
    return dtype == kBfloat16 ? Packed<FloatWords, uint16_t>::kernel() : Packed<FloatWords, float>::kernel();
}

template <class Args, template <class> class Kernel>
RowsKernel<Args> rows(int32_t dtype) {
    return {dtype == kBfloat16 ? Kernel<uint16_t>::run : Kernel<float>::run};
}

}  // namespace

const Variant kAvx2Variant = {
    prefill, row_scores, decode, linear, panel, quantised, packed, rows<NormArgs, Norm>, rows<RotaryArgs, Rotary>, rows<SwigluArgs, Swiglu>,
    rows<QuantiseArgs, Quantise>, rows<DequantiseArgs, Dequantise>,
};

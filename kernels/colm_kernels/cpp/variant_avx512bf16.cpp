// AVX-512 with VDPBF16PS and VNNI: attention and Linear (chain) of bf16 whose products are of bf16 pairs, and decode
// attention over int8 pages, whose scores are products of bytes. The other operations have nothing to gain from them, so
// they are left to the plain AVX-512 variant.
#include "vec_avx512.h"
#include "decode.h"
#include "linear.h"
#include "packed.h"
#include "panel.h"
#include "prefill.h"
#include "quantised_panel.h"
#include "row_scores.h"

namespace {

PrefillKernel prefill(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? prefill_of_dim<Bf16Words, uint16_t>(head_dim) : PrefillKernel{nullptr, nullptr, nullptr};
}

RowScoresKernel row_scores(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? row_scores_of_dim<Bf16Words, uint16_t>(head_dim) : RowScoresKernel{nullptr, nullptr};
}

DecodeKernel decode(int32_t dtype, int32_t page_dtype, int64_t head_dim) {
    switch (page_dtype) {
        case kBfloat16: return decode_of_dim<Bf16Words, uint16_t>(head_dim);
        case kInt8:
            return dtype == kBfloat16 ? decode_of_dim<ByteWords<2>, int8_t>(head_dim)
                                      : decode_of_dim<ByteWords<3>, int8_t>(head_dim);
        default: return {nullptr, nullptr};
    }
}

LinearKernel linear(int32_t dtype) {
    return dtype == kBfloat16 ? Linear<uint16_t, Pairs>::kernel() : LinearKernel{nullptr, nullptr, nullptr, 0};
}

LinearKernel panel(int32_t dtype) {
    return dtype == kBfloat16 ? Panel<Bf16Words, uint16_t, 8>::kernel() : LinearKernel{nullptr, nullptr, nullptr, 0};
}

LinearKernel quantised(int32_t dtype, int64_t format) {
    return dtype == kBfloat16 ? quantised_of<PairTerms, 8>(format) : LinearKernel{nullptr, nullptr, nullptr, 0};
}

PackedKernel packed(int32_t dtype) {
    return dtype == kBfloat16 ? Packed<Bf16Words, uint16_t>::kernel() : PackedKernel{};
}

template <class Args>
RowsKernel<Args> rows(int32_t) {
    return {nullptr};
}

}  // namespace

const Variant kAvx512Bf16Variant = {
    prefill, row_scores, decode, linear, panel, quantised, packed, rows<NormArgs>, rows<RotaryArgs>, rows<SwigluArgs>, rows<QuantiseArgs>,
    rows<DequantiseArgs>,
};

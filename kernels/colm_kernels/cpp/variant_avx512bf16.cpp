// AVX-512 with VDPBF16PS: bf16 prefill whose products are of bf16 pairs. The other operations are bounded by memory,
// not by arithmetic, and fp32 has nothing to gain, so they are left to the plain AVX-512 variant.
#include "vec_avx512.h"
#include "prefill.h"

namespace {

PrefillKernel prefill(int32_t dtype, int64_t head_dim) {
    return dtype == kBfloat16 ? prefill_of_dim<Bf16Words, uint16_t>(head_dim) : PrefillKernel{nullptr, nullptr, nullptr};
}

DecodeKernel decode(int32_t, int64_t) { return {nullptr, nullptr}; }

LinearKernel linear(int32_t) { return {nullptr, nullptr, nullptr}; }

template <class Args>
RowsKernel<Args> rows(int32_t) {
    return {nullptr};
}

}  // namespace

const Variant kAvx512Bf16Variant = {
    prefill, decode, linear, rows<NormArgs>, rows<RotaryArgs>, rows<SwigluArgs>, rows<QuantiseArgs>,
};

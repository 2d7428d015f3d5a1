// How calls of KV quantisation and of its way back are divided.
#include "launch.h"

COLM_EXPORT
int32_t colm_quantise(const QuantiseArgs* args, int32_t variant, int32_t num_threads) {
    if (!slots_fit(args->slots, args->num_tokens, args->num_slots)) return kBadTable;
    const auto kernel =
        select<RowsKernel<QuantiseArgs>>(variant, [&](const Variant& v) { return v.quantise(args->dtype); });
    const int64_t num_bytes = args->num_tokens * args->num_heads * args->head_dim * element_bytes(args->dtype);
    return run_rows(*args, kernel, args->num_tokens, num_bytes, num_threads);
}

COLM_EXPORT
int32_t colm_dequantise(const DequantiseArgs* args, int32_t variant, int32_t num_threads) {
    const auto kernel =
        select<RowsKernel<DequantiseArgs>>(variant, [&](const Variant& v) { return v.dequantise(args->dtype); });
    const int64_t num_bytes = args->num_tokens * args->num_heads * args->head_dim * element_bytes(args->dtype);
    return run_rows(*args, kernel, args->num_tokens, num_bytes, num_threads);
}

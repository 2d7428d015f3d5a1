// How a call of rotary embedding is divided.
#include "launch.h"

COLM_EXPORT
int32_t colm_rotary(const RotaryArgs* args, int32_t variant, int32_t num_threads) {
    if (!slots_fit(args->slots, args->num_tokens, args->num_slots)) return kBadTable;
    const auto kernel =
        select<RowsKernel<RotaryArgs>>(variant, [&](const Variant& v) { return v.rotary(args->dtype); });
    const int64_t head_bytes = args->head_dim * element_bytes(args->dtype) * (args->v == nullptr ? 1 : 2);
    return run_rows(*args, kernel, args->num_tokens, args->num_tokens * args->num_heads * head_bytes, num_threads);
}

// How a call of RMSNorm (chain) is divided.
#include "launch.h"

COLM_EXPORT
int32_t colm_rms_norm(const NormArgs* args, int32_t variant, int32_t num_threads) {
    const auto kernel = select<RowsKernel<NormArgs>>(variant, [&](const Variant& v) { return v.norm(args->dtype); });
    const int64_t num_bytes = args->num_rows * args->dim * element_bytes(args->dtype);
    return run_rows(*args, kernel, args->num_rows, num_bytes, num_threads);
}

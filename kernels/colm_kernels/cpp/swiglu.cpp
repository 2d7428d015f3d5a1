// How a call of SwiGLU is divided.
#include "launch.h"

COLM_EXPORT
int32_t colm_swiglu(const SwigluArgs* args, int32_t variant, int32_t num_threads) {
    const auto kernel =
        select<RowsKernel<SwigluArgs>>(variant, [&](const Variant& v) { return v.swiglu(args->dtype); });
    const int64_t num_bytes = 2 * args->num_rows * args->dim * element_bytes(args->dtype);
    return run_rows(*args, kernel, args->num_rows, num_bytes, num_threads);
}

// Shared by the launchers: a thread's workspace, the lookup of a variant's kernel, and the operations of a step. Only for files without target
// flags.
#pragma once
#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "pool.h"

// The functions that Python calls.
#define COLM_EXPORT extern "C" __attribute__((visibility("default")))

COLM_EXPORT int32_t colm_linear(LinearArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_rms_norm(const NormArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_rotary(const RotaryArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_quantise(const QuantiseArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_swiglu(const SwigluArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_decode_attention(const DecodeArgs* args, int32_t variant, int32_t num_threads);
COLM_EXPORT int32_t colm_prefill_attention(const PrefillArgs* given, int32_t variant, int32_t num_threads);

constexpr int64_t kFewestBytesPerThread = 256 << 10;  // fewer are read before another thread has woken

inline int64_t element_bytes(int64_t dtype) { return dtype == kInt8 ? 1 : dtype == kBfloat16 ? 2 : 4; }

// Memory of the calling thread, kept between calls, since fresh pages for every item would cost more than some items.
// Its contents are lost when a larger size is requested. Null if the allocation fails.
unsigned char* workspace(int64_t num_bytes);

extern const Variant* const kVariants[];

template <class Kernel, class Select>
Kernel select(int32_t variant, Select of) {
    // A variant that leaves a combination out defers to the next lower one, whose instructions it also has.
    for (; variant >= 0; --variant) {
        const Kernel kernel = of(*kVariants[variant]);
        if (kernel.run != nullptr) return kernel;
    }
    return {};
}

// Run an operation on independent rows, with a number of threads that fits its bytes.
template <class Args>
Status run_rows(const Args& args, RowsKernel<Args> kernel, int64_t num_rows, int64_t num_bytes, int num_threads) {
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t threads = std::min<int64_t>(num_threads, num_bytes / kFewestBytesPerThread);
    if (threads <= 1) {
        kernel.run(args, 0, num_rows);
        return kOk;
    }
    constexpr int64_t kItemsPerThread = 4;  // so that the last items even out
    struct Context {
        const Args& args;
        RowsKernel<Args> kernel;
        int64_t num_rows, rows_per_item;
    } context{args, kernel, num_rows, (num_rows + threads * kItemsPerThread - 1) / (threads * kItemsPerThread)};
    run_items(
        (num_rows + context.rows_per_item - 1) / context.rows_per_item, static_cast<int>(threads),
        [](void* opaque, int64_t item) {
            const auto& c = *static_cast<const Context*>(opaque);
            const int64_t begin = item * c.rows_per_item;
            c.kernel.run(c.args, begin, std::min(begin + c.rows_per_item, c.num_rows));
        },
        &context);
    return kOk;
}

// Whether every one of `count` rows lies in a cache of num_slots; null slots are the rows 0 .. count - 1.
inline bool slots_fit(const int64_t* slots, int64_t count, int64_t num_slots) {
    if (slots == nullptr) return count <= num_slots;
    return std::all_of(slots, slots + count, [&](int64_t slot) { return slot >= 0 && slot < num_slots; });
}

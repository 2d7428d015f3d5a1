// What the launchers share: a thread's workspace, and which variant has a kernel. For files of the plain target alone.
#pragma once
#include <cstdint>

#include "abi.h"

// What Python may call.
#define COLM_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t kFewestBytesPerThread = 256 << 10;  // less is read before another thread has woken

// Memory of the calling thread, kept between calls: fresh pages for every item would cost more than some items. What
// it held is lost when more is asked for. Null where there is none.
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

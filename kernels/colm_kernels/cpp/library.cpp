// Functions for Python that concern the whole library, and the code that the launchers share.
#include <cstdlib>

#include "cpu.h"
#include "launch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

const Variant* const kVariants[kNumVariants] = {&kAvx2Variant, &kAvx512Variant, &kAvx512Bf16Variant};

unsigned char* workspace(int64_t num_bytes) {
    struct Memory {
        unsigned char* data = nullptr;
        int64_t num_bytes = 0;
        ~Memory() { std::free(data); }
    };
    thread_local Memory memory;
    if (memory.num_bytes < num_bytes) {
        std::free(memory.data);
        memory.num_bytes = (num_bytes + 4095) / 4096 * 4096;
        memory.data = static_cast<unsigned char*>(std::aligned_alloc(4096, memory.num_bytes));
        if (memory.data == nullptr) memory.num_bytes = 0;
    }
#ifdef __SANITIZE_ADDRESS__
    // This call must not touch the rest of an earlier, larger call's memory.
    ASAN_UNPOISON_MEMORY_REGION(memory.data, memory.num_bytes);
    if (memory.data != nullptr) ASAN_POISON_MEMORY_REGION(memory.data + num_bytes, memory.num_bytes - num_bytes);
#endif
    return memory.data;
}

COLM_EXPORT const char colm_source_hash[] = COLM_SOURCE_HASH;

COLM_EXPORT int32_t colm_cpu_supports(int32_t variant) { return cpu_supports(variant); }

COLM_EXPORT int32_t colm_bf16_dot_pays() { return bf16_dot_pays(); }

#include "cpu.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>

bool cpu_supports(int32_t variant) {
    __builtin_cpu_init();
    // These also ask the operating system whether it saves the wide registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (variant) {
        case kAvx2: return avx2;
        case kAvx512: return avx512;
        // Every CPU with the one has had the other.
        case kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        default: return false;
    }
}

namespace {

constexpr int kSteps = 1000, kChains = 12;  // 12 independent sums hide the latency of either instruction

__attribute__((target("avx512f"))) float sum_with_fma() {
    __m512 acc[kChains];
    for (auto& a : acc) a = _mm512_setzero_ps();
    const __m512 x = _mm512_setzero_ps();
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (auto& a : acc) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(a) : "v"(x));
    }
    for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_cvtss_f32(acc[0]);
}

__attribute__((target("avx512f,avx512bf16"))) float sum_with_bf16_dot() {
    __m512 acc[kChains];
    for (auto& a : acc) a = _mm512_setzero_ps();
    const __m512 x = _mm512_setzero_ps();
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (auto& a : acc) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(a) : "v"(x));
    }
    for (int i = 1; i < kChains; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_cvtss_f32(acc[0]);
}

// The shortest of several short runs: one that no other process interrupted.
double shortest_s(float (*run)()) {
    double best = 1.0;
    for (int i = 0; i < 15; ++i) {
        const auto start = std::chrono::steady_clock::now();
        volatile float sink = run();
        static_cast<void>(sink);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

}  // namespace

bool bf16_dot_pays() {
    static const bool pays = cpu_supports(kAvx512Bf16) && shortest_s(sum_with_bf16_dot) < 1.5 * shortest_s(sum_with_fma);
    return pays;
}

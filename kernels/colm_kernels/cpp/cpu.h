// Which variants this CPU can run, and which it should.
#pragma once
#include <cstdint>

enum VariantId : int32_t { kAvx2 = 0, kAvx512 = 1, kAvx512Bf16 = 2, kNumVariants = 3 };

bool cpu_supports(int32_t variant);

// Whether VDPBF16PS does more multiplications a second on this CPU than fp32 FMA. It is measured once, since no CPUID
// bit tells: AMD's Zen 4 does twice as many, Intel's Sapphire Rapids half as many.
bool bf16_dot_pays();

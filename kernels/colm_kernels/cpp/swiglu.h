// silu(gate) * up, rounded once. Include after a vec_*.h.
#pragma once
#include "abi.h"

namespace {

template <class In>
struct Swiglu {
    // x / (1 + exp(-x)), computed with the exponential of -|x|, which never overflows.
    static Vec silu(Vec x) {
        const Vec decay = exp2<sizeof(In) == 2>(mul(magnitude(x), splat(-1.44269504088896340736f)));
        const Vec positive = max(zero(), x), negative = max(zero(), sub(zero(), x));
        return div(sub(positive, mul(negative, decay)), add(splat(1.0f), decay));
    }

    static void run(const SwigluArgs& args, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const In* gate = static_cast<const In*>(args.gate) + row * args.gate_stride;
            const In* up = static_cast<const In*>(args.up) + row * args.up_stride;
            In* out = static_cast<In*>(args.out) + row * args.out_stride;
            for (int64_t i = 0; i < args.dim; i += kLanes) {
                const int64_t left = args.dim - i;
                store_some(out + i, mul(silu(load_some(gate + i, left)), load_some(up + i, left)), left);
            }
        }
    }
};

}  // namespace

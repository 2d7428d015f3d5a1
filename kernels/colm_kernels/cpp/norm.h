// RMSNorm of rows, chain by chain, after an optional addition of delta. Include after a vec_*.h.
#pragma once
#include "abi.h"

namespace {

template <class In>
struct Norm {
    static constexpr int kSums = 4;  // running sums: enough to hide the latency of an addition

    // Adds delta to x if there is one, rounded as stored; returns the sum of squares of the stored x.
    template <bool kAdd>
    static float sum_of_squares(In* x, const In* delta, int64_t dim) {
        Vec sums[kSums] = {zero(), zero(), zero(), zero()};
        for (int64_t begin = 0; begin < dim; begin += kSums * kLanes) {
#pragma GCC unroll 4
            for (int j = 0; j < kSums; ++j) {
                const int64_t i = begin + j * kLanes, left = dim - i;
                if (left <= 0) break;
                Vec part = load_some(x + i, left);
                if constexpr (kAdd) {
                    // Not read back: a masked load has to wait until the store before it has reached the cache.
                    part = rounded_for(x, add(part, load_some(delta + i, left)));
                    store_some(x + i, part, left);
                }
                sums[j] = fma(part, part, sums[j]);
            }
        }
        float lanes[kLanes], total = 0.0f;
        store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
        for (float lane : lanes) total += lane;
        return total;
    }

    template <bool kAdd>
    static void normalise(const NormArgs& args, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            In* x = static_cast<In*>(args.x) + row * args.x_stride;
            const In* delta = static_cast<const In*>(args.delta) + row * args.delta_stride;
            In* y = static_cast<In*>(args.y) + row * args.y_stride;
            for (int64_t chain = 0; chain < args.num_chains; ++chain) {
                const int64_t dim = args.chains[chain].dim;
                const In* gain = static_cast<const In*>(args.chains[chain].gain);
                const float mean = sum_of_squares<kAdd>(x, delta, dim) / static_cast<float>(dim);
                const Vec scale = splat(1.0f / __builtin_sqrtf(mean + args.eps));
                for (int64_t i = 0; i < dim; i += kLanes) {
                    const int64_t left = dim - i;
                    // Rounded before the gain, as LLaMA does.
                    const Vec unit = rounded_for(x, mul(load_some(x + i, left), scale));
                    store_some(y + i, mul(unit, load_some(gain + i, left)), left);
                }
                x += dim;
                y += dim;
                if (kAdd) delta += dim;
            }
        }
    }

    static void run(const NormArgs& args, int64_t begin, int64_t end) {
        args.delta == nullptr ? normalise<false>(args, begin, end) : normalise<true>(args, begin, end);
    }
};

}  // namespace

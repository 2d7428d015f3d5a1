// Rotary embedding of heads in the half-split layout, in place or into the rows of a cache. Include after a vec_*.h.
#pragma once
#include "abi.h"

namespace {

template <class In>
struct Rotary {
    static void rotate(const In* x, In* out, const float* cos, const float* sin, int64_t half) {
        for (int64_t i = 0; i < half; i += kLanes) {
            const int64_t left = half - i;
            const Vec first = load_some(x + i, left), second = load_some(x + half + i, left);
            const Vec c = load_some(cos + i, left), s = load_some(sin + i, left);
            store_some(out + i, sub(mul(first, c), mul(second, s)), left);
            store_some(out + half + i, fma(second, c, mul(first, s)), left);
        }
    }

    static void run(const RotaryArgs& args, int64_t begin, int64_t end) {
        const int64_t row_bytes = args.head_dim * static_cast<int64_t>(sizeof(In));
        for (int64_t token = begin; token < end; ++token) {
            const int64_t slot = args.slots == nullptr ? token : args.slots[token];
            const In* x = static_cast<const In*>(args.x) + token * args.x_stride_t;
            In* out = static_cast<In*>(args.out) + slot * args.out_stride_s;
            const float* cos = args.cos + token * args.cos_stride_t;
            const float* sin = args.sin + token * args.sin_stride_t;
            for (int64_t head = 0; head < args.num_heads; ++head) {
                rotate(x + head * args.x_stride_n, out + head * args.out_stride_n, cos, sin, args.head_dim / 2);
            }
            if (args.v == nullptr) continue;
            const In* v = static_cast<const In*>(args.v) + token * args.v_stride_t;
            In* v_out = static_cast<In*>(args.v_out) + slot * args.v_out_stride_s;
            for (int64_t head = 0; head < args.num_heads; ++head) {
                __builtin_memcpy(v_out + head * args.v_out_stride_n, v + head * args.v_stride_n, row_bytes);
            }
        }
    }
};

}  // namespace

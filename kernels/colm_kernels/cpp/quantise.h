// Symmetric int8 of keys or values, one scale a token and head, and back. Include after a vec_*.h.
//
// Every bit is defined, since the result must equal the PyTorch reference in kv_quantise.py. So there is no product
// that a compiler could fuse with an addition.
#pragma once
#include "abi.h"

namespace {

inline float float_of(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

template <class In>
struct Quantise {
    // Returns the bits of a row's largest magnitude.
    static uint32_t largest(const In* x, int64_t dim) {
        Vec best = zero();
        for (int64_t i = 0; i < dim; i += kLanes) best = max_magnitude(best, magnitude(load_some(x + i, dim - i)));
        uint32_t lanes[kLanes], most = 0;
        store(reinterpret_cast<float*>(lanes), best);
        for (uint32_t lane : lanes) most = lane > most ? lane : most;
        return most;
    }

    // amax / 127 in bf16, rounded up so that no quotient passes 127.
    static uint16_t scale_of(uint32_t amax_bits) {
        if (amax_bits >= 0x7f800000) return 0x7fc0;
        const float scale = float_of(amax_bits) / 127.0f;
        uint32_t bits;
        __builtin_memcpy(&bits, &scale, sizeof bits);
        return static_cast<uint16_t>((bits + 0xffff) >> 16);
    }

    static uint16_t quantise(const In* x, int8_t* q, int64_t dim) {
        const uint16_t scale = scale_of(largest(x, dim));
        if (scale == 0 || scale == 0x7fc0) {
            __builtin_memset(q, 0, dim);
            return scale;
        }
        const Vec divisor = splat(float_of(static_cast<uint32_t>(scale) << 16));
        for (int64_t i = 0; i < dim; i += kLanes) {
            store_some(q + i, div(load_some(x + i, dim - i), divisor), dim - i);
        }
        return scale;
    }

    static void run(const QuantiseArgs& args, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t slot = args.slots == nullptr ? token : args.slots[token];
            const In* x = static_cast<const In*>(args.x) + token * args.x_stride_t;
            int8_t* q = args.q + slot * args.q_stride_s;
            uint16_t* scale = args.scale + slot * args.scale_stride_s;
            for (int64_t head = 0; head < args.num_heads; ++head) {
                scale[head * args.scale_stride_k] =
                    quantise(x + head * args.x_stride_k, q + head * args.q_stride_k, args.head_dim);
            }
        }
    }
};

template <class Out>
struct Dequantise {
    static void run(const DequantiseArgs& args, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int8_t* q = args.q + token * args.q_stride_t;
            const char* scale = args.scale + token * args.scale_stride_t * 2;
            Out* out = static_cast<Out*>(args.out) + token * args.out_stride_t;
            for (int64_t head = 0; head < args.num_heads; ++head) {
                uint16_t bits;
                __builtin_memcpy(&bits, scale + head * args.scale_stride_k * 2, sizeof bits);
                const Vec factor = splat(float_of(static_cast<uint32_t>(bits) << 16));
                const int8_t* from = q + head * args.q_stride_k;
                Out* to = out + head * args.out_stride_k;
                for (int64_t i = 0; i < args.head_dim; i += kLanes) {
                    const int64_t left = args.head_dim - i;
                    store_some(to + i, mul(load_some(from + i, left), factor), left);
                }
            }
        }
    }
};

}  // namespace

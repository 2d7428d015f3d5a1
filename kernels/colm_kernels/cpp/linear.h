// Few rows times the transpose of a weight matrix. Include after a vec_*.h.
//
// Reading the weights bounds the work, so each weight row is read from memory once for all rows of x. The order in
// which an output's inputs are summed depends neither on the other rows of x nor on the tile of the output. So a row's
// results are bit-identical beside any other rows.
#pragma once
#include "abi.h"

namespace {

// How weights and x of one type meet: a vector of weights of 64 bytes (32 with AVX2) as it is multiplied, and the fp32
// words in which x is kept for it. Weights are bf16 or fp32, widened in registers: element 2i of a vector of bf16
// becomes lane i of the first part, element 2i + 1 lane i of the second. That is one shift and one mask, where widening
// in order would take two shuffles and two shifts.
template <class In>
struct Widened {
    static constexpr int kParts = sizeof(float) / sizeof(In);  // vectors of fp32 that one vector of weights widens to
    static constexpr int kStep = kParts * kLanes;              // elements
    struct Factor {
        Vec parts[kParts];
    };

    static Factor weights(const float* from) { return {{load(from)}}; }
    static Factor weights(const uint16_t* from) {
        Factor to;
        split_pairs(load_pairs(from), to.parts, to.parts + 1);
        return to;
    }

    // The first `count` elements, followed by zeros.
    static Factor weights_tail(const In* from, int64_t count) {
        alignas(64) In whole[kStep] = {};
        for (int64_t i = 0; i < count; ++i) whole[i] = from[i];
        return weights(whole);
    }

    static Factor x(const float* words) {
        Factor from;
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) from.parts[part] = load(words + part * kLanes);
        return from;
    }

    static Factor x_tail(const float* words, int count) {
        Factor from = x(words);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            from.parts[part] = keep_first(from.parts[part], (count + kParts - 1 - part) / kParts, zero());
        }
        return from;
    }

    static void store_x(float* words, const Factor& x) {
        for (int part = 0; part < kParts; ++part) store(words + part * kLanes, x.parts[part]);
    }

    static Vec multiply_add(Vec acc, const Factor& a, const Factor& b) {
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) acc = fma(a.parts[part], b.parts[part], acc);
        return acc;
    }
};

#ifdef __AVX512BF16__
// Pairs of bf16, multiplied as they are; numbers below the smallest normal one count as zero.
template <class In>
struct Pairs;

template <>
struct Pairs<uint16_t> {
    static constexpr int kParts = 1, kStep = 2 * kLanes;
    using Factor = __m512bh;

    static Factor weights(const uint16_t* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }
    static Factor weights_tail(const uint16_t* from, int64_t count) {
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
    }
    static Factor x(const float* words) { return reinterpret_cast<__m512bh>(_mm512_loadu_ps(words)); }
    static Factor x_tail(const float* words, int count) {
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, words));
    }
    static void store_x(float* words, Factor x) { _mm512_storeu_si512(words, reinterpret_cast<__m512i>(x)); }
    static Vec multiply_add(Vec acc, Factor a, Factor b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

template <class In, template <class> class Arithmetic>
struct Linear {
    using Terms = Arithmetic<In>;
    using Factor = typename Terms::Factor;
    static constexpr int kStep = Terms::kStep, kWords = Terms::kParts * kLanes;
    static constexpr int kOuts = 4, kRows = kLanes / kOuts;  // a tile has one sum a lane: reduced all at once

    // Long sums are split into segments: one long chain of additions would have larger rounding errors.
    static constexpr int64_t kSegment = 2048;
    static_assert(kSegment % kStep == 0);

    // Weights are asked for in the order of their addresses, so far before they are needed: the CPU's own prefetchers
    // do not follow several rows at once. On an AMD Zen 4, 4 rows side by side read at 12 GB/s without, at 26 GB/s so,
    // of 28 in plain reading. With a full tile of rows of x, they are asked for into the second level, from where they
    // come in time.
    static constexpr int64_t kAheadBytes = 8 << 10, kLineBytes = 64;
    static constexpr int kLines = kOuts * kStep * sizeof(In) / kLineBytes;

    static int64_t words_per_row(int64_t in_dim) {
        // One more vector, so that rows of a power of two do not map to the same lines of L1.
        return (in_dim + kStep - 1) / kStep * kWords + kLanes;
    }

    // x as words, once a call. A block whose inputs end inside a vector masks that vector itself, so that it does not
    // read the next chain's inputs, which may be NaN.
    static void prepare(const LinearArgs& args, float* words) {
        const int64_t in_dim = args.in_dim, stride = words_per_row(in_dim), whole = in_dim / kStep * kStep;
        for (int64_t row = 0; row < args.num_rows; ++row, words += stride) {
            const In* x = static_cast<const In*>(args.x) + row * args.x_stride;
            float* to = words;
            for (int64_t i = 0; i < whole; i += kStep, to += kWords) Terms::store_x(to, Terms::weights(x + i));
            if (whole < in_dim) Terms::store_x(to, Terms::weights_tail(x + whole, in_dim - whole));
        }
    }

    // kCount rows of x by kOuts rows of weights; lane row * kOuts + out of the result is one output. At every step,
    // kFetch lines are asked for, from `ahead` on. Not inlined: its sums are all the registers there are.
    template <int kCount, int kFetch>
    __attribute__((noinline)) static Vec multiply(const float* words, int64_t stride, const In* const* weights, int64_t in_dim, const char* ahead) {
        Vec acc[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) acc[i] = zero();
        const int64_t whole = in_dim / kStep * kStep;
        Vec total[kCount * kOuts];
        for (int64_t begin = 0, end; begin < whole; begin = end) {
            end = whole - begin < kSegment ? whole : begin + kSegment;
            for (int64_t i = begin; i < end; i += kStep, words += kWords) {
#pragma GCC unroll 4
                for (int line = 0; line < kFetch; ++line, ahead += kLineBytes) {
                    _mm_prefetch(ahead, kFetch == kLines && kCount < kRows ? _MM_HINT_T0 : _MM_HINT_T1);
                }
                Factor x[kCount];
#pragma GCC unroll 4
                for (int row = 0; row < kCount; ++row) x[row] = Terms::x(words + row * stride);
#pragma GCC unroll 4
                for (int out = 0; out < kOuts; ++out) {
                    const Factor weight = Terms::weights(weights[out] + i);
#pragma GCC unroll 4
                    for (int row = 0; row < kCount; ++row) {
                        acc[row * kOuts + out] = Terms::multiply_add(acc[row * kOuts + out], weight, x[row]);
                    }
                }
            }
            if (whole > kSegment) {
#pragma GCC unroll 16
                for (int i = 0; i < kCount * kOuts; ++i) {
                    total[i] = begin == 0 ? acc[i] : add(total[i], acc[i]);
                    acc[i] = zero();
                }
            }
        }
        if (whole > kSegment) {
#pragma GCC unroll 16
            for (int i = 0; i < kCount * kOuts; ++i) acc[i] = total[i];
        }
        if (whole < in_dim) {
            const int tail = static_cast<int>(in_dim - whole);
            for (int out = 0; out < kOuts; ++out) {
                const Factor weight = Terms::weights_tail(weights[out] + whole, tail);
#pragma GCC unroll 4
                for (int row = 0; row < kCount; ++row) {
                    const Factor x = Terms::x_tail(words + row * stride, tail);
                    acc[row * kOuts + out] = Terms::multiply_add(acc[row * kOuts + out], weight, x);
                }
            }
        }
        return reduce_each(acc, [](Vec a, Vec b) { return add(a, b); });
    }

    static float to_float(float x) { return x; }
    static float to_float(uint16_t x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float wide;
        __builtin_memcpy(&wide, &bits, sizeof wide);
        return wide;
    }

    template <int kFetch>
    static void tile(const LinearArgs& args, const LinearBlock& block, const In* const* weights, int64_t row,
                     int64_t out, int count_outs, const char* ahead = nullptr) {
        const int64_t stride = words_per_row(args.in_dim), left = block.num_rows - row;
        const int count = static_cast<int>(left < kRows ? left : kRows);
        const float* words = args.words + row * stride;
        Vec sums;
        if (count == 1) {
            sums = multiply<1, kFetch>(words, stride, weights, block.in_dim, ahead);
        } else if (count == 2 || kRows < 4) {
            sums = multiply<2, kFetch>(words, stride, weights, block.in_dim, ahead);
        } else if (count == 3) {
            sums = multiply<3 < kRows ? 3 : kRows, kFetch>(words, stride, weights, block.in_dim, ahead);
        } else {
            sums = multiply<kRows, kFetch>(words, stride, weights, block.in_dim, ahead);
        }
        if (block.bias != nullptr) {
            float bias[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const int at = lane % kOuts < count_outs ? lane % kOuts : 0;
                bias[lane] = to_float(static_cast<const In*>(block.bias)[out + at]);
            }
            sums = add(sums, load(bias));
        }
        In rounded[kLanes];
        store_from_float(rounded, sums);
        In* y = static_cast<In*>(args.y) + row * args.y_stride + block.first_column + out;
        for (int i = 0; i < count; ++i, y += args.y_stride) {
            if (count_outs == kOuts) {
                __builtin_memcpy(y, rounded + i * kOuts, kOuts * sizeof(In));
            } else {
                __builtin_memcpy(y, rounded + i * kOuts, count_outs * sizeof(In));
            }
        }
    }

    static void run(const LinearArgs& args, const LinearBlock& block, int64_t begin, int64_t end) {
        const int64_t in_dim = block.in_dim;
        for (int64_t out = begin; out < end; out += kOuts) {
            const int count_outs = static_cast<int>(end - out < kOuts ? end - out : kOuts);
            const In* weights[kOuts];
            for (int i = 0; i < kOuts; ++i) {
                // If fewer are left, the last is repeated and the results of its copies are dropped.
                const int64_t at = out + (i < count_outs ? i : count_outs - 1);
                weights[i] = static_cast<const In*>(block.weight) + at * in_dim;
            }
            // The next weights are asked for evenly while the rows of x pass, up to a fourth of them beside each tile.
            const char* ahead = reinterpret_cast<const char*>(weights[0]) + kAheadBytes;
            const int64_t tiles = (block.num_rows + kRows - 1) / kRows, part = kOuts * in_dim * sizeof(In) / 4;
            for (int64_t row = 0, at = 0; row < block.num_rows; row += kRows, ++at) {
                if (tiles == 1) {
                    tile<kLines>(args, block, weights, row, out, count_outs, ahead);
                } else if (tiles < 4 && at < 2) {
                    tile<kLines / 2>(args, block, weights, row, out, count_outs, ahead + at * 2 * part);
                } else if (tiles >= 4 && at < kLines) {
                    tile<1>(args, block, weights, row, out, count_outs, ahead + at * (4 / kLines) * part);
                } else {
                    tile<0>(args, block, weights, row, out, count_outs);
                }
            }
        }
    }

    static LinearKernel kernel() { return {run, prepare, words_per_row, kOuts}; }
};

}  // namespace

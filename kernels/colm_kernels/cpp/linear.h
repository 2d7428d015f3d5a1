// Few rows times the transpose of a weight matrix. Include after a vec_*.h.
//
// Reading the weights bounds the work, so each weight row is read from memory once for all rows of x. The order in
// which an output's inputs are summed depends neither on the other rows of x nor on the tile of the output. So a row's
// results are bit-identical beside any other rows.
#pragma once
#include "abi.h"

namespace {

template <class In>
struct Linear {
    static constexpr int kParts = sizeof(float) / sizeof(In);  // vectors of fp32 that one vector of weights widens to
    static constexpr int kStep = kParts * kLanes;
    static constexpr int kOuts = 4, kRows = kLanes / kOuts;  // a tile has one sum a lane: reduced all at once

    // Long sums are split into segments: one long chain of additions would have larger rounding errors.
    static constexpr int64_t kSegment = 2048;
    static_assert(kSegment % kStep == 0);

    // Measured on a Xeon with 48 KiB of L1: 4096 inputs of bf16 read at 13 GB/s with this limit, and at 10 GB/s if the
    // whole next tile is fetched.
    static constexpr int64_t kTileBytes = 20 << 10, kFurtherBytes = 1 << 10;

    static int64_t words_per_row(int64_t in_dim) {
        // One more vector, so that rows of a power of two do not map to the same lines of L1.
        return (in_dim + kStep - 1) / kStep * kStep + kLanes;
    }

    // Element 2i of a vector of bf16 becomes lane i of the first part, element 2i + 1 lane i of the second: one shift
    // and one mask, where widening in order would take two shuffles and two shifts.
    static void widen(const float* from, Vec* parts) { parts[0] = load(from); }
    static void widen(const uint16_t* from, Vec* parts) { split_pairs(load_pairs(from), parts, parts + 1); }

    // The first `count` elements, followed by zeros.
    static void widen_tail(const In* from, int64_t count, Vec* parts) {
        alignas(64) In whole[kStep] = {};
        for (int64_t i = 0; i < count; ++i) whole[i] = from[i];
        widen(whole, parts);
    }

    // x as words, widened once a call into the order of widened weights. A block whose inputs end inside a vector masks
    // that vector itself, so that it does not read the next chain's inputs, which may be NaN.
    static void prepare(const LinearArgs& args, float* words) {
        const int64_t in_dim = args.in_dim, stride = words_per_row(in_dim), whole = in_dim / kStep * kStep;
        for (int64_t row = 0; row < args.num_rows; ++row, words += stride) {
            const In* x = static_cast<const In*>(args.x) + row * args.x_stride;
            Vec parts[kParts];
            for (int64_t i = 0; i < whole; i += kStep) {
                widen(x + i, parts);
                for (int part = 0; part < kParts; ++part) store(words + i + part * kLanes, parts[part]);
            }
            if (whole < in_dim) {
                widen_tail(x + whole, in_dim - whole, parts);
                for (int part = 0; part < kParts; ++part) store(words + whole + part * kLanes, parts[part]);
            }
        }
    }

    // kCount rows of x by kOuts rows of weights; lane row * kOuts + out of the result is one output.
    template <int kCount, bool kFetch>
    static Vec multiply(const float* words, int64_t stride, const In* const* weights, int64_t in_dim, int64_t ahead) {
        Vec acc[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) acc[i] = zero();
        const int64_t whole = in_dim / kStep * kStep;
        Vec total[kCount * kOuts];
        for (int64_t begin = 0, end; begin < whole; begin = end) {
            end = whole - begin < kSegment ? whole : begin + kSegment;
            for (int64_t i = begin; i < end; i += kStep) {
                Vec x[kCount][kParts];
#pragma GCC unroll 4
                for (int row = 0; row < kCount; ++row) {
                    const float* from = words + row * stride + i;
#pragma GCC unroll 2
                    for (int part = 0; part < kParts; ++part) x[row][part] = load(from + part * kLanes);
                }
#pragma GCC unroll 4
                for (int out = 0; out < kOuts; ++out) {
                    Vec weight[kParts];
                    widen(weights[out] + i, weight);
                    if (kFetch) _mm_prefetch(reinterpret_cast<const char*>(weights[out] + i + ahead), _MM_HINT_T0);
#pragma GCC unroll 4
                    for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
                        for (int part = 0; part < kParts; ++part) {
                            acc[row * kOuts + out] = fma(weight[part], x[row][part], acc[row * kOuts + out]);
                        }
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
                Vec weight[kParts];
                widen_tail(weights[out] + whole, tail, weight);
#pragma GCC unroll 4
                for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
                    for (int part = 0; part < kParts; ++part) {
                        const int count = (tail + kParts - 1 - part) / kParts;
                        const Vec x = load(words + row * stride + whole + part * kLanes);
                        acc[row * kOuts + out] =
                            fma(weight[part], keep_first(x, count, zero()), acc[row * kOuts + out]);
                    }
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

    template <bool kFetch>
    static void tile(const LinearArgs& args, const LinearBlock& block, const In* const* weights, int64_t row,
                     int64_t out, int count_outs, int64_t ahead) {
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
        // Fetch the next tile, since weight rows lie one behind the other. If two tiles do not fit into L1, fetch a
        // little further along each row instead.
        const int64_t tile_elements = kOuts * in_dim;
        const int64_t ahead = tile_elements * static_cast<int64_t>(sizeof(In)) <= kTileBytes
                                  ? tile_elements
                                  : kFurtherBytes / static_cast<int64_t>(sizeof(In));
        for (int64_t out = begin; out < end; out += kOuts) {
            const int count_outs = static_cast<int>(end - out < kOuts ? end - out : kOuts);
            const In* weights[kOuts];
            for (int i = 0; i < kOuts; ++i) {
                // If fewer are left, the last is repeated and the results of its copies are dropped.
                const int64_t at = out + (i < count_outs ? i : count_outs - 1);
                weights[i] = static_cast<const In*>(block.weight) + at * in_dim;
            }
            if (out + kOuts < end) {
                tile<true>(args, block, weights, 0, out, count_outs, ahead);
            } else {
                tile<false>(args, block, weights, 0, out, count_outs, 0);
            }
            for (int64_t row = kRows; row < block.num_rows; row += kRows) {
                tile<false>(args, block, weights, row, out, count_outs, 0);
            }
        }
    }

    static LinearKernel kernel() { return {run, prepare, words_per_row}; }
};

}  // namespace

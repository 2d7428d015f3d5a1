// Rows times the transpose of a bf16 weight matrix in panels, where a CPU has 16 registers and no products of bf16.
// Include after vec_avx2.h.
//
// x is widened once a call. Weights are widened in registers, even inputs by a shift, odd ones by a mask. A few rows take
// a whole panel at once; more take half of its outputs, so that 6 rows' sums fit in the registers beside them. A row's
// sums have one order, whatever rows are beside it and however many.
#pragma once
#include "abi.h"
#include "panel.h"

namespace {

struct WidePanel {
    static constexpr int kVecs = kPanelOutputs / kLanes, kHalf = kVecs / 2;
    static constexpr int kWholeRows = 2, kTileRows = 6;  // rows beside a whole panel, and beside half of one

    // As in panel.h: words that all rows pass before the next, rows whose sums are kept meanwhile, and how far ahead
    // weights are asked for where there are rows enough to outrun the CPU's prefetchers.
    static constexpr int64_t kDepth = 128, kGroup = 64;
    static constexpr int64_t kAheadBytes = 16 << 10, kLineBytes = 64;

    // One more line, so that rows of a power of two do not map to the same lines of L1.
    static int64_t words_per_row(int64_t in_dim) { return (in_dim + kLanes - 1) / kLanes * kLanes + 16; }

    static void prepare(const LinearArgs& args, float* words) {
        const int64_t stride = words_per_row(args.in_dim);
        for (int64_t row = 0; row < args.num_rows; ++row, words += stride) {
            const auto* x = static_cast<const uint16_t*>(args.x) + row * args.x_stride;
            for (int64_t i = 0; i < args.in_dim; i += kLanes) store(words + i, load_some(x + i, args.in_dim - i));
        }
    }

    static __m256i bits(const uint32_t* words) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)); }
    static Vec even(const uint32_t* words) { return _mm256_castsi256_ps(_mm256_slli_epi32(bits(words), 16)); }
    static Vec odd(const uint32_t* words) {
        return _mm256_castsi256_ps(_mm256_and_si256(bits(words), _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
    }

    // kCount rows of x by `depth` words of kWide vectors of a panel, added to `sums`; of the last word only the first
    // input if `is_odd`, since what stands beside it in x may be NaN.
    template <int kCount, int kWide, bool kAsks>
    __attribute__((noinline)) static void multiply(const float* x, int64_t stride, const uint32_t* panel, int64_t depth,
                                                   bool is_odd, float* sums, const char* ahead) {
        Vec acc[kCount][kWide];
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) acc[i][j] = zero();
        }
        const auto step = [&](auto widened, const float* from) __attribute__((always_inline)) {
            Vec weights[kWide];
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) weights[j] = widened(panel + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kCount; ++i) {
                const Vec factor = splat(from[i * stride]);
#pragma GCC unroll 4
                for (int j = 0; j < kWide; ++j) add_product(acc[i][j], factor, weights[j]);
            }
        };
        for (int64_t word = is_odd; word < depth; ++word, x += 2, panel += kPanelOutputs) {
            if constexpr (kAsks) {
                _mm_prefetch(ahead, _MM_HINT_T1);
                ahead += kLineBytes;
            }
            step(even, x);
            asm volatile("" ::: "memory");  // or GCC keeps the words, for which there is no register
            step(odd, x + 1);
        }
        if (is_odd) step(even, x);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kWide; ++j) {
                float* to = sums + i * kPanelOutputs + j * kLanes;
                store(to, add(load(to), acc[i][j]));
            }
        }
    }

    template <int kWide, bool kAsks, int kCount>
    static void multiply_some(int64_t count, const float* x, int64_t stride, const uint32_t* panel, int64_t depth,
                              bool is_odd, float* sums, const char* ahead) {
        if constexpr (kCount > 0) {
            if (count == kCount) return multiply<kCount, kWide, kAsks>(x, stride, panel, depth, is_odd, sums, ahead);
            multiply_some<kWide, kAsks, kCount - 1>(count, x, stride, panel, depth, is_odd, sums, ahead);
        }
    }

    static void run(const LinearArgs& args, const LinearBlock& block, int64_t begin, int64_t end) {
        const int64_t num_words = (block.in_dim + 1) / 2;
        for (int64_t out = begin; out < end; out += kPanelOutputs) {
            const auto* panel = static_cast<const uint32_t*>(block.weight) + out * num_words;
            for (int64_t row = 0; row < block.num_rows; row += kGroup) {
                const int64_t left = block.num_rows - row;
                group(args, block, panel, num_words, out, row, left < kGroup ? left : kGroup);
            }
        }
    }

    static void group(const LinearArgs& args, const LinearBlock& block, const uint32_t* panel, int64_t num_words,
                      int64_t out, int64_t first, int64_t count) {
        alignas(64) float sums[kGroup * kPanelOutputs];
        begin_sums<uint16_t>(block, out, count, sums);
        const int64_t stride = words_per_row(args.in_dim), tiles = (count + kTileRows - 1) / kTileRows;
        for (int64_t word = 0; word < num_words; word += kDepth) {
            const int64_t depth = num_words - word < kDepth ? num_words - word : kDepth;
            const bool is_odd = word + depth == num_words && block.in_dim % 2 != 0;
            const float* x = args.words + first * stride + word * 2;
            const uint32_t* from = panel + word * kPanelOutputs;
            if (count <= kWholeRows) {
                multiply_some<kVecs, false, kWholeRows>(count, x, stride, from, depth, is_odd, sums, nullptr);
                continue;
            }
            const char* ahead = reinterpret_cast<const char*>(from) + kAheadBytes;
            for (int half = 0; half < 2; ++half, ahead += depth * kLineBytes) {
                const uint32_t* of_half = from + half * kHalf * kLanes;
                float* to = sums + half * kHalf * kLanes;
                // Tiles as equal as can be; the first of each half asks for half of what comes next.
                for (int64_t tile = 0, row = 0, next; tile < tiles; ++tile, row = next) {
                    next = count * (tile + 1) / tiles;
                    const auto pass = [&]<bool kAsks> {
                        multiply_some<kHalf, kAsks, kTileRows>(next - row, x + row * stride, stride, of_half, depth,
                                                               is_odd, to + row * kPanelOutputs, ahead);
                    };
                    tile == 0 ? pass.template operator()<true>() : pass.template operator()<false>();
                }
            }
        }
        store_sums<uint16_t>(args, block, out, first, count, sums);
    }

    static LinearKernel kernel() { return {run, prepare, words_per_row, kPanelOutputs}; }
};

}  // namespace

// Rows times the transpose of a weight matrix that lies in panels. Include after a vec_*.h.
//
// A panel is kPanelOutputs outputs, transposed: at each step one word of each output, side by side. So a lane is an
// output, no sum goes across lanes, and weights are read in the order of their addresses, which the CPU's own
// prefetchers follow. A row's sums have one order, whatever rows are beside it and however many.
#pragma once
#include "abi.h"
#include "tile.h"

namespace {

// Pairs of bf16 where the CPU cannot multiply them: both are widened.
struct WidePairs {
    using Word = uint32_t;
    static constexpr int kPerWord = 2;
    struct Both {
        Vec even, odd;
    };
    static Both of(Vec pairs) {
        Both wide;
        split_pairs(pairs, &wide.even, &wide.odd);
        return wide;
    }
    static Both broadcast(const Word* p) { return of(splat(__builtin_bit_cast(float, *p))); }
    static Both load_words(const Word* p) { return of(load(reinterpret_cast<const float*>(p))); }
    static Vec multiply_add(Vec acc, Both a, Both b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
};

// Sums of `count` rows for a panel's outputs from `out` on begin at their biases, or at zero.
template <class In>
void begin_sums(const LinearBlock& block, int64_t out, int64_t count, float* sums) {
    constexpr int kVecs = kPanelOutputs / kLanes;
    Vec bias[kVecs];
    for (int j = 0; j < kVecs; ++j) {
        const int64_t left = block.out_dim - out - j * kLanes;
        const bool is_there = block.bias != nullptr && left > 0;
        bias[j] = is_there ? load_some(static_cast<const In*>(block.bias) + out + j * kLanes, left) : zero();
    }
    for (int64_t row = 0; row < count; ++row) {
        for (int j = 0; j < kVecs; ++j) store(sums + row * kPanelOutputs + j * kLanes, bias[j]);
    }
}

// And end in y: rows from `first` on.
template <class In>
void store_sums(const LinearArgs& args, const LinearBlock& block, int64_t out, int64_t first, int64_t count,
                const float* sums) {
    In* y = static_cast<In*>(args.y) + first * args.y_stride + block.first_column + out;
    const int64_t left = block.out_dim - out;
    for (int64_t row = 0; row < count; ++row, y += args.y_stride) {
        for (int64_t j = 0; j < kPanelOutputs && j < left; j += kLanes) {
            store_some(y + j, load(sums + row * kPanelOutputs + j), left - j);
        }
    }
}

// kMostRows: as many as have room for their sums in registers beside a row of the panel.
template <class Op, class In, int kMostRows>
struct Panel {
    using Word = typename Op::Word;
    static_assert(sizeof(Word) == sizeof(In) * Op::kPerWord, "rows of x are read as words");
    static constexpr int kVecs = kPanelOutputs / kLanes;

    // Words of a panel that all rows pass before the next: 16 KiB, so that they stay in the first level. Their sums are
    // added to those before them: one long chain of additions would have larger rounding errors.
    static constexpr int64_t kDepth = 128;

    // Rows whose sums are kept meanwhile. More read a panel again, from the second level.
    static constexpr int64_t kGroup = 64;

    // So far ahead, weights are asked for into the second level, where there are so many rows that the CPU's
    // prefetchers, which look at what is read, come too late. On one core of an AMD Zen 4, 16 rows reach 208 GFLOP/s so
    // and 140 without; up to 4 rows are 5% faster without.
    static constexpr int64_t kAheadBytes = 16 << 10, kLineBytes = 64;
    static constexpr int64_t kMostRowsUnasked = kMostRows < 4 ? kMostRows : 4;
    static constexpr int kLines = kPanelOutputs * sizeof(Word) / kLineBytes;  // of a step

    // kCount rows of x by `depth` words of a panel, added to `sums`. At every step, kFetch lines are asked for.
    template <int kCount, int kFetch>
    __attribute__((noinline)) static void multiply(const Word* x, int64_t stride, const Word* panel, int64_t depth,
                                                   float* sums, const char* ahead) {
        Vec acc[kCount][kVecs];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) acc[i][j] = zero();
        }
        for (int64_t step = 0; step < depth; ++step) {
#pragma GCC unroll 4
            for (int line = 0; line < kFetch; ++line, ahead += kLineBytes) _mm_prefetch(ahead, _MM_HINT_T1);
            decltype(Op::load_words(panel)) words[kVecs];
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) words[j] = Op::load_words(panel + step * kPanelOutputs + j * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
                const auto scalar = Op::broadcast(x + i * stride + step);
#pragma GCC unroll 8
                for (int j = 0; j < kVecs; ++j) acc[i][j] = Op::multiply_add(acc[i][j], scalar, words[j]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) {
                float* to = sums + i * kPanelOutputs + j * kLanes;
                store(to, add(load(to), acc[i][j]));
            }
        }
    }

    template <int kFetch, int kCount = kMostRows>
    static void multiply_some(int64_t count, const Word* x, int64_t stride, const Word* panel, int64_t depth,
                              float* sums, const char* ahead) {
        if constexpr (kCount > 0) {
            if (count == kCount) return multiply<kCount, kFetch>(x, stride, panel, depth, sums, ahead);
            multiply_some<kFetch, kCount - 1>(count, x, stride, panel, depth, sums, ahead);
        }
    }

    // x as words: where it lies, or in `copy` if its rows begin inside a word or end inside one, whose other half is of
    // the next chain and may be NaN.
    static const Word* words_of(const LinearArgs& args, int64_t first, int64_t count, int64_t in_dim, int64_t begin,
                                int64_t depth, Word* copy, int64_t* stride) {
        const In* x = static_cast<const In*>(args.x) + first * args.x_stride + begin * Op::kPerWord;
        if (in_dim % Op::kPerWord == 0 && args.x_stride % Op::kPerWord == 0 &&
            reinterpret_cast<uintptr_t>(x) % sizeof(Word) == 0) {
            *stride = args.x_stride / Op::kPerWord;
            return reinterpret_cast<const Word*>(x);
        }
        const int64_t left = in_dim - begin * Op::kPerWord, whole = depth * Op::kPerWord;
        *stride = kDepth;
        for (int64_t row = 0; row < count; ++row, x += args.x_stride) {
            copy[row * kDepth + depth - 1] = 0;
            __builtin_memcpy(copy + row * kDepth, x, (left < whole ? left : whole) * sizeof(In));
        }
        return copy;
    }

    static void run(const LinearArgs& args, const LinearBlock& block, int64_t begin, int64_t end) {
        const int64_t num_words = (block.in_dim + Op::kPerWord - 1) / Op::kPerWord;
        for (int64_t out = begin; out < end; out += kPanelOutputs) {
            const Word* panel = static_cast<const Word*>(block.weight) + out * num_words;
            for (int64_t row = 0; row < block.num_rows; row += kGroup) {
                const int64_t left = block.num_rows - row;
                group(args, block, panel, num_words, out, row, left < kGroup ? left : kGroup);
            }
        }
    }

    static void group(const LinearArgs& args, const LinearBlock& block, const Word* panel, int64_t num_words,
                      int64_t out, int64_t first, int64_t count) {
        alignas(64) float sums[kGroup * kPanelOutputs];
        alignas(64) Word copy[kGroup * kDepth];
        begin_sums<In>(block, out, count, sums);
        const int64_t tiles = (count + kMostRows - 1) / kMostRows;
        for (int64_t word = 0; word < num_words; word += kDepth) {
            const int64_t depth = num_words - word < kDepth ? num_words - word : kDepth;
            int64_t stride = 0;
            const Word* x = words_of(args, first, count, block.in_dim, word, depth, copy, &stride);
            const Word* from = panel + word * kPanelOutputs;
            const char* ahead = reinterpret_cast<const char*>(from) + kAheadBytes;
            // Tiles as equal as can be; what is asked for is divided among the first of them.
            for (int64_t tile = 0, row = 0, next; tile < tiles; ++tile, row = next) {
                next = count * (tile + 1) / tiles;
                const auto pass = [&]<int kFetch> {
                    multiply_some<kFetch>(next - row, x + row * stride, stride, from, depth,
                                          sums + row * kPanelOutputs, ahead + tile * depth * kLineBytes);
                };
                if (count <= kMostRowsUnasked || tile >= kLines) {
                    pass.template operator()<0>();
                } else if (tiles == 1) {
                    pass.template operator()<kLines>();
                } else {
                    pass.template operator()<1>();
                }
            }
        }
        store_sums<In>(args, block, out, first, count, sums);
    }

    static LinearKernel kernel() { return {run, nullptr, nullptr, kPanelOutputs}; }
};

}  // namespace

// Many rows times the transpose of a weight matrix. Include after a vec_*.h.
//
// A panel is kPanel outputs of a weight matrix, transposed once and then read by every row of the item. Packing costs a
// few hundredths of the products at 512 rows, so no second copy of a weight is kept. Where words are wider than the
// numbers, packing widens them.
//
// With few registers a panel is narrow. So an item has several, and its rows are copied once for all of them, side by
// side: rows that lie a power of two apart would map to the same lines of L1.
#pragma once
#include <utility>
#include "abi.h"
#include "swiglu.h"
#include "tile.h"

namespace {

template <class Op, class In>
struct Packed {
    using Word = typename Op::Word;
    static constexpr bool kWidens = sizeof(Word) > sizeof(In) * Op::kPerWord;
    // kVecs x kRows accumulators, the row of the panel and one broadcast; words of a panel packed at a time.
#if defined(__AVX512F__)
    static constexpr int kVecs = 4, kRows = 6, kPanels = 1;
    static constexpr int64_t kDepth = 1024;     // 256 KiB, a part of any L2
    static constexpr int64_t kMostRows = 1024;  // an item's rows of x, read for every panel, stay near the caches
#else
    static constexpr int kVecs = 2, kRows = 6, kPanels = 8;
    static constexpr int64_t kDepth = 256;      // 16 KiB, half of any L1; the rows of a tile take 6 KiB
    static constexpr int64_t kMostRows = 252;   // as many KiB, in L2
#endif
    static constexpr bool kCopies = kPanels > 1;
    static_assert(kCopies || !kWidens, "rows of x are read as words");
    static constexpr int kPanel = kVecs * kLanes;
    static constexpr int64_t kStep = kWidens ? 2 * kLanes : kLanes;  // words packed at a time
    static_assert(kDepth % kStep == 0);

    struct Workspace {
        Word* panel;     // kDepth, kPanel
        Word* rows;      // rows of the item, kDepth; only if they are copied
        float* partial;  // kPanels, rows of the item, kPanel: sums of the words so far; only if there are more than kDepth
    };

    static Workspace carve(unsigned char* memory, int64_t num_rows) {
        Word* words = reinterpret_cast<Word*>(memory);
        Word* rows = words + kDepth * kPanel;
        return {words, rows, reinterpret_cast<float*>(rows + (kCopies ? num_rows * kDepth : 0))};
    }

    static int64_t workspace_bytes(int64_t in_dim, int64_t rows_per_item) {
        const int64_t num_sums = in_dim > kDepth * Op::kPerWord ? kPanels * rows_per_item * kPanel : 0;
        return (kDepth * kPanel + (kCopies ? rows_per_item * kDepth : 0)) * static_cast<int64_t>(sizeof(Word)) + num_sums * 4;
    }

    // Outputs of a panel; where there is a gate, it has as many columns of the gate, and they come first.
    static int64_t panel_outputs(const PackedBlock& block) { return block.gate == nullptr ? kPanel : kPanel / 2; }

    // The weight row, or bias, that is column `column` of a panel. Past the last, it is repeated and its results dropped.
    static const In* row_of(const PackedBlock& block, const void* weight, const void* gate, int64_t stride,
                            int64_t first, int column) {
        const int64_t num_outputs = panel_outputs(block);
        const void* from = gate != nullptr && column < num_outputs ? gate : weight;
        const int64_t output = first + column % num_outputs;
        return static_cast<const In*>(from) + (output < block.out_dim ? output : block.out_dim - 1) * stride;
    }

    static void pack(const PackedBlock& block, int64_t first, int64_t begin, int64_t depth, Word* panel) {
        for (int column = 0; column < kPanel; column += kLanes) {
            const In* from[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const In* row = row_of(block, block.weight, block.gate, block.in_dim, first, column + i);
                from[i] = row + begin * Op::kPerWord;
            }
            for (int64_t word = 0; word < depth; word += kStep) {
                // 32 bits of a weight a lane: words, or two numbers that are widened once they are in place.
                Vec words[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    words[i] = load(reinterpret_cast<const float*>(from[i] + word * Op::kPerWord));
                }
                transpose(words);
                float* to = reinterpret_cast<float*>(panel + word * kPanel + column);
                for (int i = 0; i < kLanes; ++i) {
                    if constexpr (kWidens) {
                        Vec even, odd;
                        split_pairs(words[i], &even, &odd);
                        store(to + 2 * i * kPanel, even);
                        store(to + (2 * i + 1) * kPanel, odd);
                    } else {
                        store(to + i * kPanel, words[i]);
                    }
                }
            }
        }
    }

    // A row of x as words.
    static void copy_row(const In* from, int64_t depth, Word* to) {
        if constexpr (kWidens) {
            for (int64_t word = 0; word < depth; word += kLanes) store(to + word, load_as_float(from + word));
        } else {
            __builtin_memcpy(to, from, depth * sizeof(Word));
        }
    }

    // What becomes of the sums of one tile.
    struct Sink {
        int64_t first;       // output
        float* partial;      // of the tile's first row
        bool adds, is_last;  // to what lies in `partial`; nothing follows
        float bias[kPanel];
    };

    template <int kCount>
    __attribute__((always_inline)) static void finish(Vec (&acc)[kCount][kVecs], const PackedBlock& block, int64_t row,
                                                     const Sink& sink) {
        In* y = static_cast<In*>(block.y) + row * block.y_stride + sink.first;
        const int64_t left = block.out_dim - sink.first;
        if (block.gate == nullptr) {
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
                for (int j = 0; j < kVecs; ++j) {
                    if (j * kLanes < left) store_some(y + i * block.y_stride + j * kLanes, acc[i][j], left - j * kLanes);
                }
            }
        } else {
            constexpr int kHalf = kVecs / 2;
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
                for (int j = 0; j < kHalf; ++j) {
                    const Vec product = mul(Swiglu<In>::silu(acc[i][j]), acc[i][kHalf + j]);
                    if (j * kLanes < left) store_some(y + i * block.y_stride + j * kLanes, product, left - j * kLanes);
                }
            }
        }
    }

    // kCount rows of words, `stride` apart, times a panel.
    template <int kCount>
    static void multiply(const Word* x, int64_t stride, const Word* panel, int64_t depth, const PackedBlock& block,
                         int64_t row, const Sink& sink) {
        Vec acc[kCount][kVecs];
        const Word* rows[kCount];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
            rows[i] = x + i * stride;
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) {
                acc[i][j] = sink.adds ? load(sink.partial + i * kPanel + j * kLanes) : load(sink.bias + j * kLanes);
            }
        }
        for (int64_t step = 0; step < depth; ++step) {
            decltype(Op::load_words(panel)) words[kVecs];
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) words[j] = Op::load_words(panel + step * kPanel + j * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) {
                const auto scalar = Op::broadcast(rows[i] + step);
#pragma GCC unroll 8
                for (int j = 0; j < kVecs; ++j) acc[i][j] = Op::multiply_add(acc[i][j], scalar, words[j]);
            }
        }
        if (sink.is_last) return finish(acc, block, row, sink);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) store(sink.partial + i * kPanel + j * kLanes, acc[i][j]);
        }
    }

    static void read_bias(const PackedBlock& block, Sink& sink) {
        if (block.bias == nullptr) return;
        for (int column = 0; column < kPanel; ++column) {
            float wide[kLanes];
            store(wide, load_some(row_of(block, block.bias, block.gate_bias, 1, sink.first, column), 1));
            sink.bias[column] = wide[0];
        }
    }

    // Rows [begin, end) of the outputs of the `index`th kPanels panels.
    static void run(const PackedArgs& args, const PackedBlock& block, int64_t index, int64_t begin, int64_t end,
                    unsigned char* memory) {
        const int64_t num_rows = end - begin, num_words = block.in_dim / Op::kPerWord;
        const Workspace ws = carve(memory, num_rows);
        for (int64_t word = 0; word < num_words; word += kDepth) {
            const int64_t depth = num_words - word < kDepth ? num_words - word : kDepth;
            const In* x = static_cast<const In*>(args.x) + begin * args.x_stride + word * Op::kPerWord;
            const Word* rows = ws.rows;
            int64_t stride = kDepth;
            if constexpr (kCopies) {
                for (int64_t i = 0; i < num_rows; ++i) copy_row(x + i * args.x_stride, depth, ws.rows + i * kDepth);
            } else {
                rows = reinterpret_cast<const Word*>(x);
                stride = args.x_stride / Op::kPerWord;
            }
            for (int64_t i = 0; i < kPanels; ++i) {
                Sink sink{(index * kPanels + i) * panel_outputs(block), nullptr, word > 0, word + depth == num_words, {}};
                if (sink.first >= block.out_dim) break;
                if (!sink.adds) read_bias(block, sink);
                pack(block, sink.first, word, depth, ws.panel);
                const auto tile = [&]<int kCount>(int64_t row) {
                    sink.partial = ws.partial + (i * num_rows + row) * kPanel;
                    multiply<kCount>(rows + row * stride, stride, ws.panel, depth, block, begin + row, sink);
                };
                int64_t row = 0;
                for (; row + kRows <= num_rows; row += kRows) tile.template operator()<kRows>(row);
                [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
                    (..., (num_rows - row == kLess + 1 ? tile.template operator()<kLess + 1>(row) : void()));
                }(std::make_integer_sequence<int, kRows - 1>());
            }
        }
    }

    static PackedKernel kernel() { return {run, workspace_bytes, kPanels * kPanel, kStep * Op::kPerWord, kMostRows}; }
};

}  // namespace

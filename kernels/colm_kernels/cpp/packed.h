// Many rows times the transpose of a weight matrix. Include after a vec_*.h.
//
// A panel is kPanel outputs of a weight matrix, transposed once and then read by every row of the item. Packing costs a
// few hundredths of the products at 512 rows, so no second copy of a weight is kept.
#pragma once
#include "abi.h"
#include "swiglu.h"
#include "tile.h"

namespace {

template <class Op, class In>
struct Packed {
    using Word = typename Op::Word;
    static_assert(sizeof(Word) == sizeof(In) * Op::kPerWord, "rows of x and of weights are read as words");
    static constexpr int kVecs = 4, kRows = 6;  // kVecs x kRows accumulators, the row of the panel and one broadcast
    static constexpr int kFewRows = 2;          // rows of the smaller tiles for the rows that are left
    static constexpr int kPanel = kVecs * kLanes;
    static constexpr int64_t kDepth = 1024;     // words of a panel packed at a time: 256 KiB, a part of any L2

    struct Workspace {
        Word* panel;     // kDepth, kPanel
        float* partial;  // rows of the item, kPanel: sums of the panel's words so far; only if it has more than kDepth
    };

    static Workspace carve(unsigned char* memory) {
        return {reinterpret_cast<Word*>(memory), reinterpret_cast<float*>(memory + kDepth * kPanel * sizeof(Word))};
    }

    static int64_t workspace_bytes(int64_t in_dim, int64_t rows_per_item) {
        const bool is_split = in_dim > kDepth * Op::kPerWord;
        return kPanel * (kDepth * static_cast<int64_t>(sizeof(Word)) + (is_split ? rows_per_item * 4 : 0));
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
            const float* from[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const In* row = row_of(block, block.weight, block.gate, block.in_dim, first, column + i);
                from[i] = reinterpret_cast<const float*>(row) + begin;
            }
            for (int64_t word = 0; word < depth; word += kLanes) {
                Vec words[kLanes];
                for (int i = 0; i < kLanes; ++i) words[i] = load(from[i] + word);
                transpose(words);
                float* to = reinterpret_cast<float*>(panel + word * kPanel + column);
                for (int i = 0; i < kLanes; ++i) store(to + i * kPanel, words[i]);
            }
        }
    }

    // What becomes of the sums of one tile.
    struct Sink {
        const PackedBlock& block;
        int64_t first;       // output
        float* partial;      // of the tile's first row
        bool adds, is_last;  // to what lies in `partial`; nothing follows
        float bias[kPanel];
    };

    template <int kCount>
    __attribute__((always_inline)) static void finish(Vec (&acc)[kCount][kVecs], int64_t row, const Sink& sink) {
        const PackedBlock& block = sink.block;
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

    template <int kCount>
    static void multiply(const In* x, int64_t stride, const Word* panel, int64_t depth, int64_t row, const Sink& sink) {
        Vec acc[kCount][kVecs];
        const In* rows[kCount];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
            rows[i] = x + (row + i) * stride;
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
                const auto scalar = Op::broadcast(reinterpret_cast<const Word*>(rows[i]) + step);
#pragma GCC unroll 8
                for (int j = 0; j < kVecs; ++j) acc[i][j] = Op::multiply_add(acc[i][j], scalar, words[j]);
            }
        }
        if (sink.is_last) return finish(acc, row, sink);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kVecs; ++j) store(sink.partial + i * kPanel + j * kLanes, acc[i][j]);
        }
    }

    // Rows [begin, end) of the outputs of one panel.
    static void run(const PackedArgs& args, const PackedBlock& block, int64_t panel, int64_t begin, int64_t end,
                    unsigned char* memory) {
        const Workspace ws = carve(memory);
        Sink sink{block, panel * panel_outputs(block), nullptr, false, false, {}};
        if (block.bias != nullptr) {
            for (int column = 0; column < kPanel; ++column) {
                float wide[kLanes];
                store(wide, load_some(row_of(block, block.bias, block.gate_bias, 1, sink.first, column), 1));
                sink.bias[column] = wide[0];
            }
        }
        const int64_t num_words = block.in_dim / Op::kPerWord;
        for (int64_t word = 0; word < num_words; word += kDepth) {
            const int64_t depth = num_words - word < kDepth ? num_words - word : kDepth;
            pack(block, sink.first, word, depth, ws.panel);
            sink.adds = word > 0;
            sink.is_last = word + depth == num_words;
            const In* x = static_cast<const In*>(args.x) + word * Op::kPerWord;
            const auto tile = [&]<int kCount>(int64_t row) {
                sink.partial = ws.partial + (row - begin) * kPanel;
                multiply<kCount>(x, args.x_stride, ws.panel, depth, row, sink);
            };
            int64_t row = begin;
            for (; row + kRows <= end; row += kRows) tile.template operator()<kRows>(row);
            for (; row + kFewRows <= end; row += kFewRows) tile.template operator()<kFewRows>(row);
            if (row < end) tile.template operator()<1>(row);
        }
    }

    static PackedKernel kernel() { return {run, workspace_bytes, kPanel, kLanes * Op::kPerWord}; }
};

}  // namespace

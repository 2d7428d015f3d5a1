// Where the attention of some rows goes, without values: per block of keys for rows anywhere, by key and by distance for
// consecutive ones.
//
// Rows are held last first. Then the rows that see a block are the first ones, and a key's distance from a consecutive
// row depends on the sum of their numbers alone.
//
// Include after prefill.h.
#pragma once
#include "prefill.h"

namespace {

template <class Op, class In, int D>
struct RowScores {
    using Attention = Prefill<Op, In, D>;
    using Word = typename Op::Word;
    static constexpr int kDimWords = D / Op::kPerWord;
    static constexpr int kStride = kScoreBlock + kScorePad;
    static_assert(kScoreBlock % kPanel == 0, "panels must cover the block");

    struct Workspace {
        Word* queries;    // rows, kDimWords
        Word* keys;       // kScoreBlock / kPanel panels
        float* scores;    // kRowBlock, kStride
        float* vertical;  // kScoreBlock
        float* diagonal;  // kScoreBlock + rows
        float* column;    // kScoreBlock
        float* sums;      // kScoreItemKeys + kScoreBlock + rows: of diagonals
        float* state;     // 3, kLanes
    };

    static int64_t carve(unsigned char* base, int64_t rows, Workspace* ws) {
        int64_t offset = 0;
        auto take = [&](int64_t words) {
            unsigned char* p = base + offset;
            offset += round_up(words * 4, 64);
            return p;
        };
        unsigned char* p[] = {take(rows * kDimWords),      take(kScoreBlock * kDimWords), take(kRowBlock * kStride),
                              take(kScoreBlock),           take(kScoreBlock + rows),      take(kScoreBlock),
                              take(kScoreItemKeys + kScoreBlock + rows), take(3 * kLanes)};
        if (ws != nullptr) {
            const auto floats = [&](int i) { return reinterpret_cast<float*>(p[i]); };
            *ws = {reinterpret_cast<Word*>(p[0]), reinterpret_cast<Word*>(p[1]), floats(2), floats(3), floats(4), floats(5),
                   floats(6), floats(7)};
        }
        return offset;
    }

    static int64_t workspace_bytes(int64_t num_rows) { return carve(nullptr, round_up(num_rows, kRowBlock), nullptr); }

    static Status run(const RowScoresArgs& args, int64_t item, unsigned char* memory) {
        const int64_t padded_rows = round_up(args.num_rows, kRowBlock);
        Workspace ws;
        carve(memory, padded_rows, &ws);
        const In* q = static_cast<const In*>(args.q);
        const In* k = static_cast<const In*>(args.k);
        for (int64_t row = 0; row < args.num_rows; ++row) Attention::convert_row(q + row * D, ws.queries + row * kDimWords);
        memset(ws.queries + args.num_rows * kDimWords, 0, (padded_rows - args.num_rows) * kDimWords * sizeof(Word));
        const int64_t begin = args.begin + item * kScoreItemKeys;
        const int64_t end = begin + kScoreItemKeys < args.end ? begin + kScoreItemKeys : args.end;
        const bool by_block = args.lse == nullptr;
        if (!by_block) memset(ws.sums, 0, (kScoreItemKeys + kScoreBlock + padded_rows) * sizeof(float));
        int64_t num_seeing = args.num_rows;
        for (int64_t key = begin; key < end; key += kScoreBlock) {
            const int num_keys = static_cast<int>(end - key < kScoreBlock ? end - key : kScoreBlock);
            Attention::pack_keys([&](int i) { return k + (key + i) * args.k_stride; }, num_keys, ws.keys);
            while (num_seeing > 0 && args.positions[num_seeing - 1] < key) --num_seeing;
            if (!by_block) prepare(args, ws, key, num_keys, padded_rows);
            for (int64_t row0 = 0; row0 < num_seeing; row0 += kRowBlock) {
                const int num_rows = static_cast<int>(num_seeing - row0 < kRowBlock ? num_seeing - row0 : kRowBlock);
                score(ws, row0, num_rows);
                if (by_block) {
                    reduce(args, ws, key, num_keys, row0, num_rows);
                } else {
                    add_up(args, ws, key, key - begin, num_keys, row0, num_rows);
                }
            }
            if (by_block) {
                const int64_t at = (key - args.begin) / kScoreBlock * args.num_rows;
                for (int64_t row = num_seeing; row < args.num_rows; ++row) {
                    args.maximum[at + row] = -FLT_MAX;
                    args.sum[at + row] = 0.0f;
                }
            } else {
                memcpy(args.by_key + key, ws.column, num_keys * sizeof(float));
            }
        }
        if (!by_block) {
            const int64_t width = kScoreItemKeys + args.num_rows;
            memcpy(args.by_diagonal + item * width, ws.sums, width * sizeof(float));
        }
        return kOk;
    }

    static void score(const Workspace& ws, int64_t row0, int num_rows) {
        const Word* queries = ws.queries + row0 * kDimWords;
        for (int key = 0; key < kScoreBlock; key += kPanel) {
            const Word* panel = ws.keys + static_cast<int64_t>(key) * kDimWords;
            const auto tile = [&]<int kRows>(int row) {
                multiply_tile<Op, kRows, kScoreVecs, kDimWords, kPanel, kStride, false>(
                    queries + row * kDimWords, panel, kDimWords, ws.scores + row * kStride + key, nullptr);
            };
            int row = 0;
            for (; row + kScoreRows <= num_rows; row += kScoreRows) tile.template operator()<kScoreRows>(row);
            for (; row < num_rows; row += kFewRows) tile.template operator()<kFewRows>(row);
        }
    }

    static int visible(int64_t last, int64_t key, int num_keys) {
        const int64_t count = last + 1 - key;
        return static_cast<int>(count < 0 ? 0 : count < num_keys ? count : num_keys);
    }

    // Each row's maximum and sum over the block.
    static void reduce(const RowScoresArgs& args, const Workspace& ws, int64_t key, int num_keys, int64_t row0,
                       int num_rows) {
        const float scale_log2 = args.scale * 1.44269504088896340736f;
        float *maximum = ws.state, *sum = ws.state + kLanes, *decay = ws.state + 2 * kLanes;
        const int64_t at = (key - args.begin) / kScoreBlock * args.num_rows + row0;
        for (int row = 0; row < num_rows; row += kLanes) {
            const int count = num_rows - row < kLanes ? num_rows - row : kLanes;
            int num_visible[kLanes];
            for (int i = 0; i < count; ++i) num_visible[i] = visible(args.positions[row0 + row + i], key, num_keys);
            store(maximum, splat(-FLT_MAX));
            store(sum, zero());
            soften<FloatWords, false>(ws.scores + row * kStride, kStride, count, num_visible, kScoreBlock, scale_log2,
                                      maximum, sum, decay);
            memcpy(args.maximum + at + row, maximum, count * sizeof(float));
            memcpy(args.sum + at + row, sum, count * sizeof(float));
        }
    }

    static void prepare(const RowScoresArgs& args, const Workspace& ws, int64_t key, int num_keys, int64_t padded_rows) {
        for (int i = 0; i < kScoreBlock; i += kLanes) store(ws.column + i, zero());
        if (args.vertical == nullptr) return;
        for (int i = 0; i < kScoreBlock; ++i) ws.vertical[i] = i < num_keys ? args.vertical[key + i] : 1.0f;
        const int64_t left = args.num_keys + args.num_rows - key;
        for (int64_t i = 0; i < kScoreBlock + padded_rows; ++i) ws.diagonal[i] = i < left ? args.diagonal[key + i] : 1.0f;
    }

    // Weights, or their quotients by what column and diagonal have together.
    static void add_up(const RowScoresArgs& args, const Workspace& ws, int64_t key, int64_t offset, int num_keys,
                       int64_t row0, int num_rows) {
        const Vec factor = splat(args.scale * 1.44269504088896340736f);
        const int64_t num_first = args.num_first - key;
        const int hidden = static_cast<int>(num_first < 0 ? 0 : num_first < kScoreBlock ? num_first : kScoreBlock);
        for (int row = 0; row < num_rows; ++row) {
            const int seen = visible(args.positions[row0 + row] - args.num_nearest, key, num_keys);
            const Vec shift = splat(-args.lse[row0 + row] * 1.44269504088896340736f);
            float* sums = ws.sums + offset + row0 + row;
            for (int i = 0; i < kScoreBlock; i += kLanes) {
                if (i >= seen) break;
                Vec weight = exp2<false>(fma(load(ws.scores + row * kStride + i), factor, shift));
                if (seen - i < kLanes) weight = keep_first(weight, seen - i, zero());
                if (hidden > i) weight = keep_first(zero(), hidden - i < kLanes ? hidden - i : kLanes, weight);
                if (args.vertical != nullptr) {
                    weight = div(weight, add(load(ws.vertical + i), load(ws.diagonal + row0 + row + i)));
                }
                store(ws.column + i, add(load(ws.column + i), weight));
                store(sums + i, add(load(sums + i), weight));
            }
        }
    }

    static RowScoresKernel kernel() { return {run, workspace_bytes}; }
};

template <class Op, class In>
RowScoresKernel row_scores_of_dim(int64_t head_dim) {
    switch (head_dim) {
        case 16: return RowScores<Op, In, 16>::kernel();
        case 64: return RowScores<Op, In, 64>::kernel();
        case 80: return RowScores<Op, In, 80>::kernel();
        case 96: return RowScores<Op, In, 96>::kernel();
        case 128: return RowScores<Op, In, 128>::kernel();
        default: return {nullptr, nullptr};
    }
}

}  // namespace

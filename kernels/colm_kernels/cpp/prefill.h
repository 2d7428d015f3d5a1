// Attention of a range of rows of one kv head to all of its keys or to listed ones, with an online softmax.
//
// Sparse and dense attention differ only in where the next key lies: a list in ascending order that ends with the keys
// around the diagonal is causal like a sequence, so a row sees a prefix of either.
//
// Keys are taken in chunks that fit the second-level cache. A chunk is packed once and then read by every row block
// of the item, whatever its query head, so packing is a small part even when a tile of a few hundred queries meets a
// prefix of a million keys. A row's running maximum, sum and output wait in memory between chunks.
//
// Include after a vec_*.h.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>
#include "abi.h"
#include "softmax.h"
#include "tile.h"

namespace {

#if defined(__AVX512F__)
constexpr int kScoreVecs = 4;
#else
constexpr int kScoreVecs = 2;
#endif
constexpr int kScoreRows = 6;               // kScoreRows x kScoreVecs accumulators, the row of B and one broadcast
constexpr int kFewRows = 2;                 // rows of the smaller tiles for the rows that are left
constexpr int kPanel = kScoreVecs * kLanes;  // keys of one packed panel
constexpr int kRowBlock = 48;               // a multiple of every tile's rows
constexpr int kKeyBlock = 512;              // keys between two steps of the softmax; 256 are 1.01x slower, 128 1.03x
constexpr int kChunk = 512;                 // keys packed at a time; K and V of a chunk at head dim 64 are 128-256 KiB
constexpr int kFetchKeys = 4;               // keys of the next chunk that are fetched with every tile of scores
// Padding after a row's words, so that rows do not map to the same cache sets.
constexpr int kScorePad = 16;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How the output's columns are divided into register tiles.
template <int kColumnVecs>
struct ValueTile {
#if defined(__AVX512F__)
    static constexpr int kVecs = kColumnVecs == 8 ? 4 : kColumnVecs;
    static constexpr int kRows = kVecs == 1 ? 12 : kVecs == 4 ? 6 : 4;
#else
    static constexpr int kVecs = 2;
    static constexpr int kRows = 6;
#endif
    static_assert(kColumnVecs % kVecs == 0 && kRowBlock % kRows == 0, "tiles must cover the block");
};

template <class Op, class In, int D>
struct Prefill {
    using Word = typename Op::Word;
    static constexpr int kDimWords = D / Op::kPerWord;
    static constexpr int kScoreStride = kKeyBlock + kScorePad;
    using Tile = ValueTile<D / kLanes>;
    static_assert(kChunk % kKeyBlock == 0 && kKeyBlock % kPanel == 0, "blocks must cover the chunk");

    static constexpr In kZeros[D] = {};

    struct Workspace {
        Word* queries;   // rows, kDimWords
        float* output;   // rows, D: unnormalised
        float* maximum;  // rows: of the unscaled scores
        float* sum;      // rows
        Word* keys;      // kChunk / kPanel panels of (kDimWords, kPanel)
        Word* values;    // kChunk / kPerWord, D
        float* scores;   // kRowBlock, kScoreStride; overwritten in place by the weights, as words
    };

    static int64_t workspace_bytes(int64_t rows_per_item) {
        return carve(nullptr, round_up(rows_per_item, kRowBlock), nullptr);
    }

    static int64_t carve(unsigned char* base, int64_t rows, Workspace* ws) {
        int64_t offset = 0;
        auto take = [&](int64_t words) {
            unsigned char* p = base + offset;
            offset += round_up(words * 4, 64);
            return p;
        };
        unsigned char* p[] = {take(rows * kDimWords), take(rows * D), take(rows), take(rows),
                              take(kChunk * kDimWords), take(kChunk / Op::kPerWord * D),
                              take(kRowBlock * kScoreStride)};
        if (ws != nullptr) {
            *ws = {reinterpret_cast<Word*>(p[0]),  reinterpret_cast<float*>(p[1]), reinterpret_cast<float*>(p[2]),
                   reinterpret_cast<float*>(p[3]), reinterpret_cast<Word*>(p[4]),  reinterpret_cast<Word*>(p[5]),
                   reinterpret_cast<float*>(p[6])};
        }
        return offset;
    }

    // One row of D inputs as words along the head dim.
    static void convert_row(const In* from, Word* to) {
        if constexpr (sizeof(In) * Op::kPerWord == sizeof(Word)) {
            memcpy(to, from, D * sizeof(In));
        } else {
            for (int d = 0; d < D; d += kLanes) store(reinterpret_cast<float*>(to) + d, load_as_float(from + d));
        }
    }

    // Lanes i of `words` are words `word` .. of key i; store each word's lanes side by side.
    static void store_words(Vec* words, Word* panel, int word) {
        transpose(words);
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(panel + (word + i) * kPanel), words[i]);
    }

    // Panels are filled kLanes keys at a time, with zeros past the last key, since panels are multiplied whole.
    template <class Rows>
    static void pack_keys(Rows key_row, int num_keys, Word* packed) {
        const int num_padded = static_cast<int>(round_up(num_keys, kPanel));
        for (int key0 = 0; key0 < num_padded; key0 += kLanes) {
            Word* panel = packed + key0 / kPanel * kPanel * kDimWords + key0 % kPanel;
            const In* keys[kLanes];
            const int count = num_keys - key0 < kLanes ? num_keys - key0 : kLanes;
            for (int i = 0; i < kLanes; ++i) keys[i] = i < count ? key_row(key0 + i) : kZeros;
            Vec words[kLanes];
            if constexpr (sizeof(In) * Op::kPerWord == sizeof(Word)) {
                constexpr int kWhole = kDimWords / kLanes * kLanes;
                for (int word = 0; word < kWhole; word += kLanes) {
                    for (int i = 0; i < kLanes; ++i) words[i] = load(reinterpret_cast<const float*>(keys[i]) + word);
                    store_words(words, panel, word);
                }
                // Half a vector of words is left if D / kPerWord is not a multiple of the lanes.
                for (int word = kWhole; word < kDimWords; ++word) {
                    for (int i = 0; i < kLanes; ++i) {
                        memcpy(panel + word * kPanel + i, keys[i] + word * Op::kPerWord, sizeof(Word));
                    }
                }
            } else {
                // Two bf16 numbers share a lane in the transpose, which halves the shuffles.
                constexpr int kWhole = kDimWords / (2 * kLanes) * 2 * kLanes;
                for (int word = 0; word < kWhole; word += 2 * kLanes) {
                    for (int i = 0; i < kLanes; ++i) words[i] = load_pairs(keys[i] + word);
                    transpose(words);
                    for (int i = 0; i < kLanes; ++i) {
                        Vec even, odd;
                        split_pairs(words[i], &even, &odd);
                        store(reinterpret_cast<float*>(panel + (word + 2 * i) * kPanel), even);
                        store(reinterpret_cast<float*>(panel + (word + 2 * i + 1) * kPanel), odd);
                    }
                }
                for (int word = kWhole; word < kDimWords; word += kLanes) {
                    for (int i = 0; i < kLanes; ++i) words[i] = load_as_float(keys[i] + word);
                    store_words(words, panel, word);
                }
            }
        }
    }

    template <class Rows>
    static void pack_values(Rows value_row, int num_keys, Word* packed) {
        if constexpr (Op::kPerWord == 1) {
            for (int key = 0; key < num_keys; ++key) convert_row(value_row(key), packed + key * D);
        } else {
#ifdef __AVX512BF16__
            // Two neighbouring keys share a word, the even one in the low half; a missing last key is zero.
            for (int key = 0; key < num_keys; key += 2) {
                const uint16_t* even = reinterpret_cast<const uint16_t*>(value_row(key));
                const uint16_t* odd =
                    key + 1 < num_keys ? reinterpret_cast<const uint16_t*>(value_row(key + 1)) : nullptr;
                for (int d = 0; d < D; d += kLanes) {
                    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + d)));
                    if (odd != nullptr) {
                        low = _mm512_or_si512(low, _mm512_castps_si512(load_as_float(odd + d)));
                    }
                    _mm512_storeu_si512(packed + key / 2 * D + d, low);
                }
            }
#endif
        }
    }

    // One row block against the packed keys [key0, key0 + num_keys) of the chunk, all of which its last row sees.
    // Calls `fetch` with every tile of scores.
    template <class Fetch>
    static void attend(const Workspace& ws, int64_t row0, int num_rows, int key0, int num_keys, const int* num_visible,
                       float scale_log2, Fetch fetch) {
        const Word* queries = ws.queries + row0 * kDimWords;
        // Keys that the rows before `row` see. Rows see ever more, so it is what the last of them sees.
        const auto seen_before = [&](int row) { return num_visible[(row < num_rows ? row : num_rows) - 1]; };
        Vec largest[kRowBlock];
        for (Vec& of_row : largest) of_row = splat(-FLT_MAX);
        for (int key = 0; key < num_keys; key += kPanel) {
            const Word* panel = ws.keys + static_cast<int64_t>(key0 + key) * kDimWords;
            const auto score = [&]<int kRows>(int row) {
                fetch();
                if (key >= seen_before(row + kRows)) return;
                multiply_tile<Op, kRows, kScoreVecs, kDimWords, kPanel, kScoreStride, false>(
                    queries + row * kDimWords, panel, kDimWords, ws.scores + row * kScoreStride + key, nullptr, {},
                    largest + row);
            };
            int row = 0;
            for (; row + kScoreRows <= num_rows; row += kScoreRows) score.template operator()<kScoreRows>(row);
            for (; row < num_rows; row += kFewRows) score.template operator()<kFewRows>(row);
        }
        const int num_padded = static_cast<int>(round_up(num_keys, 2 * kLanes));
        // Otherwise the largest scores are among those that a row does not see.
        const bool sees_all = num_visible[0] == num_keys && num_keys % kPanel == 0;
        float decay[kRowBlock];
        for (int row = 0; row < num_rows; row += kLanes) {
            soften<Op, sizeof(In) == 2>(ws.scores + row * kScoreStride, kScoreStride,
                                        num_rows - row < kLanes ? num_rows - row : kLanes, num_visible + row,
                                        num_padded, scale_log2, ws.maximum + row0 + row, ws.sum + row0 + row,
                                        decay + row, sees_all ? largest + row : nullptr, Tile::kRows + Op::kPerWord);
        }
        // Tiles may reach past the last row, into the block's padding.
        for (int row = static_cast<int>(round_up(num_rows, kLanes)); row < kRowBlock; ++row) decay[row] = 0.0f;
        const Word* weights = reinterpret_cast<const Word*>(ws.scores);
        const Word* values = ws.values + static_cast<int64_t>(key0 / Op::kPerWord) * D;
        for (int column = 0; column < D; column += Tile::kVecs * kLanes) {
            const auto gather = [&]<int kRows>(int row) {
                const int64_t depth = (seen_before(row + kRows) + Op::kPerWord - 1) / Op::kPerWord;
                multiply_tile<Op, kRows, Tile::kVecs, kScoreStride, D, D, true>(
                    weights + row * kScoreStride, values + column, depth, ws.output + (row0 + row) * D + column,
                    decay + row);
            };
            int row = 0;
            for (; row + Tile::kRows <= num_rows; row += Tile::kRows) gather.template operator()<Tile::kRows>(row);
            for (; row < num_rows; row += kFewRows) gather.template operator()<kFewRows>(row);
        }
    }

    // Rows [begin, end) of the query heads first_head .. first_head + group - 1: row r is token r / group of the tile.
    struct Rows {
        int64_t first_head, group, begin, end;

        int64_t token(int64_t row) const { return (begin + row) / group; }
        int64_t head(int64_t row) const { return first_head + (begin + row) % group; }
    };

    // Every key in its order.
    struct AllKeys {
        int64_t prefix;  // row r sees the first prefix + token(r) + 1 keys

        int64_t position(int64_t i) const { return i; }
    };

    // The columns, then the blocks, of one list.
    struct ListedKeys {
        int64_t prefix;
        const int32_t *columns, *blocks;
        int64_t num_columns;
        int key_block_log2;

        int64_t position(int64_t i) const {
            if (i < num_columns) return columns[i];
            const int64_t key = i - num_columns, block = blocks[key >> key_block_log2];
            return (block << key_block_log2) + (key & ((1 << key_block_log2) - 1));
        }
    };

    template <class Keys>
    static Status attend_rows(const PrefillArgs& args, const Rows& rows, const Keys& keys, const Workspace& ws) {
        const int64_t num_rows = rows.end - rows.begin, padded_rows = round_up(num_rows, kRowBlock);
        const float scale_log2 = args.scale * 1.44269504088896340736f;
        const In* q = static_cast<const In*>(args.q);
        for (int64_t row = 0; row < num_rows; ++row) {
            convert_row(q + rows.token(row) * args.q_stride_t + rows.head(row) * args.q_stride_h,
                        ws.queries + row * kDimWords);
        }
        memset(ws.queries + num_rows * kDimWords, 0, (padded_rows - num_rows) * kDimWords * sizeof(Word));
        memset(ws.output, 0, padded_rows * D * sizeof(float));
        for (int64_t row = 0; row < padded_rows; ++row) {
            ws.maximum[row] = -FLT_MAX;  // not -infinity, whose difference with itself is NaN
            ws.sum[row] = 0.0f;
        }

        const int64_t kv_head = rows.first_head / (args.num_heads / args.num_kv_heads);
        const In* k = static_cast<const In*>(args.k) + kv_head * args.k_stride_k;
        const In* v = static_cast<const In*>(args.v) + kv_head * args.v_stride_k;
        const int64_t num_visible_keys = keys.prefix + rows.token(num_rows - 1) + 1;
        int64_t done = 0;
        for (int64_t chunk = 0; chunk < num_visible_keys; chunk += kChunk) {
            const int64_t left = num_visible_keys - chunk;
            const int chunk_keys = static_cast<int>(left < kChunk ? left : kChunk);
            pack_keys([&](int i) { return k + keys.position(chunk + i) * args.k_stride_s; }, chunk_keys, ws.keys);
            pack_values([&](int i) { return v + keys.position(chunk + i) * args.v_stride_s; }, chunk_keys, ws.values);
            // Hardware does not prefetch listed keys. They are fetched a few at a time: all at once would fill its queues.
            int64_t fetched = chunk + kChunk;
            const int64_t last = fetched + kChunk < num_visible_keys ? fetched + kChunk : num_visible_keys;
            const auto fetch = [&] {
                const int64_t until = fetched + kFetchKeys < last ? fetched + kFetchKeys : last;
                for (; fetched < until; ++fetched) {
                    const int64_t position = keys.position(fetched);
                    for (int d = 0; d < D; d += 64 / sizeof(In)) {
                        _mm_prefetch(reinterpret_cast<const char*>(k + position * args.k_stride_s + d), _MM_HINT_T1);
                        _mm_prefetch(reinterpret_cast<const char*>(v + position * args.v_stride_s + d), _MM_HINT_T1);
                    }
                }
            };
            for (int64_t row0 = 0; row0 < num_rows; row0 += kRowBlock) {
                if (args.flag != nullptr && args.flag->cancelled != 0) return kCancelled;
                const int num_block_rows = static_cast<int>(num_rows - row0 < kRowBlock ? num_rows - row0 : kRowBlock);
                const int64_t block_visible = keys.prefix + rows.token(row0 + num_block_rows - 1) + 1 - chunk;
                const int block_keys = static_cast<int>(block_visible < chunk_keys ? block_visible : chunk_keys);
                for (int key0 = 0; key0 < block_keys; key0 += kKeyBlock) {
                    const int num_keys = block_keys - key0 < kKeyBlock ? block_keys - key0 : kKeyBlock;
                    int num_visible[kRowBlock];
                    for (int row = 0; row < num_block_rows; ++row) {
                        const int64_t visible = keys.prefix + rows.token(row0 + row) + 1 - chunk - key0;
                        num_visible[row] = static_cast<int>(visible < 0 ? 0 : visible < num_keys ? visible : num_keys);
                    }
                    attend(ws, row0, num_block_rows, key0, num_keys, num_visible, scale_log2, fetch);
                }
            }
            if (args.flag != nullptr) {
                const int64_t done_now = (chunk + chunk_keys) * args.item_share / num_visible_keys;
                __atomic_fetch_add(&args.flag->done, done_now - done, __ATOMIC_RELAXED);
                done = done_now;
            }
        }

        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t at = rows.token(row) * args.num_heads + rows.head(row);
            const Vec inverse = splat(1.0f / ws.sum[row]);
            for (int d = 0; d < D; d += kLanes) {
                store_from_float(static_cast<In*>(args.out) + at * D + d, mul(load(ws.output + row * D + d), inverse));
            }
            args.lse[at] = ws.maximum[row] * args.scale + logf(ws.sum[row]);
        }
        return kOk;
    }

    static Status run(const PrefillArgs& args, int64_t item, unsigned char* memory) {
        const int64_t group = args.num_heads / args.num_kv_heads, total_rows = args.num_queries * group;
        const int64_t num_ranges = (total_rows + args.rows_per_item - 1) / args.rows_per_item;
        // The last ranges see the most keys; starting with them leaves short items to even out the threads.
        const int64_t begin = (num_ranges - 1 - item / args.num_kv_heads) * args.rows_per_item;
        const int64_t end = begin + args.rows_per_item < total_rows ? begin + args.rows_per_item : total_rows;
        Workspace ws;
        carve(memory, round_up(args.rows_per_item, kRowBlock), &ws);
        const AllKeys keys{args.num_keys - args.num_queries};
        return attend_rows(args, {item % args.num_kv_heads * group, group, begin, end}, keys, ws);
    }

    static Status run_sparse(const SparsePrefillArgs& args, int64_t item, unsigned char* memory) {
        const PrefillArgs& dense = args.dense;
        const int64_t num_row_blocks = (dense.num_queries + args.row_block - 1) / args.row_block;
        const int64_t list = item % args.num_lists, row_block = num_row_blocks - 1 - item / args.num_lists;
        const int64_t token = row_block * args.row_block;
        const int64_t end = token + args.row_block < dense.num_queries ? token + args.row_block : dense.num_queries;
        const int64_t at = list * num_row_blocks + row_block;
        const int64_t num_blocks = args.block_offsets[at + 1] - args.block_offsets[at];
        const int64_t num_columns = args.column_offsets[at + 1] - args.column_offsets[at];
        const int64_t past = dense.num_keys - dense.num_queries;  // keys before the tile
        const int64_t first_diagonal = (past + token) / args.key_block, last_diagonal = (past + end - 1) / args.key_block;
        // The listed keys before the first diagonal block take the place of all keys before it.
        const int64_t listed = num_columns + (num_blocks - (last_diagonal - first_diagonal + 1)) * args.key_block;
        const ListedKeys keys{past + listed - first_diagonal * args.key_block, args.column_ids + args.column_offsets[at],
                        args.block_ids + args.block_offsets[at], num_columns, __builtin_ctzll(args.key_block)};
        const int64_t group = dense.num_heads / args.num_lists;
        Workspace ws;
        carve(memory, round_up(dense.rows_per_item, kRowBlock), &ws);
        return attend_rows(dense, {list * group, group, token * group, end * group}, keys, ws);
    }

    static PrefillKernel kernel() { return {run, run_sparse, workspace_bytes}; }
};

template <class Op, class In>
PrefillKernel prefill_of_dim(int64_t head_dim) {
    switch (head_dim) {
        case 16: return Prefill<Op, In, 16>::kernel();
        case 64: return Prefill<Op, In, 64>::kernel();
        case 80: return Prefill<Op, In, 80>::kernel();
        case 96: return Prefill<Op, In, 96>::kernel();
        case 128: return Prefill<Op, In, 128>::kernel();
        default: return {nullptr, nullptr, nullptr};
    }
}

}  // namespace

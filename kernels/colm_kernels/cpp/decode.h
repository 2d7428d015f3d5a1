// Attention of one request's query tokens to a range of its context, read in place from the pages. Include after a
// vec_*.h.
//
// Memory bounds the work, so a key or value is read once for all query heads and query tokens of its kv head. Meanwhile
// the next block is prefetched, a little with every token, in the order of its addresses, so that hardware can prefetch
// too: prefetching head by head, as the arithmetic goes, was a fifth slower. In fp32 keys are transposed as they are
// widened, so that scores come out a vector of tokens at a time and no sum runs across lanes. Products of bf16 pairs
// read keys untransposed.
//
// The terms of a row's sums and their order depend on its own context only, not on the rows beside it nor on an item's
// last range. So a query's result has the same bits alone, among drafts and in any batch.
#pragma once
#include <cfloat>
#include <cstring>
#include "abi.h"
#include "softmax.h"
#include "tile.h"

namespace {

// Op is the arithmetic of the scores: fp32, or products of bf16 pairs if pages and queries are bf16.
template <class Op, class In, int D>
struct Decode {
    static constexpr bool kPairs = Op::kPerWord == 2;
    static constexpr bool kScaled = sizeof(In) == 1;
    static constexpr int kBlock = 64;  // tokens; keys and values of one head, widened, are 32 KiB at head dim 64
    static constexpr int kKeyVecs = sizeof(Vec) == 64 ? 4 : 2;
    static constexpr int kPanel = kKeyVecs * kLanes;  // keys of one transposed panel
    static constexpr int kPerWord = sizeof(float) / sizeof(In);
    static constexpr int kWords = D / kPerWord;
    static constexpr int kLine = 64 / sizeof(In);  // elements of a cache line
    static constexpr int kValueVecs = sizeof(Vec) == 64 ? (D % 64 == 0 ? 4 : D % 80 == 0 ? 5 : D % 48 == 0 ? 3 : 1) : 2;
    static constexpr int kRowTile = 4;  // by 4 or 5 vectors
    static_assert(kBlock % kPanel == 0 && kBlock % (2 * kLanes) == 0, "panels and the softmax cover the block");

    struct Workspace {
        float* queries;  // num_kv_heads, rows, D; as bf16 for pairs
        float* keys;     // kBlock / kPanel panels of (D, kPanel)
        float* values;   // kBlock, D
        float* scores;   // rows, kBlock; overwritten in place by the weights
        float* decay;    // padded rows
        float* maxima;   // num_kv_heads, padded rows
        float* sums;     // num_kv_heads, padded rows
    };

    static int64_t padded(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

    static int64_t workspace_bytes(int64_t num_kv_heads, int64_t rows) {
        return 4 * (num_kv_heads * (rows * D + 2 * padded(rows)) + 2 * kBlock * D + rows * kBlock + padded(rows));
    }

    static Workspace carve(unsigned char* memory, int64_t num_kv_heads, int64_t rows) {
        Workspace ws;
        ws.keys = reinterpret_cast<float*>(memory);
        ws.values = ws.keys + kBlock * D;
        ws.scores = ws.values + kBlock * D;
        ws.queries = ws.scores + rows * kBlock;
        ws.decay = ws.queries + num_kv_heads * rows * D;
        ws.maxima = ws.decay + padded(rows);
        ws.sums = ws.maxima + num_kv_heads * padded(rows);
        return ws;
    }

    // Tokens of the context as rows of the pool: page * P + position in the page. Entries past the last repeat it.
    struct Block {
        int count;
        int64_t rows[kBlock];
    };

    static void locate(const DecodeArgs& args, int64_t request, int64_t begin, int64_t end, Block* block) {
        const int32_t* table = args.block_table + request * args.table_columns;
        block->count = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
        int64_t column = begin / args.page_tokens, position = begin % args.page_tokens, row = 0;
        for (int i = 0; i < block->count; ++column, position = 0) {
            row = table[column] * args.page_tokens + position;
            for (; i < block->count && position < args.page_tokens; ++position) block->rows[i++] = row++;
        }
        for (int i = block->count; i < kBlock; ++i) block->rows[i] = row - 1;
    }

    // Prefetches a block of one pool, all its heads, in the order of its addresses, so that hardware can prefetch too.
    // One step prefetches as much as one head of one token.
    struct Ahead {
        const In* pool;
        const Block* block;
        int64_t stride;
        int token = 0;
        int64_t within = 0;

        void step() {
            if (token >= block->count) return;
            const In* from = pool + block->rows[token] * stride + within;
            for (int d = 0; d < D; d += kLine) _mm_prefetch(reinterpret_cast<const char*>(from + d), _MM_HINT_T1);
            within += D;
            if (within == stride) {
                within = 0;
                ++token;
            }
        }
    };

    // Widens and transposes the keys of one head.
    static void pack_keys(const In* keys, int64_t stride, const Block& block, float* packed) {
        for (int first = 0; first < block.count; first += kLanes) {
            float* panel = packed + first / kPanel * kPanel * D + first % kPanel;
            for (int word = 0; word < kWords; word += kLanes) {
                constexpr int kLast = kWords % kLanes;
                Vec part[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    const In* from = keys + block.rows[first + i] * stride + word * kPerWord;
                    part[i] = word + kLanes <= kWords ? load(reinterpret_cast<const float*>(from))
                                                      : load_first_words(from, kLast);
                }
                transpose(part);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    if (word + i >= kWords) break;
                    Vec wide[kPerWord];
                    split_words(part[i], wide);
                    for (int j = 0; j < kPerWord; ++j) store(panel + ((word + i) * kPerWord + j) * kPanel, wide[j]);
                }
            }
        }
    }

    template <class Ask>
    static void pack_values(const In* values, int64_t stride, const Block& block, Ask ask, float* packed) {
        for (int token = 0; token < block.count; ++token) {
            ask();
            const In* from = values + block.rows[token] * stride;
            for (int d = 0; d < D; d += kLanes) store(packed + token * D + d, load_as_float(from + d));
        }
    }

    // Scores of kRows rows against the block; prefetches one step a token.
    template <int kRows, class Ask>
    static void score(const float* queries, const float* keys, int num_padded, float* scores, Ask ask) {
        constexpr int kPanels = kBlock / kPanel;
        for (int key = 0; key < num_padded; key += kPanel) {
            multiply_tile<FloatWords, kRows, kKeyVecs, D, kPanel, kBlock, false>(
                queries, keys + key * D, D, scores + key, nullptr, [&](int64_t step) {
                    for (int64_t i = step * kPanels + key / kPanel; i < kBlock; i += D * kPanels) ask();
                });
        }
    }

    // output[row] = output[row] * decay[row] + sum over tokens of weights[row][token] * value(token), for kRows rows.
    template <int kRows, class Value>
    static void gather(const float* weights, Value value, int count, const float* decay, float* output) {
        for (int column = 0; column < D; column += kValueVecs * kLanes) {
            Vec acc[kRows][kValueVecs];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                const Vec factor = splat(decay[i]);
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) acc[i][j] = mul(load(output + i * D + column + j * kLanes), factor);
            }
            for (int token = 0; token < count; ++token) {
                const auto* from = value(token) + column;
                Vec row[kValueVecs];
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) row[j] = load_as_float(from + j * kLanes);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    const Vec weight = splat(weights[i * kBlock + token]);
#pragma GCC unroll 5
                    for (int j = 0; j < kValueVecs; ++j) acc[i][j] = fma(weight, row[j], acc[i][j]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) store(output + i * D + column + j * kLanes, acc[i][j]);
            }
        }
    }

#ifdef __AVX512BF16__
    // Pairs of elements, 32 a vector; a vector that the head dim fills by half ends in zeros.
    static constexpr int kPairVecs = (D + 31) / 32;

    static __m512bh load_pairs_of(const uint16_t* from, int vec) {
        from += vec * 32;
        if (vec * 32 + 32 <= D) return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return reinterpret_cast<__m512bh>(_mm512_zextsi256_si512(half));
    }

    // The same scores from untransposed keys, one dot product along the head dim at a time.
    template <int kRows, class Ask>
    static void score_pairs(const uint16_t* queries, const In* keys, int64_t stride, const Block& block, int num_padded,
                            float* scores, Ask ask) {
        for (int key = 0; key < num_padded; key += kLanes) {
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                Vec acc[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    if (row == 0) ask();
                    const uint16_t* from = keys + block.rows[key + i] * stride;
                    acc[i] = zero();
#pragma GCC unroll 4
                    for (int vec = 0; vec < kPairVecs; ++vec) {
                        acc[i] = Op::multiply_add(acc[i], load_pairs_of(from, vec), load_pairs_of(queries + row * D, vec));
                    }
                }
                store(scores + row * kBlock + key, reduce_each(acc, [](Vec a, Vec b) { return add(a, b); }));
            }
        }
    }
#endif

    // Calls of<4>, of<2> and of<1> with the first row of each tile until [row, end) is covered.
    template <class Of>
    static void in_tiles(int64_t row, int64_t end, Of of) {
        for (; end - row >= 4; row += 4) of.template operator()<4>(row);
        if (end - row >= 2) {
            of.template operator()<2>(row);
            row += 2;
        }
        if (row < end) of.template operator()<1>(row);
    }

    static void load_scales(const uint16_t* from, const Block& block, int64_t num_heads, int64_t head, float* scales) {
        for (int i = 0; i < block.count; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[block.rows[i] * num_heads + head]) << 16;
            memcpy(scales + i, &bits, sizeof bits);
        }
    }

    // A scale that is not finite multiplies every element before the sum, since infinities of both signs must give NaN.
    static void apply_unusual_scales(float* packed, int count, float* scales) {
        for (int i = 0; i < count; ++i) {
            if (scales[i] - scales[i] == 0.0f) continue;
            float* column = packed + i / kPanel * kPanel * D + i % kPanel;
            for (int d = 0; d < D; ++d) column[d * kPanel] *= scales[i];
            scales[i] = 1.0f;
        }
    }

    // Multiplies the first `count` entries by their tokens' scales; the others, up to a whole vector, become zero.
    static void scale_row(float* row, int count, const float* scales) {
        for (int i = 0; i < count; i += kLanes) {
            const int left = count - i < kLanes ? count - i : kLanes;
            store(row + i, keep_first(mul(load(row + i), load(scales + i)), left, zero()));
        }
    }

    static void run(const DecodeArgs& args, const DecodeItem& item, unsigned char* memory) {
        const int64_t num_heads = args.num_kv_heads, group = args.group, stride = num_heads * D;
        const int64_t first_query = args.cu_seqlens_q[item.request];
        const int64_t num_queries = args.cu_seqlens_q[item.request + 1] - first_query;
        const int64_t rows = num_queries * group, padded_rows = padded(rows);
        const int64_t num_common = args.context_lens[item.request] - num_queries + 1;  // tokens that every query sees
        const float scale_log2 = args.scale * 1.44269504088896340736f;
        const Workspace ws = carve(memory, num_heads, rows);
        float* const output = item.partial;

        for (int64_t head = 0; head < num_heads; ++head) {
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t at = (((first_query + row / group) * num_heads + head) * group + row % group) * D;
                float* query = ws.queries + (head * rows + row) * D;
                if constexpr (kPairs) {
                    memcpy(reinterpret_cast<uint16_t*>(ws.queries) + (head * rows + row) * D,
                           static_cast<const uint16_t*>(args.q) + at, D * sizeof(uint16_t));
                }
                for (int d = 0; d < D; d += kLanes) {
                    if constexpr (!kPairs) {
                        store(query + d, args.dtype == kBfloat16
                                             ? load_as_float(static_cast<const uint16_t*>(args.q) + at + d)
                                             : load(static_cast<const float*>(args.q) + at + d));
                    }
                    store(output + (head * rows + row) * D + d, zero());
                }
            }
        }
        for (int64_t i = 0; i < num_heads * padded_rows; ++i) {
            ws.maxima[i] = -FLT_MAX;  // not -infinity, whose difference with itself is NaN
            ws.sums[i] = 0.0f;
        }

        float k_scales[kBlock], v_scales[kBlock];
        Block blocks[2];
        locate(args, item.request, item.begin, item.end, &blocks[0]);
        for (int64_t begin = item.begin, turn = 0; begin < item.end; begin += kBlock, turn ^= 1) {
            const Block& block = blocks[turn];
            Block& next = blocks[turn ^ 1];
            if (begin + kBlock < item.end) {
                locate(args, item.request, begin + kBlock, item.end, &next);
            } else {
                next = block;
            }
            const int num_padded = (block.count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
            const bool all_visible = begin + block.count <= num_common;
            auto visible = [&](int64_t row) {
                const int64_t count = num_common + row / group - begin;
                return static_cast<int>(count < 0 ? 0 : count < block.count ? count : block.count);
            };
            Ahead keys_ahead{static_cast<const In*>(args.k_pages), &next, stride};
            Ahead values_ahead{static_cast<const In*>(args.v_pages), &next, stride};
            for (int64_t head = 0; head < num_heads; ++head) {
                const In* keys = static_cast<const In*>(args.k_pages) + head * D;
                const In* values = static_cast<const In*>(args.v_pages) + head * D;
                if constexpr (!kPairs) pack_keys(keys, stride, block, ws.keys);
                if constexpr (kScaled) {
                    load_scales(args.k_scales, block, num_heads, head, k_scales);
                    load_scales(args.v_scales, block, num_heads, head, v_scales);
                    apply_unusual_scales(ws.keys, block.count, k_scales);
                }
                in_tiles(0, rows, [&]<int kRows>(int64_t row) {
                    const auto ask = [&] {
                        if (row == 0) keys_ahead.step();
                    };
                    if constexpr (kPairs) {
#ifdef __AVX512BF16__
                        score_pairs<kRows>(reinterpret_cast<const uint16_t*>(ws.queries) + (head * rows + row) * D, keys,
                                           stride, block, num_padded, ws.scores + row * kBlock, ask);
#endif
                    } else {
                        score<kRows>(ws.queries + (head * rows + row) * D, ws.keys, num_padded, ws.scores + row * kBlock,
                                     ask);
                    }
                });
                if constexpr (kScaled) {
                    for (int64_t row = 0; row < rows; ++row) scale_row(ws.scores + row * kBlock, visible(row), k_scales);
                }
                for (int64_t row = 0; row < rows; row += kLanes) {
                    const int count = static_cast<int>(rows - row < kLanes ? rows - row : kLanes);
                    int num_visible[kLanes];
                    for (int i = 0; i < count; ++i) num_visible[i] = visible(row + i);
                    const int64_t at = head * padded_rows + row;
                    soften<FloatWords, sizeof(In) == 2>(ws.scores + row * kBlock, kBlock, count, num_visible, num_padded,
                                                        scale_log2, ws.maxima + at, ws.sums + at, ws.decay + row);
                }
                if constexpr (kScaled) {
                    for (int64_t row = 0; row < rows; ++row) scale_row(ws.scores + row * kBlock, visible(row), v_scales);
                }
                float* to = output + head * rows * D;
                const auto ask_values = [&] { values_ahead.step(); };
                const bool packed = rows > kRowTile;
                if (packed) pack_values(values, stride, block, ask_values, ws.values);
                for (int64_t row = 0; row < rows;) {
                    // Rows of one query token see the same tokens. A weight of zero times infinity would be NaN.
                    const int64_t end = all_visible ? rows : row + group;
                    const int count = visible(row);
                    in_tiles(row, end, [&]<int kRows>(int64_t r) {
                        const float* weights = ws.scores + r * kBlock;
                        if (packed) {
                            gather<kRows>(weights, [&](int token) { return ws.values + token * D; }, count, ws.decay + r,
                                          to + r * D);
                        } else {
                            auto value = [&](int token) {
                                ask_values();
                                return values + block.rows[token] * stride;
                            };
                            gather<kRows>(weights, value, count, ws.decay + r, to + r * D);
                        }
                    });
                    row = end;
                }
            }
        }
        for (int64_t row = 0; row < num_heads * rows; ++row) {
            const int64_t at = row / rows * padded_rows + row % rows;
            output[num_heads * rows * D + row] = ws.maxima[at];
            output[num_heads * rows * (D + 1) + row] = ws.sums[at];
        }
    }

    static DecodeKernel kernel() { return {run, workspace_bytes}; }
};

template <class Op, class In>
DecodeKernel decode_of_dim(int64_t head_dim) {
    switch (head_dim) {
        case 16: return Decode<Op, In, 16>::kernel();
        case 64: return Decode<Op, In, 64>::kernel();
        case 80: return Decode<Op, In, 80>::kernel();
        case 96: return Decode<Op, In, 96>::kernel();
        case 128: return Decode<Op, In, 128>::kernel();
        default: return {nullptr, nullptr};
    }
}

}  // namespace

// Attention of one request's query tokens to spans of its context, read in place from the pages. Include after a
// vec_*.h.
//
// Memory bounds the work, so a key or value is read once for all query heads and query tokens of its kv head. Meanwhile
// the next block is prefetched, in the order of its addresses, so that hardware can prefetch too: head by head, as the
// arithmetic goes, was a fifth slower, keys and values in turn took twice the time. Its keys are asked for while scores
// are computed, which read no new memory, a little with every token. Keys are transposed, and widened unless they are
// multiplied as pairs of bf16 or as bytes, so that scores come out a vector of tokens at a time and no sum runs across
// lanes; with AVX2 alone they are multiplied as they lie (direct_scores.h), and so are values (direct_values.h, and of int8
// short_values.h).
//
// The terms of a row's sums and their order depend on its own context only, not on the rows beside it nor on where an
// item begins or ends. So a query's result has the same bits alone, among drafts and in any batch.
#pragma once
#include <cfloat>
#include <cstring>
#include "abi.h"
#include "byte_scores.h"
#include "byte_values.h"
#include "direct_scores.h"
#include "direct_values.h"
#include "page_block.h"
#include "short_values.h"
#include "softmax.h"
#include "tile.h"

namespace {

// Op is the arithmetic: fp32, products of bf16 pairs for the scores if pages and queries are bf16, or products of bytes
// if pages are int8.
template <class Op, class In, int D>
struct Decode {
    static constexpr bool kPairs = Op::kPerWord == 2;
    static constexpr bool kBytes = Op::kPerWord == 4;
    static constexpr bool kScaled = sizeof(In) == 1;
    static constexpr bool kDirect = sizeof(Vec) == 32;  // keys are multiplied as they lie
    static constexpr bool kPrepared = kBytes || kDirect;  // queries have a form of their own; scores come out scaled
    static constexpr int kDigits = [] { if constexpr (kBytes) return Op::kDigits; else return 3; }();
    static constexpr bool kWholeValues = kBytes && (kDirect || D % 64 == 0);  // weights are whole numbers too
    static constexpr int kBlock = 64;  // tokens; keys and values of one head, widened, are 32 KiB at head dim 64
    static constexpr int kKeyVecs = sizeof(Vec) == 64 ? 4 : 2;
    static constexpr int kPanel = kKeyVecs * kLanes;  // keys of one transposed panel
    static constexpr int kPerWord = sizeof(float) / sizeof(In);
    static constexpr int kWords = D / kPerWord;
    static constexpr int kDepth = kPairs ? kWords : D;  // of the product of queries and keys, in its words
    static constexpr int kValueVecs = sizeof(Vec) == 64 ? (D % 64 == 0 ? 4 : D % 80 == 0 ? 5 : D % 48 == 0 ? 3 : 1) : 2;
    static constexpr int kRowTile = 4;  // by 4 or 5 vectors
    static_assert(kBlock % kPanel == 0 && kBlock % (2 * kLanes) == 0, "panels and the softmax cover the block");

    using Block = PageBlock<In, D, kBlock>;
    using RowsAhead = Ahead<In, D, kBlock, kDirect>;
#ifdef __AVX512VNNI__
    using Scores = ByteScores<D, kDigits>;
    using Values = ByteValues<D, kDigits, kBlock>;
#elif !defined(__AVX512F__)
    using Scores = typename DirectScoresOf<Op, In, D>::Type;
    using Values = ShortValues<D, kBlock>;
#endif

    struct Workspace {
        float* queries;  // num_kv_heads, rows, D; as bf16 for pairs, as digits for bytes
        float* keys;     // kBlock / kPanel panels of (kDepth, kPanel); of words for bytes
        float* values;   // kBlock, D
        float* scores;   // rows of the heads at once, kBlock; overwritten in place by the weights
        float* decay;    // rows of the heads at once, kLanes more
        float* maxima;   // num_kv_heads, rows; kLanes more
        float* sums;     // num_kv_heads, rows; kLanes more
    };

    // The softmax takes kLanes rows at once, of several heads where one has fewer, and writes as many states.
    static int64_t most_scores(int64_t rows) { return rows < kLanes ? kLanes : rows; }

    static int64_t workspace_bytes(int64_t num_kv_heads, int64_t rows) {
        const int64_t num_rows = num_kv_heads * rows;
        return 4 * (num_rows * D + 2 * (num_rows + kLanes) + 2 * kBlock * D + most_scores(rows) * (kBlock + 1) + kLanes);
    }

    static Workspace carve(unsigned char* memory, int64_t num_kv_heads, int64_t rows) {
        Workspace ws;
        ws.keys = reinterpret_cast<float*>(memory);
        ws.values = ws.keys + kBlock * D;
        ws.scores = ws.values + kBlock * D;
        ws.queries = ws.scores + most_scores(rows) * kBlock;
        ws.decay = ws.queries + num_kv_heads * rows * D;
        ws.maxima = ws.decay + most_scores(rows) + kLanes;
        ws.sums = ws.maxima + num_kv_heads * rows + kLanes;
        return ws;
    }

    // Transposes the keys of one head, by words; widens them where they are not multiplied in pairs.
    static void pack_keys(const In* keys, const Block& block, float* packed) {
        for (int first = 0; first < block.count; first += kLanes) {
            float* panel = packed + first / kPanel * kPanel * kDepth + first % kPanel;
            for (int word = 0; word < kWords; word += kLanes) {
                constexpr int kLast = kWords % kLanes;
                Vec part[kLanes];
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    const In* from = keys + block.offsets[first + i] + word * kPerWord;
                    part[i] = word + kLanes <= kWords ? load(reinterpret_cast<const float*>(from))
                                                      : load_first_words(from, kLast);
                }
                transpose(part);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) {
                    if (word + i >= kWords) break;
                    if constexpr (kPairs) {
                        store(panel + (word + i) * kPanel, part[i]);
                        continue;
                    }
                    Vec wide[kPerWord];
                    split_words(part[i], wide);
                    for (int j = 0; j < kPerWord; ++j) store(panel + ((word + i) * kPerWord + j) * kPanel, wide[j]);
                }
            }
        }
    }

    // Values in the order of the output: bf16 is widened by pairs, in half the instructions, where a tile has whole ones;
    // even elements of a pair of vectors then stand before the odd ones.
    static constexpr bool kParted = sizeof(In) == 2 && kValueVecs % 2 == 0;

    template <class Value>  // In, or float where they are widened already
    static void widen(const Value* from, Vec* to) {
        if constexpr (kParted && sizeof(Value) == 2) {
#pragma GCC unroll 2
            for (int j = 0; j < kValueVecs; j += 2) {
                split_pairs(load_pairs(from + j * kLanes), &to[j], &to[j + 1]);
            }
        } else {
#pragma GCC unroll 5
            for (int j = 0; j < kValueVecs; ++j) to[j] = load_as_float(from + j * kLanes);
        }
    }

    // Output in the order of the head dim again.
    static void join_parts(float* output, int64_t rows) {
        for (int64_t i = 0; kParted && i < rows * D; i += 2 * kLanes) {
            Vec low, high;
            join_pairs(load(output + i), load(output + i + kLanes), &low, &high);
            store(output + i, low);
            store(output + i + kLanes, high);
        }
    }

    template <class Ask>
    static void pack_values(const In* values, const Block& block, Ask ask, float* packed) {
        for (int token = 0; token < block.count; ++token) {
            ask();
            for (int column = 0; column < D; column += kValueVecs * kLanes) {
                Vec wide[kValueVecs];
                widen(values + block.offsets[token] + column, wide);
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) store(packed + token * D + column + j * kLanes, wide[j]);
            }
        }
    }

    // Scores of kRows rows against the block; prefetches one step a token.
    template <int kRows, class Ask>
    static void score(const float* queries, const float* keys, int num_padded, float* scores, Ask ask) {
        using Word = typename Op::Word;
        constexpr int kPanels = kBlock / kPanel;
        for (int key = 0; key < num_padded; key += kPanel) {
            multiply_tile<Op, kRows, kKeyVecs, kDepth, kPanel, kBlock, false>(
                reinterpret_cast<const Word*>(queries), reinterpret_cast<const Word*>(keys) + key * kDepth, kDepth,
                scores + key, nullptr, [&](int64_t step) {
                    for (int64_t i = step * kPanels + key / kPanel; i < kBlock; i += kDepth * kPanels) ask();
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
                Vec row[kValueVecs];
                widen(value(token) + column, row);
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

    // The same of a block's values as they lie, beside which what comes next is asked for.
    template <int kRows, class Ask>
    static void gather_in_place(const float* weights, const In* values, const Block& block, int count,
                                const float* decay, float* output, Ask ask) {
        if constexpr (kDirect) {
#ifndef __AVX512F__
            DirectValues<In, D>::template add<kRows, kBlock>(weights, values, block.offsets, count, decay, output, ask);
#endif
        } else {
            auto value = [&](int token) {
                ask(1);
                return values + block.offsets[token];
            };
            gather<kRows>(weights, value, count, decay, output);
        }
    }

    // Calls of<4>, then of<3>, of<2> or of<1>, with the first row of each tile until [row, end) is covered.
    template <class Of>
    static void in_tiles(int64_t row, int64_t end, Of of) {
        for (; end - row >= 4; row += 4) of.template operator()<4>(row);
        switch (end - row) {
            case 3: return of.template operator()<3>(row);
            case 2: return of.template operator()<2>(row);
            case 1: return of.template operator()<1>(row);
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

#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
    // The same where keys are not widened in memory: such a token's scores are computed anew, feature by feature.
    static void score_unusual_scales(const DecodeArgs& args, int64_t first_query, int64_t head, int64_t rows,
                                     const int8_t* keys, const Block& block, const float* scales, float* scores) {
        Vec total = zero();
        for (int i = 0; i < kBlock; i += kLanes) total = fma(load(scales + i), zero(), total);
        if (sum_of_lanes(total) == 0.0f) return;
        for (int i = 0; i < block.count; ++i) {
            if (scales[i] - scales[i] == 0.0f) continue;
            for (int64_t row = 0; row < rows; ++row) {
                float query[D], score = 0.0f;
                read_query(args, first_query, head, row, query);
                for (int d = 0; d < D; ++d) score += query[d] * (keys[block.offsets[i] + d] * scales[i]);
                scores[row * kBlock + i] = score;
            }
        }
    }
#endif

    // A query of one head and row, in fp32.
    static void read_query(const DecodeArgs& args, int64_t first_query, int64_t head, int64_t row, float* query) {
        const int64_t token = first_query + row / args.group;
        const int64_t at = ((token * args.num_kv_heads + head) * args.group + row % args.group) * D;
        for (int d = 0; d < D; d += kLanes) {
            store(query + d, args.dtype == kBfloat16 ? load_as_float(static_cast<const uint16_t*>(args.q) + at + d)
                                                     : load(static_cast<const float*>(args.q) + at + d));
        }
    }

    // Multiplies the first `count` entries by their tokens' scales; the others, up to a whole vector, become zero.
    static void scale_row(float* row, int count, const float* scales) {
        for (int i = 0; i < count; i += kLanes) {
            const int left = count - i < kLanes ? count - i : kLanes;
            store(row + i, keep_first(mul(load(row + i), load(scales + i)), left, zero()));
        }
    }

    static void run(const DecodeArgs& args, const DecodeSpan* span, const DecodeSpan* last, unsigned char* memory) {
        const int64_t request = span->request, item_begin = span->begin, item_end = last[-1].end;
        const int64_t num_heads = args.num_kv_heads, group = args.group;
        const int64_t first_query = args.cu_seqlens_q[request];
        const int64_t num_queries = args.cu_seqlens_q[request + 1] - first_query;
        const int64_t rows = num_queries * group, heads_at_once = rows < kLanes ? kLanes / rows : 1;
        const int64_t num_common = args.context_lens[request] - num_queries + 1;  // tokens that every query sees
        const float scale_log2 = args.scale * 1.44269504088896340736f;
        const Workspace ws = carve(memory, num_heads, rows);
#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
        static_assert(sizeof(typename Scores::Query) <= D * sizeof(float), "it takes the place of a query");
        auto* const own_queries = reinterpret_cast<typename Scores::Query*>(ws.queries);
#endif

        for (int64_t head = 0; head < num_heads; ++head) {
            for (int64_t row = 0; row < rows; ++row) {
                if constexpr (kPairs) {
                    const int64_t at = (((first_query + row / group) * num_heads + head) * group + row % group) * D;
                    memcpy(reinterpret_cast<uint16_t*>(ws.queries) + (head * rows + row) * D,
                           static_cast<const uint16_t*>(args.q) + at, D * sizeof(uint16_t));
                } else if constexpr (kPrepared) {
#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
                    float query[D];
                    read_query(args, first_query, head, row, query);
                    Scores::prepare(query, own_queries + head * rows + row);
#endif
                } else {
                    read_query(args, first_query, head, row, ws.queries + (head * rows + row) * D);
                }
            }
        }

        float scales[kBlock];
        Block blocks[2];
        blocks[0].locate(args, request, item_begin, item_end);
        // All keys of the first block at once: whoever read what is before it may have been another thread.
        for (RowsAhead ahead(args.k_pages, blocks[0]); ahead.row();) {}
        for (int64_t begin = item_begin, turn = 0; begin < item_end; begin += kBlock, turn ^= 1) {
            float* const output = span->partial;
            if (begin == span->begin) {
                for (int64_t i = 0; i < num_heads * rows * D; i += kLanes) store(output + i, zero());
                for (int64_t i = 0; i < num_heads * rows + kLanes; ++i) {
                    ws.maxima[i] = -FLT_MAX;  // not -infinity, whose difference with itself is NaN
                    ws.sums[i] = 0.0f;
                }
            }
            const Block& block = blocks[turn];
            Block& next = blocks[turn ^ 1];
            // Behind the item lies what this thread most likely takes next, if it is of the same request.
            const int64_t next_begin = begin + kBlock < item_end ? begin + kBlock : item_end;
            next.locate(args, request, next_begin, next_begin < item_end ? item_end : args.context_lens[request]);
            const int num_padded = (block.count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
            const bool all_visible = begin + block.count <= num_common;
            auto visible = [&](int64_t row) {
                const int64_t count = num_common + row / group - begin;
                return static_cast<int>(count < 0 ? 0 : count < block.count ? count : block.count);
            };
            RowsAhead keys_ahead(args.k_pages, next), values_ahead(args.v_pages, next);
            RowsAhead first_values(args.v_pages, block);
            if constexpr (kScaled) {
                next.prefetch_scales(args.k_scales);
                next.prefetch_scales(args.v_scales);
            }
            for (int64_t first = 0, num_softened; first < num_heads; first += num_softened) {
                num_softened = num_heads - first < heads_at_once ? num_heads - first : heads_at_once;
                for (int64_t head = first; head < first + num_softened; ++head) {
                    const In* keys = static_cast<const In*>(args.k_pages) + head * D;
                    float* const scores = ws.scores + (head - first) * rows * kBlock;
                    // Nobody has asked for the first block's values either: one head's share of them.
                    for (int i = 0; begin == item_begin && i < block.count; ++i) first_values.row();
                    if constexpr (kScaled) block.load_scales(args.k_scales, head, scales);
                    if constexpr (kBytes && !kDirect) {
#ifdef __AVX512VNNI__
                        Scores::pack(keys, block.offsets, num_padded, reinterpret_cast<int32_t*>(ws.keys));
#endif
                    } else if constexpr (!kDirect) {
                        pack_keys(keys, block, ws.keys);
                        if constexpr (kScaled) apply_unusual_scales(ws.keys, block.count, scales);
                    }
                    in_tiles(0, rows, [&]<int kRows>(int64_t row) {
                        const auto ask = [&](int num_tokens = 1) {
                            if (row == 0) keys_ahead.rows(num_tokens);
                        };
                        if constexpr (kDirect) {
#ifndef __AVX512F__
                            Scores::template score<kRows, kBlock>(own_queries + head * rows + row, keys, block.offsets,
                                                                  scales, num_padded, scores + row * kBlock, ask);
#endif
                        } else if constexpr (kBytes) {
#ifdef __AVX512VNNI__
                            Scores::template score<kRows, kBlock>(
                                own_queries + head * rows + row, reinterpret_cast<const int32_t*>(ws.keys), scales,
                                num_padded, scores + row * kBlock, ask);
#endif
                        } else {
                            score<kRows>(ws.queries + (head * rows + row) * kDepth, ws.keys, num_padded,
                                         scores + row * kBlock, ask);
                        }
                    });
                    if constexpr (kPrepared) {
#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
                        if constexpr (kScaled) {
                            score_unusual_scales(args, first_query, head, rows, keys, block, scales, scores);
                        }
#endif
                    } else if constexpr (kScaled) {
                        for (int64_t row = 0; row < rows; ++row) scale_row(scores + row * kBlock, visible(row), scales);
                    }
                }
                for (int64_t row = 0; row < num_softened * rows; row += kLanes) {
                    const int64_t left = num_softened * rows - row, at = first * rows + row;
                    const int count = static_cast<int>(left < kLanes ? left : kLanes);
                    int num_visible[kLanes];
                    for (int i = 0; i < count; ++i) num_visible[i] = visible((row + i) % rows);
                    soften<FloatWords, kBytes || sizeof(In) == 2>(ws.scores + row * kBlock, kBlock, count, num_visible,
                                                                  num_padded, scale_log2, ws.maxima + at, ws.sums + at,
                                                                  ws.decay + row);
                }
                for (int64_t head = first; head < first + num_softened; ++head) {
                    const In* values = static_cast<const In*>(args.v_pages) + head * D;
                    float* const scores = ws.scores + (head - first) * rows * kBlock;
                    float* const decay = ws.decay + (head - first) * rows;
                    if constexpr (kScaled) {
                        block.load_scales(args.v_scales, head, scales);
                        for (int64_t row = 0; !kWholeValues && row < rows; ++row) {
                            scale_row(scores + row * kBlock, visible(row), scales);
                        }
                    }
                    float* to = output + head * rows * D;
                    const auto ask_values = [&](int num_tokens = 1) { values_ahead.rows(num_tokens); };
                    if constexpr (kWholeValues) {
#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
                        for (int64_t row = 0; row < rows; ++row) {
                            if (Values::prepare(scores + row * kBlock, scales, visible(row))) continue;
                            Values::arrange(to + row * D);
                            gather_in_place<1>(scores + row * kBlock, values, block, visible(row), decay + row,
                                               to + row * D, [](int) {});
                            Values::arrange(to + row * D);
                            decay[row] = 1.0f;
                            memset(scores + row * kBlock, 0, kBlock * sizeof(float));
                        }
                        in_tiles(0, rows, [&]<int kRows>(int64_t row) {
                            const auto ask = [&](int num_tokens) {
                                if (row == 0) ask_values(num_tokens);
                            };
                            Values::template add<kRows>(scores + row * kBlock, values, block.offsets, block.count,
                                                        decay + row, to + row * D, ask);
                        });
#endif
                        continue;
                    }
                    const bool packed = !kDirect && rows > kRowTile;  // widened once for all tiles of rows
                    if (packed) pack_values(values, block, ask_values, ws.values);
                    for (int64_t row = 0; row < rows;) {
                        // Rows of one query token see the same tokens. A weight of zero times infinity would be NaN.
                        const int64_t end = all_visible ? rows : row + group;
                        const int count = visible(row);
                        in_tiles(row, end, [&]<int kRows>(int64_t r) {
                            const float* weights = scores + r * kBlock;
                            if (packed) {
                                gather<kRows>(weights, [&](int token) { return ws.values + token * D; }, count, decay + r,
                                              to + r * D);
                            } else {
                                const auto ask = [&](int num_tokens) {
                                    if (!kDirect || r == 0) ask_values(num_tokens);
                                };
                                gather_in_place<kRows>(weights, values, block, count, decay + r, to + r * D, ask);
                            }
                        });
                        row = end;
                    }
                }
            }
            if (begin + kBlock < span->end) continue;
            join_parts(output, num_heads * rows);
#if defined(__AVX512VNNI__) || !defined(__AVX512F__)
            for (int64_t row = 0; kWholeValues && row < num_heads * rows; ++row) Values::arrange(output + row * D);
#endif
            memcpy(output + num_heads * rows * D, ws.maxima, num_heads * rows * sizeof(float));
            memcpy(output + num_heads * rows * (D + 1), ws.sums, num_heads * rows * sizeof(float));
            ++span;
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

// One query token's attention to a range of its context, read in place from the pages. Include after a vec_*.h.
//
// The work is bounded by memory, so what matters is the order of reading: all heads of a block of tokens before the
// next block, as the pages lie in memory, with what follows already asked for.
#pragma once
#include <cfloat>
#include "abi.h"
#include "softmax.h"
#include "tile.h"

namespace {

constexpr int kTokenBlock = 32;  // one head's K and V of two blocks, and the widened keys, stay in 32 KiB of L1
static_assert(kTokenBlock % (2 * kLanes) == 0, "the softmax takes two vectors at a time");

template <class In, int D>
struct Decode {
    static constexpr int kValueVecs = sizeof(Vec) == 64 ? (D % 64 == 0 ? 4 : D % 80 == 0 ? 5 : D % 48 == 0 ? 3 : 1) : 2;
    static constexpr int kValueRows = 4;  // 4 x 5 accumulators at most
    static constexpr int kLineElements = 64 / sizeof(In);

    static int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

    static int64_t workspace_bytes(int64_t num_kv_heads, int64_t group) {
        const int64_t padded_group = round_up_lanes(group);
        return 4 * (num_kv_heads * group * D + group * kTokenBlock + kTokenBlock * D + padded_group +
                    2 * num_kv_heads * padded_group);
    }

    static void to_float(const In* from, float* to) {
        for (int d = 0; d < D; d += kLanes) store(to + d, load_as_float(from + d));
    }

    // Scores of kLanes tokens for one query head. Tokens past the last repeat it; the softmax drops them.
    template <class T>
    static void score(const float* q, const T* const* keys, int64_t offset, float* scores) {
        Vec acc[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) acc[i] = zero();
        for (int d = 0; d < D; d += kLanes) {
            const Vec part = load(q + d);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) acc[i] = fma(part, load_as_float(keys[i] + offset + d), acc[i]);
        }
        store(scores, reduce_each(acc, [](Vec a, Vec b) { return add(a, b); }));
    }

    // output[row] = output[row] * decay[row] + sum over tokens of weights[row][token] * values[token], for kRows rows.
    template <int kRows>
    static void gather(const float* weights, const In* const* values, int64_t offset, int count, float* output,
                       int64_t output_stride, const float* decay) {
        for (int column = 0; column < D; column += kValueVecs * kLanes) {
            Vec acc[kRows][kValueVecs];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                const Vec factor = splat(decay[i]);
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) {
                    acc[i][j] = mul(load(output + i * output_stride + column + j * kLanes), factor);
                }
            }
            for (int token = 0; token < count; ++token) {
                const In* from = values[token] + offset + column;
                Vec row[kValueVecs];
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) row[j] = load_as_float(from + j * kLanes);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    const Vec weight = splat(weights[i * kTokenBlock + token]);
#pragma GCC unroll 5
                    for (int j = 0; j < kValueVecs; ++j) acc[i][j] = fma(weight, row[j], acc[i][j]);
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 5
                for (int j = 0; j < kValueVecs; ++j) {
                    store(output + i * output_stride + column + j * kLanes, acc[i][j]);
                }
            }
        }
    }

    struct Block {
        int count;
        const In* keys[kTokenBlock];
        const In* values[kTokenBlock];
    };

    static void locate(const DecodeArgs& args, int64_t request, int64_t begin, int64_t end, Block* block) {
        const int32_t* table = args.block_table + request * args.table_columns;
        const int64_t row_elements = args.num_kv_heads * D;
        block->count = static_cast<int>(end - begin < kTokenBlock ? end - begin : kTokenBlock);
        for (int i = 0; i < block->count; ++i) {
            const int64_t token = begin + i;
            const int64_t row = table[token / args.page_tokens] * args.page_tokens + token % args.page_tokens;
            block->keys[i] = static_cast<const In*>(args.k_pages) + row * row_elements;
            block->values[i] = static_cast<const In*>(args.v_pages) + row * row_elements;
        }
        for (int i = block->count; i < kTokenBlock; ++i) {
            block->keys[i] = block->count == 0 ? nullptr : block->keys[block->count - 1];
        }
    }

    static void prefetch(const Block& block, int64_t offset) {
        for (int i = 0; i < block.count; ++i) {
            for (int d = 0; d < D; d += kLineElements) {
                _mm_prefetch(reinterpret_cast<const char*>(block.keys[i] + offset + d), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(block.values[i] + offset + d), _MM_HINT_T0);
            }
        }
    }

    static void run(const DecodeArgs& args, const DecodeItem& item, unsigned char* memory) {
        const int64_t group = args.group, num_rows = args.num_kv_heads * group, padded_group = round_up_lanes(group);
        const float scale_log2 = args.scale * 1.44269504088896340736f;
        float* queries = reinterpret_cast<float*>(memory);      // num_rows, D
        float* scores = queries + num_rows * D;                 // group, kTokenBlock
        float* key_block = scores + group * kTokenBlock;        // kTokenBlock, D
        float* decay = key_block + kTokenBlock * D;             // padded_group
        float* maxima = decay + padded_group;                   // num_kv_heads, padded_group
        float* sums = maxima + args.num_kv_heads * padded_group;
        float* output = item.partial;                           // num_rows, D

        const In* q = static_cast<const In*>(args.q) + item.request * num_rows * D;
        for (int64_t row = 0; row < num_rows; ++row) {
            to_float(q + row * D, queries + row * D);
            for (int d = 0; d < D; d += kLanes) store(output + row * D + d, zero());
        }
        for (int64_t i = 0; i < args.num_kv_heads * padded_group; ++i) {
            maxima[i] = -FLT_MAX;  // not -infinity, whose difference with itself is NaN
            sums[i] = 0.0f;
        }
        const float* float_keys[kTokenBlock];
        for (int i = 0; i < kTokenBlock; ++i) float_keys[i] = key_block + i * D;

        Block blocks[2];
        locate(args, item.request, item.begin, item.end, &blocks[0]);
        int current = 0;
        for (int64_t begin = item.begin; begin < item.end; begin += kTokenBlock, current ^= 1) {
            const Block& block = blocks[current];
            Block& next = blocks[current ^ 1];
            const int64_t next_begin = begin + kTokenBlock < item.end ? begin + kTokenBlock : item.end;
            locate(args, item.request, next_begin, item.end, &next);
            int num_visible[kLanes];
            for (int& visible : num_visible) visible = block.count;
            const int num_padded = (block.count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
            for (int64_t head = 0; head < args.num_kv_heads; ++head) {
                const int64_t offset = head * D;
                // One head ahead: far enough to hide memory, near enough to be in L1 when its turn comes. Asking for
                // the next block's same head instead, or only up to L2, was a quarter to a half slower.
                const bool last = head + 1 == args.num_kv_heads;
                prefetch(last ? next : block, last ? 0 : offset + D);
                // Queries that share a kv head share the conversion of its keys.
                const bool shared = sizeof(In) != sizeof(float) && group > 1;
                if (shared) {
                    for (int i = 0; i < num_padded; ++i) to_float(block.keys[i] + offset, key_block + i * D);
                }
                for (int64_t g = 0; g < group; ++g) {
                    const int64_t row = head * group + g;
                    for (int i = 0; i < num_padded; i += kLanes) {
                        if (shared) {
                            score(queries + row * D, float_keys + i, 0, scores + g * kTokenBlock + i);
                        } else {
                            score(queries + row * D, block.keys + i, offset, scores + g * kTokenBlock + i);
                        }
                    }
                }
                for (int64_t g = 0; g < group; g += kLanes) {
                    const int64_t row = head * padded_group + g;
                    soften<FloatWords, sizeof(In) == 2>(
                        scores + g * kTokenBlock, kTokenBlock, static_cast<int>(group - g < kLanes ? group - g : kLanes),
                        num_visible, num_padded, scale_log2, maxima + row, sums + row, decay + g);
                }
                for (int64_t g = 0; g < group;) {
                    float* to = output + (head * group + g) * D;
                    const float* weights = scores + g * kTokenBlock;
                    if (group - g >= kValueRows) {
                        gather<kValueRows>(weights, block.values, offset, block.count, to, D, decay + g);
                        g += kValueRows;
                    } else if (group - g >= 2) {
                        gather<2>(weights, block.values, offset, block.count, to, D, decay + g);
                        g += 2;
                    } else {
                        gather<1>(weights, block.values, offset, block.count, to, D, decay + g);
                        g += 1;
                    }
                }
            }
        }
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t at = row / group * padded_group + row % group;
            output[num_rows * D + row] = maxima[at];
            output[num_rows * (D + 1) + row] = sums[at];
        }
    }

    static DecodeKernel kernel() { return {run, workspace_bytes}; }
};

template <class In>
DecodeKernel decode_of_dim(int64_t head_dim) {
    switch (head_dim) {
        case 16: return Decode<In, 16>::kernel();
        case 64: return Decode<In, 64>::kernel();
        case 80: return Decode<In, 80>::kernel();
        case 96: return Decode<In, 96>::kernel();
        case 128: return Decode<In, 128>::kernel();
        default: return {nullptr, nullptr};
    }
}

}  // namespace

// Where a block of a request's tokens lies in the pages, and how it is asked for before it is needed. Include after a
// vec_*.h.
#pragma once
#include <cstring>
#include "abi.h"

namespace {

// Offsets of tokens in a pool: (page * P + position in the page) * stride, the stride being that of a token. Entries past
// the last repeat it. Tokens of one page are a run of elements [begin, end).
template <class In, int D, int kTokens>
struct PageBlock {
    int count = 0, num_runs = 0;
    int64_t offsets[kTokens];
    int64_t begins[kTokens], ends[kTokens];
    int64_t scales[sizeof(In) == 1 ? kTokens : 1];  // of the first head

    // Tokens [begin, end) of a request, at most kTokens of them; none where the end is at the beginning.
    void locate(const DecodeArgs& args, int64_t request, int64_t begin, int64_t end) {
        const int32_t* table = args.block_table + request * args.table_columns;
        const int64_t stride = args.num_kv_heads * D;
        count = static_cast<int>(end - begin < kTokens ? end - begin : kTokens);
        num_runs = 0;
        int64_t column = begin / args.page_tokens, position = begin % args.page_tokens, at = 0;
        for (int i = 0; i < count; ++column, position = 0) {
            begins[num_runs] = at = (table[column] * args.page_tokens + position) * stride;
            for (; i < count && position < args.page_tokens; ++position, at += stride) offsets[i++] = at;
            ends[num_runs++] = at;
        }
        for (int i = count; i < kTokens; ++i) offsets[i] = at - stride;
        for (int i = 0; sizeof(In) == 1 && i < kTokens; ++i) scales[i] = offsets[i] / D;
    }

    // Of one head, for each token of the block.
    void load_scales(const uint16_t* from, int64_t head, float* to) const {
#ifndef __AVX512F__
        for (int i = 0; i < kTokens; i += kLanes) {
            const auto at = [&](int j) { return from[scales[i + j] + head]; };
            store(to + i, widen_each(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)));
        }
#else
        for (int i = 0; i < kTokens; ++i) {
            const uint32_t bits = static_cast<uint32_t>(from[scales[i] + head]) << 16;
            memcpy(to + i, &bits, sizeof bits);
        }
#endif
    }

    void prefetch_scales(const uint16_t* from) const {
        for (int i = 0; i < count; i += 8) {
            _mm_prefetch(reinterpret_cast<const char*>(from + scales[i]), _MM_HINT_T1);
        }
    }
};

// Prefetches a block of one pool, all its heads, in the order of its addresses, so that hardware can prefetch too. Or, of
// pages that lie anywhere, all of the block's in turn: a processor that starts anew on each of them (Zen 3) then reads a
// third faster.
template <class In, int D, int kTokens, bool kInTurn>
class Ahead {
  public:
    Ahead(const void* pool, const PageBlock<In, D, kTokens>& block)
        : pool_(static_cast<const In*>(pool)), block_(block) {
        for (int i = 0; kInTurn && i < block.num_runs; ++i) {
            const int64_t length = block.ends[i] - block.begins[i];
            longest_ = length > longest_ ? length : longest_;
        }
    }

    // As much as one head of one token; false if there is no more.
    bool row() {
        if constexpr (kInTurn) {
            if (step_ == longest_) return false;
            if (step_ < block_.ends[run_] - block_.begins[run_]) ask(pool_ + block_.begins[run_] + step_);
            if (++run_ == block_.num_runs) {
                run_ = 0;
                step_ += D;
            }
            return true;
        }
        if (at_ == end_) {
            if (run_ == block_.num_runs) return false;
            at_ = pool_ + block_.begins[run_];
            end_ = pool_ + block_.ends[run_++];
        }
        ask(at_);
        at_ += D;
        return true;
    }

    void rows(int count) {
        for (int i = 0; i < count; ++i) row();
    }

  private:
    static void ask(const In* from) {
        constexpr int kLine = 64 / sizeof(In);
#pragma GCC unroll 8
        for (int d = 0; d < D; d += kLine) _mm_prefetch(reinterpret_cast<const char*>(from + d), _MM_HINT_T1);
    }

    const In *at_ = nullptr, *end_ = nullptr;
    const In* const pool_;
    const PageBlock<In, D, kTokens>& block_;
    int run_ = 0;
    int64_t step_ = 0, longest_ = 0;
};

}  // namespace

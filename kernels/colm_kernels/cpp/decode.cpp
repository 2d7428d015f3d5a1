// How a call of decode attention is divided into items, and their results joined.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "launch.h"
#include "pool.h"

namespace {

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Join the partial results of one request, each weighted by its share of the softmax denominator.
void merge(const DecodeArgs& args, const DecodeItem* begin, const DecodeItem* end) {
    const int64_t num_rows = args.num_kv_heads * args.group, dim = args.head_dim;
    std::vector<float> row_out(dim);
    for (int64_t row = 0; row < num_rows; ++row) {
        float maximum = begin->partial[num_rows * dim + row];
        for (auto* item = begin + 1; item < end; ++item) {
            maximum = std::max(maximum, item->partial[num_rows * dim + row]);
        }
        float sum = 0.0f;
        std::fill(row_out.begin(), row_out.end(), 0.0f);
        for (auto* item = begin; item < end; ++item) {
            const float* maxima = item->partial + num_rows * dim;
            const float weight = std::exp((maxima[row] - maximum) * args.scale);
            sum += maxima[num_rows + row] * weight;
            for (int64_t d = 0; d < dim; ++d) row_out[d] += item->partial[row * dim + d] * weight;
        }
        const int64_t at = (begin->request * num_rows + row) * dim;
        for (int64_t d = 0; d < dim; ++d) {
            const float value = row_out[d] / sum;
            if (args.dtype == kBfloat16) {
                static_cast<uint16_t*>(args.out)[at + d] = to_bfloat16(value);
            } else {
                static_cast<float*>(args.out)[at + d] = value;
            }
        }
    }
}

constexpr int64_t kFewestTokensPerSplit = 256;
constexpr int64_t kItemsPerThread = 3;  // so that the last items even out

}  // namespace

COLM_EXPORT
int32_t colm_decode_attention(const DecodeArgs* given, int32_t variant, int32_t num_threads) try {
    const DecodeArgs& args = *given;
    const auto kernel =
        select<DecodeKernel>(variant, [&](const Variant& v) { return v.decode(args.dtype, args.head_dim); });
    if (kernel.run == nullptr) return kUnsupported;
    int64_t num_tokens = 0;
    for (int64_t r = 0; r < args.num_requests; ++r) {
        const int64_t length = args.context_lens[r];
        if (length < 1 || length > args.table_columns * args.page_tokens) return kBadTable;
        const int32_t* pages = args.block_table + r * args.table_columns;
        for (int64_t i = 0; i < (length + args.page_tokens - 1) / args.page_tokens; ++i) {
            if (pages[i] < 0 || pages[i] >= args.num_pages) return kBadTable;
        }
        num_tokens += length;
    }
    const int64_t token_bytes = 2 * args.num_kv_heads * args.head_dim * (args.dtype == kBfloat16 ? 2 : 4);
    const int64_t threads =
        std::clamp<int64_t>(num_tokens * token_bytes / kFewestBytesPerThread, 1, std::max(num_threads, 1));
    // One thread has nobody to share a context with.
    const int64_t split = threads == 1 ? INT64_MAX / 2
                                       : std::max(kFewestTokensPerSplit, num_tokens / (threads * kItemsPerThread) + 1);

    std::vector<DecodeItem> items;
    for (int64_t r = 0; r < args.num_requests; ++r) {
        const int64_t length = args.context_lens[r];
        const int64_t num_splits = (length + split - 1) / split;
        for (int64_t i = 0; i < num_splits; ++i) {
            items.push_back({r, length * i / num_splits, length * (i + 1) / num_splits, nullptr});
        }
    }
    const int64_t partial = args.num_kv_heads * args.group * (args.head_dim + 2);
    const int64_t num_items = static_cast<int64_t>(items.size());
    std::vector<float> partials(num_items * partial);
    for (int64_t i = 0; i < num_items; ++i) items[i].partial = partials.data() + i * partial;

    struct Context {
        const DecodeArgs& args;
        const DecodeKernel& kernel;
        const DecodeItem* items;
        std::atomic<int32_t> status{kOk};
    } context{args, kernel, items.data()};
    run_items(
        num_items, static_cast<int>(threads),
        [](void* opaque, int64_t item) {
            auto& c = *static_cast<Context*>(opaque);
            unsigned char* memory = workspace(c.kernel.workspace_bytes(c.args.num_kv_heads, c.args.group));
            if (memory == nullptr) {
                c.status = kOutOfMemory;
            } else {
                c.kernel.run(c.args, c.items[item], memory);
            }
        },
        &context);
    if (context.status != kOk) return context.status;
    for (const DecodeItem *begin = items.data(), *last = begin + num_items; begin < last;) {
        const DecodeItem* end = begin;
        while (end < last && end->request == begin->request) ++end;
        merge(args, begin, end);
        begin = end;
    }
    return kOk;
} catch (const std::bad_alloc&) {
    return kOutOfMemory;
}

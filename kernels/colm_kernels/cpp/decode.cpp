// How a call of decode attention is divided into items, and their results joined.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
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
    const int64_t first_query = args.cu_seqlens_q[begin->request];
    const int64_t rows = (args.cu_seqlens_q[begin->request + 1] - first_query) * args.group;
    const int64_t num_rows = args.num_kv_heads * rows, dim = args.head_dim;
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
        const int64_t head = row / rows, query = first_query + row % rows / args.group;
        const int64_t at = ((query * args.num_kv_heads + head) * args.group + row % args.group) * dim;
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

constexpr int64_t kMostQueries = 16;  // of one request; MAX_QUERY_TOKENS of decode_attention.py

// Whether every request's queries, length and page ids lie within the tensors given.
bool fits(const DecodeArgs& args) {
    if (args.cu_seqlens_q[0] != 0 || args.cu_seqlens_q[args.num_requests] != args.num_queries) return false;
    for (int64_t r = 0; r < args.num_requests; ++r) {
        const int64_t length = args.context_lens[r], num_queries = args.cu_seqlens_q[r + 1] - args.cu_seqlens_q[r];
        if (num_queries < 1 || num_queries > kMostQueries) return false;
        if (length < num_queries || length > args.table_columns * args.page_tokens) return false;
        const int32_t* pages = args.block_table + r * args.table_columns;
        for (int64_t i = 0; i < (length + args.page_tokens - 1) / args.page_tokens; ++i) {
            if (pages[i] < 0 || pages[i] >= args.num_pages) return false;
        }
    }
    return true;
}

// Every context is divided at multiples of this, for any number of threads and any batch, so that a request's result
// has the same bits in every batch.
constexpr int64_t kTokensPerItem = 1024;

}  // namespace

COLM_EXPORT
int32_t colm_decode_attention(const DecodeArgs* given, int32_t variant, int32_t num_threads) try {
    const DecodeArgs& args = *given;
    const auto kernel =
        select<DecodeKernel>(variant, [&](const Variant& v) { return v.decode(args.page_dtype, args.head_dim); });
    if (kernel.run == nullptr) return kUnsupported;
    if (!fits(args)) return kBadTable;

    std::vector<DecodeItem> items;
    int64_t num_tokens = 0, num_floats = 0, most_rows = 0;
    std::vector<int64_t> partial_at;
    for (int64_t r = 0; r < args.num_requests; ++r) {
        const int64_t length = args.context_lens[r];
        const int64_t rows = (args.cu_seqlens_q[r + 1] - args.cu_seqlens_q[r]) * args.group;
        num_tokens += length;
        most_rows = std::max(most_rows, rows);
        for (int64_t begin = 0; begin < length; begin += kTokensPerItem) {
            items.push_back({r, begin, std::min(begin + kTokensPerItem, length), nullptr});
            partial_at.push_back(num_floats);
            num_floats += args.num_kv_heads * rows * (args.head_dim + 2);
        }
    }
    const int64_t num_items = static_cast<int64_t>(items.size());
    const std::unique_ptr<float[]> partials(new float[num_floats]);
    for (int64_t i = 0; i < num_items; ++i) items[i].partial = partials.get() + partial_at[i];
    const int64_t num_bytes = 2 * num_tokens * args.num_kv_heads * args.head_dim * element_bytes(args.page_dtype);
    const int64_t threads = std::clamp<int64_t>(num_bytes / kFewestBytesPerThread, 1, std::max(num_threads, 1));

    struct Context {
        const DecodeArgs& args;
        const DecodeKernel& kernel;
        const DecodeItem* items;
        int64_t workspace_bytes;
        std::atomic<int32_t> status{kOk};
    } context{args, kernel, items.data(), kernel.workspace_bytes(args.num_kv_heads, most_rows)};
    run_items(
        num_items, static_cast<int>(threads),
        [](void* opaque, int64_t item) {
            auto& c = *static_cast<Context*>(opaque);
            unsigned char* memory = workspace(c.workspace_bytes);
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

// How a call of decode attention is divided into spans and items, and the spans' results joined.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
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
void merge(const DecodeArgs& args, const DecodeSpan* begin, const DecodeSpan* end) {
    const int64_t first_query = args.cu_seqlens_q[begin->request];
    const int64_t rows = (args.cu_seqlens_q[begin->request + 1] - first_query) * args.group;
    const int64_t num_rows = args.num_kv_heads * rows, dim = args.head_dim;
    std::vector<float> row_out(dim);
    for (int64_t row = 0; row < num_rows; ++row) {
        float maximum = begin->partial[num_rows * dim + row];
        for (auto* span = begin + 1; span < end; ++span) {
            maximum = std::max(maximum, span->partial[num_rows * dim + row]);
        }
        float sum = 0.0f;
        std::fill(row_out.begin(), row_out.end(), 0.0f);
        for (auto* span = begin; span < end; ++span) {
            const float* maxima = span->partial + num_rows * dim;
            const float weight = std::exp((maxima[row] - maximum) * args.scale);
            sum += maxima[num_rows + row] * weight;
            for (int64_t d = 0; d < dim; ++d) row_out[d] += span->partial[row * dim + d] * weight;
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

// A context is divided at fixed places, so that a request's result has the same bits for any number of threads, in every
// batch, and for a query among drafts, which sees less than the last of them. Where a span begins, 8 to 16 times as much
// lies before it, within these bounds: threads find equal shares of a short context, and a long one has few spans to join.
constexpr int64_t kFewestSpanTokens = 128, kMostSpanTokens = 1024;

int64_t span_tokens(int64_t begin) {
    int64_t tokens = kFewestSpanTokens;
    while (tokens < kMostSpanTokens && 16 * tokens <= begin) tokens *= 2;
    return tokens;
}

// Items a thread, which even out what threads lose to other work; at the start of an item memory is waited for.
constexpr int64_t kItemsPerThread = 4, kFewestItemTokens = 256;
// Fewer bytes are read before another thread has begun, which has just worked at the product before and is awake.
constexpr int64_t kFewestDecodeBytesPerThread = 64 << 10;

// Every span of a call, and where an item's first one is in the list; the last entry is its end.
struct DecodeSplit {
    std::vector<DecodeSpan> spans;
    std::vector<int64_t> firsts;

    DecodeSplit(const DecodeArgs& args, int64_t num_tokens, int64_t threads) {
        int64_t num_items = std::clamp<int64_t>(num_tokens / kFewestItemTokens, 1, kItemsPerThread * threads);
        if (num_items > threads) num_items -= num_items % threads;
        for (int64_t r = 0; r < args.num_requests; ++r) {
            const int64_t length = args.context_lens[r];
            const int64_t pieces = std::max<int64_t>((length * num_items + num_tokens / 2) / num_tokens, 1);
            int64_t piece = 0;
            for (int64_t begin = 0, end; begin < length; begin = end) {
                end = std::min(begin + span_tokens(begin), length);
                if (begin * pieces >= piece * length) {
                    firsts.push_back(static_cast<int64_t>(spans.size()));
                    while (begin * pieces >= piece * length) ++piece;
                }
                spans.push_back({r, begin, end, nullptr});
            }
        }
        firsts.push_back(static_cast<int64_t>(spans.size()));
    }

    int64_t num_items() const { return static_cast<int64_t>(firsts.size()) - 1; }

    // The item that is taken at a turn: neighbours by one thread, which has asked for the second one's memory by the end of
    // the first, as long as threads take turns.
    int64_t item(int64_t turn, int64_t threads) const {
        return num_items() % threads == 0 ? turn % threads * (num_items() / threads) + turn / threads : turn;
    }
};

}  // namespace

COLM_EXPORT
int32_t colm_decode_attention(const DecodeArgs* given, int32_t variant, int32_t num_threads) try {
    const DecodeArgs& args = *given;
    const auto kernel =
        select<DecodeKernel>(variant, [&](const Variant& v) { return v.decode(args.dtype, args.page_dtype, args.head_dim); });
    if (kernel.run == nullptr) return kUnsupported;
    if (!fits(args)) return kBadTable;

    const int64_t num_tokens = std::accumulate(args.context_lens, args.context_lens + args.num_requests, int64_t{0});
    const int64_t num_bytes = 2 * num_tokens * args.num_kv_heads * args.head_dim * element_bytes(args.page_dtype);
    const int64_t threads = std::clamp<int64_t>(num_bytes / kFewestDecodeBytesPerThread, 1, std::max(num_threads, 1));
    DecodeSplit split(args, num_tokens, threads);
    int64_t num_floats = 0, most_rows = 0;
    const auto rows = [&](int64_t r) { return (args.cu_seqlens_q[r + 1] - args.cu_seqlens_q[r]) * args.group; };
    for (const DecodeSpan& span : split.spans) {
        most_rows = std::max(most_rows, rows(span.request));
        num_floats += args.num_kv_heads * rows(span.request) * (args.head_dim + 2);
    }
    const std::unique_ptr<float[]> partials(new float[num_floats]);
    float* partial = partials.get();
    for (DecodeSpan& span : split.spans) {
        span.partial = partial;
        partial += args.num_kv_heads * rows(span.request) * (args.head_dim + 2);
    }

    struct Context {
        const DecodeArgs& args;
        const DecodeKernel& kernel;
        const DecodeSplit& split;
        int64_t threads, workspace_bytes;
        std::atomic<int32_t> status{kOk};
    } context{args, kernel, split, threads, kernel.workspace_bytes(args.num_kv_heads, most_rows)};
    run_items(
        split.num_items(), static_cast<int>(threads),
        [](void* opaque, int64_t turn) {
            auto& c = *static_cast<Context*>(opaque);
            const int64_t item = c.split.item(turn, c.threads);
            unsigned char* memory = workspace(c.workspace_bytes);
            if (memory == nullptr) {
                c.status = kOutOfMemory;
            } else {
                const DecodeSpan* spans = c.split.spans.data();
                c.kernel.run(c.args, spans + c.split.firsts[item], spans + c.split.firsts[item + 1], memory);
            }
        },
        &context);
    if (context.status != kOk) return context.status;
    for (const DecodeSpan *begin = split.spans.data(), *last = begin + split.spans.size(); begin < last;) {
        const DecodeSpan* end = begin;
        while (end < last && end->request == begin->request) ++end;
        merge(args, begin, end);
        begin = end;
    }
    return kOk;
} catch (const std::bad_alloc&) {
    return kOutOfMemory;
}

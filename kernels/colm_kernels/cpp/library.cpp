// The functions that Python calls, and how a call is divided into items.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "abi.h"
#include "cpu.h"
#include "pool.h"

namespace {

const Variant* const kVariants[kNumVariants] = {&kAvx2Variant, &kAvx512Variant, &kAvx512Bf16Variant};

// Kept by each thread between calls: fresh pages for every item would cost more than some items.
unsigned char* workspace(int64_t num_bytes) {
    struct Memory {
        unsigned char* data = nullptr;
        int64_t num_bytes = 0;
        ~Memory() { std::free(data); }
    };
    thread_local Memory memory;
    if (memory.num_bytes < num_bytes) {
        std::free(memory.data);
        memory.num_bytes = (num_bytes + 4095) / 4096 * 4096;
        memory.data = static_cast<unsigned char*>(std::aligned_alloc(4096, memory.num_bytes));
        if (memory.data == nullptr) memory.num_bytes = 0;
    }
    return memory.data;
}

template <class Kernel, class Select>
Kernel select(int32_t variant, Select of) {
    // A variant that leaves a combination out defers to the next lower one, whose instructions it also has.
    for (; variant >= 0; --variant) {
        const Kernel kernel = of(*kVariants[variant]);
        if (kernel.run != nullptr) return kernel;
    }
    return {};
}

constexpr int64_t kRowAlign = 48;       // a row block of the kernel
constexpr int64_t kMostRows = 1536;     // an item's queries and output stay near the second-level cache
constexpr int64_t kFewestRows = 384;    // below this, packing keys shows: each item packs for itself
constexpr int64_t kItemsPerThread = 3;  // so that the last items even out

int64_t choose_rows_per_item(int64_t total_rows, int64_t num_kv_heads, int num_threads) {
    int64_t rows = kMostRows;
    while (rows > kFewestRows && (total_rows + rows - 1) / rows * num_kv_heads < kItemsPerThread * num_threads) rows /= 2;
    return std::min(rows, (total_rows + kRowAlign - 1) / kRowAlign * kRowAlign);
}

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

constexpr int64_t kFewestBytesPerThread = 256 << 10;  // less is read before another thread has woken
constexpr int64_t kFewestTokensPerSplit = 256;

constexpr int64_t kLinearTile = 4;  // outputs that the kernel takes at once
// Small enough that there is little to wait for at the end, large enough that reading gets into its stride.
constexpr int64_t kFewestLinearItemBytes = 64 << 10, kMostLinearItemBytes = 1 << 20, kLinearItemsPerThread = 16;

// How the outputs of the blocks of a staircase are divided.
struct LinearSplit {
    int64_t item_bytes, element_bytes;

    int64_t outputs_per_item(const LinearBlock& block) const {
        const int64_t fitting = item_bytes / std::max<int64_t>(block.in_dim * element_bytes, 1);
        return std::max(fitting / kLinearTile, int64_t{1}) * kLinearTile;
    }

    int64_t num_items(const LinearBlock& block) const {
        const int64_t outputs = outputs_per_item(block);
        return block.num_rows == 0 ? 0 : (block.out_dim + outputs - 1) / outputs;
    }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char colm_source_hash[] = COLM_SOURCE_HASH;

#pragma GCC visibility push(default)
extern "C" {

int32_t colm_cpu_supports(int32_t variant) { return cpu_supports(variant); }

int32_t colm_bf16_dot_pays() { return bf16_dot_pays(); }

int32_t colm_prefill_attention(const PrefillArgs* given, int32_t variant, int32_t num_threads) {
    PrefillArgs args = *given;
    const auto kernel =
        select<PrefillKernel>(variant, [&](const Variant& v) { return v.prefill(args.dtype, args.head_dim); });
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t total_rows = args.num_queries * (args.num_heads / args.num_kv_heads);
    args.rows_per_item = choose_rows_per_item(total_rows, args.num_kv_heads, num_threads);
    const int64_t num_items = (total_rows + args.rows_per_item - 1) / args.rows_per_item * args.num_kv_heads;

    struct Context {
        const PrefillArgs& args;
        const PrefillKernel& kernel;
        std::atomic<int32_t> status{kOk};
    } context{args, kernel};
    run_items(
        num_items, num_threads,
        [](void* opaque, int64_t item) {
            auto& c = *static_cast<Context*>(opaque);
            if (c.status != kOk) return;
            unsigned char* memory = workspace(c.kernel.workspace_bytes(c.args.rows_per_item));
            const Status status = memory == nullptr ? kOutOfMemory : c.kernel.run(c.args, item, memory);
            if (status != kOk) c.status = status;
        },
        &context);
    return context.status;
}

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

int32_t colm_linear(LinearArgs* args, int32_t variant, int32_t num_threads) {
    const auto kernel =
        select<LinearKernel>(variant, [&](const Variant& v) { return v.linear(static_cast<int32_t>(args->dtype)); });
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t element_bytes = args->dtype == kBfloat16 ? 2 : 4;
    int64_t num_bytes = 0, column = 0;
    for (int64_t i = 0; i < args->num_blocks; ++i) {
        LinearBlock& block = args->blocks[i];
        block.first_column = column;
        column += block.out_dim;
        if (block.num_rows > 0) num_bytes += block.in_dim * block.out_dim * element_bytes;
        for (int64_t row = block.num_rows; row < args->num_rows; ++row) {
            char* y = static_cast<char*>(args->y) + (row * args->y_stride + block.first_column) * element_bytes;
            std::memset(y, 0, block.out_dim * element_bytes);
        }
    }
    const int64_t threads = std::clamp<int64_t>(num_bytes / kFewestBytesPerThread, 1, std::max(num_threads, 1));
    const LinearSplit split{
        std::clamp(num_bytes / (threads * kLinearItemsPerThread), kFewestLinearItemBytes, kMostLinearItemBytes),
        element_bytes};
    int64_t num_items = 0;
    for (int64_t i = 0; i < args->num_blocks; ++i) num_items += split.num_items(args->blocks[i]);
    // Never asked for again below, so it stays in place until the call ends.
    auto* words = reinterpret_cast<float*>(workspace(4 * args->num_rows * kernel.words_per_row(args->in_dim)));
    if (words == nullptr) return kOutOfMemory;
    kernel.prepare(*args, words);
    args->words = words;

    struct Context {
        const LinearArgs& args;
        const LinearKernel& kernel;
        const LinearSplit& split;
    } context{*args, kernel, split};
    run_items(
        num_items, static_cast<int>(threads),
        [](void* opaque, int64_t item) {
            const auto& c = *static_cast<const Context*>(opaque);
            const LinearBlock* block = c.args.blocks;
            for (int64_t count; item >= (count = c.split.num_items(*block)); ++block) item -= count;
            const int64_t outputs = c.split.outputs_per_item(*block), begin = item * outputs;
            c.kernel.run(c.args, *block, begin, std::min(begin + outputs, block->out_dim));
        },
        &context);
    return kOk;
}

}  // extern "C"
#pragma GCC visibility pop

// How a call of prefill attention, dense or sparse, is divided into items.
#include <algorithm>
#include <atomic>

#include "launch.h"
#include "pool.h"

namespace {

constexpr int64_t kRowAlign = 48;       // a row block of the kernel
constexpr int64_t kMostRows = 1536;     // an item's queries and output stay near the second-level cache
constexpr int64_t kFewestRows = 384;    // with fewer, packing takes a visible share, since each item packs its own keys
constexpr int64_t kItemsPerThread = 3;  // so that the last items even out

int64_t choose_rows_per_item(int64_t total_rows, int64_t num_kv_heads, int num_threads) {
    int64_t rows = kMostRows;
    while (rows > kFewestRows && (total_rows + rows - 1) / rows * num_kv_heads < kItemsPerThread * num_threads) rows /= 2;
    return std::min(rows, (total_rows + kRowAlign - 1) / kRowAlign * kRowAlign);
}

// Run every item with a workspace for `args.rows_per_item` rows, until one fails.
template <class Args>
int32_t run_all(const Args& args, Status (*run)(const Args&, int64_t, unsigned char*), int64_t num_items,
                int64_t workspace_bytes, int num_threads) {
    struct Context {
        const Args& args;
        Status (*run)(const Args&, int64_t, unsigned char*);
        int64_t workspace_bytes;
        std::atomic<int32_t> status{kOk};
    } context{args, run, workspace_bytes};
    run_items(
        num_items, num_threads,
        [](void* opaque, int64_t item) {
            auto& c = *static_cast<Context*>(opaque);
            if (c.status != kOk) return;
            unsigned char* memory = workspace(c.workspace_bytes);
            const Status status = memory == nullptr ? kOutOfMemory : c.run(c.args, item, memory);
            if (status != kOk) c.status = status;
        },
        &context);
    return context.status;
}

// A call of attention begins.
void begin(PrefillArgs& args, int64_t num_items) {
    args.item_share = kWholeCall / std::max<int64_t>(num_items, 1);
    if (args.flag != nullptr) __atomic_store_n(&args.flag->done, 0, __ATOMIC_RELAXED);
}

PrefillKernel select_prefill(const PrefillArgs& args, int32_t variant) {
    return select<PrefillKernel>(variant, [&](const Variant& v) { return v.prefill(args.dtype, args.head_dim); });
}

}  // namespace

COLM_EXPORT
int32_t colm_prefill_attention(const PrefillArgs* given, int32_t variant, int32_t num_threads) {
    PrefillArgs args = *given;
    const PrefillKernel kernel = select_prefill(args, variant);
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t total_rows = args.num_queries * (args.num_heads / args.num_kv_heads);
    args.rows_per_item = choose_rows_per_item(total_rows, args.num_kv_heads, num_threads);
    const int64_t num_items = (total_rows + args.rows_per_item - 1) / args.rows_per_item * args.num_kv_heads;
    begin(args, num_items);
    return run_all(args, kernel.run, num_items, kernel.workspace_bytes(args.rows_per_item), num_threads);
}

COLM_EXPORT
int32_t colm_row_scores(const RowScoresArgs* args, int32_t variant, int32_t num_threads) {
    const RowScoresKernel kernel =
        select<RowScoresKernel>(variant, [&](const Variant& v) { return v.row_scores(args->dtype, args->head_dim); });
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t num_items = (args->end - args->begin + kScoreItemKeys - 1) / kScoreItemKeys;
    return run_all(*args, kernel.run, num_items, kernel.workspace_bytes(args->num_rows), num_threads);
}

COLM_EXPORT
int32_t colm_sparse_prefill_attention(const SparsePrefillArgs* given, int32_t variant, int32_t num_threads) {
    SparsePrefillArgs args = *given;
    const PrefillKernel kernel = select_prefill(args.dense, variant);
    if (kernel.run_sparse == nullptr) return kUnsupported;
    // Every list of every row block is an item.
    args.dense.rows_per_item = args.row_block * (args.dense.num_heads / args.num_lists);
    const int64_t num_items = (args.dense.num_queries + args.row_block - 1) / args.row_block * args.num_lists;
    begin(args.dense, num_items);
    return run_all(args, kernel.run_sparse, num_items, kernel.workspace_bytes(args.dense.rows_per_item), num_threads);
}

// How a call of Linear (chain) of many rows is divided into items.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "launch.h"
#include "pool.h"

namespace {

constexpr int64_t kFewestPackedRows = 192;     // with fewer, packing takes a visible share, since each item packs its own
constexpr int64_t kRowAlign = 6;               // a tile of the kernel
constexpr int64_t kPackedItemsPerThread = 3;   // so that the last items even out
constexpr double kFewestOpsPerThread = 4e6;    // fewer are done before another thread has woken

struct PackedSplit {
    int64_t rows_per_item, panel;

    int64_t num_panels(const PackedBlock& block) const {
        const int64_t outputs = block.gate == nullptr ? panel : panel / 2;
        return (block.out_dim + outputs - 1) / outputs;
    }

    int64_t num_items(const PackedBlock& block) const {
        return (block.num_rows + rows_per_item - 1) / rows_per_item * num_panels(block);
    }
};

}  // namespace

COLM_EXPORT
int32_t colm_packed_linear(const PackedArgs* args, int32_t variant, int32_t num_threads) {
    const auto kernel =
        select<PackedKernel>(variant, [&](const Variant& v) { return v.packed(static_cast<int32_t>(args->dtype)); });
    if (kernel.run == nullptr) return kUnsupported;
    const int64_t width = element_bytes(args->dtype);
    int64_t widest = 0;
    double num_ops = 0;
    for (int64_t i = 0; i < args->num_blocks; ++i) {
        const PackedBlock& block = args->blocks[i];
        if (block.in_dim % kernel.input_multiple != 0) return kUnsupported;
        widest = std::max(widest, block.in_dim);
        num_ops += 2.0 * block.num_rows * block.in_dim * block.out_dim * (block.gate == nullptr ? 1 : 2);
        for (int64_t row = block.num_rows; row < args->num_rows; ++row) {
            std::memset(static_cast<char*>(block.y) + row * block.y_stride * width, 0, block.out_dim * width);
        }
    }
    const int threads =
        static_cast<int>(std::clamp(num_ops / kFewestOpsPerThread, 1.0, static_cast<double>(std::max(num_threads, 1))));
    // Ranges of rows as equal as can be, since each packs as much.
    const int64_t num_ranges = std::max<int64_t>((args->num_rows + kernel.most_rows - 1) / kernel.most_rows, 1);
    const int64_t rows_per_range = (args->num_rows + num_ranges - 1) / num_ranges;
    PackedSplit split{std::max<int64_t>((rows_per_range + kRowAlign - 1) / kRowAlign * kRowAlign, kRowAlign), kernel.panel};
    const auto count = [&] {
        int64_t num_items = 0;
        for (int64_t i = 0; i < args->num_blocks; ++i) num_items += split.num_items(args->blocks[i]);
        return num_items;
    };
    while (threads > 1 && split.rows_per_item / 2 >= kFewestPackedRows && count() < kPackedItemsPerThread * threads) {
        split.rows_per_item = (split.rows_per_item / 2 + kRowAlign - 1) / kRowAlign * kRowAlign;
    }
    struct Context {
        const PackedArgs& args;
        const PackedKernel& kernel;
        const PackedSplit& split;
        int64_t workspace_bytes;
        std::atomic<int32_t> status{kOk};
    } context{*args, kernel, split, kernel.workspace_bytes(widest, split.rows_per_item)};
    run_items(
        count(), threads,
        [](void* opaque, int64_t item) {
            auto& c = *static_cast<Context*>(opaque);
            if (c.status != kOk) return;
            unsigned char* memory = workspace(c.workspace_bytes);
            if (memory == nullptr) {
                c.status = kOutOfMemory;
                return;
            }
            const PackedBlock* block = c.args.blocks;
            for (int64_t count; item >= (count = c.split.num_items(*block)); ++block) item -= count;
            const int64_t panels = c.split.num_panels(*block), begin = item / panels * c.split.rows_per_item;
            const int64_t end = std::min(begin + c.split.rows_per_item, block->num_rows);
            c.kernel.run(c.args, *block, item % panels, begin, end, memory);
        },
        &context);
    return context.status;
}

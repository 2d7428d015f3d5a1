// How a call of Linear (chain) is divided into items.
#include <algorithm>
#include <cstring>

#include "launch.h"
#include "pool.h"

namespace {

// Small enough that threads end at nearly the same time, large enough that reading reaches its full rate.
constexpr int64_t kFewestLinearItemBytes = 64 << 10, kMostLinearItemBytes = 1 << 20, kLinearItemsPerThread = 16;

constexpr int64_t kNumFormats = 4;

// The kernel of each WeightFormat.
struct Kernels {
    LinearKernel of[kNumFormats];

    Kernels(int32_t variant, int32_t dtype) {
        for (int64_t format = 0; format < kNumFormats; ++format) {
            of[format] = select<LinearKernel>(variant, [&](const Variant& v) {
                return format == kRows ? v.linear(dtype) : format == kPanels ? v.panel(dtype) : v.quantised(dtype, format);
            });
        }
    }
};

int64_t bytes_per_output(const LinearBlock& block, int64_t width) {
    switch (block.format) {
        case kInt8Panels: return block.in_dim / kGroupInputs * kInt8OutputBytes;
        case kQ4Panels: return block.in_dim / kGroupInputs * kQ4OutputBytes;
        default: return block.in_dim * width;
    }
}

// Divides the outputs of the blocks of a staircase into items.
struct LinearSplit {
    int64_t item_bytes, width;
    const Kernels& kernels;

    int64_t outputs_per_item(const LinearBlock& block) const {
        const int64_t tile = kernels.of[block.format].tile;
        const int64_t fitting = item_bytes / std::max<int64_t>(bytes_per_output(block, width), 1);
        return std::max(fitting / tile, int64_t{1}) * tile;
    }

    int64_t num_items(const LinearBlock& block) const {
        const int64_t outputs = outputs_per_item(block);
        return block.num_rows == 0 ? 0 : (block.out_dim + outputs - 1) / outputs;
    }
};

}  // namespace

COLM_EXPORT
int32_t colm_linear(LinearArgs* args, int32_t variant, int32_t num_threads) {
    const Kernels kernels(variant, static_cast<int32_t>(args->dtype));
    const int64_t width = element_bytes(args->dtype);
    int64_t num_bytes = 0, column = 0;
    bool is_there[kNumFormats] = {};
    for (int64_t i = 0; i < args->num_blocks; ++i) {
        LinearBlock& block = args->blocks[i];
        const LinearKernel& kernel = kernels.of[block.format];
        if (kernel.run == nullptr) return kUnsupported;
        is_there[block.format] = true;
        block.first_column = column;
        column += block.out_dim;
        if (block.num_rows > 0) num_bytes += block.out_dim * bytes_per_output(block, width);
        for (int64_t row = block.num_rows; row < args->num_rows; ++row) {
            char* y = static_cast<char*>(args->y) + (row * args->y_stride + block.first_column) * width;
            std::memset(y, 0, block.out_dim * width);
        }
    }
    const int64_t threads = std::clamp<int64_t>(num_bytes / kFewestBytesPerThread, 1, std::max(num_threads, 1));
    const LinearSplit split{
        std::clamp(num_bytes / (threads * kLinearItemsPerThread), kFewestLinearItemBytes, kMostLinearItemBytes),
        width, kernels};
    int64_t num_items = 0;
    for (int64_t i = 0; i < args->num_blocks; ++i) num_items += split.num_items(args->blocks[i]);
    // Each format reads x as words of its own. No further workspace is requested below, so these stay in place until the
    // call ends.
    LinearArgs of_format[kNumFormats];
    int64_t num_words = 0, begins[kNumFormats];
    for (int64_t format = 0; format < kNumFormats; ++format) {
        of_format[format] = *args;
        begins[format] = num_words;
        const LinearKernel& kernel = kernels.of[format];
        if (is_there[format] && kernel.prepare != nullptr) num_words += args->num_rows * kernel.words_per_row(args->in_dim);
    }
    if (num_words > 0) {
        auto* words = reinterpret_cast<float*>(workspace(4 * num_words));
        if (words == nullptr) return kOutOfMemory;
        for (int64_t format = 0; format < kNumFormats; ++format) {
            if (!is_there[format] || kernels.of[format].prepare == nullptr) continue;
            of_format[format].words = words + begins[format];
            kernels.of[format].prepare(*args, words + begins[format]);
        }
    }

    struct Context {
        const LinearArgs* of_format;
        const LinearSplit& split;
        int64_t num_items, threads;

        // Items start in turn, one a thread, so threads walk side by side, each through weights that follow each other:
        // what it has asked for ahead is what it reads next.
        int64_t place(int64_t item) const {
            const int64_t walk = item % threads, rest = num_items % threads;
            return walk * (num_items / threads) + std::min(walk, rest) + item / threads;
        }
    } context{of_format, split, num_items, threads};
    run_items(
        num_items, static_cast<int>(threads),
        [](void* opaque, int64_t item) {
            const auto& c = *static_cast<const Context*>(opaque);
            const LinearBlock* block = c.of_format->blocks;
            item = c.place(item);
            for (int64_t count; item >= (count = c.split.num_items(*block)); ++block) item -= count;
            const int64_t outputs = c.split.outputs_per_item(*block), begin = item * outputs;
            const LinearKernel& kernel = c.split.kernels.of[block->format];
            kernel.run(c.of_format[block->format], *block, begin, std::min(begin + outputs, block->out_dim));
        },
        &context);
    return kOk;
}

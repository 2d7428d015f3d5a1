// The index of a tile from lines: which key blocks and columns each row block of each list attends to.
#include <cstring>
#include <vector>

#include "launch.h"

namespace {

// One list of one row block; returns how many ids there are.
struct Lowered {
    int64_t num_blocks, num_columns;
};

Lowered lower_one(const LowerArgs& args, int64_t list, int64_t row_block, std::vector<uint8_t>& listed, int32_t* blocks,
                  int32_t* columns) {
    const int64_t past = args.num_keys - args.num_queries, key_block = args.key_block;
    const int64_t first = past + row_block * args.row_block;
    const int64_t last = std::min(first + args.row_block, args.num_keys) - 1;
    const int64_t first_diagonal = first / key_block, last_diagonal = last / key_block;
    const auto mark = [&](int64_t first_key, int64_t last_key) {
        if (last_key < 0) return;
        const int64_t begin = std::max<int64_t>(first_key, 0) / key_block, end = std::min(last_key / key_block, last_diagonal);
        if (begin <= end) memset(listed.data() + begin, 1, end - begin + 1);
    };
    memset(listed.data(), 0, last_diagonal + 1);
    const bool is_dense = args.is_dense[list] || last >= args.dense_from;
    mark(0, is_dense ? last : std::max<int64_t>(args.sink_tokens[list], 1) - 1);
    mark(first, last);
    for (int64_t i = args.range_offsets[list]; i < args.range_offsets[list + 1]; ++i) {
        mark(first - args.farthest[i], last - args.nearest[i]);
    }
    Lowered found{0, 0};
    for (int64_t block = 0; block <= last_diagonal; ++block) {
        if (listed[block]) blocks[found.num_blocks++] = static_cast<int32_t>(block);
    }
    for (int64_t i = args.column_offsets_in[list]; i < args.column_offsets_in[list + 1]; ++i) {
        const int64_t column = args.columns_in[i];
        if (column >= first_diagonal * key_block) break;  // they ascend
        if (!listed[column / key_block]) columns[found.num_columns++] = static_cast<int32_t>(column);
    }
    return found;
}

}  // namespace

COLM_EXPORT
int32_t colm_lower(const LowerArgs* given, int32_t, int32_t) {
    const LowerArgs& args = *given;
    const int64_t num_row_blocks = (args.num_queries + args.row_block - 1) / args.row_block;
    std::vector<uint8_t> listed(args.num_keys / args.key_block + 1);
    int64_t at = 0, num_blocks = 0, num_columns = 0;
    args.block_offsets[0] = args.column_offsets[0] = 0;
    for (int64_t list = 0; list < args.num_lists; ++list) {
        for (int64_t row_block = 0; row_block < num_row_blocks; ++row_block) {
            const Lowered found =
                lower_one(args, list, row_block, listed, args.block_ids + num_blocks, args.column_ids + num_columns);
            args.block_offsets[++at] = num_blocks += found.num_blocks;
            args.column_offsets[at] = num_columns += found.num_columns;
        }
    }
    return kOk;
}

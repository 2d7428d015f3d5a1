// The data passed from Python (ctypes) to the library and from it to the variants: plain structs only.
//
// A variant is one translation unit built with its own target flags. Two such units must not share instantiated code:
// the linker keeps one copy of an inline function, and a copy built for AVX-512 would then run on a CPU without it. So
// these headers hold no inline code, variants include only C headers of the standard library, and all their own code is
// in unnamed namespaces.
#pragma once
#include <cstdint>

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
enum Status : int32_t { kOk = 0, kCancelled = 1, kUnsupported = 2, kOutOfMemory = 3, kBadTable = 4 };

constexpr int64_t kWholeCall = int64_t{1} << 32;

// What a call shares with the threads that wait for it.
struct CancelFlag {
    volatile int32_t cancelled;  // any thread sets it to non-zero to stop the call
    int64_t done;                // how much of the call is done, in parts of kWholeCall; 0 again as the next call begins
};

// Shapes: T query tokens, S keys, H query heads, K kv heads, G = H / K, D head dim. Strides count elements; the
// last dimension of every tensor is contiguous.
struct PrefillArgs {
    const void* q;        // T, H, D
    const void* k;        // K, S, D
    const void* v;        // K, S, D
    void* out;            // T, H, D contiguous
    float* lse;           // T, H contiguous
    int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim;
    int64_t q_stride_t, q_stride_h;
    int64_t k_stride_k, k_stride_s;
    int64_t v_stride_k, v_stride_s;
    float scale;
    int32_t dtype;
    CancelFlag* flag;  // may be null

    // Rows are (query token, query head of one kv head), token-major: row = t * G + g. One item of work is a range of
    // rows of one kv head. Filled in by the launcher.
    int64_t rows_per_item;
    int64_t item_share;  // of kWholeCall
};

// Attention over the key blocks and key columns that an index lists, for each list (of one kv head's or one query head's
// rows) and row block. The ids of all row blocks of the first list come first; `offsets` has one entry more than lists
// times row blocks. Ids ascend. Blocks begin with block 0 and end with the diagonal blocks; columns lie in no listed
// block.
struct SparsePrefillArgs {
    PrefillArgs dense;
    const int64_t* block_offsets;
    const int32_t* block_ids;
    const int64_t* column_offsets;
    const int32_t* column_ids;
    int64_t num_lists, row_block, key_block;
};

// Where the queries of a tile attend, from lines. Outputs are as large as they can get: every block, and every column, for
// each list and row block.
struct LowerArgs {
    int64_t num_queries, num_keys, row_block, key_block, num_lists, dense_from;
    const int64_t* sink_tokens;        // lists
    const int64_t* is_dense;           // lists
    const int64_t* range_offsets;      // lists + 1
    const int64_t* nearest;            // ranges of distances
    const int64_t* farthest;
    const int64_t* column_offsets_in;  // lists + 1
    const int64_t* columns_in;         // key positions, ascending strictly within a list
    int64_t* block_offsets;            // lists * row blocks + 1
    int32_t* block_ids;
    int64_t* column_offsets;
    int32_t* column_ids;
};

constexpr int kScoreBlock = 64;          // keys whose scores are added up together
constexpr int kScoreItemKeys = 1024;     // keys of one item

// Attention of R rows of one query head to the keys [begin, end), of which a row sees those up to its position. With a
// null lse, each row's maximum and sum in every block of kScoreBlock keys. Else the weights are added up: by key, and by
// the sum of row's and key's number; divided by vertical[key] + diagonal[row + key] before, where these are given.
struct RowScoresArgs {
    const void* q;             // R, D contiguous
    const void* k;             // S, D
    const int64_t* positions;  // R: descending; with an lse, each one less than the one before
    int64_t num_rows, num_keys, head_dim, k_stride, begin, end;
    float scale;
    int32_t dtype;
    float* maximum;            // blocks of [begin, end), R: of the unscaled scores
    float* sum;                // blocks, R: of exp(scale * (score - maximum))
    const float* lse;          // R, of the scaled scores; may be null
    const float* vertical;     // S; may be null
    const float* diagonal;     // S + R
    float* by_key;             // S
    float* by_diagonal;        // items, kScoreItemKeys + R
    int64_t num_first, num_nearest;  // keys at the start, and nearest to each row, that do not count
};

// Shapes: R requests, T query tokens (packed), K kv heads, G query heads per kv head, D head dim, B pool pages, P tokens
// per page, M table columns.
struct DecodeArgs {
    const void* q;                // T, K, G, D contiguous
    const void* k_pages;          // B, P, K, D contiguous
    const void* v_pages;          // B, P, K, D contiguous
    const uint16_t* k_scales;     // B, P, K contiguous bf16 for int8 pages; else unused
    const uint16_t* v_scales;     // B, P, K contiguous bf16 for int8 pages; else unused
    const int32_t* block_table;   // R, M contiguous
    const int32_t* context_lens;  // R
    const int32_t* cu_seqlens_q;  // R + 1: request r has the query tokens [r], .. [r + 1]
    void* out;                    // T, K, G, D contiguous
    int64_t num_requests, num_queries, num_kv_heads, group, head_dim, num_pages, page_tokens, table_columns;
    float scale;
    int32_t dtype, page_dtype;
};

// Outputs of a panel. A weight in panels is: panels, words of I, outputs of the panel; a word is one fp32 or two bf16 that
// follow each other along I. Where O or I end inside a panel or a word, zeros follow.
constexpr int64_t kPanelOutputs = 32;

// How the weights of a block lie. Quantised ones lie in panels of groups: kGroupInputs inputs of each of the panel's
// outputs, which share a scale in fp16, and in q4 a minimum (quantised.py). A group is its scales, its minima, then the
// whole numbers: in int8 a byte of each output for one input after the other; in q4 a word of each output for every 8
// inputs, whose 16 low bits hold inputs 0, 2, 4, 6 and whose high bits hold 1, 3, 5, 7, the lowest first, less 8 in two's
// complement.
enum WeightFormat : int64_t { kRows = 0, kPanels = 1, kInt8Panels = 2, kQ4Panels = 3 };
constexpr int64_t kGroupInputs = 32, kInt8OutputBytes = 34, kQ4OutputBytes = 20;  // the latter of one output's group

// Shapes: R rows, I input features, O output features of one block.
struct LinearBlock {
    const void* weight;            // O, I contiguous; or its panels
    const void* bias;              // O contiguous; may be null
    int64_t num_rows;              // leading rows of x that compute this block; the others get zeros
    int64_t in_dim, out_dim;       // its inputs are the first in_dim features of x
    int64_t format;                // a WeightFormat; kRows for all blocks of a call, or for none
    int64_t first_column;          // of y; set by the launcher
};

// A staircase of blocks, their outputs side by side in y.
struct LinearArgs {
    const void* x;                 // R, I
    void* y;                       // R, sum of the blocks' O
    LinearBlock* blocks;
    int64_t num_blocks, num_rows, in_dim;
    int64_t x_stride, y_stride;
    int64_t dtype;
    const float* words;            // x as the kernel reads it; set by the launcher
};

// Shapes: R rows, I input features, O output features of one block. y = x weight^T + bias, or with a gate
// y = silu(x gate^T + gate_bias) * (x weight^T + bias).
struct PackedBlock {
    const void* weight;            // O, I contiguous
    const void* gate;              // O, I contiguous; may be null
    const void* bias;              // O contiguous; may be null
    const void* gate_bias;         // O contiguous; null where `bias` or `gate` is
    void* y;                       // R, O
    int64_t y_stride;
    int64_t num_rows;              // leading rows of x that compute this block; the others get zeros
    int64_t in_dim, out_dim;       // its inputs are the first in_dim features of x
};

struct PackedArgs {
    const void* x;                 // R, I
    const PackedBlock* blocks;
    int64_t num_blocks, num_rows;
    int64_t x_stride;              // rows begin at a whole word
    int64_t dtype;
};

// Shapes: R rows, D features of all chains.
struct NormChain {
    const void* gain;  // dim contiguous
    int64_t dim;
};

struct NormArgs {
    void* x;                  // R, D; changed only where there is a delta
    const void* delta;        // R, D: added to x first; may be null
    void* y;                  // R, D
    const NormChain* chains;  // side by side
    int64_t num_chains, num_rows, dim;
    int64_t x_stride, delta_stride, y_stride;
    float eps;
    int32_t dtype;
};

// Shapes: T tokens, N heads, D head dim, S rows of the cache. The last dimension of every tensor is contiguous.
struct RotaryArgs {
    const void* x;         // T, N, D: rotated into out
    void* out;             // S, N, D; may be x itself
    const void* v;         // T, N, D: copied into v_out; may be null
    void* v_out;           // S, N, D
    const float* cos;      // T, D / 2 of each row
    const float* sin;
    const int64_t* slots;  // T: rows of out and v_out; null where token t goes to row t
    int64_t num_tokens, num_heads, head_dim, num_slots;
    int64_t x_stride_t, x_stride_n, out_stride_s, out_stride_n;
    int64_t v_stride_t, v_stride_n, v_out_stride_s, v_out_stride_n;
    int64_t cos_stride_t, sin_stride_t;
    int64_t dtype;
};

// Shapes: R rows, F features.
struct SwigluArgs {
    const void* gate;  // R, F
    const void* up;    // R, F
    void* out;         // R, F; may be gate itself
    int64_t num_rows, dim;
    int64_t gate_stride, up_stride, out_stride;
    int64_t dtype;
};

// Shapes: T tokens, K kv heads, D head dim, S rows of the cache.
struct QuantiseArgs {
    const void* x;         // T, K, D; D contiguous
    int8_t* q;             // S, K, D; D contiguous
    uint16_t* scale;       // S, K in bf16
    const int64_t* slots;  // T: rows of q and scale; null where token t goes to row t
    int64_t num_tokens, num_heads, head_dim, num_slots;
    int64_t x_stride_t, x_stride_k, q_stride_s, q_stride_k, scale_stride_s, scale_stride_k;
    int64_t dtype;
};

// Shapes: T tokens, K kv heads, D head dim.
struct DequantiseArgs {
    const int8_t* q;    // T, K, D; D contiguous
    const char* scale;  // T, K in bf16, at any address: they may lie in a message
    void* out;          // T, K, D; D contiguous
    int64_t num_tokens, num_heads, head_dim;
    int64_t q_stride_t, q_stride_k, scale_stride_t, scale_stride_k, out_stride_t, out_stride_k;
    int64_t dtype;      // of out
};

struct PackArgs {
    const unsigned char* tensors[2];  // keys, values: K, T, D; T and D contiguous
    int64_t strides_k[2];             // bytes
    unsigned char* out;               // 2 K head_bytes: every head of the keys, then of the values
    int64_t num_heads, head_bytes;    // of one head's T, D
    int64_t dtype;                    // of all values
    uint64_t checksum;                // out: XXH3-64
    int64_t is_finite;                // out: whether no value is NaN or an infinity
};

// Shapes: K kv heads, T tokens, D head dim.
struct ScatterArgs {
    const unsigned char* x;  // K, T, D; T and D contiguous
    unsigned char* out;      // T, K, D; K and D contiguous
    int64_t num_heads, num_tokens;
    int64_t head_bytes;              // of one token's D
    int64_t x_stride_k, out_stride;  // bytes
};

// A payload, and the rows of pages that its tokens go to. Shapes: K kv heads, T tokens, D head dim.
struct StoreArgs {
    const unsigned char* payload;     // 2, K, T, D: keys, then values
    unsigned char* rows[2];           // keys', values': S, K, D; K and D contiguous
    const int64_t* runs;              // num_runs, 2: how many tokens, and the row of the first; T in all
    int64_t num_runs, num_heads;
    int64_t head_bytes, row_stride;   // bytes of one token's D, and from row to row
    int64_t num_bytes;                // of the payload
    uint64_t checksum;                // out: XXH3-64 of the payload
};

// The weights of one chain in one linear, and its bias.
struct StepMatrix {
    const void* weight;  // out_dim, in_dim contiguous; or its panels
    const void* bias;    // out_dim contiguous; may be null
    int64_t in_dim, out_dim;
    int64_t format;      // a WeightFormat
};

// A decode step of a gated model, or what half a layer of a prefill shares with it. Shapes: T tokens (packed), R requests, L layers, N chains of the model, of which the
// first num_active run, D features of these, K kv heads, E head dim, B pages, P tokens per page, M table columns.
struct StepArgs {
    const StepMatrix* matrices;   // L, 5 N + 2: queries, N each; keys; values; output, gate, up and down, N each
    const NormChain* norms;       // 2 L + 1, N: each layer's before attention and before the feed-forward; the final one
    const int64_t* chain_heads;   // N: query heads
    const int64_t* chain_rows;    // num_active: leading tokens that run the chain
    void* k_pages;                // L, B, P, K, E contiguous; int8 where there are scales
    void* v_pages;                // likewise
    uint16_t* k_scales;           // L, B, P, K in bf16, contiguous; null unless pages are int8
    uint16_t* v_scales;           // likewise
    const float* cos;             // T, E contiguous
    const float* sin;
    const int64_t* slots;         // T: page * P + token
    const int32_t* block_table;   // R, M contiguous
    const int32_t* context_lens;  // R
    const int32_t* cu_seqlens_q;  // R + 1
    void* x;                      // T, D contiguous: embeddings; afterwards the residual stream
    void* y;                      // T, D contiguous: x after the final norm
    int64_t num_layers, num_chains, num_active, num_tokens, num_requests;
    int64_t num_kv_heads, head_dim, num_pages, page_tokens, table_columns;
    float eps, scale;
    int32_t dtype, attention_variant;
};

// Half of a layer over a tile of one prompt, by chain 1 alone. Of `step`, the arguments of the tile's tokens and of this
// one layer, which is layer 0 there; y is x after the norm before attention.
struct PrefillLayerArgs {
    StepArgs step;
    void* k;                            // K, N, E contiguous: the layer's rotated keys of all N prompt tokens
    void* v;                            // likewise
    void* delta;                        // T, D contiguous: the feed-forward's part, to be added to x
    int64_t first_token, num_keys;      // of the tile; N
    CancelFlag* flag;                   // as in PrefillArgs
};

// Tokens [begin, end) of one request, whose part of the attention is summed by itself, for all heads and query tokens.
// Rows of a kv head are (query token, query head), token-major; N of them for all kv heads.
struct DecodeSpan {
    int64_t request, begin, end;
    float* partial;  // unnormalised output (N, D), then maxima (N), then sums (N)
};

using PrefillFn = Status (*)(const PrefillArgs&, int64_t item, unsigned char* workspace);
using SparsePrefillFn = Status (*)(const SparsePrefillArgs&, int64_t item, unsigned char* workspace);
// An item of work: spans [first, last) of one request, one after the other.
using DecodeFn = void (*)(const DecodeArgs&, const DecodeSpan* first, const DecodeSpan* last, unsigned char* workspace);

using LinearFn = void (*)(const LinearArgs&, const LinearBlock&, int64_t begin, int64_t end);

using RowScoresFn = Status (*)(const RowScoresArgs&, int64_t item, unsigned char* memory);

struct RowScoresKernel {
    RowScoresFn run;
    int64_t (*workspace_bytes)(int64_t num_rows);
};

struct PrefillKernel {
    PrefillFn run;
    SparsePrefillFn run_sparse;
    int64_t (*workspace_bytes)(int64_t rows_per_item);
};

struct DecodeKernel {
    DecodeFn run;
    int64_t (*workspace_bytes)(int64_t num_kv_heads, int64_t rows_per_head);
};

struct LinearKernel {
    LinearFn run;  // outputs [begin, end) of a block
    void (*prepare)(const LinearArgs&, float* words);  // null where x is read as it is
    int64_t (*words_per_row)(int64_t in_dim);
    int64_t tile;  // outputs that are taken at once: items begin at a multiple of it
};

struct PackedKernel {
    // Rows [begin, end) of the `index`th outputs of a block, `panel` at a time.
    void (*run)(const PackedArgs&, const PackedBlock&, int64_t index, int64_t begin, int64_t end,
                unsigned char* workspace);
    int64_t (*workspace_bytes)(int64_t in_dim, int64_t rows_per_item);
    int64_t panel;           // outputs of an item, half of them where there is a gate
    int64_t input_multiple;  // in_dim is a multiple of it
    int64_t most_rows;       // of an item
};

// Rows or tokens [begin, end) of an operation on independent rows.
template <class Args>
struct RowsKernel {
    void (*run)(const Args&, int64_t begin, int64_t end);
};

// The kernels of one translation unit; a null `run` leaves the combination to another variant.
struct Variant {
    PrefillKernel (*prefill)(int32_t dtype, int64_t head_dim);
    RowScoresKernel (*row_scores)(int32_t dtype, int64_t head_dim);
    DecodeKernel (*decode)(int32_t dtype, int32_t page_dtype, int64_t head_dim);
    LinearKernel (*linear)(int32_t dtype);
    LinearKernel (*panel)(int32_t dtype);
    LinearKernel (*quantised)(int32_t dtype, int64_t format);
    PackedKernel (*packed)(int32_t dtype);
    RowsKernel<NormArgs> (*norm)(int32_t dtype);
    RowsKernel<RotaryArgs> (*rotary)(int32_t dtype);
    RowsKernel<SwigluArgs> (*swiglu)(int32_t dtype);
    RowsKernel<QuantiseArgs> (*quantise)(int32_t dtype);
    RowsKernel<DequantiseArgs> (*dequantise)(int32_t dtype);
};

extern const Variant kAvx2Variant, kAvx512Variant, kAvx512Bf16Variant;

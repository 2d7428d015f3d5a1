// The operations of layers in one call, so that nothing but their work is between them: a whole decode step, or half a
// layer of a prefill.
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "launch.h"

namespace {

// What both run, each method for all tokens. The first failure is kept, and what follows it has no meaning.
class Layers {
  public:
    Layers(const StepArgs& args, int32_t variant, int32_t num_threads)
        : args_(args),
          variant_(variant),
          num_threads_(num_threads),
          width_(element_bytes(args.dtype)),
          dim_(sum_of_outputs(layer(0).output)),
          hidden_(sum_of_outputs(layer(0).gate)),
          query_dim_(sum_of_outputs(layer(0).queries)),
          kv_dim_(args.num_kv_heads * args.head_dim),
          row_bytes_((2 * dim_ + 3 * query_dim_ + 2 * kv_dim_ + 2 * hidden_) * width_),
          memory_(new char[row_bytes_ * args.num_tokens]) {
        char* next = memory_.get();
        for (auto [buffer, features] : {std::pair{&normed_, dim_}, {&delta_, dim_}, {&qkv_, query_dim_ + 2 * kv_dim_},
                                        {&grouped_, query_dim_}, {&attended_, query_dim_}, {&gate_up_, 2 * hidden_}}) {
            *buffer = next;
            next += features * args.num_tokens * width_;
        }
    }

  protected:
    // A layer's matrices: one for each chain, but for keys and values.
    struct Layer {
        const StepMatrix *queries, *keys, *values, *output, *gate, *up, *down;
    };

    Layer layer(int64_t index) const {
        const int64_t chains = args_.num_chains;
        const StepMatrix *queries = args_.matrices + index * (5 * chains + 2), *output = queries + chains + 2;
        return {queries, queries + chains, queries + chains + 1, output, output + chains, output + 2 * chains,
                output + 3 * chains};
    }

    struct Family {
        const StepMatrix* matrices;
        bool is_shared;  // of chain 1 alone, for all tokens
    };

    int64_t sum_of_outputs(const StepMatrix* matrices) const {
        int64_t sum = 0;
        for (int64_t chain = 0; chain < args_.num_active; ++chain) sum += matrices[chain].out_dim;
        return sum;
    }

    void check(int32_t status) {
        if (status_ == kOk) status_ = status;
    }

    void norm(int64_t place, void* delta, void* y) {
        NormArgs norm{args_.x, delta, y, args_.norms + place * args_.num_chains, args_.num_active, args_.num_tokens, dim_,
                      dim_, delta == nullptr ? 0 : dim_, dim_, args_.eps, args_.dtype};
        check(colm_rms_norm(&norm, variant_, num_threads_));
    }

    void linear(const void* x, int64_t in_dim, int64_t x_stride, void* y, std::initializer_list<Family> families) {
        blocks_.clear();
        int64_t out_dim = 0;
        for (const Family& family : families) {
            for (int64_t chain = 0; chain < (family.is_shared ? 1 : args_.num_active); ++chain) {
                const StepMatrix& matrix = family.matrices[chain];
                const int64_t rows = family.is_shared ? args_.num_tokens : args_.chain_rows[chain];
                blocks_.push_back({matrix.weight, matrix.bias, rows, matrix.in_dim, matrix.out_dim, matrix.format, 0});
                out_dim += matrix.out_dim;
            }
        }
        LinearArgs linear{x, y, blocks_.data(), static_cast<int64_t>(blocks_.size()), args_.num_tokens, in_dim,
                          x_stride, out_dim, args_.dtype, nullptr};
        check(colm_linear(&linear, variant_, num_threads_));
    }

    // Calls `move` for each run of query heads of one chain and one kv head: (its place among the heads chain by chain,
    // its place among the heads by kv head, heads).
    template <class Move>
    void each_run(Move move) const {
        const int64_t group = query_dim_ / kv_dim_;
        int64_t head = 0, before = 0;
        for (int64_t chain = 0; chain < args_.num_active; ++chain) {
            const int64_t count = args_.chain_heads[chain] / args_.num_kv_heads;
            for (int64_t kv_head = 0; kv_head < args_.num_kv_heads; ++kv_head, head += count) {
                move(head, kv_head * group + before, count);
            }
            before += count;
        }
    }

    // From rows of qkv_ at a distance of `stride` into the order of the kv heads.
    void rotate_queries(int64_t stride) {
        const int64_t dim = args_.head_dim;
        each_run([&](int64_t head, int64_t place, int64_t count) {
            RotaryArgs rotary{qkv_ + head * dim * width_, grouped_ + place * dim * width_, nullptr, nullptr,
                              args_.cos, args_.sin, nullptr, args_.num_tokens, count, dim, args_.num_tokens,
                              stride, dim, query_dim_, dim, 0, 0, 0, 0, dim, dim, args_.dtype};
            check(colm_rotary(&rotary, variant_, num_threads_));
        });
    }

    // Heads chain by chain again, into the place of the queries, which nobody reads any more.
    void ungroup() {
        const int64_t head_bytes = args_.head_dim * width_, row = query_dim_ * width_;
        each_run([&](int64_t head, int64_t place, int64_t count) {
            for (int64_t token = 0; token < args_.num_tokens; ++token) {
                std::memcpy(qkv_ + token * row + head * head_bytes, attended_ + token * row + place * head_bytes,
                            count * head_bytes);
            }
        });
    }

    void activate() {
        SwigluArgs swiglu{gate_up_, gate_up_ + hidden_ * width_, gate_up_, args_.num_tokens, hidden_,
                          2 * hidden_, 2 * hidden_, 2 * hidden_, args_.dtype};
        check(colm_swiglu(&swiglu, variant_, num_threads_));
    }

    // From what attention gave to the feed-forward's part of the layer: delta.
    void after_attention(int64_t index, void* delta) {
        const Layer of = layer(index);
        ungroup();
        linear(qkv_, query_dim_, query_dim_, delta_, {{of.output, false}});
        norm(2 * index + 1, delta_, normed_);
        linear(normed_, dim_, dim_, gate_up_, {{of.gate, false}, {of.up, false}});
        activate();
        linear(gate_up_, hidden_, 2 * hidden_, delta, {{of.down, false}});
    }

    const StepArgs& args_;
    const int32_t variant_, num_threads_;
    const int64_t width_, dim_, hidden_, query_dim_, kv_dim_, row_bytes_;
    const std::unique_ptr<char[]> memory_;
    char *normed_, *delta_, *qkv_, *grouped_, *attended_, *gate_up_;
    std::vector<LinearBlock> blocks_;
    int32_t status_ = kOk;
};

class DecodeStep : public Layers {
  public:
    using Layers::Layers;

    int32_t run() {
        norm(0, nullptr, normed_);
        for (int64_t index = 0; index < args_.num_layers && status_ == kOk; ++index) {
            const Layer of = layer(index);
            linear(normed_, dim_, dim_, qkv_, {{of.queries, false}, {of.keys, true}, {of.values, true}});
            write_keys_values(index);
            rotate_queries(query_dim_ + 2 * kv_dim_);
            attend(index);
            after_attention(index, delta_);
            norm(2 * index + 2, delta_, index == args_.num_layers - 1 ? args_.y : normed_);
        }
        return status_;
    }

  private:
    bool is_int8() const { return args_.k_scales != nullptr; }

    int64_t num_slots() const { return args_.num_pages * args_.page_tokens; }

    // A layer's keys, values and scales.
    struct Pages {
        char *k, *v;
        uint16_t *k_scales, *v_scales;
    };

    Pages pages(int64_t layer) const {
        const int64_t at = layer * num_slots() * kv_dim_ * (is_int8() ? 1 : width_);
        const int64_t scale = layer * num_slots() * args_.num_kv_heads;
        return {static_cast<char*>(args_.k_pages) + at, static_cast<char*>(args_.v_pages) + at,
                is_int8() ? args_.k_scales + scale : nullptr, is_int8() ? args_.v_scales + scale : nullptr};
    }

    void write_keys_values(int64_t layer) {
        const int64_t stride = query_dim_ + 2 * kv_dim_, dim = args_.head_dim;
        const Pages to = pages(layer);
        char *keys = qkv_ + query_dim_ * width_, *values = keys + kv_dim_ * width_;
        RotaryArgs rotary{keys, to.k, values, to.v, args_.cos, args_.sin, args_.slots, args_.num_tokens,
                          args_.num_kv_heads, dim, num_slots(), stride, dim, kv_dim_, dim, stride, dim, kv_dim_, dim,
                          dim, dim, args_.dtype};
        if (is_int8()) {  // rotated in place, then quantised into their rows
            rotary = {keys, keys, nullptr, nullptr, args_.cos, args_.sin, nullptr, args_.num_tokens,
                      args_.num_kv_heads, dim, args_.num_tokens, stride, dim, stride, dim, 0, 0, 0, 0, dim, dim,
                      args_.dtype};
        }
        check(colm_rotary(&rotary, variant_, num_threads_));
        if (!is_int8()) return;
        quantise(keys, to.k, to.k_scales);
        quantise(values, to.v, to.v_scales);
    }

    void quantise(const char* from, char* to, uint16_t* scales) {
        const int64_t dim = args_.head_dim, heads = args_.num_kv_heads;
        QuantiseArgs quantise{from, reinterpret_cast<int8_t*>(to), scales, args_.slots, args_.num_tokens, heads, dim,
                              num_slots(), query_dim_ + 2 * kv_dim_, dim, kv_dim_, dim, heads, 1, args_.dtype};
        check(colm_quantise(&quantise, variant_, num_threads_));
    }

    void attend(int64_t layer) {
        const Pages of = pages(layer);
        DecodeArgs decode{grouped_, of.k, of.v, of.k_scales, of.v_scales,
                          args_.block_table, args_.context_lens, args_.cu_seqlens_q, attended_, args_.num_requests,
                          args_.num_tokens, args_.num_kv_heads, query_dim_ / kv_dim_, args_.head_dim, args_.num_pages,
                          args_.page_tokens, args_.table_columns, args_.scale, args_.dtype,
                          is_int8() ? kInt8 : args_.dtype};
        check(colm_decode_attention(&decode, args_.attention_variant, num_threads_));
    }
};

class PrefillLayer : public Layers {
  public:
    PrefillLayer(const PrefillLayerArgs& args, int32_t variant, int32_t num_threads)
        : Layers(args.step, variant, num_threads), tile_(args) {}

    int32_t write_keys_values() {
        const Layer of = layer(0);
        const int64_t dim = args_.head_dim, first = tile_.first_token * dim * width_, of_head = tile_.num_keys * dim;
        norm(0, nullptr, args_.y);
        linear(args_.y, dim_, dim_, qkv_, {{of.keys, true}, {of.values, true}});
        RotaryArgs rotary{qkv_, static_cast<char*>(tile_.k) + first, qkv_ + kv_dim_ * width_,
                          static_cast<char*>(tile_.v) + first, args_.cos, args_.sin, nullptr, args_.num_tokens,
                          args_.num_kv_heads, dim, args_.num_tokens, 2 * kv_dim_, dim, dim, of_head, 2 * kv_dim_, dim,
                          dim, of_head, dim, dim, args_.dtype};
        check(colm_rotary(&rotary, variant_, num_threads_));
        return status_;
    }

    int32_t attend() {
        const int64_t dim = args_.head_dim, num_heads = query_dim_ / dim, of_head = tile_.num_keys * dim;
        linear(args_.y, dim_, dim_, qkv_, {{layer(0).queries, false}});
        rotate_queries(query_dim_);
        const std::unique_ptr<float[]> lse(new float[args_.num_tokens * num_heads]);
        PrefillArgs prefill{grouped_, tile_.k, tile_.v, attended_, lse.get(), args_.num_tokens,
                            tile_.first_token + args_.num_tokens, num_heads, args_.num_kv_heads, dim, query_dim_, dim,
                            of_head, dim, of_head, dim, args_.scale, args_.dtype, tile_.flag, 0, 0};
        check(colm_prefill_attention(&prefill, args_.attention_variant, num_threads_));
        if (status_ == kOk) after_attention(0, tile_.delta);
        return status_;
    }

  private:
    const PrefillLayerArgs& tile_;
};

}  // namespace

COLM_EXPORT
int32_t colm_decode_step(const StepArgs* args, int32_t variant, int32_t num_threads) try {
    return DecodeStep(*args, variant, num_threads).run();
} catch (const std::bad_alloc&) {
    return kOutOfMemory;
}

COLM_EXPORT
int32_t colm_prefill_keys_values(const PrefillLayerArgs* args, int32_t variant, int32_t num_threads) try {
    return PrefillLayer(*args, variant, num_threads).write_keys_values();
} catch (const std::bad_alloc&) {
    return kOutOfMemory;
}

COLM_EXPORT
int32_t colm_prefill_attend(const PrefillLayerArgs* args, int32_t variant, int32_t num_threads) try {
    return PrefillLayer(*args, variant, num_threads).attend();
} catch (const std::bad_alloc&) {
    return kOutOfMemory;
}

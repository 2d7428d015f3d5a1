// Rows times the transpose of a quantised weight matrix that lies in panels. Include after a vec_*.h and panel.h.
//
// The products are of x and the weights' whole numbers, which bf16 and fp32 hold exactly. Scale and minimum join once a
// group: sum x (scale q + minimum) = scale (sum x q) + minimum (sum x). A row's sums have one order, whatever rows are
// beside it and however many.
#pragma once
#include "abi.h"
#include "panel.h"

namespace {

constexpr int kWordsPerGroup = 4, kInputsPerWord = kGroupInputs / kWordsPerGroup;  // as q4 has them, for both

struct Int8Group {
    static constexpr bool kHasMinimum = false;
    static constexpr int64_t kBytes = kPanelOutputs * kInt8OutputBytes, kWordBytes = kInputsPerWord * kPanelOutputs;

    // Of input kInput of a word, the lanes from `first` on.
    template <int kInput>
    static Vec whole(const unsigned char* word, int first) {
        return load_as_float(reinterpret_cast<const int8_t*>(word) + kInput * kPanelOutputs + first);
    }
#ifdef __AVX512BF16__
    template <int kPair>
    static __m512bh pair(const unsigned char* word, int first) {
        // Of a whole number below 256 in fp32, the lower half is zero, and the upper half is its bf16.
        const __m512i even = _mm512_castps_si512(whole<2 * kPair>(word, first));
        const __m512i odd = _mm512_castps_si512(whole<2 * kPair + 1>(word, first));
        return reinterpret_cast<__m512bh>(_mm512_or_si512(odd, _mm512_srli_epi32(even, 16)));
    }
#endif
};

struct Q4Group {
    static constexpr bool kHasMinimum = true;
    static constexpr int64_t kBytes = kPanelOutputs * kQ4OutputBytes, kWordBytes = sizeof(uint32_t) * kPanelOutputs;

    template <int kInput>
    static Vec whole(const unsigned char* word, int first) {
        return load_nibbles<kInput / 2 * 4 + kInput % 2 * 16>(word + first * sizeof(uint32_t));
    }
#ifdef __AVX512BF16__
    template <int kPair>
    static __m512bh pair(const unsigned char* word, int first) {
        // bf16 of 0 .. 7 and -8 .. -1, twice: the permutation reads 5 bits, of which the highest is the next number's.
        alignas(64) static constexpr uint16_t kValues[32] = {
            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
            0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
            0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
        const __m512i words = _mm512_loadu_si512(word + first * sizeof(uint32_t));
        const __m512i values = _mm512_load_si512(kValues);
        return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * kPair), values));
    }
#endif
};

// All in fp32, one input a step; x of bf16 is widened once a call.
template <class In>
struct WideTerms {
    using Element = In;
    using X = float;
    using Operand = Vec;
    static constexpr int kInputs = 1;
    static constexpr bool kWidensX = sizeof(In) != sizeof(float);

    static Vec broadcast(const float* x) { return splat(*x); }
    template <class Group, int kStep>
    static Vec of(const unsigned char* word, int first) {
        return Group::template whole<kStep>(word, first);
    }
    static Vec multiply_add(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
};

#ifdef __AVX512BF16__
// Pairs of bf16, multiplied as they are; numbers below the smallest normal one count as zero.
struct PairTerms {
    using Element = uint16_t;
    using X = uint16_t;
    using Operand = __m512bh;
    static constexpr int kInputs = 2;
    static constexpr bool kWidensX = false;

    static __m512bh broadcast(const uint16_t* x) {
        int32_t word;
        __builtin_memcpy(&word, x, sizeof word);
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
    }
    template <class Group, int kStep>
    static __m512bh of(const unsigned char* word, int first) {
        return Group::template pair<kStep>(word, first);
    }
    static Vec multiply_add(Vec acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

// kMostRows: as many as have room for their sums in registers beside a step's weights.
template <class Group, class Terms, int kMostRows>
struct QuantisedPanel {
    using Element = typename Terms::Element;
    using X = typename Terms::X;
    using Operand = typename Terms::Operand;
    static constexpr int kVecs = kPanelOutputs / kLanes, kSteps = kInputsPerWord / Terms::kInputs;
    static constexpr int64_t kScaleBytes = kPanelOutputs * sizeof(uint16_t) * (Group::kHasMinimum ? 2 : 1);

    static constexpr int64_t kKeptRows = 64;      // whose sums are kept while a panel passes
    static constexpr int64_t kGroupsAtOnce = 16;  // that all rows pass before the next: they stay in the first level
    // As in panel.h: so far ahead, weights are asked for where there are rows enough to outrun the prefetchers.
    static constexpr int64_t kAheadBytes = 16 << 10, kLineBytes = 64, kMostRowsUnasked = 4;

    // A row's words: the sums of x over each group; then x itself where it is widened.
    static int64_t sums_per_row(int64_t in_dim) { return (in_dim / kGroupInputs + kLanes - 1) / kLanes * kLanes; }
    static constexpr bool kNeedsWords = Group::kHasMinimum || Terms::kWidensX;
    static int64_t words_per_row(int64_t in_dim) {
        if (!kNeedsWords) return 0;
        return sums_per_row(in_dim) + (Terms::kWidensX ? in_dim / kGroupInputs * kGroupInputs : 0);
    }

    static void prepare(const LinearArgs& args, float* words) {
        const int64_t groups = args.in_dim / kGroupInputs;
        for (int64_t row = 0; row < args.num_rows; ++row, words += words_per_row(args.in_dim)) {
            const Element* x = static_cast<const Element*>(args.x) + row * args.x_stride;
            float* wide = words + sums_per_row(args.in_dim);
            for (int64_t group = 0; group < groups; ++group, x += kGroupInputs, wide += kGroupInputs) {
                Vec sum = zero();
                for (int i = 0; i < kGroupInputs; i += kLanes) {
                    const Vec part = load_as_float(x + i);
                    if constexpr (Terms::kWidensX) store(wide + i, part);
                    sum = add(sum, part);
                }
                alignas(64) float lanes[kLanes];
                store(lanes, sum);
                for (int lane = 1; lane < kLanes; ++lane) lanes[0] += lanes[lane];
                words[group] = lanes[0];
            }
        }
    }

    struct Rows {
        const X* x;
        int64_t x_stride;
        const float* x_sums;
        int64_t sums_stride;
    };

    // Steps of a word for kCount rows.
    template <int kCount, int kStep = 0>
    __attribute__((always_inline)) static void steps(Vec (&acc)[kCount][kVecs], const X* x, int64_t x_stride,
                                                     const unsigned char* word) {
        if constexpr (kStep < kSteps) {
            Operand weights[kVecs];
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) weights[j] = Terms::template of<Group, kStep>(word, j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kCount; ++i) {
                const Operand factor = Terms::broadcast(x + i * x_stride + kStep * Terms::kInputs);
#pragma GCC unroll 4
                for (int j = 0; j < kVecs; ++j) acc[i][j] = Terms::multiply_add(acc[i][j], factor, weights[j]);
            }
            steps<kCount, kStep + 1>(acc, x, x_stride, word);
        }
    }

    // kCount rows by `num_groups` groups of a panel, added to `sums`.
    template <int kCount, bool kAsks>
    __attribute__((noinline)) static void multiply(Rows rows, const unsigned char* group, int64_t num_groups,
                                                   float* sums) {
        for (; num_groups > 0; --num_groups, group += Group::kBytes, ++rows.x_sums) {
            Vec acc[kCount][kVecs];
#pragma GCC unroll 8
            for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
                for (int j = 0; j < kVecs; ++j) acc[i][j] = zero();
            }
            const unsigned char* word = group + kScaleBytes;
            for (int at = 0; at < kWordsPerGroup; ++at, word += Group::kWordBytes, rows.x += kInputsPerWord) {
                if constexpr (kAsks) ask(word, at);
                steps<kCount>(acc, rows.x, rows.x_stride, word);
            }
#pragma GCC unroll 4
            for (int j = 0; j < kVecs; ++j) {
                const auto* halves = reinterpret_cast<const uint16_t*>(group) + j * kLanes;
                const Vec scale = load_halves(halves);
                Vec offset;
                if constexpr (Group::kHasMinimum) offset = fma(splat(8.0f), scale, load_halves(halves + kPanelOutputs));
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    float* to = sums + i * kPanelOutputs + j * kLanes;
                    Vec sum = fma(scale, acc[i][j], load(to));
                    if constexpr (Group::kHasMinimum) sum = fma(offset, splat(rows.x_sums[i * rows.sums_stride]), sum);
                    store(to, sum);
                }
            }
        }
    }

    static void ask(const unsigned char* word, int at) {
        const auto* ahead = reinterpret_cast<const char*>(word) + kAheadBytes;
        for (int64_t line = at == 0 ? -kScaleBytes : 0; line < Group::kWordBytes; line += kLineBytes) {
            _mm_prefetch(ahead + line, _MM_HINT_T1);
        }
    }

    template <bool kAsks, int kCount = kMostRows>
    static void multiply_some(int64_t count, Rows rows, const unsigned char* group, int64_t num_groups, float* sums) {
        if constexpr (kCount > 0) {
            if (count == kCount) return multiply<kCount, kAsks>(rows, group, num_groups, sums);
            multiply_some<kAsks, kCount - 1>(count, rows, group, num_groups, sums);
        }
    }

    static void run(const LinearArgs& args, const LinearBlock& block, int64_t begin, int64_t end) {
        const int64_t groups = block.in_dim / kGroupInputs;
        for (int64_t out = begin; out < end; out += kPanelOutputs) {
            const auto* panel = static_cast<const unsigned char*>(block.weight) +
                                out / kPanelOutputs * groups * Group::kBytes;
            for (int64_t row = 0; row < block.num_rows; row += kKeptRows) {
                const int64_t left = block.num_rows - row;
                some_rows(args, block, panel, groups, out, row, left < kKeptRows ? left : kKeptRows);
            }
        }
    }

    static void some_rows(const LinearArgs& args, const LinearBlock& block, const unsigned char* panel, int64_t groups,
                          int64_t out, int64_t first, int64_t count) {
        alignas(64) float sums[kKeptRows * kPanelOutputs];
        begin_sums<Element>(block, out, count, sums);
        const int64_t of_row = words_per_row(args.in_dim);
        const float* words = args.words + first * of_row;
        Rows rows{nullptr, args.x_stride, words, of_row};
        if constexpr (Terms::kWidensX) {
            rows.x = words + sums_per_row(args.in_dim);
            rows.x_stride = of_row;
        } else {
            rows.x = static_cast<const X*>(args.x) + first * args.x_stride;
        }
        const int64_t tiles = (count + kMostRows - 1) / kMostRows;
        for (int64_t group = 0; group < groups; group += kGroupsAtOnce) {
            const int64_t depth = groups - group < kGroupsAtOnce ? groups - group : kGroupsAtOnce;
            const unsigned char* from = panel + group * Group::kBytes;
            for (int64_t tile = 0, row = 0, next; tile < tiles; ++tile, row = next) {
                next = count * (tile + 1) / tiles;
                const Rows of_tile{rows.x + row * rows.x_stride + group * kGroupInputs, rows.x_stride,
                                   rows.x_sums + row * of_row + group, of_row};
                float* to = sums + row * kPanelOutputs;
                if (tile == 0 && count > kMostRowsUnasked) {
                    multiply_some<true>(next - row, of_tile, from, depth, to);
                } else {
                    multiply_some<false>(next - row, of_tile, from, depth, to);
                }
            }
        }
        store_sums<Element>(args, block, out, first, count, sums);
    }

    static LinearKernel kernel() { return {run, kNeedsWords ? prepare : nullptr, words_per_row, kPanelOutputs}; }
};

template <class Terms, int kMostRows>
LinearKernel quantised_of(int64_t format) {
    return format == kQ4Panels ? QuantisedPanel<Q4Group, Terms, kMostRows>::kernel()
                               : QuantisedPanel<Int8Group, Terms, kMostRows>::kernel();
}

}  // namespace

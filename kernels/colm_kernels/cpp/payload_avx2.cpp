// Payloads of the KV stream, at the speed of memory: laid out, hashed and looked at in one pass; scattered into pages.
//
// The hash is XXH3-64 with its default secret, of more than 240 bytes; shorter inputs are hashed otherwise, by Python.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "abi.h"
#include "launch.h"

namespace {

constexpr int64_t kStripe = 64, kBlock = 1024, kSecretBytes = 192;
constexpr int64_t kChunk = 8 << 10;  // copied, looked at and hashed while the first-level cache holds it

alignas(64) constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

__m256i load(const unsigned char* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

uint64_t word(const unsigned char* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// XXH3-64 of an input that becomes complete block by block.
struct Hash {
    __m256i acc[2] = {
        _mm256_set_epi64x(kPrime64_3, kPrime64_2, kPrime64_1, kPrime32_3),
        _mm256_set_epi64x(kPrime32_1, kPrime64_5, kPrime32_2, kPrime64_4),
    };

    // Where the part of an input begins that `end` takes; it is never empty.
    static int64_t last_block(int64_t num_bytes) { return (num_bytes - 1) / kBlock * kBlock; }

    void stripe(const unsigned char* in, const unsigned char* secret) {
        for (int half = 0; half < 2; ++half) {
            const __m256i data = load(in + 32 * half), mixed = _mm256_xor_si256(data, load(secret + 32 * half));
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
            acc[half] = _mm256_add_epi64(product, _mm256_add_epi64(acc[half], swapped));
        }
    }

    void stripes(const unsigned char* in, int64_t count) {
        for (int64_t i = 0; i < count; ++i) stripe(in + i * kStripe, kSecret + 8 * i);
    }

    void block(const unsigned char* in) {
        stripes(in, kBlock / kStripe);
        const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
        for (int half = 0; half < 2; ++half) {
            __m256i mixed = _mm256_xor_si256(acc[half], _mm256_srli_epi64(acc[half], 47));
            mixed = _mm256_xor_si256(mixed, load(kSecret + kSecretBytes - kStripe + 32 * half));
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
            acc[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
        }
    }

    // What lies behind the last whole block, and the end. `rest` is all from there on; the stripe before it is read too.
    uint64_t end(const unsigned char* rest, int64_t num_bytes) {
        const int64_t num_rest = num_bytes - last_block(num_bytes);
        stripes(rest, (num_rest - 1) / kStripe);
        stripe(rest + num_rest - kStripe, kSecret + kSecretBytes - kStripe - 7);
        alignas(32) uint64_t lanes[8];
        for (int half = 0; half < 2; ++half) _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 4 * half), acc[half]);
        uint64_t result = static_cast<uint64_t>(num_bytes) * kPrime64_1;
        for (int i = 0; i < 4; ++i) {
            const unsigned char* secret = kSecret + 11 + 16 * i;
            const unsigned __int128 product =
                static_cast<unsigned __int128>(lanes[2 * i] ^ word(secret)) * (lanes[2 * i + 1] ^ word(secret + 8));
            result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
        }
        result ^= result >> 37;
        result *= 0x165667919E3779F9;
        return result ^ result >> 32;
    }
};

// Looks for exponents that are all ones.
struct Finite {
    __m256i exponent, bad = _mm256_setzero_si256();
    bool of_words;

    explicit Finite(int64_t dtype) : of_words(dtype == kFloat32) {
        exponent = of_words ? _mm256_set1_epi32(0x7F800000) : _mm256_set1_epi16(0x7F80);
    }

    void look(__m256i values) {
        const __m256i bits = _mm256_and_si256(values, exponent);
        const __m256i found =
            of_words ? _mm256_cmpeq_epi32(bits, exponent) : _mm256_cmpeq_epi16(bits, exponent);
        bad = _mm256_or_si256(bad, found);
    }

    void look(const unsigned char* at, int64_t num_bytes) {
        int64_t i = 0;
        for (; i + 32 <= num_bytes; i += 32) look(load(at + i));
        if (i < num_bytes) {
            unsigned char rest[32] = {};
            std::memcpy(rest, at + i, num_bytes - i);
            look(load(rest));
        }
    }

    bool holds() const { return _mm256_testz_si256(bad, bad); }
};

// The rows of pages as a payload goes to them: keys, then values; of each, head by head, token by token.
class Rows {
  public:
    explicit Rows(const StoreArgs& args) : args_(args) {
        const auto in_lines = [](int64_t number) { return number % 32 == 0; };
        streams_ = in_lines(args.head_bytes) && in_lines(args.row_stride) &&
                   in_lines(reinterpret_cast<intptr_t>(args.rows[0])) && in_lines(reinterpret_cast<intptr_t>(args.rows[1]));
        begin_run();
    }

    // Take what comes next.
    void take(const unsigned char* x, int64_t num_bytes) {
        while (num_bytes > 0) {
            const int64_t count = std::min(args_.head_bytes - inside_, num_bytes);
            if (streams_ && count == args_.head_bytes) {
                // Past the caches: pages are read when the whole prompt is there.
                for (int64_t i = 0; i < count; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(out_ + i), load(x + i));
            } else {
                std::memcpy(out_ + inside_, x, count);
            }
            x += count, num_bytes -= count, inside_ += count;
            if (inside_ == args_.head_bytes) next_row();
        }
    }

    void end() const {
        if (streams_) _mm_sfence();
    }

  private:
    void next_row() {
        inside_ = 0, out_ += args_.row_stride;
        if (--left_ > 0) return;
        if (++run_ == args_.num_runs) {
            run_ = 0;
            if (++head_ == args_.num_heads) head_ = 0, ++which_;
        }
        if (which_ < 2) begin_run();
    }

    void begin_run() {
        left_ = args_.runs[2 * run_];
        out_ = args_.rows[which_] + args_.runs[2 * run_ + 1] * args_.row_stride + head_ * args_.head_bytes;
    }

    const StoreArgs& args_;
    unsigned char* out_ = nullptr;  // the row's place for this head
    int64_t which_ = 0, head_ = 0, run_ = 0;
    int64_t left_ = 0;    // rows of this run
    int64_t inside_ = 0;  // bytes of the row that are there
    bool streams_;
};

}  // namespace

COLM_EXPORT
int32_t colm_pack_payload(PackArgs* args, int32_t, int32_t) {
    Hash hash;
    Finite finite(args->dtype);
    unsigned char* const out = args->out;
    const int64_t num_bytes = 2 * args->num_heads * args->head_bytes;
    const int64_t last_block = Hash::last_block(num_bytes);
    int64_t written = 0, hashed = 0;
    for (int which = 0; which < 2; ++which) {
        for (int64_t head = 0; head < args->num_heads; ++head) {
            const unsigned char* const x = args->tensors[which] + head * args->strides_k[which];
            for (int64_t done = 0; done < args->head_bytes; done += kChunk) {
                const int64_t count = std::min(kChunk, args->head_bytes - done);
                std::memcpy(out + written, x + done, count);
                finite.look(out + written, count);
                written += count;
                for (; hashed < last_block && hashed + kBlock <= written; hashed += kBlock) hash.block(out + hashed);
            }
        }
    }
    args->checksum = hash.end(out + last_block, num_bytes);
    args->is_finite = finite.holds();
    return kOk;
}

COLM_EXPORT
int32_t colm_scatter_rows(const ScatterArgs* args, int32_t, int32_t) {
    const bool streams = args->head_bytes % 32 == 0 && args->out_stride % 32 == 0 &&
                         reinterpret_cast<uintptr_t>(args->out) % 32 == 0;
    for (int64_t token = 0; token < args->num_tokens; ++token) {
        const unsigned char* x = args->x + token * args->head_bytes;
        unsigned char* out = args->out + token * args->out_stride;
        for (int64_t head = 0; head < args->num_heads; ++head, x += args->x_stride_k, out += args->head_bytes) {
            if (!streams) {
                std::memcpy(out, x, args->head_bytes);
                continue;
            }
            // Past the caches: pages are read when the whole prompt is there.
            for (int64_t i = 0; i < args->head_bytes; i += 32) {
                _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), load(x + i));
            }
        }
    }
    if (streams) _mm_sfence();
    return kOk;
}

COLM_EXPORT
int32_t colm_store_payload(StoreArgs* args, int32_t, int32_t) {
    // Each chunk is read once and then looked at here alone, so the checksum is of what the pages get, whoever else may
    // write to the payload. Before it, the end of the one before.
    alignas(kStripe) unsigned char held[kStripe + kChunk];
    unsigned char* const chunk = held + kStripe;
    const int64_t last_block = Hash::last_block(args->num_bytes);
    Hash hash;
    Rows rows(*args);
    for (int64_t done = 0; done < args->num_bytes; done += kChunk) {
        const int64_t count = std::min(kChunk, args->num_bytes - done);
        std::memcpy(held, held + kChunk, kStripe);
        std::memcpy(chunk, args->payload + done, count);
        for (int64_t at = 0; at + kBlock <= count && done + at < last_block; at += kBlock) hash.block(chunk + at);
        rows.take(chunk, count);
        if (done + count == args->num_bytes) args->checksum = hash.end(chunk + last_block - done, args->num_bytes);
    }
    rows.end();
    return kOk;
}

// What one call of attention is given: sizes, strides in elements, and where the numbers lie. No part of it is owned.
//
// Letters: B sequences, T queries of each, S keys, H query heads, G KV heads, D head_dim of keys, E head_dim of values, n pairs that turn.
#pragma once

#include <cstddef>
#include <cstdint>

namespace twofold {

enum class Kind : int32_t { f32, bf16, f16, i8 };

// [B, G, S, D], or, in pages, [N, G, tokens of a page, D]; the numbers of a row lie side by side.
struct Rows {
    const char* data = nullptr;
    Kind kind = Kind::f32;
    int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// What codes are multiplied by: one number for a token (row_stride != 0 or S = 1), or one for a channel.
struct Scales {
    const float* of_tokens = nullptr;
    const float* of_channels = nullptr;
    int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// Cosines and sines [S, n], or [B, S, n]. Where successive rows turn by one angle more (`is_steady`) only a row of each block is read.
struct Table {
    const char *cosine = nullptr, *sine = nullptr;
    Kind kind = Kind::f32;
    int64_t batch_stride = 0, row_stride = 0, pairs = 0, distance = 0;
    bool is_steady = false;
};

struct Call {
    uint64_t serial = 0;  // no other call of this process has it: what a thread made for this one it may use again
    int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, key_dim = 0, value_dim = 0, extension_dim = 0;
    bool shares_value = false, query_is_bf16 = false, is_causal = true;
    int64_t window = 0;
    float scale = 1.0f, soft_cap = 0.0f;

    const float* query = nullptr;  // [B, H, T, D + extension_dim], side by side
    Rows key, value, extension;
    Scales key_scales, value_scales;
    const float* key_scale = nullptr;  // [D]
    Table table;
    const float* sinks = nullptr;  // [H]

    const int64_t* lengths = nullptr;          // [B]
    const int64_t* query_positions = nullptr;  // [T]
    const int64_t* key_positions = nullptr;    // [S]
    const uint8_t* key_mask = nullptr;         // [B, S]
    int64_t mask_batch_stride = 0, mask_row_stride = 0;

    const int64_t* pages = nullptr;  // [B, pages_per_sequence]
    int64_t pages_per_sequence = 0, page_tokens = 0;

    float* output = nullptr;  // [B, H, T, E], side by side

    int64_t rows() const { return heads / kv_heads * queries; }  // queries that read one KV head
    int64_t length(int64_t sequence) const { return lengths ? lengths[sequence] : keys; }
};

inline size_t bytes_of(Kind kind) { return kind == Kind::f32 ? 4 : kind == Kind::i8 ? 1 : 2; }

// The part of a softmax that some of the keys make up, for each of the rows() queries of a KV head.
struct Part {
    float* greatest;  // [rows]
    float* total;     // [rows]: sum of exp(logit - greatest)
    float* values;    // [rows, E]: sum of exp(logit - greatest) * value
};

// One way to compute, compiled for one kind of processor.
struct Level {
    const char* name;
    size_t (*scratch_bytes)(const Call&);
    // Keys [first, last) of one KV head of one sequence.
    void (*attend)(const Call&, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, char* scratch, Part part);
};

constexpr int64_t TILE = 128;    // keys that are looked at together, at most
constexpr int64_t PADDING = 64;  // a row of sums has a whole number of these, at every level

}  // namespace twofold

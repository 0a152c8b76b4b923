// What `attend` is told of the layers that it attends to: kernels/cpu_prepared.py fills these structures.

#pragma once

#include "cpu.h"

constexpr int RUN = 16, RUNS = 8, TILE = RUN * RUNS;  // tokens that are worked on at a time: runs that lie together
constexpr int HEADS = 16;  // query heads of a KV head, at most
constexpr int SIZE = 256;  // channels of a head, at most

enum Kind : int32_t { RAW, BY_TOKEN, BY_CHANNEL };

extern "C" {

// Numbers of some tokens of every row and KV head, keys or values.
struct Numbers {
    int32_t kind, bits, groups, unused;
    const uint8_t* planes[3];  // BY_TOKEN: the high bits first; BY_CHANNEL: of 4, 2 and 1 bits
    int64_t plane_rows[3];     // BY_CHANNEL: channels of all heads in a plane
    const uint8_t *zero, *span;  // BY_CHANNEL: `span` has the scales
    void* raw;                   // RAW: in the model's dtype
    int64_t row_stride, head_stride;  // RAW: in numbers
};

struct Block {
    int64_t tokens;
    Numbers keys, values;
    const int32_t* plane_row[3];  // BY_CHANNEL: row of each channel in each plane, -1: none, [Hkv, D]
    const uint8_t* width;         // [Hkv, D]
    const float* unit;            // [B, Hkv, D]: step of each channel, times its spread
};

struct Layer {
    int64_t rows, kv_heads, group, size, value_size;
    int64_t kept, slots, blocks, pairs, padded;  // padded: `pairs` filled up to whole vectors
    const Block* block;              // [blocks + 1]; the last one is what is not packed
    const int32_t* positions;        // [B, Hkv, kept]
    const float* centre;             // [B, Hkv, D] or null
    const int32_t *first, *second;   // [pairs]: channels that are turned together
    const int32_t* still;            // [still_count]: channels that are not turned
    int64_t still_count;
    const float *middle, *beside;    // see `interval_tables` in cpu_basis.py
    const float *of_keys, *of_values;  // rotations [D, D] of what is packed, or null
    int32_t dtype, threads;
    const void* queries;             // [B, Hq, D] of all heads of the model's layer
    void* output;                    // [B, Hq, Dv], likewise
    int64_t all_heads;               // KV heads of the model's layer
    const int64_t* head_places;      // [Hkv]: which of them these are; null: all, in their order
    const uint8_t* shown;            // [B or B * Hkv, slots] or null
    int64_t shown_row, shown_head;   // strides
    float scaling;
};

}  // extern "C"

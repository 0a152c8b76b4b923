// Logits and values of a tile of tokens. Codes are unpacked to bytes once for all query heads of a KV head, and become
// floats in registers.

#pragma once

#include "cpu_centre.h"
#include "cpu_powers.h"
#include "cpu_unpack.h"

#include <numeric>

namespace {

constexpr int CHANNELS = 64;  // channels of a tile of keys that are unpacked at a time

// The number of the first query head of a row's KV head.
int64_t first_query(const Layer& layer, int64_t row, int64_t head) {
    return (row * layer.all_heads + (layer.head_places == nullptr ? head : layer.head_places[head])) * layer.group;
}

// What one thread works with: one row and KV head at a time.
struct Worker {
    const Layer& layer;
    int64_t row, head, heads;
    alignas(64) float q[HEADS][SIZE], turned[HEADS][SIZE], folded[HEADS][SIZE];
    alignas(64) float logits[HEADS][TILE], weights[HEADS][TILE];
    alignas(64) uint8_t codes[CHANNELS * TILE];
    alignas(64) uint8_t rows[TILE * SIZE];
    alignas(64) float real[RUN * SIZE], part[HEADS][SIZE];
    alignas(64) float low[TILE], step[TILE];  // of the tokens' ranges
    float offset[HEADS], sums_of[HEADS][SIZE];  // sums_of: a query's groups
    Channel channels[SIZE];  // of a block's keys, those of few bits first
    int until[WIDTHS] = {};  // where those of each width end
    Centre centre;

    explicit Worker(const Layer& l) : layer(l), row(-1), head(-1), heads(l.group), centre(l) {}

    int64_t pair() const { return row * layer.kv_heads + head; }

    void start(int64_t r, int64_t h) {
        row = r, head = h;
        const int64_t size = layer.size, first = first_query(layer, row, head);
        std::memset(q, 0, sizeof q[0] * heads);
        for (int64_t g = 0; g < heads; ++g) {
            widen(layer.queries, (first + g) * size, size, layer.dtype, q[g]);
            for (int64_t d = 0; d < size; ++d) q[g][d] *= layer.scaling;
        }
        std::memcpy(turned, q, sizeof q[0] * heads);
        if (layer.of_keys != nullptr) {
            for (int64_t g = 0; g < heads; ++g) {
                std::fill_n(turned[g], size, 0.0f);
                for (int64_t d = 0; d < size; ++d)
                    for (int64_t e = 0; e < size; ++e) turned[g][e] += q[g][d] * layer.of_keys[d * size + e];
            }
        }
        centre.start(row, head, q[0]);
    }

    // Makes of the queries what a block's codes are multiplied with.
    void fold(const Block& block) {
        const int64_t size = layer.size;
        if (block.keys.kind == BY_CHANNEL) {
            fold_channels(block);
        } else if (block.keys.kind == BY_TOKEN) {  // each group filled up with zeros, and its sum
            const int64_t groups = block.keys.groups, length = size / groups, padded = filled(length);
            for (int64_t g = 0; g < heads; ++g)
                for (int64_t group = 0; group < groups; ++group) {
                    const float* from = turned[g] + group * length;
                    float* to = folded[g] + group * padded;
                    std::fill(std::copy_n(from, length, to), to + padded, 0.0f);
                    sums_of[g][group] = std::accumulate(from, from + length, 0.0f);
                }
        }
    }

    // The steps of the channels, and the middles of their codes.
    void fold_channels(const Block& block) {
        const int64_t size = layer.size, eighth = (block.tokens + 7) / 8;
        const float* unit = block.unit + pair() * size;
        std::fill_n(offset, heads, 0.0f);
        int used = 0;
        for (int width = 1; width < WIDTHS; ++width) {  // those of one width are unpacked together
            for (int64_t d = 0; d < size; ++d) {
                const int64_t at = head * size + d;
                if (block.width[at] != width) continue;
                for (int plane = 0; plane < 3; ++plane)
                    if (width & 4 >> plane) {
                        const int64_t line = row * block.keys.plane_rows[plane] + block.plane_row[plane][at];
                        channels[used].from[plane] = block.keys.planes[plane] + line * eighth * (4 >> plane);
                    }
                for (int64_t g = 0; g < heads; ++g) {
                    folded[g][used] = q[g][d] * unit[d];
                    offset[g] += folded[g][used] * static_cast<float>((1 << width) - 1) / 2;
                }
                ++used;
            }
            until[width] = used;
        }
    }

    // Logits of a tile of keys that are held by channel, without their centre.
    void channel_logits(const Block& block, const int64_t* token, const int* count) {
        for (int64_t g = 0; g < heads; ++g) std::fill_n(logits[g], TILE, -offset[g]);
        const int64_t eighth = token[1] - token[0];
        for (int c = 0; c < until[WIDTHS - 1]; c += CHANNELS) {
            const int end = std::min(c + CHANNELS, until[WIDTHS - 1]);
            for (int width = 1, done = c; done < end; ++width) {
                const int number = std::min(until[width], end) - done;
                if (number <= 0) continue;
                UNPACK[width](channels + done, number, eighth, token[0], count[0], codes + (done - c) * TILE);
                done += number;
            }
            add_products(heads, codes, TILE, end - c, TILE, folded[0] + c, SIZE, logits[0], TILE);
        }
        const uint8_t* scale = block.keys.span + pair() * block.tokens;
        alignas(64) uint8_t scales[TILE] = {};
        for (int k = 0; k < RUNS; ++k) {
            soon(scale + token[k] + RUN);
            std::memcpy(scales + k * RUN, scale + token[k], count[k]);
        }
        for (int t = 0; t < TILE; t += LANES) {
            const floats s = powers_of_two<4>(scales + t);
            for (int64_t g = 0; g < heads; ++g) store(logits[g] + t, load<floats>(logits[g] + t) * s);
        }
    }

    // A run of tokens as floats, `[count, padded]`.
    void read_raw(const Numbers& from, int64_t token, int count, int64_t size) {
        const int64_t start = row * from.row_stride + head * from.head_stride + token * size, padded = filled(size);
        for (int t = 0; t < count; ++t) {
            widen(from.raw, start + t * size, size, layer.dtype, real + t * padded);
            std::fill(real + t * padded + size, real + (t + 1) * padded, 0.0f);
        }
    }

    // Logits of a tile of keys that are held token by token, without their centre.
    void token_logits(const Block& block, const int64_t* token, const int* count, bool dense) {
        const Numbers& keys = block.keys;
        const int64_t size = layer.size;
        for (int64_t g = 0; g < heads; ++g) std::fill_n(logits[g], TILE, 0.0f);
        if (keys.kind == RAW) {
            for (int k = 0; k < RUNS; ++k) {
                read_raw(keys, token[k], count[k], size);
                // What was not packed is as the model made it; what was is rotated in its dtype, too.
                for (int i = 0; i < count[k]; i += 8) add_eight(i, filled(size), dense ? q[0] : turned[0], k * RUN + i);
            }
            return;
        }
        const int64_t padded = filled(size / keys.groups), stride = padded * keys.groups;
        for (int k = 0; k < RUNS; ++k)
            unpack_run(keys, pair(), block.tokens, token[k], count[k], size, rows + k * RUN * stride);
        for (int64_t group = 0; group < keys.groups; ++group) {
            ranges(keys, block.tokens, token, count, group);
            for (int k = 0; k < RUNS; ++k)
                for (int i = 0; i < count[k]; i += 8) {
                    const int t = k * RUN + i;
                    for (int n = 0; n < 8; ++n)  // floats once for all query heads
                        for (int64_t d = 0; d < padded; d += LANES) {
                            const floats x = widened(rows + (t + n) * stride + group * padded + d);
                            store(real + n * padded + d, x);
                        }
                    add_eight(0, padded, folded[0] + group * padded, t, group);
                }
        }
    }

    // Adds the products of eight tokens, which stand in `real` from `first` on, with each query head's weights. Codes,
    // whose group is given, are multiplied in the ranges of their tokens.
    void add_eight(int first, int64_t size, const float* with, int t, int64_t group = -1) {
        for (int64_t g = 0; g < heads; ++g) {
            eight found = products(real + first * size, with + g * SIZE, size);
            if (group >= 0) {
                const eight s = load<eight>(step + t);
                found = found * s + (load<eight>(low + t) + 0.5f * s) * sums_of[g][group];
            }
            found += load<eight>(logits[g] + t);
            store(logits[g] + t, found);
        }
    }

    // `low` and `step` of a tile.
    void ranges(const Numbers& from, int64_t tokens, const int64_t* token, const int* count, int64_t group) {
        const float part = 1.0f / static_cast<float>(1 << from.bits);
        alignas(64) uint8_t zeros[TILE] = {}, spans[TILE] = {};
        for (int k = 0; k < RUNS; ++k) {
            const int64_t start = (pair() * tokens + token[k]) * from.groups + group;
            soon(from.zero + start + RUN * from.groups);
            soon(from.span + start + RUN * from.groups);
            for (int t = 0; t < count[k]; ++t) {
                zeros[k * RUN + t] = from.zero[start + t * from.groups];
                spans[k * RUN + t] = from.span[start + t * from.groups];
            }
        }
        for (int t = 0; t < TILE; t += LANES) {
            const floats width = powers_of_two<3>(spans + t);
            store(low + t, width * (widened(zeros + t) * (-1.0f / 255.0f)));
            store(step + t, width * part);
        }
    }

    // Adds a tile of values, weighted by `weights`, to `sum`. Weights of what is no token are zero.
    void add_tile(const Block& block, const int64_t* token, const int* count, float (*sum)[SIZE]) {
        const Numbers& values = block.values;
        const int64_t size = layer.value_size;
        if (values.kind == RAW) {
            for (int k = 0; k < RUNS; ++k) {
                read_raw(values, token[k], count[k], size);
                const int64_t padded = filled(size);
                add_products(heads, real, padded, count[k], padded, weights[0] + k * RUN, TILE, sum[0], SIZE);
            }
            return;
        }
        const int64_t length = size / values.groups, padded = filled(length), stride = padded * values.groups;
        for (int k = 0; k < RUNS; ++k)
            unpack_run(values, pair(), block.tokens, token[k], count[k], size, rows + k * RUN * stride);
        for (int64_t group = 0; group < values.groups; ++group) {
            ranges(values, block.tokens, token, count, group);
            for (int64_t g = 0; g < heads; ++g) {
                floats shift{};
                for (int t = 0; t < TILE; t += LANES) {
                    const floats w = load<floats>(weights[g] + t), s = load<floats>(step + t) * w;
                    store(logits[g] + t, s);  // they are done with
                    shift += w * load<floats>(low + t) + 0.5f * s;
                }
                std::fill_n(part[g], padded, sum_of(shift));
            }
            add_products(heads, rows + group * padded, stride, TILE, padded, logits[0], TILE, part[0], SIZE);
            for (int64_t g = 0; g < heads; ++g)
                for (int64_t d = 0; d < length; ++d) sum[g][group * length + d] += part[g][d];
        }
    }
};

}  // namespace

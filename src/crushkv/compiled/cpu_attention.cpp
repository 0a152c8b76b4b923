// Attention of one token a row over the tokens of a layer, read as they are packed. See kernels/cpu.py, which fills
// `Layer`. Tokens are worked on in tiles of eight runs of sixteen. The codes of a tile are unpacked to bytes once for
// all query heads of a KV head. They become floats in registers.

#include "cpu.h"

#include <limits>
#include <numeric>

namespace {

constexpr int RUN = 16, RUNS = 8, TILE = RUN * RUNS;
constexpr int CHANNELS = 64;   // channels of a tile of keys that are unpacked at a time
constexpr int HEADS = 16;      // query heads of a group, at most
constexpr int SIZE = 256;      // channels of a head, at most
constexpr float NOWHERE = -std::numeric_limits<float>::infinity();

enum Kind : int32_t { RAW, BY_TOKEN, BY_CHANNEL };

inline words wide(uint8_t mask) { return words{} + static_cast<uint16_t>(mask * 0x0101); }

// Bytes moved down (or up, where `down` is negative), two at a time, which processors have instructions for. What
// crosses into a neighbour has to be masked off.
inline bytes shifted(bytes x, int down) {
    shorts y;
    std::memcpy(&y, &x, sizeof y);
    y = down > 0 ? y >> down : y << -down;
    std::memcpy(&x, &y, sizeof y);
    return x;
}

}  // namespace

extern "C" {

// Numbers of some tokens of every row and KV head, keys or values.
struct Numbers {
    int32_t kind, bits, groups, unused;
    const uint8_t* planes[3];  // BY_TOKEN: the high bits first; BY_CHANNEL: of 4, 2 and 1 bits
    int64_t plane_rows[3];     // BY_CHANNEL: channels of all heads in a plane
    const uint8_t *zero, *span;  // BY_CHANNEL: `span` has the scales
    const void* raw;             // RAW: in the model's dtype
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
    int64_t kept, slots, blocks, pairs, padded;  // padded: `pairs` filled up to a multiple of LANES
    const Block* block;              // [blocks + 1]; the last one is what is not packed
    const int32_t* positions;        // [B, Hkv, kept]
    const float* centre;             // [B, Hkv, D] or null
    const int32_t *first, *second;   // [pairs]: channels that are turned together
    const int32_t* still;            // [still_count]: channels that are not turned
    int64_t still_count;
    const float *coarse, *fine;      // cosines and sines: [reach / FINE, 2, padded], [FINE, 2, padded]
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

int64_t size_of_layer() { return sizeof(Layer); }
int64_t size_of_block() { return sizeof(Block); }

}  // extern "C"

namespace {

// Powers of e for numbers of at most 0; below -87, next to nothing.
inline floats exp_of(floats x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    floats y = x * 1.44269504f;
    ints n = __builtin_convertvector(y - 0.5f, ints);  // towards zero: the nearest, for negative numbers
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ints power = (n + 127) << 23;
    return p * load<floats>(&power);
}

// Sums of the lanes of eight vectors.
inline floats sums(const floats* v) {
#define EVEN(a, b) __builtin_shuffle(a, b, ints{0, 8, 2, 10, 4, 12, 6, 14})
#define ODD(a, b) __builtin_shuffle(a, b, ints{1, 9, 3, 11, 5, 13, 7, 15})
    floats pair[4], quad[2];
    for (int i = 0; i < 4; ++i) pair[i] = EVEN(v[2 * i], v[2 * i + 1]) + ODD(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; ++i)
        quad[i] = __builtin_shuffle(pair[2 * i], pair[2 * i + 1], ints{0, 1, 8, 9, 4, 5, 12, 13}) +
                  __builtin_shuffle(pair[2 * i], pair[2 * i + 1], ints{2, 3, 10, 11, 6, 7, 14, 15});
    return __builtin_shuffle(quad[0], quad[1], ints{0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(quad[0], quad[1], ints{4, 5, 6, 7, 12, 13, 14, 15});
#undef EVEN
#undef ODD
}

// Products of eight rows with the same vector, `size` a multiple of LANES.
inline floats products(const float* const* rows, const float* weights, int64_t size) {
    floats v[8] = {};
    for (int64_t d = 0; d < size; d += LANES) {
        const floats w = load<floats>(weights + d);
        for (int k = 0; k < 8; ++k) v[k] += load<floats>(rows[k] + d) * w;
    }
    return sums(v);
}

// Logits of `TILE` tokens: `logits[g][t] += weights[g][c] * codes[c][t]`, for G query heads.
template <int G, int V>
inline void add_channels(const uint8_t* codes, int channels, const float* weights, int64_t apart, float* logits) {
    for (int t = 0; t < TILE; t += V * LANES) {
        floats sum[G][V];
        for (int g = 0; g < G; ++g)
            for (int v = 0; v < V; ++v) sum[g][v] = load<floats>(logits + g * TILE + t + v * LANES);
        for (int c = 0; c < channels; ++c)
            for (int v = 0; v < V; ++v) {
                floats x = widened(codes + c * TILE + t + v * LANES);
                for (int g = 0; g < G; ++g) sum[g][v] += weights[g * apart + c] * x;
            }
        for (int g = 0; g < G; ++g)
            for (int v = 0; v < V; ++v) std::memcpy(logits + g * TILE + t + v * LANES, &sum[g][v], sizeof(floats));
    }
}

// `sum[g][c] += weights[g][t] * numbers[t][c]` for G query heads and V vectors of channels.
template <int G, int V, class T>
inline void add_vectors(const T* numbers, int64_t stride, int tokens, const float* weights, float* sum, int64_t apart) {
    floats s[G][V];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) s[g][v] = load<floats>(sum + g * apart + v * LANES);
    for (int t = 0; t < tokens; ++t)
        for (int v = 0; v < V; ++v) {
            floats x = widened(numbers + t * stride + v * LANES);
            for (int g = 0; g < G; ++g) s[g][v] += weights[g * TILE + t] * x;
        }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) std::memcpy(sum + g * apart + v * LANES, &s[g][v], sizeof(floats));
}

template <int G, class T>
void add_tokens(const T* numbers, int64_t stride, int64_t channels, int tokens, const float* w, float* sum,
                int64_t apart) {
    constexpr int V = G > 3 ? 2 : 4;
    int64_t c = 0;
    for (; c + V * LANES <= channels; c += V * LANES)
        add_vectors<G, V>(numbers + c, stride, tokens, w, sum + c, apart);
    for (; c < channels; c += LANES) add_vectors<G, 1>(numbers + c, stride, tokens, w, sum + c, apart);
}

// For any number of heads, a few at a time.
template <class F1, class F2, class F3, class F4>
inline void by_heads(int64_t heads, F1 one, F2 two, F3 three, F4 four) {
    for (int64_t g = 0; g < heads;) {
        int64_t left = heads - g;
        if (left >= 4 && left != 6) {
            four(g);
            g += 4;
        } else if (left >= 3) {
            three(g);
            g += 3;
        } else if (left == 2) {
            two(g);
            g += 2;
        } else {
            one(g);
            g += 1;
        }
    }
}

template <class T>
void add_values(const T* numbers, int64_t stride, int64_t channels, int tokens, const float* w, int64_t heads,
                float* sum, int64_t apart) {
    by_heads(
        heads,
        [&](int64_t g) { add_tokens<1>(numbers, stride, channels, tokens, w + g * TILE, sum + g * apart, apart); },
        [&](int64_t g) { add_tokens<2>(numbers, stride, channels, tokens, w + g * TILE, sum + g * apart, apart); },
        [&](int64_t g) { add_tokens<3>(numbers, stride, channels, tokens, w + g * TILE, sum + g * apart, apart); },
        [&](int64_t g) { add_tokens<4>(numbers, stride, channels, tokens, w + g * TILE, sum + g * apart, apart); });
}

void add_logits(const uint8_t* codes, int channels, const float* weights, int64_t heads, float* logits) {
    by_heads(
        heads, [&](int64_t g) { add_channels<1, 4>(codes, channels, weights + g * SIZE, SIZE, logits + g * TILE); },
        [&](int64_t g) { add_channels<2, 4>(codes, channels, weights + g * SIZE, SIZE, logits + g * TILE); },
        [&](int64_t g) { add_channels<3, 4>(codes, channels, weights + g * SIZE, SIZE, logits + g * TILE); },
        [&](int64_t g) { add_channels<4, 2>(codes, channels, weights + g * SIZE, SIZE, logits + g * TILE); });
}

// Widths of the planes of codes of so many bits, the high bits first.
inline int planes_of(int bits, int* widths) {
    if (bits == 3) {
        widths[0] = 2, widths[1] = 1;
        return 2;
    }
    widths[0] = bits;
    return 1;
}

// Where the queries of a row's KV head begin, and what is computed for them: a number of query heads.
int64_t first_query(const Layer& layer, int64_t row, int64_t head) {
    return (row * layer.all_heads + (layer.head_places == nullptr ? head : layer.head_places[head])) * layer.group;
}

// What one thread works with: one row and KV head at a time.
struct Worker {
    const Layer& layer;
    int64_t row, head, heads;
    alignas(64) float q[HEADS][SIZE], turned[HEADS][SIZE], folded[HEADS][SIZE];
    alignas(64) float about[2][HEADS][SIZE];  // of the centre: the weights of cosines and sines
    alignas(64) float logits[HEADS][TILE], weights[HEADS][TILE], scaled[HEADS][TILE];
    alignas(64) uint8_t codes[CHANNELS * TILE];
    alignas(64) uint8_t rows[TILE * SIZE];
    alignas(64) float real[RUN * SIZE];
    alignas(64) float low[TILE], step[TILE];  // of the tokens' ranges
    alignas(64) float near[HEADS][2 * SIZE];  // weights of the fine table at `place`
    float constant[HEADS], offset[HEADS], sums_of[HEADS][SIZE / LANES];  // sums_of: a query's groups
    int64_t place;

    explicit Worker(const Layer& l) : layer(l), row(-1), head(-1), heads(l.group), place(-1) {}

    void start(int64_t r, int64_t h) {
        row = r, head = h, place = -1;
        const int64_t size = layer.size, first = first_query(layer, row, head);
        std::memset(q, 0, sizeof q);
        for (int64_t g = 0; g < heads; ++g)
            for (int64_t d = 0; d < size; ++d)
                q[g][d] = layer.scaling * number(layer.queries, (first + g) * size + d, layer.dtype);
        std::memcpy(turned, q, sizeof q);
        if (layer.of_keys != nullptr)
            for (int64_t g = 0; g < heads; ++g)
                for (int64_t e = 0; e < size; ++e) {
                    float sum = 0;
                    for (int64_t d = 0; d < size; ++d) sum += q[g][d] * layer.of_keys[d * size + e];
                    turned[g][e] = sum;
                }
        if (layer.centre == nullptr) return;
        const float* c = layer.centre + (row * layer.kv_heads + head) * size;
        std::memset(about, 0, sizeof about);
        for (int64_t g = 0; g < heads; ++g) {
            constant[g] = 0;
            for (int64_t i = 0; i < layer.still_count; ++i) constant[g] += q[g][layer.still[i]] * c[layer.still[i]];
            for (int64_t j = 0; j < layer.pairs; ++j) {
                int32_t a = layer.first[j], b = layer.second[j];
                about[0][g][j] = q[g][a] * c[a] + q[g][b] * c[b];
                about[1][g][j] = q[g][a] * c[b] - q[g][b] * c[a];
            }
        }
    }

    // Adds what the keys' centre gives to the logits of some tokens of a tile.
    void add_centre(const int32_t* slots, const int* at, int count) {
        if (layer.centre == nullptr) return;
        const int64_t padded = layer.padded;
        if (layer.pairs == 0) {
            for (int64_t g = 0; g < heads; ++g)
                for (int i = 0; i < count; ++i) logits[g][at[i]] += constant[g];
            return;
        }
        const int32_t* positions = layer.positions + (row * layer.kv_heads + head) * layer.kept;
        for (int i = 0; i < count;) {
            const int64_t interval = positions[slots[i]] / FINE;
            if (interval != place) move(interval);
            const float* fine[8];
            int n = 0;
            for (; n < 8 && i + n < count && positions[slots[i + n]] / FINE == interval; ++n)
                fine[n] = layer.fine + (positions[slots[i + n]] % FINE) * 2 * padded;
            for (int k = n; k < 8; ++k) fine[k] = fine[0];
            for (int64_t g = 0; g < heads; ++g) {
                const floats found = products(fine, near[g], 2 * padded);
                for (int k = 0; k < n; ++k) logits[g][at[i + k]] += found[k] + constant[g];
            }
            i += n;
        }
    }

    void move(int64_t interval) {
        place = interval;
        const int64_t padded = layer.padded;
        const float *cosine = layer.coarse + interval * 2 * padded, *sine = cosine + padded;
        for (int64_t g = 0; g < heads; ++g)
            for (int64_t j = 0; j < padded; ++j) {
                const float a = about[0][g][j], b = about[1][g][j];
                near[g][j] = a * cosine[j] + b * sine[j];
                near[g][padded + j] = b * cosine[j] - a * sine[j];
            }
    }

    // Adds the bits of a plane to eight runs of codes: part m of stretch s of the plane is run `s * parts + m`.
    template <int BITS>
    static inline void add_plane(const uint8_t* from, int64_t eighth, int count, int up, bytes* found) {
        constexpr int STRETCHES = 8 / BITS, PARTS = RUNS / STRETCHES;
        constexpr uint8_t MASK = (1 << BITS) - 1;
        for (int m = 0; m < PARTS; ++m) {
            bytes x{};
            if (count == RUN)
                x = load<bytes>(from + m * eighth);
            else
                std::memcpy(&x, from + m * eighth, count);
            for (int s = 0; s < STRETCHES; ++s) found[s * PARTS + m] |= shifted(shifted(x, s * BITS) & MASK, -up);
        }
    }

    // Codes of one run of sixteen bytes of each plane: eight runs of codes.
    void unpack_channel(const Block& block, int64_t channel, int64_t eighth, int64_t start, int count, uint8_t* out) {
        const int64_t at = head * layer.size + channel;
        const int width = block.width[at];
        bytes found[RUNS];
        for (int k = 0; k < RUNS; ++k) found[k] = bytes{};
        const uint8_t* from[3];
        for (int plane = 0; plane < 3; ++plane)
            from[plane] = block.keys.planes[plane] +
                          (row * block.keys.plane_rows[plane] + block.plane_row[plane][at]) * eighth * (4 >> plane) +
                          start;
        if (width & 4) add_plane<4>(from[0], eighth, count, width & 3, found);
        if (width & 2) add_plane<2>(from[1], eighth, count, width & 1, found);
        if (width & 1) add_plane<1>(from[2], eighth, count, 0, found);
        std::memcpy(out, found, sizeof found);
    }

    // Logits of a tile of keys that are held by channel, without their centre.
    void channel_logits(const Block& block, int64_t eighth, int64_t start, int count) {
        const int64_t size = layer.size;
        for (int64_t g = 0; g < heads; ++g) std::fill_n(logits[g], TILE, -offset[g]);
        for (int64_t c = 0; c < size; c += CHANNELS) {
            int used = 0;
            alignas(64) float w[HEADS][SIZE];
            for (int64_t d = c; d < std::min<int64_t>(size, c + CHANNELS); ++d) {
                if (block.width[head * size + d] == 0) continue;
                unpack_channel(block, d, eighth, start, count, codes + used * TILE);
                for (int64_t g = 0; g < heads; ++g) w[g][used] = folded[g][d];
                ++used;
            }
            add_logits(codes, used, &w[0][0], heads, &logits[0][0]);
        }
        const uint8_t* scale = block.keys.span + (row * layer.kv_heads + head) * block.tokens;
        for (int k = 0; k < RUNS; ++k)
            for (int t = 0; t < RUN; ++t) {
                const int64_t token = k * eighth + start + t;
                step[k * RUN + t] = t < count && token < block.tokens ? tables.scale[scale[token]] : 0;
            }
        for (int64_t g = 0; g < heads; ++g)
            for (int t = 0; t < TILE; t += LANES) {
                const floats x = load<floats>(logits[g] + t) * load<floats>(step + t);
                std::memcpy(logits[g] + t, &x, sizeof x);
            }
    }

    // Makes of the queries what a block's codes are multiplied with.
    void fold(const Block& block) {
        const int64_t size = layer.size;
        if (block.keys.kind == BY_CHANNEL) {  // the steps of the channels, and the middles of their codes
            const float* unit = block.unit + (row * layer.kv_heads + head) * size;
            for (int64_t g = 0; g < heads; ++g) {
                offset[g] = 0;
                for (int64_t d = 0; d < size; ++d) {
                    folded[g][d] = q[g][d] * unit[d];
                    offset[g] += folded[g][d] * static_cast<float>((1 << block.width[head * size + d]) - 1) / 2;
                }
            }
        } else if (block.keys.kind == BY_TOKEN) {  // each group filled up with zeros, and its sum
            const int64_t groups = block.keys.groups, length = size / groups, padded = filled(length);
            for (int64_t g = 0; g < heads; ++g) {
                std::fill_n(folded[g], padded * groups, 0.0f);
                for (int64_t d = 0; d < size; ++d) folded[g][d / length * padded + d % length] = turned[g][d];
                for (int64_t group = 0; group < groups; ++group)
                    sums_of[g][group] =
                        std::accumulate(turned[g] + group * length, turned[g] + (group + 1) * length, 0.0f);
            }
        }
    }

    // A run of tokens as floats, `[count, padded]`.
    void read_raw(const Numbers& from, int64_t token, int count, int64_t size, int64_t padded) {
        const int64_t start = row * from.row_stride + head * from.head_stride + token * size;
        for (int t = 0; t < count; ++t) {
            float* out = real + t * padded;
            if (layer.dtype == FLOAT32)
                std::memcpy(out, static_cast<const float*>(from.raw) + start + t * size, size * sizeof(float));
            else
                for (int64_t d = 0; d < size; ++d) out[d] = number(from.raw, start + t * size + d, layer.dtype);
            for (int64_t d = size; d < padded; ++d) out[d] = 0;
        }
    }

    // The codes of a run of tokens, one byte each, filled up to `padded` channels. Of several groups, each is a whole
    // number of vectors.
    void unpack_run(const Numbers& from, int64_t tokens, int64_t token, int count, int64_t size, int64_t padded,
                    uint8_t* out) {
        int widths[2];
        const int planes = planes_of(from.bits, widths);
        const int64_t stride = padded * from.groups;
        int below = from.bits;
        for (int p = 0; p < planes; ++p) {
            below -= widths[p];
            const int64_t lines = (tokens * widths[p] + 7) / 8;
            const uint8_t* first = from.planes[p] + (row * layer.kv_heads + head) * lines * size;
            int64_t stretch = token / lines, line = token % lines;
            const uint8_t mask = static_cast<uint8_t>((1 << widths[p]) - 1);
            for (int t = 0; t < count;) {
                const int down = static_cast<int>(stretch) * widths[p];
                const uint8_t* here = first + line * size;
                if (stride == size) {  // tokens of one stretch lie side by side, here and there
                    const int n = static_cast<int>(std::min<int64_t>(count - t, lines - line));
                    unpack_line(here, out + t * stride, n * size, down, mask, below, p > 0);
                    t += n, line += n;
                } else {
                    unpack_line(here, out + t * stride, size, down, mask, below, p > 0);
                    ++t, ++line;
                }
                if (line == lines) line = 0, ++stretch;
            }
        }
    }

    static void unpack_line(const uint8_t* from, uint8_t* to, int64_t length, int down, uint8_t mask, int up,
                            bool add) {
        int64_t d = 0;
        for (; d + 32 <= length; d += 32) {
            words x = (load<words>(from + d) >> down & wide(mask)) << up;
            if (add) x |= load<words>(to + d);
            std::memcpy(to + d, &x, sizeof x);
        }
        for (; d < length; ++d) {
            const uint8_t x = static_cast<uint8_t>(((from[d] >> down) & mask) << up);
            to[d] = add ? static_cast<uint8_t>(to[d] | x) : x;
        }
    }

    // Logits of a tile of keys that are held token by token, without their centre.
    void token_logits(const Block& block, const int64_t* token, const int* count, bool dense) {
        const Numbers& keys = block.keys;
        const int64_t size = layer.size;
        for (int64_t g = 0; g < heads; ++g) std::fill_n(logits[g], TILE, 0.0f);
        if (keys.kind == RAW) {
            const int64_t padded = filled(size);
            for (int k = 0; k < RUNS; ++k) {
                read_raw(keys, token[k], count[k], size, padded);
                // What was not packed is as the model made it; what was is rotated in its dtype, too.
                for (int i = 0; i < count[k]; i += 8) add_products(i, padded, dense ? q[0] : turned[0], k * RUN + i);
            }
            return;
        }
        const int64_t padded = filled(size / keys.groups), stride = padded * keys.groups;
        for (int k = 0; k < RUNS; ++k)
            unpack_run(keys, block.tokens, token[k], count[k], size, padded, rows + k * RUN * stride);
        for (int64_t group = 0; group < keys.groups; ++group) {
            for (int k = 0; k < RUNS; ++k)
                ranges(keys, block.tokens, token[k], count[k], group, low + k * RUN, step + k * RUN);
            for (int k = 0; k < RUNS; ++k)
                for (int i = 0; i < count[k]; i += 8) {
                    const int t = k * RUN + i;
                    for (int n = 0; n < 8; ++n)  // floats once for all query heads
                        for (int64_t d = 0; d < padded; d += LANES) {
                            const floats x = widened(rows + (t + n) * stride + group * padded + d);
                            std::memcpy(real + n * padded + d, &x, sizeof x);
                        }
                    add_products(0, padded, folded[0] + group * padded, t, group);
                }
        }
    }

    // Adds the products of eight tokens, which stand in `real` from `first` on, with each query head's weights. Codes,
    // whose group is given, are multiplied in the ranges of their tokens.
    void add_products(int first, int64_t size, const float* with, int t, int64_t group = -1) {
        const float* lines[8];
        for (int n = 0; n < 8; ++n) lines[n] = real + (first + n) * size;
        for (int64_t g = 0; g < heads; ++g) {
            floats found = products(lines, with + g * SIZE, size);
            if (group >= 0) {
                const floats s = load<floats>(step + t);
                found = found * s + (load<floats>(low + t) + 0.5f * s) * sums_of[g][group];
            }
            found += load<floats>(logits[g] + t);
            std::memcpy(logits[g] + t, &found, sizeof found);
        }
    }

    void ranges(const Numbers& from, int64_t tokens, int64_t token, int count, int64_t group, float* low, float* step) {
        const int64_t start = ((row * layer.kv_heads + head) * tokens + token) * from.groups + group;
        const float part = 1.0f / static_cast<float>(1 << from.bits);
        for (int t = 0; t < count; ++t) {
            const float width = tables.width[from.span[start + t * from.groups]];
            low[t] = width * (static_cast<float>(from.zero[start + t * from.groups]) * (-1.0f / 255.0f));
            step[t] = width * part;
        }
    }

    // Adds a tile of values, weighted by `weights`, to `sum`. Weights of what is no token are zero.
    void add_tile(const Block& block, const int64_t* token, const int* count, float* sum, int64_t apart) {
        const Numbers& values = block.values;
        const int64_t size = layer.value_size;
        if (values.kind == RAW) {
            const int64_t padded = filled(size);
            for (int k = 0; k < RUNS; ++k) {
                read_raw(values, token[k], count[k], size, padded);
                add_values(real, padded, padded, count[k], &weights[0][k * RUN], heads, sum, apart);
            }
            return;
        }
        const int64_t length = size / values.groups, padded = filled(length);
        const int64_t stride = padded * values.groups;
        for (int k = 0; k < RUNS; ++k)
            unpack_run(values, block.tokens, token[k], count[k], size, padded, rows + k * RUN * stride);
        for (int64_t group = 0; group < values.groups; ++group) {
            for (int k = 0; k < RUNS; ++k)
                ranges(values, block.tokens, token[k], count[k], group, low + k * RUN, step + k * RUN);
            for (int64_t g = 0; g < heads; ++g) {
                floats shift{};
                for (int t = 0; t < TILE; t += LANES) {
                    const floats w = load<floats>(weights[g] + t), s = load<floats>(step + t) * w;
                    std::memcpy(scaled[g] + t, &s, sizeof s);
                    shift += w * load<floats>(low + t) + 0.5f * s;
                }
                float* of_group = sum + g * apart + group * padded;
                const float total = sum_of(shift);
                for (int64_t d = 0; d < padded; ++d) of_group[d] += total;
            }
            add_values(rows + group * padded, stride, padded, TILE, &scaled[0][0], heads, sum + group * padded, apart);
        }
    }
};

constexpr int64_t APART = SIZE;  // numbers from one head's sums to the next one's

// What one thread found for one part of the tokens of a row and KV head.
struct Partial {
    float most[HEADS], total[HEADS];
    float packed[HEADS][APART], dense[HEADS][APART];
};

int64_t tiles_of(const Block& block) {
    if (block.tokens == 0) return 0;
    if (block.keys.kind != BY_CHANNEL) return (block.tokens + TILE - 1) / TILE;
    return ((block.tokens + 7) / 8 + RUN - 1) / RUN;
}

void attend_tile(Worker& w, const Block& block, int64_t number, int64_t first, bool dense, Partial& out) {
    const Layer& layer = w.layer;
    const bool by_channel = block.keys.kind == BY_CHANNEL;
    const int64_t eighth = (block.tokens + 7) / 8;
    int64_t token[RUNS];
    int count[RUNS], all_count = 0;
    int32_t slots[TILE];
    int at[TILE];
    for (int k = 0; k < RUNS; ++k) {
        token[k] = by_channel ? k * eighth + number * RUN : number * TILE + k * RUN;
        int64_t end = std::min<int64_t>(token[k] + RUN, block.tokens);
        if (by_channel) end = std::min<int64_t>(end, (k + 1) * eighth);
        count[k] = static_cast<int>(std::max<int64_t>(0, end - token[k]));
        for (int t = 0; t < count[k]; ++t, ++all_count) {
            slots[all_count] = static_cast<int32_t>(first + token[k] + t);
            at[all_count] = k * RUN + t;
        }
    }
    if (by_channel) {
        w.channel_logits(block, eighth, number * RUN,
                         static_cast<int>(std::min<int64_t>(RUN, eighth - number * RUN)));
    } else {
        w.token_logits(block, token, count, dense);
    }
    if (!dense) w.add_centre(slots, at, all_count);

    const uint8_t* shown =
        layer.shown == nullptr ? nullptr : layer.shown + w.row * layer.shown_row + w.head * layer.shown_head;
    alignas(64) float held[TILE] = {};
    for (int i = 0; i < all_count; ++i) held[at[i]] = shown == nullptr || shown[slots[i]] ? 1.0f : 0.0f;
    for (int64_t g = 0; g < w.heads; ++g) {
        float* logits = w.logits[g];
        floats highest = all(out.most[g]);
        for (int t = 0; t < TILE; t += LANES) {
            const floats x = load<floats>(held + t) > 0.0f ? load<floats>(logits + t) : all(NOWHERE);
            std::memcpy(logits + t, &x, sizeof x);
            highest = highest > x ? highest : x;
        }
        float most = highest[0];
        for (int l = 1; l < LANES; ++l) most = std::max(most, highest[l]);
        if (most == NOWHERE) {
            std::memset(w.weights[g], 0, sizeof w.weights[g]);
            continue;
        }
        if (most > out.most[g]) {
            const float shrink = out.most[g] == NOWHERE ? 0 : std::exp(out.most[g] - most);
            out.total[g] *= shrink;
            for (int64_t d = 0; d < layer.value_size; ++d) out.packed[g][d] *= shrink, out.dense[g][d] *= shrink;
            out.most[g] = most;
        }
        floats total{};
        for (int t = 0; t < TILE; t += LANES) {
            const floats p = exp_of(load<floats>(logits + t) - most) * load<floats>(held + t);
            total += p;
            std::memcpy(w.weights[g] + t, &p, sizeof p);
        }
        out.total[g] += sum_of(total);
    }
    float* sum = dense ? &out.dense[0][0] : &out.packed[0][0];
    w.add_tile(block, token, count, sum, APART);
}

// Layers, or groups of heads of one layer, that are attended to at once.
struct Job {
    const Layer* const* layers;
    std::vector<int64_t> chunks, first, first_pair;  // of each: parts of a row and KV head; its first item and pair
    std::vector<Partial>* partials;
    std::atomic<int64_t> next{0};
};

int64_t tiles_of(const Layer& layer) {
    int64_t tiles = 0;
    for (int64_t b = 0; b <= layer.blocks; ++b) tiles += tiles_of(layer.block[b]);
    return tiles;
}

// Which layer a number belongs to, by the first number of each.
int64_t layer_of(const std::vector<int64_t>& first, int64_t number) {
    return std::upper_bound(first.begin(), first.end(), number) - first.begin() - 1;
}

void attend_chunk(Worker& worker, Job& job, int64_t number, int64_t item) {
    const Layer& layer = worker.layer;
    const int64_t chunks = job.chunks[number], own = item - job.first[number];
    const int64_t chunk = own % chunks, pair = own / chunks;
    worker.start(pair / layer.kv_heads, pair % layer.kv_heads);
    Partial& out = (*job.partials)[item];
    std::memset(&out, 0, sizeof out);
    std::fill_n(out.most, HEADS, NOWHERE);
    const int64_t tiles = tiles_of(layer), begin = tiles * chunk / chunks, end = tiles * (chunk + 1) / chunks;
    int64_t before = 0, first = 0;
    for (int64_t b = 0; b <= layer.blocks; ++b) {
        const Block& block = layer.block[b];
        const int64_t here = tiles_of(block);
        const int64_t from = std::max<int64_t>(begin - before, 0), to = std::min(end - before, here);
        if (from < to) {
            worker.fold(block);
            for (int64_t tile = from; tile < to; ++tile)
                attend_tile(worker, block, tile, first, b == layer.blocks, out);
        }
        before += here;
        first += block.tokens;
    }
}

// Puts the parts of one row and KV head together, and takes the rotation of what is packed off.
void merge(const Job& job, int64_t item) {
    const int64_t which = layer_of(job.first_pair, item), pair = item - job.first_pair[which];
    const Layer& layer = *job.layers[which];
    const int64_t chunks = job.chunks[which], size = layer.value_size;
    const Partial* parts = job.partials->data() + job.first[which] + pair * chunks;
    for (int64_t g = 0; g < layer.group; ++g) {
        float most = NOWHERE, total = 0;
        for (int64_t c = 0; c < chunks; ++c) most = std::max(most, parts[c].most[g]);
        float packed[SIZE] = {}, sum[SIZE] = {};
        for (int64_t c = 0; c < chunks; ++c) {
            if (parts[c].most[g] == NOWHERE) continue;
            const float part = std::exp(parts[c].most[g] - most);
            total += part * parts[c].total[g];
            for (int64_t d = 0; d < size; ++d) {
                packed[d] += part * parts[c].packed[g][d];
                sum[d] += part * parts[c].dense[g][d];
            }
        }
        if (layer.of_values == nullptr)
            for (int64_t d = 0; d < size; ++d) sum[d] += packed[d];
        else
            for (int64_t d = 0; d < size; ++d)  // the transpose is the inverse
                for (int64_t e = 0; e < size; ++e) sum[d] += packed[e] * layer.of_values[d * size + e];
        const int64_t start = (first_query(layer, pair / layer.kv_heads, pair % layer.kv_heads) + g) * size;
        for (int64_t d = 0; d < size; ++d) put(layer.output, start + d, sum[d] / total, layer.dtype);
    }
}

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t items = static_cast<int64_t>(job.partials->size());
    static thread_local std::vector<char> room;
    room.resize(sizeof(Worker) + 64);
    const auto start = (reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64;
    Worker* worker = nullptr;
    int64_t of = -1;
    for (int64_t item; (item = job.next++) < items;) {
        if (const int64_t number = layer_of(job.first, item); number != of)
            of = number, worker = new (reinterpret_cast<void*>(start)) Worker(*job.layers[number]);
        attend_chunk(*worker, job, of, item);
    }
}

}  // namespace

extern "C" void attend(const Layer* const* layers, int64_t count) {
    static thread_local std::vector<Partial> partials;
    const int64_t threads = std::max<int64_t>(1, layers[0]->threads);
    Job job;
    job.layers = layers, job.partials = &partials;
    int64_t all_tiles = 0, items = 0, pairs = 0, merging = 0;
    for (int64_t i = 0; i < count; ++i) all_tiles += tiles_of(*layers[i]) * layers[i]->rows * layers[i]->kv_heads;
    // Some parts for each thread, of about as many tiles each, so that none waits long for another.
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;
    const int64_t together = std::max<int64_t>(2, (all_tiles + wanted - 1) / wanted);
    for (int64_t i = 0; i < count; ++i) {
        const Layer& layer = *layers[i];
        const int64_t own = layer.rows * layer.kv_heads;
        job.chunks.push_back(std::max<int64_t>(1, (tiles_of(layer) + together - 1) / together));
        job.first.push_back(items), job.first_pair.push_back(pairs);
        items += own * job.chunks.back(), pairs += own;
        merging += own * layer.group * layer.value_size * layer.value_size;
    }
    partials.resize(items);
    run(work, &job, std::min(threads, items));
    for_each(pairs, merging > 200000 ? threads : 1, [&](int64_t item) { merge(job, item); });
}

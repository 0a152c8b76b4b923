// Quantizing and packing. The plain forms, which say what is computed, are in storage/channels.py, quantization.py and
// packing.py. On the border of two cells, a number may fall into the other one here.

#include "cpu.h"

#include <limits>

namespace {

constexpr int SCALES = 5;  // that are tried for a token: as many as `channel_codes` in Python is given

// The nearest whole number from 0 to 255; 0 for what is not a number.
inline int byte_of(float x) {
    x = std::nearbyint(x);
    return x > 0 ? (x < 255 ? static_cast<int>(x) : 255) : 0;
}

inline floats limited(floats x, floats low, floats high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// What some channels have in common: the greatest code, and where codes lie around zero.
struct Top {
    floats last, half, middle;
    explicit Top(floats top) : last(top), half((top + 1.0f) / 2.0f), middle(top / 2.0f) {}

    // The codes of numbers in steps.
    ints levels(floats y) const { return __builtin_convertvector(limited(y + half, all(0), last), ints); }
    // How far these numbers are from their codes.
    floats off(floats y) const { return __builtin_convertvector(levels(y), floats) - middle - y; }
};

// Writes the first `count` of a vector's numbers, which are below 256.
inline void put_bytes(uint8_t* to, ints x, int64_t count) {
    const bytes low = __builtin_convertvector(x, bytes);
    std::memcpy(to, &low, std::min<int64_t>(count, LANES));
}

// What belongs to one row and head: one number for each channel, filled up to whole vectors.
struct Channels {
    std::vector<float> per_unit, cost, used, last, z;
    int64_t size, padded;
    Channels(int64_t n, const float* units, const float* uses, const float* lasts) : size(n), padded(filled(n)) {
        for (auto* each : {&per_unit, &cost, &used, &last, &z}) each->assign(padded, 0);
        for (int64_t d = 0; d < size; ++d) per_unit[d] = 1 / units[d];
        std::copy_n(uses, size, used.data());
        std::copy_n(lasts, size, last.data());
    }

    // Takes in the numbers of a token, in steps (`z`); returns their size.
    float take(const float* from) {
        std::copy_n(from, size, z.data());
        floats squares{};
        for (int64_t d = 0; d < padded; d += LANES) {
            const floats y = load<floats>(&z[d]) * load<floats>(&per_unit[d]);
            squares += y * y * load<floats>(&used[d]);
            store(&z[d], y);
        }
        return std::max(std::sqrt(sum_of(squares)), 1e-6f);
    }
};

// The places of numbers that are not negative, the greatest first, and of equal ones in their order: a radix sort.
std::vector<int32_t> descending(const float* from, int64_t count) {
    constexpr int DIGIT = 11, DIGITS = 1 << DIGIT;
    std::vector<uint32_t> keys(count);
    std::vector<int32_t> order(count), next(count);
    for (int64_t i = 0; i < count; ++i) keys[i] = ~load<uint32_t>(from + i), order[i] = static_cast<int32_t>(i);
    for (int shift = 0; shift < 32; shift += DIGIT) {
        std::vector<int32_t> place(DIGITS + 1, 0);
        for (int64_t i = 0; i < count; ++i) ++place[(keys[i] >> shift) % DIGITS + 1];
        for (int digit = 0; digit < DIGITS; ++digit) place[digit + 1] += place[digit];
        for (int64_t i = 0; i < count; ++i) next[place[(keys[order[i]] >> shift) % DIGITS]++] = order[i];
        order.swap(next);
    }
    return order;
}

// The bits of a plane in codes, and in the bytes of its stretch `s`.
inline Bits packed(int64_t up, int64_t width, int64_t s) {
    return {static_cast<int>(up), static_cast<int>(s * width), static_cast<uint8_t>((1 << width) - 1)};
}

// Eight rows of eight bytes each, in which rows become columns.
inline void transpose(uint64_t (&rows)[8]) {
    constexpr uint64_t MASKS[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
    for (int level = 0, apart = 4; apart > 0; ++level, apart /= 2)
        for (int i = 0; i < 8; ++i)
            if (!(i & apart)) {
                const uint64_t moved = (rows[i] >> 8 * apart ^ rows[i + apart]) & MASKS[level];
                rows[i] ^= moved << 8 * apart;
                rows[i + apart] ^= moved;
            }
}

// Up to `TOGETHER` rows of `size` bytes each, as columns of `to [size, TOGETHER]`.
void turn(const uint8_t* from, uint8_t* to, int64_t rows, int64_t size) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) {
        int64_t d = 0;
        for (; d + 8 <= size; d += 8) {
            uint64_t block[8];
            for (int i = 0; i < 8; ++i) block[i] = load<uint64_t>(from + (row + i) * size + d);
            transpose(block);
            for (int i = 0; i < 8; ++i) store(to + (d + i) * TOGETHER + row, block[i]);
        }
        for (; d < size; ++d)
            for (int i = 0; i < 8; ++i) to[d * TOGETHER + row + i] = from[(row + i) * size + d];
    }
    for (; row < rows; ++row)
        for (int64_t d = 0; d < size; ++d) to[d * TOGETHER + row] = from[row * size + d];
}

}  // namespace

extern "C" {

// Codes [pairs, tokens, size] and codes of scales [pairs, tokens] of keys `x`, likewise; see `channel_codes` in Python.
// unit, cost: [pairs, size]. used, last: [heads, size]. factors: log2 of the scales that are tried.
void channel_codes(const float* x, uint8_t* codes, uint8_t* scales, const float* unit, const float* cost,
                   const float* used, const float* last, const float* factors, float octave, float middle,
                   int64_t pairs, int64_t heads, int64_t tokens, int64_t size, int64_t threads) {
    const int64_t parts = parts_of(tokens);
    for_each(pairs * parts, threads, [=](int64_t item) {
        const int64_t pair = item / parts, head = pair % heads, begin = item % parts * TOGETHER;
        const int64_t end = std::min(begin + TOGETHER, tokens);
        Channels of(size, unit + pair * size, used + head * size, last + head * size);
        std::copy_n(cost + pair * size, size, of.cost.data());
        for (int64_t token = begin; token < end; ++token) {
            const int64_t at = (pair * tokens + token) * size;
            const float base = std::log2(of.take(x + at)), *z = of.z.data();
            int tried[SCALES];
            floats sums[SCALES]{};
            for (int f = 0; f < SCALES; ++f) tried[f] = byte_of(std::nearbyint((base + factors[f]) * octave) + middle);
            for (int64_t d = 0; d < of.padded; d += LANES) {
                const Top top(load<floats>(&of.last[d]));
                const floats cost = load<floats>(&of.cost[d]), steps = load<floats>(z + d);
                for (int f = 0; f < SCALES; ++f) {
                    const floats off = top.off(steps * tables.per_scale[tried[f]]);
                    sums[f] += off * off * cost;
                }
            }
            int best = 0;
            float least = std::numeric_limits<float>::infinity();
            for (int f = 0; f < SCALES; ++f) {
                const float scale = tables.scale[tried[f]], error = sum_of(sums[f]) * (scale * scale);
                if (f == 0 || error < least) least = error, best = tried[f];
            }
            scales[pair * tokens + token] = static_cast<uint8_t>(best);
            for (int64_t d = 0; d < size; d += LANES)
                put_bytes(codes + at + d, Top(load<floats>(&of.last[d])).levels(load<floats>(z + d) * tables.per_scale[best]),
                          size - d);
        }
    });
}

// The squared errors of each channel, in squares of its steps, if its steps were larger by each of some factors: `errors
// [count, pairs, size]`; see `spread_errors` in Python. weight: [pairs, tokens], of which the `whole` greatest are looked
// at, and each `step`-th of the others.
void spread_errors(float* errors, const float* x, const float* weight, const float* unit, const float* used,
                   const float* last, const float* factors, int64_t count, int64_t whole, int64_t step, int64_t pairs,
                   int64_t heads, int64_t tokens, int64_t size, int64_t threads) {
    std::vector<std::vector<int32_t>> orders(pairs);
    for_each(pairs, threads, [&](int64_t pair) { orders[pair] = descending(weight + pair * tokens, tokens); });
    for_each(count * pairs, threads, [&](int64_t item) {
        const int64_t pair = item % pairs, head = pair % heads;
        Channels of(size, unit + pair * size, used + head * size, last + head * size);
        std::vector<float> sums(of.padded, 0);
        for (int64_t rank = 0; rank < tokens; rank += rank < whole ? 1 : step) {
            const int64_t at = pair * tokens + orders[pair][rank];
            const float counts = weight[at] * static_cast<float>(rank < whole ? 1 : step);
            if (counts == 0) continue;
            const float scale = of.take(x + at * size) * factors[item / pairs];
            const float per_scale = 1 / scale, share = counts * scale * scale;
            for (int64_t d = 0; d < of.padded; d += LANES) {
                const floats off = Top(load<floats>(&of.last[d])).off(load<floats>(&of.z[d]) * per_scale);
                const floats sum = load<floats>(&sums[d]) + off * off * share;
                store(&sums[d], sum);
            }
        }
        std::copy_n(sums.data(), size, errors + item * size);
    });
}

// Codes of 8 bits of `x [groups, length]`, with where zero lies and the span of each group.
void range_codes(const float* x, uint8_t* codes, uint8_t* zeros, uint8_t* spans, int64_t groups, int64_t length,
                 int64_t threads) {
    const int64_t parts = parts_of(groups), whole = length / LANES * LANES;
    for_each(parts, threads, [=](int64_t part) {
        for (int64_t g = part * TOGETHER; g < std::min((part + 1) * TOGETHER, groups); ++g) {
            const float* from = x + g * length;
            uint8_t* to = codes + g * length;
            floats lows{}, highs{};  // the span holds zero
            for (int64_t d = 0; d < whole; d += LANES) {
                const floats y = load<floats>(from + d);
                lows = lows < y ? lows : y;
                highs = highs > y ? highs : y;
            }
            float least = 0, most = 0;
            for (int l = 0; l < LANES; ++l) least = std::min(least, lows[l]), most = std::max(most, highs[l]);
            for (int64_t d = whole; d < length; ++d) least = std::min(least, from[d]), most = std::max(most, from[d]);
            const float needed = std::max(most - least, 0x1p-16f) * static_cast<float>(255.0 / 254.0);
            const int span = byte_of(std::ceil(std::log2(needed) * 8) + 128);
            const float width = tables.width[span];
            const int zero = byte_of((width - most - least) / (2 * width) * 255);
            const float low = width * (static_cast<float>(zero) / -255.0f), cells = 256 / width;
            zeros[g] = static_cast<uint8_t>(zero), spans[g] = static_cast<uint8_t>(span);
            const auto cell = [=](floats y) {
                return __builtin_convertvector(limited((y - low) * cells, all(0), all(255)), ints);
            };
            for (int64_t d = 0; d < whole; d += LANES) put_bytes(to + d, cell(load<floats>(from + d)), LANES);
            floats rest{};
            std::copy(from + whole, from + length, reinterpret_cast<float*>(&rest));
            put_bytes(to + whole, cell(rest), length - whole);
        }
    });
}

// A plane [rows, count, length] of the `width` bits above `ups [count]` of some channels of codes [rows, heads, tokens,
// size]. Channels are numbered through all heads, and ascend. Byte j holds the tokens j, j + length, ...
void pack_channels(const uint8_t* codes, uint8_t* plane, const int64_t* channels, const uint8_t* ups, int64_t rows,
                   int64_t heads, int64_t tokens, int64_t size, int64_t count, int64_t width, int64_t length,
                   int64_t threads) {
    const int64_t parts = parts_of(length);
    for_each(rows * heads * parts, threads, [=](int64_t item) {
        const int64_t row = item / parts / heads, head = item / parts % heads, begin = item % parts * TOGETHER;
        const int64_t* first = std::lower_bound(channels, channels + count, head * size);
        const int64_t* last = std::lower_bound(first, channels + count, (head + 1) * size);
        const int64_t held = std::min(TOGETHER, length - begin);
        uint8_t* to = plane + (row * count + (first - channels)) * length + begin;
        for (int64_t n = 0; n < last - first; ++n) std::memset(to + n * length, 0, held);
        std::vector<uint8_t> turned(size * TOGETHER);  // [size, tokens]
        for (int64_t s = 0; s < 8 / width; ++s) {
            const int64_t there = std::min(held, tokens - s * length - begin);
            if (there <= 0) break;
            turn(codes + ((row * heads + head) * tokens + s * length + begin) * size, turned.data(), there, size);
            for (int64_t n = 0; n < last - first; ++n)
                move_bits(&turned[first[n] % size * TOGETHER], to + n * length, there,
                          packed(ups[first - channels + n], width, s), true);
        }
    });
}

// A plane [count, length, size] of the `width` bits above `up` of codes [count, tokens, size].
void pack_tokens(const uint8_t* codes, uint8_t* plane, int64_t count, int64_t tokens, int64_t size, int64_t up,
                 int64_t width, int64_t length, int64_t threads) {
    const int64_t parts = parts_of(length);
    for_each(count * parts, threads, [=](int64_t item) {
        const int64_t n = item / parts, begin = item % parts * TOGETHER, held = std::min(TOGETHER, length - begin);
        uint8_t* to = plane + (n * length + begin) * size;
        std::memset(to, 0, held * size);
        for (int64_t s = 0; s < 8 / width; ++s) {
            const int64_t there = std::min(held, tokens - s * length - begin);
            if (there <= 0) break;
            const uint8_t* from = codes + (n * tokens + s * length + begin) * size;
            move_bits(from, to, there * size, packed(up, width, s), true);
        }
    });
}

}  // extern "C"

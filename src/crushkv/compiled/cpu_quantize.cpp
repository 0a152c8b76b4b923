// Quantizing and packing. The plain forms, which say what is computed, are in storage/channels.py, quantization.py and
// packing.py. On the border of two cells, a number may fall into the other one here.

#include "cpu.h"

#include <limits>

namespace {

// The nearest whole number from 0 to 255; 0 for what is not a number.
inline int byte_of(float x) {
    x = std::nearbyint(x);
    return x > 0 ? (x < 255 ? static_cast<int>(x) : 255) : 0;
}

inline floats limited(floats x, floats low, floats high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// The codes of numbers in steps, of which `top` is the greatest.
inline ints levels(floats y, floats top) {
    return __builtin_convertvector(limited(y + (top + 1.0f) / 2.0f, all(0), top), ints);
}

// What belongs to one row and head: one number for each channel, filled up to whole vectors.
struct Channels {
    std::vector<float> unit, cost, used, last, z;
    int64_t size, padded;
    Channels(int64_t n, const float* units, const float* uses, const float* lasts) : size(n), padded(filled(n)) {
        for (auto* each : {&unit, &cost, &used, &last, &z}) each->assign(padded, 0);
        std::fill(unit.begin(), unit.end(), 1.0f);
        std::copy_n(units, size, unit.data());
        std::copy_n(uses, size, used.data());
        std::copy_n(lasts, size, last.data());
    }

    // Takes in the numbers of a token, in steps (`z`); returns their size.
    float take(const float* from) {
        std::copy_n(from, size, z.data());
        floats squares{};
        for (int64_t d = 0; d < padded; d += LANES) {
            const floats y = load<floats>(&z[d]) / load<floats>(&unit[d]);
            squares += y * y * load<floats>(&used[d]);
            store(&z[d], y);
        }
        return std::max(std::sqrt(sum_of(squares)), 1e-6f);
    }
};

}  // namespace

extern "C" {

// Codes [pairs, tokens, size] and codes of scales [pairs, tokens] of keys `x`, likewise; see `channel_codes` in Python.
// unit, cost: [pairs, size]. used, last: [heads, size]. factors: log2 of the scales that are tried.
void channel_codes(const float* x, uint8_t* codes, uint8_t* scales, const float* unit, const float* cost,
                   const float* used, const float* last, const float* factors, int64_t count, float octave,
                   float middle, int64_t pairs, int64_t heads, int64_t tokens, int64_t size, int64_t threads) {
    const int64_t parts = parts_of(tokens);
    for_each(pairs * parts, threads, [=](int64_t item) {
        const int64_t pair = item / parts, head = pair % heads, begin = item % parts * TOGETHER;
        const int64_t end = std::min(begin + TOGETHER, tokens);
        Channels of(size, unit + pair * size, used + head * size, last + head * size);
        std::copy_n(cost + pair * size, size, of.cost.data());
        for (int64_t token = begin; token < end; ++token) {
            const int64_t at = (pair * tokens + token) * size;
            const float base = std::log2(of.take(x + at)), *z = of.z.data();
            int best = 0;
            float least = std::numeric_limits<float>::infinity();
            for (int64_t f = 0; f < count; ++f) {
                const int code = byte_of(std::nearbyint((base + factors[f]) * octave) + middle);
                const float scale = tables.scale[code];
                floats sum{};
                for (int64_t d = 0; d < of.padded; d += LANES) {
                    const floats y = load<floats>(z + d) / scale, top = load<floats>(&of.last[d]);
                    const floats off = __builtin_convertvector(levels(y, top), floats) - top / 2.0f - y;
                    sum += off * off * load<floats>(&of.cost[d]);
                }
                const float error = sum_of(sum) * (scale * scale);
                if (f == 0 || error < least) least = error, best = code;
            }
            scales[pair * tokens + token] = static_cast<uint8_t>(best);
            for (int64_t d = 0; d < of.padded; d += LANES) {
                const ints level = levels(load<floats>(z + d) / tables.scale[best], load<floats>(&of.last[d]));
                for (int64_t l = 0; l < std::min<int64_t>(LANES, size - d); ++l)
                    codes[at + d + l] = static_cast<uint8_t>(level[l]);
            }
        }
    });
}

// The squared errors of each channel, in squares of its steps, if its steps were larger by each of some factors: `errors
// [count, pairs, size]`; see `spread_errors` in Python. weight: [pairs, tokens].
void spread_errors(float* errors, const float* x, const float* weight, const float* unit, const float* used,
                   const float* last, const float* factors, int64_t count, int64_t pairs, int64_t heads, int64_t tokens,
                   int64_t size, int64_t threads) {
    for_each(count * pairs, threads, [=](int64_t item) {
        const int64_t pair = item % pairs, head = pair % heads;
        Channels of(size, unit + pair * size, used + head * size, last + head * size);
        std::vector<float> sums(of.padded, 0);
        for (int64_t token = 0; token < tokens; ++token) {
            const float counts = weight[pair * tokens + token];
            if (counts == 0) continue;
            const float base = of.take(x + (pair * tokens + token) * size);
            const float scale = base * factors[item / pairs], share = counts * scale * scale;
            for (int64_t d = 0; d < of.padded; d += LANES) {
                const floats y = load<floats>(&of.z[d]) / scale, top = load<floats>(&of.last[d]);
                const floats off = __builtin_convertvector(levels(y, top), floats) - top / 2.0f - y;
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
            for (int64_t d = 0; d < length; ++d) {
                const float cell = (from[d] - low) * cells;
                to[d] = static_cast<uint8_t>(static_cast<int>(cell > 0 ? (cell < 255 ? cell : 255) : 0));
            }
        }
    });
}

// A plane [rows, count, length] of the `width` bits above `ups [count]` of some channels of codes [rows, heads, tokens,
// size]. Channels are numbered through all heads. Byte j holds the tokens j, j + length, ...
void pack_channels(const uint8_t* codes, uint8_t* plane, const int64_t* channels, const uint8_t* ups, int64_t rows,
                   int64_t heads, int64_t tokens, int64_t size, int64_t count, int64_t width, int64_t length,
                   int64_t threads) {
    const int64_t parts = parts_of(length);
    const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
    for_each(rows * parts, threads, [=](int64_t item) {
        const int64_t row = item / parts, begin = item % parts * TOGETHER, end = std::min(begin + TOGETHER, length);
        for (int64_t n = 0; n < count; ++n) {
            const uint8_t* from = codes + (row * heads + channels[n] / size) * tokens * size + channels[n] % size;
            uint8_t* to = plane + (row * count + n) * length;
            std::memset(to + begin, 0, end - begin);
            for (int64_t s = 0; s < 8 / width; ++s)
                for (int64_t j = begin; j < std::min(end, tokens - s * length); ++j)
                    to[j] |= static_cast<uint8_t>((from[(s * length + j) * size] >> ups[n] & mask) << s * width);
        }
    });
}

// A plane [count, length, size] of the `width` bits above `up` of codes [count, tokens, size].
void pack_tokens(const uint8_t* codes, uint8_t* plane, int64_t count, int64_t tokens, int64_t size, int64_t up,
                 int64_t width, int64_t length, int64_t threads) {
    const int64_t parts = parts_of(length);
    const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
    for_each(count * parts, threads, [=](int64_t item) {
        const int64_t n = item / parts, begin = item % parts * TOGETHER;
        for (int64_t j = begin; j < std::min(begin + TOGETHER, length); ++j) {
            uint8_t* to = plane + (n * length + j) * size;
            std::memset(to, 0, size);
            for (int64_t s = 0; s < 8 / width && s * length + j < tokens; ++s) {
                const uint8_t* from = codes + (n * tokens + s * length + j) * size;
                for (int64_t d = 0; d < size; ++d)
                    to[d] |= static_cast<uint8_t>((from[d] >> up & mask) << s * width);
            }
        }
    });
}

}  // extern "C"

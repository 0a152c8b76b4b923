// Keys and values less their centre, and the centre itself. The plain forms are in storage/basis.py and rope.py.

#include "cpu.h"

namespace {

// How channels turn, or not at all: R_p x has x[d] cos(p f[d]) + x[partner[d]] sin(p f[d]) in channel d.
struct Turns {
    const int64_t* partner;      // [size] or null
    const float *coarse, *fine;  // cosines and sines: see `angle_tables` in Python
    int64_t size;

    // Cosines and sines at a position.
    void at(int64_t position, float* cosine, float* sine) const {
        const int64_t padded = filled(size);
        const float *far = coarse + position / INTERVAL * 2 * padded, *near = fine + position % INTERVAL * 2 * padded;
        for (int64_t d = 0; d < padded; ++d) {
            cosine[d] = far[d] * near[d] - far[padded + d] * near[padded + d];
            sine[d] = far[padded + d] * near[d] + far[d] * near[padded + d];
        }
    }
};

// The numbers of a token as float32: where they lie, or written to `room`.
const float* token(const void* x, int64_t at, int64_t size, int32_t dtype, float* room) {
    if (dtype == FLOAT32) return static_cast<const float*>(x) + at;
    widen(x, at, size, dtype, room);
    return room;
}

}  // namespace

extern "C" {

// The tokens `indices [pairs, count]` of `x`, less their centre `[pairs, size]` or null, turned to `positions [pairs,
// count]`: `out [pairs, count, size]`.
void coordinates(const void* x, float* out, const int64_t* indices, const int64_t* positions, const float* centre,
                 const int64_t* partner, const float* coarse, const float* fine, int64_t dtype, int64_t pairs,
                 int64_t heads, int64_t count, int64_t size, int64_t of_row, int64_t of_head, int64_t of_token,
                 int64_t threads) {
    const int64_t parts = parts_of(count);
    const Turns turns{partner, coarse, fine, size};
    for_each(pairs * parts, threads, [=](int64_t item) {
        const int64_t pair = item / parts, begin = item % parts * TOGETHER, padded = filled(size);
        std::vector<float> cosine(padded, 1), sine(padded, 0), own(padded, 0), other(padded, 0), room(padded);
        if (centre != nullptr) std::copy_n(centre + pair * size, size, own.data());
        if (centre != nullptr && partner != nullptr)
            for (int64_t d = 0; d < size; ++d) other[d] = own[partner[d]];
        for (int64_t k = begin; k < std::min(begin + TOGETHER, count); ++k) {
            const int64_t at = pair / heads * of_row + pair % heads * of_head + indices[pair * count + k] * of_token;
            const float* from = token(x, at, size, static_cast<int32_t>(dtype), room.data());
            if (centre != nullptr && partner != nullptr)
                turns.at(positions[pair * count + k], cosine.data(), sine.data());
            float* to = out + (pair * count + k) * size;
            for (int64_t d = 0; d < size; ++d) to[d] = from[d] - (own[d] * cosine[d] + other[d] * sine[d]);
        }
    });
}

// Sums over `TOGETHER` tokens each of `x` before RoPE, at `positions [tokens]`: `out [rows, heads, parts, size]`. Given
// a `centre [rows * heads, size]`, of the squares of what is left without it. `real [rows, tokens]` or null: which
// tokens count.
void sums(const void* x, float* out, const int64_t* positions, const uint8_t* real, const float* centre,
          const int64_t* partner, const float* coarse, const float* fine, int64_t dtype, int64_t rows, int64_t heads,
          int64_t tokens, int64_t size, int64_t of_row, int64_t of_head, int64_t of_token, int64_t threads) {
    const int64_t parts = parts_of(tokens);
    const Turns turns{partner, coarse, fine, size};
    for_each(rows * parts, threads, [=](int64_t item) {
        const int64_t row = item / parts, part = item % parts, begin = part * TOGETHER, padded = filled(size);
        std::vector<float> cosine(padded, 1), sine(padded, 0), other(padded, 0), room(padded);
        std::vector<int32_t> with(size, 0);
        if (partner != nullptr) std::copy_n(partner, size, with.data());
        for (int64_t head = 0; head < heads; ++head)
            std::fill_n(out + ((row * heads + head) * parts + part) * size, size, 0.0f);
        for (int64_t t = begin; t < std::min(begin + TOGETHER, tokens); ++t) {
            if (real != nullptr && !real[row * tokens + t]) continue;
            if (partner != nullptr) turns.at(positions[t], cosine.data(), sine.data());
            for (int64_t head = 0; head < heads; ++head) {
                const int64_t at = row * of_row + head * of_head + t * of_token;
                const float* from = token(x, at, size, static_cast<int32_t>(dtype), room.data());
                for (int64_t d = 0; d < size; ++d) other[d] = from[with[d]];
                float* sum = out + ((row * heads + head) * parts + part) * size;
                const float* away = centre == nullptr ? nullptr : centre + (row * heads + head) * size;
                for (int64_t d = 0; d < size; ++d) {
                    float y = from[d] * cosine[d] - other[d] * sine[d];
                    if (away != nullptr) y = (y - away[d]) * (y - away[d]);
                    sum[d] += y;
                }
            }
        }
    });
}

}  // extern "C"

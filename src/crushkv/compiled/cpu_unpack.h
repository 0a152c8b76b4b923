// Packed codes as bytes.

#pragma once

#include "cpu_attention.h"

namespace {

#if defined(__AVX512BW__)
constexpr int LINE = 64;
#else
constexpr int LINE = 16;  // bytes of several runs in one vector would need shifts of their own
#endif
constexpr int TOGETHER_RUNS = LINE / RUN;
typedef uint16_t line __attribute__((vector_size(LINE)));

// Where the bits of a channel of a KV head's keys lie in the planes of 4, 2 and 1 bits.
struct Channel {
    const uint8_t* from[3];
};

// How far the bits of each run are up in its byte, for a plane of so many bits.
template <int BITS>
struct Shifts {
    alignas(LINE) uint16_t of[RUNS][RUN / 2];
    constexpr Shifts() : of() {
        for (int run = 0; run < RUNS; ++run)
            for (int i = 0; i < RUN / 2; ++i) of[run][i] = static_cast<uint16_t>(run / BITS * BITS);
    }
};

// The bits of the runs `k`, `k + 1`, ... of a plane, as many as a vector holds. A byte has bits of 8 / BITS stretches
// of the tokens, one above the other. A stretch has BITS runs, whose bytes lie `apart`.
template <int BITS>
inline line plane_bits(const uint8_t* from, int64_t apart, int k) {
    constexpr uint16_t MASK = ((1 << BITS) - 1) * 0x0101;
#if defined(__AVX512BW__)
    static constexpr Shifts<BITS> shifts;
    const auto part = [=](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i % BITS * apart)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
    const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    return reinterpret_cast<line>(x) >> load<line>(shifts.of[k]) & (line{} + MASK);
#else
    return load<line>(from + k % BITS * apart) >> (k / BITS * BITS) & (line{} + MASK);
#endif
}

template <int WIDTH>
inline void unpack_bits(const uint8_t* const* from, int64_t apart, uint8_t* out) {
    line found[RUNS / TOGETHER_RUNS];
#pragma GCC unroll 8
    for (int i = 0; i < RUNS / TOGETHER_RUNS; ++i) {
        const int k = i * TOGETHER_RUNS;
        found[i] = line{};
        if (WIDTH & 4) found[i] |= plane_bits<4>(from[0], apart, k) << (WIDTH & 3);
        if (WIDTH & 2) found[i] |= plane_bits<2>(from[1], apart, k) << (WIDTH & 1);
        if (WIDTH & 1) found[i] |= plane_bits<1>(from[2], apart, k);
    }
    std::memcpy(out, found, sizeof found);
}

// The codes of a tile of some channels of one width: of `count` tokens in each of eight runs, whose bytes lie `apart`.
template <int WIDTH>
void unpack_channels(const Channel* channels, int number, int64_t apart, int64_t start, int count, uint8_t* out) {
    for (int i = 0; i < number; ++i, out += TILE) {
        const uint8_t* from[3];
        if (count == RUN) {
            for (int plane = 0; plane < 3; ++plane) {
                from[plane] = channels[i].from[plane] + start;
                for (int part = 0; part < (WIDTH & 4 >> plane); ++part) soon(from[plane] + part * apart + RUN);
            }
            unpack_bits<WIDTH>(from, apart, out);
            continue;
        }
        uint8_t ends[7 * RUN] = {}, *end = ends;  // nothing is read beyond the end
        for (int plane = 0; plane < 3; ++plane) {
            from[plane] = end;
            for (int part = 0; part < (WIDTH & 4 >> plane); ++part, end += RUN)
                std::memcpy(end, channels[i].from[plane] + part * apart + start, count);
        }
        unpack_bits<WIDTH>(from, RUN, out);
    }
}

typedef void (*Unpack)(const Channel*, int, int64_t, int64_t, int, uint8_t*);
constexpr int WIDTHS = 8;
constexpr Unpack UNPACK[WIDTHS] = {nullptr,
                                   unpack_channels<1>,
                                   unpack_channels<2>,
                                   unpack_channels<3>,
                                   unpack_channels<4>,
                                   unpack_channels<5>,
                                   unpack_channels<6>,
                                   unpack_channels<7>};

// The codes of a run of tokens of one row and KV head (`pair`) of `tokens`, one byte each. Each group of channels is
// filled up to whole vectors.
inline void unpack_run(const Numbers& numbers, int64_t pair, int64_t tokens, int64_t token, int count, int64_t size,
                       uint8_t* out) {
    const int64_t groups = numbers.groups, length = size / groups, padded = filled(length), stride = padded * groups;
    int below = numbers.bits;
    for (int plane = 0; below > 0; ++plane) {
        const int bits = numbers.bits == 3 ? 2 - plane : numbers.bits;
        below -= bits;
        const int64_t lines = (tokens * bits + 7) / 8;
        const uint8_t* first = numbers.planes[plane] + pair * lines * size;
        Bits place{0, below, static_cast<uint8_t>((1 << bits) - 1)};
        for (int t = 0; t < count;) {
            const uint32_t at = static_cast<uint32_t>(token + t), line = at % static_cast<uint32_t>(lines);
            place.down = static_cast<int>(at / static_cast<uint32_t>(lines)) * bits;
            const uint8_t* from = first + line * size;
            uint8_t* to = out + t * stride;
            if (stride == size) {  // tokens of one stretch lie side by side, here and there
                const int n = static_cast<int>(std::min<int64_t>(count - t, lines - line));
                move_bits(from, to, n * size, place, plane > 0);
                t += n;
            } else {
                for (int64_t group = 0; group < groups; ++group)
                    move_bits(from + group * length, to + group * padded, length, place, plane > 0);
                ++t;
            }
        }
    }
}

}  // namespace

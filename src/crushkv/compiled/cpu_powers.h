// Powers of e and of 2, several at a time.

#pragma once

#include "cpu.h"

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

// 2 ** ((code - 128) / 2 ** SHIFT), as `tables` has it.
template <int SHIFT>
inline floats powers_of_two(const uint8_t* codes) {
    constexpr int PARTS = 1 << SHIFT;
    const ints code = __builtin_convertvector(widened(codes), ints), whole = code >> SHIFT;
    const floats part = __builtin_convertvector((code & (PARTS - 1)) - PARTS, floats);
    const ints power = (whole + 128 - 128 / PARTS) << 23;
    return exp_of(part * (0.693147181f / PARTS)) * load<floats>(&power);
}

}  // namespace

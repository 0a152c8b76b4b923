// What the compiled code for CPUs shares: vectors, numbers of all dtypes, the bytes of scales, threads.
//
// A library is built for several instruction sets from the same files. Vectors are GCC's (and Clang's) vector types, so
// that next to nothing here names an instruction.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
constexpr int64_t FINE = 32;      // positions of the fine table of angles
constexpr int64_t TOGETHER = 64;  // tokens, groups or bytes that a thread takes at a time
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes8 __attribute__((vector_size(LANES)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef uint16_t words __attribute__((vector_size(32)));

enum Dtype : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline floats widened(const float* from) { return load<floats>(from); }
inline floats widened(const uint8_t* from) {
#if defined(__AVX2__)  // what GCC makes of the line below takes an instruction a lane
    return floats(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
    return __builtin_convertvector(__builtin_convertvector(load<bytes8>(from), ints), floats);
#endif
}

inline int64_t filled(int64_t size) { return (size + LANES - 1) / LANES * LANES; }  // up to whole vectors

inline floats all(float x) { return floats{} + x; }

inline float sum_of(floats x) {
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += x[l];
    return sum;
}

inline float number(const void* from, int64_t at, int32_t dtype) {
    if (dtype == FLOAT32) return static_cast<const float*>(from)[at];
    uint32_t bits = static_cast<const uint16_t*>(from)[at];
    float x;
    if (dtype == BFLOAT16) {
        bits <<= 16;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    if ((bits & 0x7c00u) == 0x7c00u) {
        rest |= 0x7f800000u;  // infinite, or not a number
    } else {
        std::memcpy(&x, &rest, 4);
        x *= 0x1p112f;
        std::memcpy(&rest, &x, 4);
    }
    rest |= sign;
    std::memcpy(&x, &rest, 4);
    return x;
}

inline void put(void* to, int64_t at, float x, int32_t dtype) {
    if (dtype == FLOAT32) {
        static_cast<float*>(to)[at] = x;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half;
    if (x != x) {
        half = 0x7fff;
    } else if (dtype == BFLOAT16) {
        half = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    } else {
        uint32_t sign = (bits >> 16) & 0x8000u;
        float y = std::fabs(x);
        if (y >= 65520.0f) {
            half = static_cast<uint16_t>(sign | 0x7c00u);
        } else if (y < 0x1p-14f) {  // too small for a leading one: adding 1/2 rounds at the place of its last bit
            y += 0.5f;
            std::memcpy(&bits, &y, 4);
            half = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
        } else {
            std::memcpy(&bits, &y, 4);
            bits += 0xfffu + ((bits >> 13) & 1) - (112u << 23);
            half = static_cast<uint16_t>(sign | (bits >> 13));
        }
    }
    static_cast<uint16_t*>(to)[at] = half;
}

// What the bytes of spans and scales stand for; see quantization.py and channels.py.
struct Tables {
    float width[256], scale[256];
    Tables() {
        for (int i = 0; i < 256; ++i) {
            width[i] = std::exp2((i - 128.0f) / 8.0f);
            scale[i] = std::exp2((i - 128.0f) / 16.0f);
        }
    }
};
const Tables tables;

}  // namespace

typedef void (*Work)(void*);
typedef void (*Parallel)(Work, void*, unsigned, unsigned);
inline Parallel parallel = nullptr;  // see `use_parallel`

// Runs `function(data)` on so many threads at once.
inline void run(Work function, void* data, int64_t threads) {
    if (threads <= 1) {
        function(data);
    } else if (parallel != nullptr) {
        parallel(function, data, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(function, data);
        function(data);
        for (auto& other : others) other.join();
    }
}

namespace {

inline int64_t parts_of(int64_t size) { return (size + TOGETHER - 1) / TOGETHER; }

template <class F>
struct Items {
    F each;
    int64_t count;
    std::atomic<int64_t> next{0};
    Items(F f, int64_t n) : each(f), count(n) {}
    static void work(void* data) {
        auto& items = *static_cast<Items*>(data);
        for (int64_t item; (item = items.next++) < items.count;) items.each(item);
    }
};

// Runs `each(item)` for so many items, on several threads.
template <class F>
inline void for_each(int64_t count, int64_t threads, F each) {
    Items<F> items(each, count);
    run(Items<F>::work, &items, std::min(threads, count));
}

}  // namespace

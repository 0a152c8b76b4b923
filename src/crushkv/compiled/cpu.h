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

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bytes are read as words, the lowest first"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int WORDS = 4 * LANES;  // bytes of a vector
constexpr int64_t FILLED = 16;    // numbers of a row are filled up to a multiple of this
constexpr int64_t INTERVAL = 32;  // positions between two of the coarse table of angles
constexpr int64_t TOGETHER = 64;  // tokens, groups or bytes that a thread takes at a time
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint16_t words __attribute__((vector_size(WORDS)));

enum Dtype : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

template <class V, class T>
inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Fetches what the next tile reads. Runs of tokens are too short for a processor to see that coming.
inline void soon(const void* from) { __builtin_prefetch(from); }

// Where some bits stand in a byte, and where they go.
struct Bits {
    int down, up;
    uint8_t mask;
};

// Moves the bits of `length` bytes. `add`: `to` has other bits already.
inline void move_bits(const uint8_t* from, uint8_t* to, int64_t length, Bits bits, bool add) {
    int64_t d = 0;
    const auto [down, up, mask] = bits;
    const words of_two = words{} + static_cast<uint16_t>(mask * 0x0101);
    for (; d + WORDS <= length; d += WORDS) {
        soon(from + d + length);
        words x = (load<words>(from + d) >> down & of_two) << up;
        if (add) x |= load<words>(to + d);
        store(to + d, x);
    }
    for (; d < length; ++d) {
        const uint8_t x = static_cast<uint8_t>((from[d] >> down & mask) << up);
        to[d] = add ? static_cast<uint8_t>(to[d] | x) : x;
    }
}

inline floats widened(const float* from) { return load<floats>(from); }
inline floats widened(const uint8_t* from) {
    // What GCC makes of the last line takes an instruction a lane.
#if defined(__AVX512F__)
    return floats(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__)
    return floats(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__SSE2__)
    const __m128i zero = _mm_setzero_si128(), x = _mm_cvtsi32_si128(load<int32_t>(from));
    return floats(_mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(x, zero), zero)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<bytes>(from), ints), floats);
#endif
}

inline int64_t filled(int64_t size) { return (size + FILLED - 1) / FILLED * FILLED; }

inline floats all(float x) { return floats{} + x; }

// The lanes of a vector in other places: lane l is what was lane `place(l)`.
template <class F>
inline floats placed(floats x, F place) {
#if defined(__clang__)
    floats y;
    for (int l = 0; l < LANES; ++l) y[l] = x[place(l)];
    return y;
#else
    ints places;
    for (int l = 0; l < LANES; ++l) places[l] = place(l);
    return __builtin_shuffle(x, places);
#endif
}

// `merge` of all lanes, of those that lie N apart first.
template <int N, class F>
inline float reduced(floats x, F merge) {
    if constexpr (N == 0)
        return x[0];
    else
        return reduced<N / 2>(merge(x, placed(x, [](int l) { return l ^ N; })), merge);
}

inline float sum_of(floats x) {
    return reduced<LANES / 2>(x, [](floats a, floats b) { return a + b; });
}

inline float greatest_of(floats x) {
    return reduced<LANES / 2>(x, [](floats a, floats b) { return a > b ? a : b; });
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

// So many numbers of any dtype as floats.
inline void widen(const void* from, int64_t at, int64_t count, int32_t dtype, float* to) {
    if (dtype == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + at, count * sizeof(float));
    } else if (dtype == BFLOAT16) {
        const uint16_t* bits = static_cast<const uint16_t*>(from) + at;
        uint32_t* out = reinterpret_cast<uint32_t*>(to);
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint32_t>(bits[i]) << 16;
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = number(from, at + i, dtype);
    }
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
    float width[256], scale[256], per_scale[256];
    Tables() {
        for (int i = 0; i < 256; ++i) {
            width[i] = std::exp2((i - 128.0f) / 8.0f);
            scale[i] = std::exp2((i - 128.0f) / 16.0f);
            per_scale[i] = std::exp2((128.0f - i) / 16.0f);
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

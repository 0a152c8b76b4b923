// Sums of products for several query heads at once.

#pragma once

#include "cpu_attention.h"

namespace {

typedef float eight __attribute__((vector_size(32)));

#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, places{__VA_ARGS__})
#endif

#if defined(__AVX512F__)
typedef floats part_of_row;
inline eight halves_added(floats x) {
    return eight(_mm512_castps512_ps256(__m512(x))) + eight(_mm512_extractf32x8_ps(__m512(x), 1));
}
#else
typedef eight part_of_row;
inline eight halves_added(eight x) { return x; }
#endif

// Sums of the lanes of eight vectors.
inline eight sums_of(const part_of_row* of) {
    eight v[8], pair[4], quad[2];
    for (int i = 0; i < 8; ++i) v[i] = halves_added(of[i]);
    for (int i = 0; i < 4; ++i)
        pair[i] = SHUFFLED(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                  SHUFFLED(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; ++i)
        quad[i] = SHUFFLED(pair[2 * i], pair[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  SHUFFLED(pair[2 * i], pair[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLED(quad[0], quad[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLED(quad[0], quad[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#undef SHUFFLED

inline float product(const float* a, const float* b, int64_t size) {
    floats sum{};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) sum += load<floats>(a + d) * load<floats>(b + d);
    float rest = sum_of(sum);
    for (; d < size; ++d) rest += a[d] * b[d];
    return rest;
}

// Products of eight rows that lie `size` apart with the same vector.
inline eight products(const float* rows, const float* weights, int64_t size) {
    part_of_row v[8] = {};
    for (int64_t d = 0; d < size; d += sizeof v[0] / sizeof(float)) {
        const part_of_row w = load<part_of_row>(weights + d);
        for (int k = 0; k < 8; ++k) v[k] += load<part_of_row>(rows + k * size + d) * w;
    }
    return sums_of(v);
}

// `sum[g][v] += weights[g][i] * numbers[i][v]` for G query heads, V vectors, and `count` rows of numbers. The rows lie
// `stride` apart, and what belongs to a head `of_weights` and `of_sum`.
template <int G, int V, class T>
inline void add_vectors(const T* numbers, int64_t stride, int64_t count, const float* weights, int64_t of_weights,
                        float* sum, int64_t of_sum) {
    floats s[G][V];
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) s[g][v] = load<floats>(sum + g * of_sum + v * LANES);
    for (int64_t i = 0; i < count; ++i)
        for (int v = 0; v < V; ++v) {
            const floats x = widened(numbers + i * stride + v * LANES);
            for (int g = 0; g < G; ++g) s[g][v] += weights[g * of_weights + i] * x;
        }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) store(sum + g * of_sum + v * LANES, s[g][v]);
}

template <int G, class T>
inline void add_rows(const T* numbers, int64_t stride, int64_t count, int64_t length, const float* weights,
                     int64_t of_weights, float* sum, int64_t of_sum) {
    constexpr int V = G < 4 || LANES > 8 ? 4 : 2;  // as many sums as there are registers for
    int64_t at = 0;
    for (; at + V * LANES <= length; at += V * LANES)
        add_vectors<G, V>(numbers + at, stride, count, weights, of_weights, sum + at, of_sum);
    for (; at < length; at += LANES)
        add_vectors<G, 1>(numbers + at, stride, count, weights, of_weights, sum + at, of_sum);
}

// `sum[g][d] += weights[g][i] * numbers[i][d]` for all query heads of a KV head, a few at a time, and `length` numbers
// in each of `count` rows; see `add_vectors`.
template <class T>
void add_products(int64_t heads, const T* numbers, int64_t stride, int64_t count, int64_t length, const float* weights,
                  int64_t of_weights, float* sum, int64_t of_sum) {
    for (int64_t g = 0; g < heads;) {
        const int64_t left = heads - g;
        const float* w = weights + g * of_weights;
        float* s = sum + g * of_sum;
        if (left >= 4 && left != 6) {
            add_rows<4>(numbers, stride, count, length, w, of_weights, s, of_sum);
            g += 4;
        } else if (left >= 3) {
            add_rows<3>(numbers, stride, count, length, w, of_weights, s, of_sum);
            g += 3;
        } else if (left == 2) {
            add_rows<2>(numbers, stride, count, length, w, of_weights, s, of_sum);
            g += 2;
        } else {
            add_rows<1>(numbers, stride, count, length, w, of_weights, s, of_sum);
            g += 1;
        }
    }
}

}  // namespace

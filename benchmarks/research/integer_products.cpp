// Products of packed keys with queries in integers (VNNI), against those in floats that crushkv has.
//
//     g++ -O3 -std=c++17 -ffp-contract=fast -fno-math-errno -Wno-psabi -mfma -mavx512f -mavx512bw -mavx512vl \
//         -mavx512dq -mavx512vnni -I src/crushkv/compiled benchmarks/research/integer_products.cpp -o products && ./products
//
// A tile has 64 channels of 128 tokens, whose codes are bytes in the first cache. Queries have 8 bits, or 16 in two parts.

#include "cpu_products.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>

constexpr int CHANNELS = 64, FOUR = CHANNELS / 4;
alignas(64) uint8_t codes[CHANNELS * TILE], together[CHANNELS * TILE];
alignas(64) float queries[4][SIZE], expected[4][TILE], found[4][TILE];
alignas(64) int32_t parts[2][4][FOUR];  // four channels of a query in each
float unit[4];

template <int G>
void in_floats() {
    std::memset(expected, 0, sizeof expected);
    add_products(G, codes, TILE, CHANNELS, TILE, queries[0], SIZE, expected[0], TILE);
}

// Bytes of four channels side by side, which is what the instruction takes. Of 64 tokens, a vector gets four out of each
// sixteen.
void interleave() {
    for (int q = 0; q < FOUR; ++q)
        for (int t = 0; t < TILE; t += 64) {
            __m512i x[4], low[2], high[2], *to = reinterpret_cast<__m512i*>(together + (q * TILE + t) * 4);
            for (int i = 0; i < 4; ++i) x[i] = _mm512_load_si512(codes + (4 * q + i) * TILE + t);
            for (int i = 0; i < 2; ++i) {
                low[i] = _mm512_unpacklo_epi8(x[2 * i], x[2 * i + 1]);
                high[i] = _mm512_unpackhi_epi8(x[2 * i], x[2 * i + 1]);
            }
            to[0] = _mm512_unpacklo_epi16(low[0], low[1]);
            to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
            to[2] = _mm512_unpacklo_epi16(high[0], high[1]);
            to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
        }
}

template <int G, int PARTS>
void in_integers() {
    constexpr int V = 2;
    interleave();
    for (int t = 0; t < TILE; t += 16 * V) {
        __m512i sum[PARTS][G][V];
        for (auto& part : sum)
            for (auto& head : part)
                for (auto& x : head) x = _mm512_setzero_si512();
        for (int q = 0; q < FOUR; ++q)
            for (int v = 0; v < V; ++v) {
                const __m512i x = _mm512_load_si512(together + (q * TILE + t + 16 * v) * 4);
                for (int p = 0; p < PARTS; ++p)
                    for (int g = 0; g < G; ++g)
                        sum[p][g][v] = _mm512_dpbusd_epi32(sum[p][g][v], x, _mm512_set1_epi32(parts[p][g][q]));
            }
        for (int g = 0; g < G; ++g)
            for (int v = 0; v < V; ++v) {
                __m512 x = _mm512_cvtepi32_ps(sum[0][g][v]);
                if (PARTS == 2) x = x * _mm512_set1_ps(256) + _mm512_cvtepi32_ps(sum[1][g][v]);
                x = x * _mm512_set1_ps(unit[g]);
                float* to = found[g] + t / 64 * 64 + t % 64 / 4 + 4 * v;  // back into the order of the text
                _mm_store_ps(to, _mm512_extractf32x4_ps(x, 0));
                _mm_store_ps(to + 16, _mm512_extractf32x4_ps(x, 1));
                _mm_store_ps(to + 32, _mm512_extractf32x4_ps(x, 2));
                _mm_store_ps(to + 48, _mm512_extractf32x4_ps(x, 3));
            }
    }
}

template <class F>
double nanoseconds(F run) {
    double least = 1e9;
    for (int round = 0; round < 300; ++round) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 100; ++i) {
            run();
            asm volatile("" ::: "memory");
        }
        const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
        least = std::min(least, taken.count() / 100);
    }
    return least;
}

template <int G, int PARTS>
void compare() {
    for (int g = 0; g < G; ++g) {
        float most = 0;
        for (int c = 0; c < CHANNELS; ++c) most = std::max(most, std::fabs(queries[g][c]));
        unit[g] = most / (PARTS == 2 ? 32600.0f : 127.0f);
        for (int c = 0; c < CHANNELS; ++c) {
            const int whole = static_cast<int>(std::lrint(queries[g][c] / unit[g]));
            const int low = static_cast<int8_t>(whole & 255);
            auto of = [&](int p) { return reinterpret_cast<int8_t*>(parts[p][g]) + c; };
            *of(PARTS - 1) = static_cast<int8_t>(low);
            if (PARTS == 2) *of(0) = static_cast<int8_t>((whole - low) >> 8);
        }
    }
    const double floats = nanoseconds(in_floats<G>), integers = nanoseconds(in_integers<G, PARTS>);
    double off = 0, all = 0;
    for (int g = 0; g < G; ++g)
        for (int t = 0; t < TILE; ++t) {
            off += std::pow(expected[g][t] - found[g][t], 2);
            all += std::pow(expected[g][t], 2);
        }
    std::printf("%d query heads, %2d bits: %3.0f ns in floats, %3.0f ns in integers, relative error %.0e\n", G, 8 * PARTS,
                floats, integers, std::sqrt(off / all));
}

int main() {
    std::srand(1);
    for (auto& code : codes) code = static_cast<uint8_t>(std::rand() % 64);
    for (auto& query : queries)
        for (auto& x : query) x = static_cast<float>(std::rand() % 2001 - 1000) / 1000;
    compare<1, 1>(), compare<1, 2>();
    compare<3, 1>(), compare<3, 2>();
    compare<4, 1>(), compare<4, 2>();
}

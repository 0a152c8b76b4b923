// What the keys' centre gives to the logits: q · R_p c, which depends on a token's position alone.

#pragma once

#include "cpu_products.h"

namespace {

constexpr int64_t HALF = INTERVAL / 2;

// Of one row and KV head at a time. All positions of an interval are computed at once, since pages have most of them.
// Seen from its middle, they lie at -δ and δ: the cosines are the same and the sines opposite, so that half of the
// products are enough. Tokens of a run lie close together in the text, so each run keeps what was found for its last
// interval.
class Centre {
    static constexpr int AT_ONCE = LANES / 2;       // rows of sums that there are registers for
    static constexpr int64_t APART = SIZE + LANES;  // from row to row of weights: not the same lines of the cache

    const Layer& layer;
    const int32_t* positions;
    float constant[HEADS];                        // of the channels that are not turned
    alignas(64) float about[2][HEADS][SIZE / 2];  // weights of cosines and sines
    int64_t interval[RUNS];
    alignas(64) float found[RUNS][HEADS][INTERVAL + RUN];  // what is behind has no meaning
    // Of the intervals that are new: the weights as seen from their middles, and what cosines and sines give.
    alignas(64) float near[RUNS * HEADS + AT_ONCE][APART];
    alignas(64) float even[RUNS * HEADS + AT_ONCE][HALF], odd[RUNS * HEADS + AT_ONCE][HALF];
    float* target[RUNS * HEADS];

   public:
    alignas(64) float logits[HEADS][RUNS][2 * RUN];  // of each run the first half

    explicit Centre(const Layer& l) : layer(l) {}

    // queries: [heads][SIZE], scaled.
    void start(int64_t row, int64_t head, const float* queries) {
        if (layer.centre == nullptr) return;
        const int64_t pair = row * layer.kv_heads + head;
        const float* c = layer.centre + pair * layer.size;
        positions = layer.positions + pair * layer.kept;
        std::fill_n(interval, RUNS, -1);
        for (int64_t g = 0; g < layer.group; ++g, queries += SIZE) {
            constant[g] = 0;
            for (int64_t i = 0; i < layer.still_count; ++i) constant[g] += queries[layer.still[i]] * c[layer.still[i]];
            std::fill_n(about[0][g], layer.padded, 0.0f);
            std::fill_n(about[1][g], layer.padded, 0.0f);
            for (int64_t j = 0; j < layer.pairs; ++j) {
                const int32_t a = layer.first[j], b = layer.second[j];
                about[0][g][j] = queries[a] * c[a] + queries[b] * c[b];
                about[1][g][j] = queries[a] * c[b] - queries[b] * c[a];
            }
            if (layer.pairs == 0) std::fill_n(logits[g][0], sizeof logits[g] / sizeof(float), constant[g]);
        }
    }

    // Finds `logits` of a tile: of `count` tokens in each run, from the slots `token` on.
    void find(const int64_t* token, const int* count) {
        if (layer.pairs == 0) return;
        int done[RUNS] = {};
        for (int run = 0; run < RUNS; ++run) soon(positions + token[run] + RUN);
        for (bool more = true; more;) {  // a stretch of each run, within one interval
            int64_t rows = 0;
            for (int run = 0; run < RUNS; ++run)
                if (done[run] < count[run]) rows += turned(positions[token[run] + done[run]] / INTERVAL, run, rows);
            take(rows);
            more = false;
            for (int run = 0; run < RUNS; ++run)
                if (done[run] < count[run]) {
                    done[run] += put(positions + token[run] + done[run], run, done[run], count[run] - done[run]);
                    more |= done[run] < count[run];
                }
        }
    }

   private:
    // Goes to an interval, if that is not where the run is; returns how many rows of weights that makes.
    int64_t turned(int64_t place, int run, int64_t row) {
        if (interval[run] == place) return 0;
        interval[run] = place;
        const int64_t padded = layer.padded;
        const float *cosine = layer.middle + place * 2 * padded, *sine = cosine + padded;
        for (int64_t g = 0; g < layer.group; ++g, ++row) {
            for (int64_t j = 0; j < padded; j += LANES) {
                const floats a = load<floats>(about[0][g] + j), b = load<floats>(about[1][g] + j);
                const floats c = load<floats>(cosine + j), s = load<floats>(sine + j);
                store(near[row] + j, a * c + b * s);
                store(near[row] + padded + j, b * c - a * s);
            }
            std::fill_n(even[row], HALF, constant[g]);
            std::fill_n(odd[row], HALF, 0.0f);
            target[row] = found[run][g];
        }
        return layer.group;
    }

    void take(int64_t rows) {
        const int64_t padded = layer.padded;
        const float* sines = layer.beside + padded * HALF;
        for (int64_t row = 0; row < rows; row += AT_ONCE) {
            add_vectors<AT_ONCE, HALF / LANES>(layer.beside, HALF, padded, near[row], APART, even[row], HALF);
            add_vectors<AT_ONCE, HALF / LANES>(sines, HALF, padded, near[row] + padded, APART, odd[row], HALF);
        }
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < HALF; i += LANES) {
                const floats a = load<floats>(even[row] + i), b = load<floats>(odd[row] + i);
                store(target[row] + HALF + i, a + b);
                store(target[row] + HALF - LANES - i, placed(a - b, [](int l) { return LANES - 1 - l; }));
            }
    }

    // Writes the logits of the tokens of a run that lie one after the other in its interval; returns how many.
    int put(const int32_t* at, int run, int token, int most) {
        const int64_t offset = *at % INTERVAL;
        for (int64_t g = 0; g < layer.group; ++g)  // those behind them are written over
            std::memcpy(logits[g][run] + token, found[run][g] + offset, RUN * sizeof(float));
        int n = 1;
        for (most = std::min<int>(most, INTERVAL - offset); n < most && at[n] == at[0] + n; ++n) {}
        return n;
    }
};

}  // namespace

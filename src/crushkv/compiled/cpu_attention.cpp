// Attention of one token a row over the tokens of a layer, read as they are packed, tile by tile.

#include "cpu_tile.h"

#include <limits>

namespace {

constexpr float NOWHERE = -std::numeric_limits<float>::infinity();

// What one thread found for one part of the tokens of a row and KV head.
struct Partial {
    float most[HEADS], total[HEADS];
    float packed[HEADS][SIZE], dense[HEADS][SIZE];

    void clear(int64_t heads) {
        std::fill_n(most, heads, NOWHERE);
        std::fill_n(total, heads, 0.0f);
        std::memset(packed, 0, sizeof packed[0] * heads);
        std::memset(dense, 0, sizeof dense[0] * heads);
    }
};

int64_t tiles_of(const Block& block) {
    if (block.tokens == 0) return 0;
    if (block.keys.kind != BY_CHANNEL) return (block.tokens + TILE - 1) / TILE;
    return ((block.tokens + 7) / 8 + RUN - 1) / RUN;
}

void attend_tile(Worker& w, const Block& block, int64_t number, int64_t first, bool dense, Partial& out) {
    const Layer& layer = w.layer;
    const bool by_channel = block.keys.kind == BY_CHANNEL;
    const int64_t eighth = (block.tokens + 7) / 8;
    int64_t token[RUNS], slot[RUNS];
    int count[RUNS];
    bool full = layer.shown == nullptr;
    for (int k = 0; k < RUNS; ++k) {
        token[k] = by_channel ? k * eighth + number * RUN : number * TILE + k * RUN;
        const int64_t end = by_channel ? std::min((k + 1) * eighth, block.tokens) : block.tokens;
        count[k] = static_cast<int>(std::clamp<int64_t>(end - token[k], 0, RUN));
        slot[k] = first + token[k];
        full &= count[k] == RUN;
    }
    if (by_channel)
        w.channel_logits(block, token, count);
    else
        w.token_logits(block, token, count, dense);
    const bool centred = !dense && layer.centre != nullptr;
    if (centred) w.centre.find(slot, count);

    alignas(64) float held[TILE];
    if (!full) {
        const uint8_t* shown =
            layer.shown == nullptr ? nullptr : layer.shown + w.row * layer.shown_row + w.head * layer.shown_head;
        for (int t = 0; t < TILE; ++t)
            held[t] = t % RUN < count[t / RUN] && (shown == nullptr || shown[slot[t / RUN] + t % RUN]) ? 1.0f : 0.0f;
    }
    for (int64_t g = 0; g < w.heads; ++g) {
        float* logits = w.logits[g];
        floats highest = all(out.most[g]);
        for (int t = 0; t < TILE; t += LANES) {
            floats x = load<floats>(logits + t);
            if (centred) x += load<floats>(w.centre.logits[g][t / RUN] + t % RUN);
            if (!full) x = load<floats>(held + t) > 0.0f ? x : all(NOWHERE);
            store(logits + t, x);
            highest = highest > x ? highest : x;
        }
        const float most = greatest_of(highest);
        if (most == NOWHERE) {
            std::fill_n(w.weights[g], TILE, 0.0f);
            continue;
        }
        if (most > out.most[g]) {
            const float shrink = out.most[g] == NOWHERE ? 0 : std::exp(out.most[g] - most);
            out.total[g] *= shrink;
            for (int64_t d = 0; d < layer.value_size; ++d) out.packed[g][d] *= shrink, out.dense[g][d] *= shrink;
            out.most[g] = most;
        }
        floats total{};
        for (int t = 0; t < TILE; t += LANES) {
            floats p = exp_of(load<floats>(logits + t) - most);
            if (!full) p *= load<floats>(held + t);
            total += p;
            store(w.weights[g] + t, p);
        }
        out.total[g] += sum_of(total);
    }
    w.add_tile(block, token, count, dense ? out.dense : out.packed);
}

// Layers, or groups of heads of one layer, that are attended to at once.
struct Job {
    const Layer* const* layers;
    std::vector<int64_t> chunks, first, first_pair;  // of each: parts of a row and KV head; its first item and pair
    std::vector<Partial>* partials;
    std::atomic<int64_t> next{0};
};

int64_t tiles_of(const Layer& layer) {
    int64_t tiles = 0;
    for (int64_t b = 0; b <= layer.blocks; ++b) tiles += tiles_of(layer.block[b]);
    return tiles;
}

// Which layer a number belongs to, by the first number of each.
int64_t layer_of(const std::vector<int64_t>& first, int64_t number) {
    return std::upper_bound(first.begin(), first.end(), number) - first.begin() - 1;
}

void attend_chunk(Worker& worker, Job& job, int64_t number, int64_t item) {
    const Layer& layer = worker.layer;
    const int64_t chunks = job.chunks[number], own = item - job.first[number];
    const int64_t chunk = own % chunks, pair = own / chunks;
    worker.start(pair / layer.kv_heads, pair % layer.kv_heads);
    Partial& out = (*job.partials)[item];
    out.clear(layer.group);
    const int64_t tiles = tiles_of(layer), begin = tiles * chunk / chunks, end = tiles * (chunk + 1) / chunks;
    int64_t before = 0, first = 0;
    for (int64_t b = 0; b <= layer.blocks; ++b) {
        const Block& block = layer.block[b];
        const int64_t here = tiles_of(block);
        const int64_t from = std::max<int64_t>(begin - before, 0), to = std::min(end - before, here);
        if (from < to) {
            worker.fold(block);
            for (int64_t tile = from; tile < to; ++tile)
                attend_tile(worker, block, tile, first, b == layer.blocks, out);
        }
        before += here;
        first += block.tokens;
    }
}

// Puts the parts of one row and KV head together, and takes the rotation of what is packed off.
void merge(const Job& job, int64_t item) {
    const int64_t which = layer_of(job.first_pair, item), pair = item - job.first_pair[which];
    const Layer& layer = *job.layers[which];
    const int64_t chunks = job.chunks[which], size = layer.value_size;
    const Partial* parts = job.partials->data() + job.first[which] + pair * chunks;
    for (int64_t g = 0; g < layer.group; ++g) {
        float most = NOWHERE, total = 0;
        for (int64_t c = 0; c < chunks; ++c) most = std::max(most, parts[c].most[g]);
        float packed[SIZE] = {}, sum[SIZE] = {};
        for (int64_t c = 0; c < chunks; ++c) {
            if (parts[c].most[g] == NOWHERE) continue;
            const float part = std::exp(parts[c].most[g] - most);
            total += part * parts[c].total[g];
            for (int64_t d = 0; d < size; ++d) {
                packed[d] += part * parts[c].packed[g][d];
                sum[d] += part * parts[c].dense[g][d];
            }
        }
        if (layer.of_values == nullptr)
            for (int64_t d = 0; d < size; ++d) sum[d] += packed[d];
        else
            for (int64_t d = 0; d < size; ++d)  // the transpose is the inverse
                sum[d] += product(packed, layer.of_values + d * size, size);
        const int64_t start = (first_query(layer, pair / layer.kv_heads, pair % layer.kv_heads) + g) * size;
        for (int64_t d = 0; d < size; ++d) put(layer.output, start + d, sum[d] / total, layer.dtype);
    }
}

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    const int64_t items = static_cast<int64_t>(job.partials->size());
    static thread_local std::vector<char> room;
    room.resize(sizeof(Worker) + 64);
    const auto start = (reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64;
    Worker* worker = nullptr;
    int64_t of = -1;
    for (int64_t item; (item = job.next++) < items;) {
        if (const int64_t number = layer_of(job.first, item); number != of)
            of = number, worker = new (reinterpret_cast<void*>(start)) Worker(*job.layers[number]);
        attend_chunk(*worker, job, of, item);
    }
}

// Writes a token's numbers as the model made them, which stand at a place in `x`.
void put(const Numbers& held, int32_t dtype, int64_t size, int64_t row, int64_t head, int64_t token, const void* x,
         int64_t place) {
    const int64_t bytes = dtype == FLOAT32 ? 4 : 2;
    const int64_t at = row * held.row_stride + head * held.head_stride + token * size;
    std::memcpy(static_cast<uint8_t*>(held.raw) + at * bytes, static_cast<const uint8_t*>(x) + place * bytes,
                size * bytes);
}

}  // namespace

extern "C" {

int64_t size_of_layer() { return sizeof(Layer); }
int64_t size_of_block() { return sizeof(Block); }

// Writes a new token's keys or values `[B, all_heads, size]` behind what is not packed, of `count` groups of heads of one
// layer.
void append(const Layer* const* layers, int64_t count, const void* keys, int64_t key_row, int64_t key_head,
            const void* values, int64_t value_row, int64_t value_head) {
    for (int64_t i = 0; i < count; ++i) {
        const Layer& layer = *layers[i];
        const Block& came = layer.block[layer.blocks];
        for (int64_t row = 0; row < layer.rows; ++row)
            for (int64_t head = 0; head < layer.kv_heads; ++head) {
                const int64_t place = layer.head_places ? layer.head_places[head] : head;
                put(came.keys, layer.dtype, layer.size, row, head, came.tokens, keys, row * key_row + place * key_head);
                put(came.values, layer.dtype, layer.value_size, row, head, came.tokens, values,
                    row * value_row + place * value_head);
            }
    }
}

// Attends to the tokens of `count` layers, or groups of heads of one layer, at once.
void attend(const Layer* const* layers, int64_t count) {
    static thread_local std::vector<Partial> partials;
    const int64_t threads = std::max<int64_t>(1, layers[0]->threads);
    Job job;
    job.layers = layers, job.partials = &partials;
    int64_t all_tiles = 0, items = 0, pairs = 0, merging = 0;
    for (int64_t i = 0; i < count; ++i) all_tiles += tiles_of(*layers[i]) * layers[i]->rows * layers[i]->kv_heads;
    // Some parts for each thread, of about as many tiles each, so that none waits long for another.
    const int64_t wanted = threads == 1 ? 1 : 4 * threads;
    const int64_t together = std::max<int64_t>(2, (all_tiles + wanted - 1) / wanted);
    for (int64_t i = 0; i < count; ++i) {
        const Layer& layer = *layers[i];
        const int64_t own = layer.rows * layer.kv_heads;
        job.chunks.push_back(std::max<int64_t>(1, (tiles_of(layer) + together - 1) / together));
        job.first.push_back(items), job.first_pair.push_back(pairs);
        items += own * job.chunks.back(), pairs += own;
        merging += own * layer.group * layer.value_size * layer.value_size;
    }
    partials.resize(items);
    run(work, &job, std::min(threads, items));
    for_each(pairs, merging > 200000 ? threads : 1, [&](int64_t item) { merge(job, item); });
}

}  // extern "C"

// Runs the CPU step on a small random model and prints the logits, for each kind of weights: what test_cpu_neon.py
// compares between a build for this machine and one for another, run by an emulator.

#include "step.cpp"

#include <cstdio>
#include <random>

using namespace pw;

constexpr int HIDDEN = 64, INNER = 96, HEADS = 4, KV_HEADS = 2, DIM = 16, VOCAB = 96, LAYERS = 2, BLOCKS = 16, ROWS_IN = 40;

static std::mt19937 numbers(7);

static float random_float(float spread) { return spread * (float(numbers() % 20001) / 10000.0f - 1.0f); }

static std::vector<std::vector<char>> kept;

template <class T>
static T* keep(size_t count) {
    kept.emplace_back(count * sizeof(T) + 64);
    return (T*)((uintptr_t(kept.back().data()) + 63) / 64 * 64);
}

static Linear linear(int kind, int n, int k, int half) {
    const int packed_n = half ? 2 * half : (n + 31) / 32 * 32, group = kind >= INT8_GROUPED ? 32 : 0;
    std::vector<float> w(size_t(n) * k);
    for (float& x : w) x = random_float(2.0f / std::sqrt(float(k)));
    Linear l = {kind, packed_n, k, group, keep<uint8_t>(size_t(packed_n) * k * 4), nullptr, nullptr, nullptr};
    if (kind == F32) {
        pw_pack_f32(w.data(), n, k, packed_n, k, half, (float*)l.weight);
    } else if (kind == BF16) {
        std::vector<uint16_t> b(w.size());
        for (size_t i = 0; i < w.size(); i++) b[i] = float_to_bf16(w[i]);
        pw_pack_bf16(b.data(), n, k, packed_n, k, half, (uint16_t*)l.weight);
    } else {
        const float most = kind == INT4 ? 7.0f : 127.0f, scale = 2.0f / std::sqrt(float(k)) / most;
        std::vector<int8_t> q(w.size());
        for (size_t i = 0; i < w.size(); i++) q[i] = int8_t(std::nearbyint(w[i] / scale));
        const int groups = group ? k / group : 1;
        std::vector<float> scales(size_t(n) * groups, scale);
        l.scales = keep<float>(size_t(packed_n) * groups);
        l.sums = keep<int32_t>(size_t(packed_n) * groups);
        if (kind == INT4) pw_pack_int4(q.data(), scales.data(), n, k, packed_n, k, half, group, (uint8_t*)l.weight, (float*)l.scales);
        else pw_pack_int8(q.data(), scales.data(), n, k, packed_n, k, half, group, (int8_t*)l.weight, (float*)l.scales, (int32_t*)l.sums);
    }
    return l;
}

static float* ones(int n) {
    float* p = keep<float>(n);
    for (int i = 0; i < n; i++) p[i] = 1.0f + random_float(0.1f);
    return p;
}

int main() {
    for (int kind : {F32, BF16, INT8, INT8_GROUPED, INT4}) {
        numbers.seed(7);
        const bool half = kind == BF16;
        std::vector<Layer> layers;
        for (int i = 0; i < LAYERS; i++)
            layers.push_back({ones(HIDDEN), ones(HIDDEN), ones(DIM), ones(DIM), linear(kind, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 0),
                              linear(kind, HIDDEN, HEADS * DIM, 0), linear(kind, 2 * INNER, HIDDEN, INNER), linear(kind, HIDDEN, INNER, 0), i ? 24 : 0});
        Model m = {HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS, VOCAB, 16, BLOCKS, half, 1e-5f, 0.25f, nullptr, nullptr, ones(HIDDEN), linear(kind, VOCAB, HIDDEN, 0), layers.data(), nullptr, {0, 1, nullptr}};
        float* embedding = keep<float>(VOCAB * HIDDEN);
        for (int i = 0; i < VOCAB * HIDDEN; i++) {
            const float x = random_float(1.0f);
            if (half) ((uint16_t*)embedding)[i] = float_to_bf16(x);
            else embedding[i] = x;
        }
        float* cos_sin = keep<float>(64 * DIM);
        for (int p = 0; p < 64; p++)
            for (int i = 0; i < DIM / 2; i++) {
                const float angle = float(p) * std::pow(10000.0f, -2.0f * float(i) / DIM);
                cos_sin[p * DIM + i] = std::cos(angle), cos_sin[p * DIM + DIM / 2 + i] = std::sin(angle);
            }
        m.embedding = embedding, m.cos_sin = cos_sin, m.cache = keep<float>(size_t(LAYERS) * 2 * BLOCKS * KV_HEADS * 16 * DIM);
        std::fill_n((uint32_t*)m.cache, size_t(LAYERS) * 2 * BLOCKS * KV_HEADS * 16 * DIM, 0x7fc07fc0u);  // NaN in either type
        Cores cores(2, nullptr, 0, nullptr);
        Runner runner(cores, 0);
        const int32_t tables[] = {3, 9, 1, 0, 7, 2, 5, 4}, seats[] = {0, 1}, chunks[][2] = {{ROWS_IN - 5, 5}, {1, 1}};
        int32_t done[] = {0, 0};
        for (auto& chunk : chunks) {
            std::vector<int32_t> ids, starts = {0}, lengths, from;
            for (int s = 0; s < 2; s++) {
                for (int i = 0; i < chunk[s]; i++) ids.push_back((17 * (done[s] + i) + 5 * s) % VOCAB);
                done[s] += chunk[s];
                starts.push_back(int32_t(ids.size())), lengths.push_back(done[s]), from.push_back(int32_t(ids.size()) - 1);
            }
            const Choice choices[2] = {};
            const uint8_t raw[] = {1, 0};
            int32_t tokens[2];
            std::vector<float> logits(2 * VOCAB);
            Batch b = {int32_t(ids.size()), 2, 2, ids.data(), starts.data(), lengths.data(), tables, seats, 4, from.data(), choices, raw, nullptr, tokens, logits.data(), nullptr, nullptr};
            pw_step(&runner, &m, &b);
            std::printf("%d", tokens[1]);
            for (int i = 0; i < VOCAB; i++) std::printf(" %.6g", double(logits[i]));
            std::printf("\n");
        }
    }
}

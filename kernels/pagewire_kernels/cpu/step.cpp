// One step of a dense decoder in one call: any mix of decoding rows and prompt chunks, from token ids to chosen tokens.
//
// The residual stream is float32; what a linear layer reads is in the form of its weights. Phases of a layer, with
// one meeting of the threads after each: qkv, rotary + KV write, attention, o, gate/up, down. Norms are part of the
// phase before or, for few rows, done by every thread for itself.

#include <algorithm>
#include <memory>

#include "attention.h"
#include "rows.h"
#include "sampling.h"
#include "threads.h"

namespace pw {

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null unless the model has them
    Linear qkv, o, gate_up, down;
    int32_t window;  // 0: none
};

struct Model {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, layers, vocab, block_size;
    int64_t num_blocks;
    int32_t half;  // whether KV and activations are bf16, not float32
    float eps, scale;
    const void* embedding;  // [vocab][hidden] in the type that `half` says
    const float* cos_sin;   // [positions][head_dim]
    const float* norm;
    Linear head;
    const Layer* layer;
    void* cache;
};

struct Batch {
    int32_t num_rows, num_sequences, num_samples;
    const int32_t *input_ids, *query_start, *seq_lens, *tables, *seats;
    int64_t table_stride;
    const int32_t* sample_from;
    const Choice* choices;     // [samples]
    const uint8_t* raw;        // [samples], 1: the row's logits are wanted, no token
    const uint32_t* mask;      // [samples][ceil(vocab / 32)] allowed tokens, or null; raw rows stay as they are
    int32_t* tokens;           // [samples], -1 where no logit is a number
    float* logits;             // [samples][vocab rounded up to 32], written where raw or temperature > 0
};

constexpr int64_t FETCH_EARLY = 32 << 10;
constexpr int FEW_ROWS = 4;  // up to so many, every thread does the norms for itself

struct Best {
    float value;
    int32_t token;
};

struct Query {  // one piece of attention: some flattened query rows of one sequence
    int32_t sequence, first, count;
};

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Runner {
   public:
    // small_step: see is_small.
    // The threads divide the cores; without cores they go where the system puts them.
    Runner(int threads, const int32_t* cores, int num_cores, int64_t small_step)
        : threads_(threads), cores_(cores, cores + num_cores), small_step_(small_step) {
        if (num_cores) threads_.run([this](int thread) { if (thread) pin(thread); });
    }

    void step(const Model& model, const Batch& batch) {
        model_ = &model, b_ = &batch;
        pin_caller();
        prepare();
        threads_.run([this](int thread) { model_->half ? forward<uint16_t>(thread) : forward<float>(thread); }, is_small());
    }

    Threads& threads() { return threads_; }

   private:
    // Two threads that the system puts on one core take turns at every barrier, and it sees nothing to move.
    void pin(int thread) {
        const size_t cores = cores_.size(), threads = threads_.count();
        pin_to_cores(cores_.data() + cores * thread / threads, cores_.data() + cores * (thread + 1) / threads);
    }

    // Thread 0 is whoever calls. A process's first thread has other work, and is left where the system puts it.
    void pin_caller() {
        static thread_local bool is_pinned = false;
        if (cores_.empty() || is_pinned || is_first_thread()) return;
        pin(0);
        is_pinned = true;
    }

    // Whether the step takes about as long as its threads' meetings would: 40 of them cost some 20 microseconds on an
    // idle machine, and far more on a busy one. Counts the weights to go through, again for every eight rows.
    bool is_small() const {
        const Layer& l = model_->layer[0];
        const int64_t weights = int64_t(l.qkv.n) * l.qkv.k + int64_t(l.o.n) * l.o.k + int64_t(l.gate_up.n) * l.gate_up.k + int64_t(l.down.n) * l.down.k;
        return (weights * model_->layers) * (1 + b_->num_rows / 8) < small_step_;
    }

    // ------------------------------------------------------------------ memory

    template <class T>
    T* take(int64_t count) {
        int64_t bytes = rounded(count * int64_t(sizeof(T)) + 64, 64);
        T* p = (T*)(arena_.get() + used_);
        used_ += bytes;
        return p;
    }

    RowBuffer buffer(const Linear& reader, int64_t rows, int64_t least_stride) {
        RowBuffer b;
        b.kind = reader.kind;
        b.stride = rounded(std::max<int64_t>(reader.k, least_stride), 16);
        b.group = reader.group;
        b.groups = reader.kind >= INT8_GROUPED ? reader.k / reader.group : 1;
        if (b.kind >= INT8_GROUPED) b.stride = reader.k;
        if (b.kind == F32) b.f32 = take<float>(rows * b.stride);
        if (b.kind == BF16) b.bf16 = take<uint16_t>(rows * b.stride);
        if (b.kind >= INT8) {
            b.int8 = take<int8_t>(rows * b.stride);
            b.scales = take<float>(rows * b.groups);
            b.sums = take<int32_t>(rows * b.groups);
        }
        return b;
    }

    // Lays the step's buffers out in one arena that only grows; the first pass finds its size.
    void prepare() {
        for (int pass = 0; pass < 2; pass++) {
            used_ = 0;
            lay_out();
            if (used_ <= size_) break;
            size_ = used_ + used_ / 4;
            arena_.reset((char*)std::aligned_alloc(4096, rounded(size_, 4096)));
        }
        queries_.clear();
        int group = model_->heads / model_->kv_heads;
        for (int s = 0; s < b_->num_sequences; s++) {
            int rows = (b_->query_start[s + 1] - b_->query_start[s]) * group;
            for (int first = 0; first < rows; first += QUERY_ROWS) queries_.push_back({s, first, std::min(QUERY_ROWS, rows - first)});
        }
        // Long ones first, so that no thread is left with one at the end.
        auto cost = [this](const Query& q) { return int64_t(b_->seq_lens[q.sequence]) * q.count; };
        std::stable_sort(queries_.begin(), queries_.end(), [&](const Query& a, const Query& b) { return cost(a) > cost(b); });
        decode_only_ = b_->num_rows == b_->num_sequences && group <= QUERY_ROWS;
        sequence_of_.resize(b_->num_rows);
        for (int s = 0; s < b_->num_sequences; s++)
            for (int r = b_->query_start[s]; r < b_->query_start[s + 1]; r++) sequence_of_[r] = s;
        best_.assign(size_t(threads_.count()) * b_->num_samples, {-INFINITY, -1});
        if ((int)scratch_.size() < threads_.count()) scratch_.resize(threads_.count());
        if ((int)samplers_.size() < threads_.count()) samplers_.resize(threads_.count());
    }

    void lay_out() {
        const Model& m = *model_;
        const Layer& l = m.layer[0];
        int64_t rows = std::max(b_->num_rows, b_->num_samples), width = m.heads * int64_t(m.head_dim);
        x_stride_ = rounded(m.hidden, STRIP);
        x_ = take<float>(rows * x_stride_);
        qkv_stride_ = l.qkv.n;
        qkv_ = take<float>(rows * qkv_stride_);
        wide_stride_ = rounded(std::max<int64_t>({width, l.gate_up.n / 2, l.down.k, l.o.k, m.hidden, l.qkv.k}), STRIP) + 128;
        wide_ = take<float>(rows * wide_stride_);
        query_ = take<uint8_t>(rows * width * (m.half ? 2 : 4));
        normed_ = buffer(l.qkv, rows, m.hidden);
        attended_ = buffer(l.o, rows, width);
        middle_ = buffer(l.down, rows, l.gate_up.n / 2);
        final_ = buffer(m.head, std::max(b_->num_samples, 1), m.hidden);
        own_.resize(threads_.count());
        for (Own& own : own_) {
            own.normed = buffer(l.qkv, FEW_ROWS, m.hidden);
            own.row = take<float>(wide_stride_ + 256);
        }
        logits_stride_ = rounded(m.vocab, STRIP);
    }

    // ------------------------------------------------------------------ the step

    template <class T>
    void forward(int thread) {
        const Model& m = *model_;
        int rows = b_->num_rows;
        threads_.share(thread, rows, piece(rows, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) embed<T>(r);
        });
        for (int i = 0; i < m.layers; i++) layer<T>(m.layer[i], i, thread);
        if (b_->num_samples) choose(thread);
    }

    template <class T>
    void layer(const Layer& l, int index, int thread) {
        const Model& m = *model_;
        const Linear* next = index + 1 < m.layers ? &m.layer[index + 1].qkv : b_->num_samples ? &m.head : nullptr;
        times(l.qkv, norm(l.input_norm, thread), b_->num_rows, thread, &l.o, [&](int row, int strip, float* c) {
            float* out = qkv_ + row * qkv_stride_ + strip * STRIP;
            store(out, load(c) + bias(l.qkv, strip, 0)), store(out + 16, load(c + 16) + bias(l.qkv, strip, 16));
        });
        if (!decode_only_)
            threads_.share(thread, b_->num_rows, piece(b_->num_rows, 4), [&](int begin, int end) {
                for (int r = begin; r < end; r++)
                    for (int h = 0; h < m.kv_heads; h++) position<T>(l, index, r, h);
            });
        attention<T>(l, index, thread);
        times(l.o, attended_.rows(), b_->num_rows, thread, &l.gate_up, [&](int row, int strip, float* c) { add(l.o, row, strip, c); });
        // gate and up lie side by side in a strip: 16 outputs of each.
        const bool direct = middle_.kind <= BF16;
        times(l.gate_up, norm(l.post_norm, thread), b_->num_rows, thread, &l.down, [&](int row, int strip, float* c) {
            F16 gate = load(c) + bias(l.gate_up, strip, 0), up = load(c + 16) + bias(l.gate_up, strip, 16);
            F16 y = gate / (splat(1.0f) + exponential(splat(0.0f) - gate)) * up;
            if (!direct) return store(wide_ + row * wide_stride_ + strip * 16, y);
            if (middle_.kind == F32) return store(middle_.f32 + row * middle_.stride + strip * 16, y);
            store_bf16(middle_.bf16 + row * middle_.stride + strip * 16, y);
        });
        if (!direct) put_rows(middle_, l.gate_up.n / 2, thread);
        times(l.down, middle_.rows(), b_->num_rows, thread, next, [&](int row, int strip, float* c) { add(l.down, row, strip, c); });
    }

    static F16 bias(const Linear& w, int strip, int at) {
        return w.bias ? load(w.bias + strip * STRIP + at) : splat(0.0f);
    }

    void add(const Linear& w, int row, int strip, const float* c) {
        float* x = x_ + row * x_stride_ + strip * STRIP;
        store(x, load(x) + (load(c) + bias(w, strip, 0)));
        store(x + 16, load(x + 16) + (load(c + 16) + bias(w, strip, 16)));
    }

    template <class T>
    void embed(int row) {
        const Model& m = *model_;
        const T* from = (const T*)m.embedding + int64_t(b_->input_ids[row]) * m.hidden;
        float* x = x_ + row * x_stride_;
        for (int i = 0; i < m.hidden; i += 16) {
            if constexpr (sizeof(T) == 2) store(x + i, load_bf16((const uint16_t*)from + i));
            else store(x + i, load((const float*)from + i));
        }
        for (int64_t i = m.hidden; i < x_stride_; i++) x[i] = 0.0f;
    }

    // The normed residual rows, as the next linear layer reads them.
    Rows norm(const float* weight, int thread) {
        const Model& m = *model_;
        Own& own = own_[thread];
        auto one = [&](const RowBuffer& to, int row) {
            rms_norm(x_ + row * x_stride_, weight, m.eps, m.hidden, own.row);
            put_row(to, row, own.row, m.hidden);
        };
        if (b_->num_rows <= FEW_ROWS) {
            for (int r = 0; r < b_->num_rows; r++) one(own.normed, r);
            return own.normed.rows();
        }
        threads_.share(thread, b_->num_rows, piece(b_->num_rows, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) one(normed_, r);
        });
        return normed_.rows();
    }

    void put_rows(const RowBuffer& to, int64_t n, int thread) {
        threads_.share(thread, b_->num_rows, piece(b_->num_rows, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) put_row(to, r, wide_ + r * wide_stride_, n);
        });
    }

    // Rotates the queries, key and value of one kv head of a row, and writes key and value to their slot.
    template <class T>
    void position(const Layer& l, int index, int row, int kv_head) {
        const Model& m = *model_;
        const int64_t dim = m.head_dim, group = m.heads / m.kv_heads;
        const int s = sequence_of_[row];
        const int64_t position = b_->seq_lens[s] - (b_->query_start[s + 1] - row);
        const float* cos_sin = m.cos_sin + position * dim;
        float* qkv = qkv_ + row * qkv_stride_;
        for (int64_t g = 0; g < group; g++) {
            float* head = qkv + (kv_head * group + g) * dim;
            if (l.q_norm) rms_norm(head, l.q_norm, m.eps, int(dim), head);
            rotate(head, cos_sin, dim);
            T* out = (T*)query_ + (row * m.heads + kv_head * group + g) * dim;
            for (int64_t i = 0; i < dim; i += 16) put(out + i, load(head + i));
        }
        float* key = qkv + (m.heads + kv_head) * dim;
        float* value = qkv + (m.heads + m.kv_heads + kv_head) * dim;
        if (l.k_norm) rms_norm(key, l.k_norm, m.eps, int(dim), key);
        rotate(key, cos_sin, dim);
        const int32_t* table = b_->tables + b_->seats[s] * b_->table_stride;
        Cache c = cache();
        write_key((T*)c.data + c.page(index, 0, table, kv_head, position), int(position % PAGE), key, dim);
        write_value((T*)c.data + c.page(index, 1, table, kv_head, position), int(position % PAGE), value, dim);
    }

    Cache cache() const { return {model_->cache, model_->num_blocks, model_->kv_heads, model_->block_size, model_->head_dim}; }

    template <class T>
    void attention(const Layer& l, int index, int thread) {
        const Model& m = *model_;
        if (!scratch_[thread]) scratch_[thread].reset(new AttentionScratch<float>);
        // Large enough for either type.
        auto& scratch = *(AttentionScratch<T>*)scratch_[thread].get();
        const Attention a = {cache(), m.heads, m.scale};
        const bool direct = attended_.kind <= BF16;
        threads_.share(thread, int(queries_.size()) * m.kv_heads, 1, [&](int begin, int end) {
            for (int i = begin; i < end; i++) {
                const Query& q = queries_[i / m.kv_heads];
                const int kv_head = i % m.kv_heads, row = b_->query_start[q.sequence];
                if (decode_only_ && q.first == 0) this->position<T>(l, index, row, kv_head);
                const int64_t position = b_->seq_lens[q.sequence] - (b_->query_start[q.sequence + 1] - row);
                const int32_t* table = b_->tables + b_->seats[q.sequence] * b_->table_stride;
                auto go = [&](auto* out, int64_t stride) {
                    attend<T>(a, index, l.window, kv_head, table, (const T*)query_, row, position, q.first, q.count, scratch, out, stride);
                };
                if (!direct) go(wide_, wide_stride_);
                else if (attended_.kind == F32) go(attended_.f32, attended_.stride);
                else go(attended_.bf16, attended_.stride);
            }
        });
        if (!direct) put_rows(attended_, m.heads * int64_t(m.head_dim), thread);
    }

    // done(row, strip, c[32]) for every row and strip of y = W x. next: the layer that comes after.
    template <class Done>
    void times(const Linear& w, Rows x, int rows, int thread, const Linear* next, Done done) {
        const int strips = w.n / STRIP, most = rows_per_block(w);
        const int blocks = (rows + most - 1) / most;
        auto body = [&](int begin, int end) {
            for (int i = begin; i < end; i++) {
                const int strip = i % strips, first = i / strips * most, count = std::min(most, rows - first);
                strip_times_rows(w, strip, x, first, count, [&](int64_t row, int n, float* c) {
                    for (int r = 0; r < n; r++) done(int(row) + r, strip, c + r * STRIP);
                });
            }
        };
        threads_.share(thread, strips * blocks, piece(strips * blocks, 6), body, [&] {
            if (next) begin_fetching(*next, thread);
        });
    }

    // While the others are waited for: the start of this thread's share of what comes next.
    void begin_fetching(const Linear& w, int thread) {
        const uint8_t* p = w.weight + threads_.first_item(thread, w.n / STRIP) * strip_bytes(w);
        if (b_->num_rows <= rows_per_tile(w.kind)) return;  // all the time goes into fetching already
        for (int64_t i = 0; i < std::min(strip_bytes(w), FETCH_EARLY); i += 64) prefetch(p + i);
    }

    // As many rows as stay in the second-level cache beside the strip that walks over them.
    static int rows_per_block(const Linear& w) { return w.kind == F32 ? 64 : 128; }

    int piece(int items, int pieces) const { return std::max(1, items / (threads_.count() * pieces)); }

    // ------------------------------------------------------------------ the tokens

    void choose(int thread) {
        const Model& m = *model_;
        const int samples = b_->num_samples, words = (m.vocab + 31) / 32;
        Own& own = own_[thread];
        threads_.share(thread, samples, piece(samples, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) {
                rms_norm(x_ + b_->sample_from[r] * x_stride_, m.norm, m.eps, m.hidden, own.row);
                put_row(final_, r, own.row, m.hidden);
            }
        });
        Best* best = best_.data() + size_t(thread) * samples;
        times(m.head, final_.rows(), samples, thread, nullptr, [&](int r, int strip, float* c) {
            const uint32_t outside = (strip + 1) * STRIP > m.vocab ? ~0u << (m.vocab - strip * STRIP) : 0;
            const uint32_t banned = outside | (b_->mask && !b_->raw[r] ? ~b_->mask[int64_t(r) * words + strip] : 0);
            if (banned)
                for (int i = 0; i < STRIP; i++)
                    if (banned >> i & 1) c[i] = -INFINITY;
            if (b_->raw[r] || b_->choices[r].temperature > 0) {
                float* out = b_->logits + r * logits_stride_ + strip * STRIP;
                store(out, load(c)), store(out + 16, load(c + 16));
                return;
            }
            if (!(largest(max(load(c), load(c + 16))) > best[r].value)) return;
            for (int i = 0; i < STRIP; i++)
                if (c[i] > best[r].value) best[r] = {c[i], strip * STRIP + i};
        });
        threads_.share(thread, samples, 1, [&](int begin, int end) {
            for (int r = begin; r < end; r++) b_->tokens[r] = b_->raw[r] ? -1 : token(r, thread);
        });
    }

    int32_t token(int r, int thread) {
        if (b_->choices[r].temperature > 0) return samplers_[thread].draw(b_->logits + r * logits_stride_, int(logits_stride_), b_->choices[r]);
        Best found = {-INFINITY, -1};
        for (int t = 0; t < threads_.count(); t++) {
            const Best& other = best_[size_t(t) * b_->num_samples + r];
            if (other.token < 0) continue;
            if (found.token < 0 || other.value > found.value || (other.value == found.value && other.token < found.token)) found = other;
        }
        return found.token;
    }

    struct Own {  // what each thread has for itself
        RowBuffer normed;
        float* row = nullptr;
    };
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };

    Threads threads_;
    std::vector<int32_t> cores_;
    const int64_t small_step_;
    const Model* model_ = nullptr;
    const Batch* b_ = nullptr;
    std::unique_ptr<char, Free> arena_;
    int64_t used_ = 0, size_ = -1;
    float *x_ = nullptr, *qkv_ = nullptr, *wide_ = nullptr;
    uint8_t* query_ = nullptr;
    int64_t x_stride_ = 0, qkv_stride_ = 0, wide_stride_ = 0, logits_stride_ = 0;
    RowBuffer normed_, attended_, middle_, final_;
    std::vector<Own> own_;
    std::vector<Query> queries_;
    std::vector<int> sequence_of_;
    std::vector<Best> best_;
    std::vector<std::unique_ptr<AttentionScratch<float>>> scratch_;
    std::vector<Sampler> samplers_;
    bool decode_only_ = false;
};

}  // namespace pw

#include "kv_move.h"

#include "exports.h"

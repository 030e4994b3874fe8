// One step of a dense decoder in one call: any mix of decoding rows and prompt chunks, from token ids to chosen tokens.
//
// The residual stream is float32; what a linear layer reads is in the form of its weights. Phases of a layer, with
// one meeting of the threads after each: qkv, rotary + KV write, attention, o, gate/up, down. Norms are part of the
// phase before or, for few rows, done by every thread for itself.

#include <algorithm>
#include <memory>

#include "attention.h"
#include "model.h"
#include "rows.h"
#include "sampling.h"
#include "threads.h"

namespace pw {

constexpr int64_t FETCH_EARLY = 32 << 10;
constexpr int FEW_ROWS = 4;  // up to so many, every thread does the norms for itself
constexpr int LARGEST_PIECE = 32;  // some milliseconds at most, so that a borrowed core is soon given back

struct Best {
    float value;
    int32_t token;  // -1: none so far, or none at all
};
constexpr Best NOTHING = {-INFINITY, -1}, NOT_NUMBERS = {INFINITY, -1};

struct Query {  // one piece of attention: some flattened query rows of one sequence
    int32_t sequence, first, count;
};

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// First of the outputs of `rank` when `total` are divided by units.
int64_t first_output(int64_t total, int64_t unit, int64_t rank, int64_t ranks) {
    const int64_t units = (total + unit - 1) / unit;
    return std::min(units * rank / ranks * unit, total);
}

class Runner {
   public:
    // small_step: see is_small.
    Runner(Cores& cores, int64_t small_step) : threads_(cores), small_step_(small_step) {}

    // 0, or what a gathering returned that failed: the rest was then computed with whatever was there.
    int step(const Model& model, const Batch& batch) {
        model_ = &model, b_ = &batch;
        failed_ = 0;
        prepare();
        threads_.run([this](int thread) { model_->half ? forward<uint16_t>(thread) : forward<float>(thread); }, is_small());
        return failed_;
    }

    Threads& threads() { return threads_; }

   private:
    // Whether the step takes about as long as its threads' meetings would: 40 of them cost some 20 microseconds on an
    // idle machine, and far more on a busy one. Counts the weights to go through, again for every eight rows; the head's
    // only where there is nothing else.
    bool is_small() const {
        const Layer& l = model_->layer[0];
        const int64_t weights = int64_t(l.qkv.n) * l.qkv.k + int64_t(l.o.n) * l.o.k + int64_t(l.gate_up.n) * l.gate_up.k + int64_t(l.down.n) * l.down.k;
        const int64_t all = model_->layers ? weights * model_->layers : int64_t(model_->head.n) * model_->head.k;
        return all * (1 + b_->num_rows / 8) < small_step_;
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
        // An even number of lines puts the rows of a tile into few sets of the cache.
        const int64_t line = 64 / (b.kind == BF16 ? sizeof(Bf16Row) : 1);
        if (MATRIX_ROWS && b.kind != F32) b.stride = ((b.stride + line - 1) / line | 1) * line;
        if (b.kind == F32) b.f32 = take<float>(rows * b.stride);
        if (b.kind == BF16) b.bf16 = take<Bf16Row>(rows * b.stride);
        if (b.kind >= INT8) {
            b.int8 = take<int8_t>(rows * b.stride);
            const int64_t whole = rounded(rows, 16);  // which a tile reads
            b.scales = take<float>(whole * b.groups);
            b.sums = take<int32_t>(whole * b.groups);
        }
        return b;
    }

    // Lays the step's buffers out in one arena that only grows; the first pass finds its size.
    void prepare() {
        wanted_.clear();
        for (int r = 0; r < b_->num_samples; r++)
            if (wants_logits(r)) wanted_.push_back(r);
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
        best_.assign(size_t(threads_.most()) * b_->num_samples, NOTHING);
        if ((int)scratch_.size() < threads_.most()) scratch_.resize(threads_.most());
        if ((int)samplers_.size() < threads_.most()) samplers_.resize(threads_.most());
    }

    void lay_out() {
        const Model& m = *model_;
        const Layer& l = m.layer[0];
        int64_t rows = std::max(b_->num_rows, b_->num_samples), width = m.heads * int64_t(m.head_dim) * m.peers.ranks;
        x_stride_ = rounded(m.hidden, STRIP);
        x_ = take<float>(rows * x_stride_);
        qkv_stride_ = l.qkv.n;
        qkv_ = take<float>(rows * qkv_stride_);
        wide_stride_ = rounded(std::max<int64_t>({width, l.gate_up.n / 2, l.down.k, l.o.k, m.hidden, l.qkv.k}), STRIP) + 128;
        wide_ = take<float>(rows * wide_stride_);
        query_ = take<uint8_t>(rows * m.heads * m.head_dim * int64_t(m.half ? sizeof(Bf16Row) : 4));
        normed_ = buffer(l.qkv, rows, m.hidden);
        attended_ = buffer(l.o, rows, width);
        middle_ = buffer(l.down, rows, m.peers.ranks > 1 ? 0 : l.gate_up.n / 2);
        final_ = buffer(m.head, std::max(b_->num_samples, 1), m.hidden);
        own_.resize(threads_.most());
        for (Own& own : own_) {
            own.normed = buffer(l.qkv, FEW_ROWS, m.hidden);
            own.row = take<float>(wide_stride_ + 256);
        }
        logits_stride_ = rounded(m.vocab, STRIP);
        hidden_ = shares(m.hidden, 16), middle_shares_ = shares(m.intermediate, 16), vocab_ = shares(m.vocab, STRIP);
        attended_shares_ = shares(width, m.heads * m.head_dim);
        if (m.peers.ranks == 1) return;
        const int64_t widest = std::max({hidden_.widest, middle_shares_.widest, attended_shares_.widest});
        const int64_t floats = std::max(rows * widest, choices_bytes() / int64_t(sizeof(float)));
        mine_ = take<float>(floats);
        all_ = take<float>(floats * m.peers.ranks);
    }

    // ------------------------------------------------------------------ the other ranks

    // How the outputs of a matrix are divided: rank r has [first(r), first(r + 1)).
    struct Shares {
        int64_t total, unit, ranks, widest, own;

        int64_t first(int64_t rank) const { return first_output(total, unit, rank, ranks); }
        int64_t width(int64_t rank) const { return first(rank + 1) - first(rank); }
    };

    Shares shares(int64_t total, int64_t unit) const {
        const Peers& peers = model_->peers;
        Shares s = {total, unit, peers.ranks, 0, 0};
        for (int r = 0; r < peers.ranks; r++) s.widest = std::max(s.widest, s.width(r));
        s.widest = rounded(s.widest, unit);
        s.own = s.first(peers.rank);
        return s;
    }

    bool divided() const { return model_->peers.ranks > 1; }

    // Every rank's `mine_` into `all_`, once all threads have filled their part of it.
    void gather(int thread, int64_t bytes) {
        threads_.first_alone(thread, [&] {
            if (!failed_) failed_ = model_->peers.gather(mine_, all_, bytes);
        });
    }

    // mine_ [rows][widest] of every rank, elements of type E, side by side in the rows of `to`, and zeros from there up
    // to `filled`. own: also this rank's.
    template <class E, class To>
    void gather_rows(const Shares& s, To* to, int64_t stride, int64_t filled, bool own, int thread) {
        const int64_t rows = b_->num_rows;
        gather(thread, rows * s.widest * int64_t(sizeof(E)));
        threads_.share(thread, int(rows), piece(int(rows), 4), [&](int begin, int end) {
            for (int row = begin; row < end; row++) {
                for (int64_t i = s.total; i < filled; i++) to[row * stride + i] = {};
                for (int r = 0; r < s.ranks; r++)
                    if (own || r != model_->peers.rank)
                        copy(to + row * stride + s.first(r), (const E*)all_ + (r * rows + row) * s.widest, s.width(r));
            }
        });
    }

    // The same into a buffer of rows that a linear layer reads, by way of `wide_` where they have to be quantized.
    void gather_rows(const Shares& s, const RowBuffer& to, int thread) {
        if (to.kind == F32) return gather_rows<float>(s, to.f32, to.stride, to.stride, true, thread);
        if (to.kind == BF16) return gather_rows<uint16_t>(s, to.bf16, to.stride, to.stride, true, thread);
        gather_rows<float>(s, wide_, wide_stride_, 0, true, thread);
        put_rows(to, s.total, thread);
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
        if (b_->hidden_out) leave(thread);
        if (chooses()) choose(thread);
    }

    // Only the last stage has what comes after the layers.
    bool chooses() const { return b_->num_samples && model_->norm; }

    void leave(int thread) {
        threads_.share(thread, b_->num_rows, piece(b_->num_rows, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) std::memcpy(b_->hidden_out + int64_t(r) * model_->hidden, x_ + r * x_stride_, model_->hidden * sizeof(float));
        });
    }

    template <class T>
    void layer(const Layer& l, int index, int thread) {
        const Model& m = *model_;
        const Linear* next = index + 1 < m.layers ? &m.layer[index + 1].qkv : chooses() ? &m.head : nullptr;
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
        if (thread == 0 && b_->progress) tell(index + 1);
        times(l.o, attended_.rows(), b_->num_rows, thread, &l.gate_up, [&](int row, int strip, float* c) { add(l.o, row, strip, c); });
        if (divided()) gather_rows<float>(hidden_, x_, x_stride_, 0, false, thread);
        // gate and up lie side by side in a strip: 16 outputs of each.
        const bool direct = middle_.kind <= BF16;
        times(l.gate_up, norm(l.post_norm, thread), b_->num_rows, thread, &l.down, [&](int row, int strip, float* c) {
            F16 gate = load(c) + bias(l.gate_up, strip, 0), up = load(c + 16) + bias(l.gate_up, strip, 16);
            F16 y = gate / (splat(1.0f) + exponential(splat(0.0f) - gate)) * up;
            if (divided()) return put_middle(row, strip, y);
            if (!direct) return store(wide_ + row * wide_stride_ + strip * 16, y);
            if (middle_.kind == F32) return store(middle_.f32 + row * middle_.stride + strip * 16, y);
            put(middle_.bf16 + row * middle_.stride + strip * 16, y);
        });
        if (divided()) gather_rows(middle_shares_, middle_, thread);
        else if (!direct) put_rows(middle_, l.gate_up.n / 2, thread);
        times(l.down, middle_.rows(), b_->num_rows, thread, next, [&](int row, int strip, float* c) { add(l.down, row, strip, c); });
        if (divided()) gather_rows<float>(hidden_, x_, x_stride_, 0, false, thread);
    }

    // In the type that it will be read in; what is quantized later is whole float32 rows first.
    void put_middle(int row, int strip, F16 y) {
        const int64_t at = row * middle_shares_.widest + strip * 16;
        if (middle_.kind == BF16) return store_bf16((uint16_t*)mine_ + at, y);
        store(mine_ + at, y);
    }

    // The KV of so many layers is final: transfers of it need not wait for the others. What is left of a step after the
    // last layer's attention is short.
    void tell(int layers) {
        __atomic_store_n(b_->progress, (*b_->progress & ~int64_t(0xffff)) | layers, __ATOMIC_RELEASE);
        if (layers % b_->progress_group == 0 && layers < model_->layers)
            if (write(b_->progress_pipe, "", 1) < 0) return;  // full: its reader has been told often enough
    }

    static F16 bias(const Linear& w, int strip, int at) {
        return w.bias ? load(w.bias + strip * STRIP + at) : splat(0.0f);
    }

    void add(const Linear& w, int row, int strip, const float* c) {
        float* x = x_ + row * x_stride_ + hidden_.own + strip * STRIP;
        if (!divided()) {
            store(x, load(x) + (load(c) + bias(w, strip, 0)));
            store(x + 16, load(x + 16) + (load(c + 16) + bias(w, strip, 16)));
            return;
        }
        float* mine = mine_ + row * hidden_.widest + strip * STRIP;
        const int64_t width = hidden_.width(model_->peers.rank);
        for (int half = 0; half < 2 && strip * STRIP + 16 * half < width; half++) {
            F16 sum = load(x + 16 * half) + (load(c + 16 * half) + bias(w, strip, 16 * half));
            store(x + 16 * half, sum), store(mine + 16 * half, sum);
        }
    }

    template <class T>
    void embed(int row) {
        const Model& m = *model_;
        float* x = x_ + row * x_stride_;
        if (!m.embedding) {
            std::memcpy(x, b_->hidden_in + int64_t(row) * m.hidden, m.hidden * sizeof(float));
            for (int64_t i = m.hidden; i < x_stride_; i++) x[i] = 0.0f;
            return;
        }
        const T* from = (const T*)m.embedding + int64_t(b_->input_ids[row]) * m.hidden;
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
            for (int r = 0; r < b_->num_rows && !threads_.is_late(thread); r++) one(own.normed, r);
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
            RowOf<T>* out = (RowOf<T>*)query_ + (row * m.heads + kv_head * group + g) * dim;
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
                const T* then[PAGES];
                const bool goes_on = first_pages(l, index, i + 1, then);
                auto go = [&](auto* out, int64_t stride) {
                    attend<T>(a, index, l.window, kv_head, table, (const RowOf<T>*)query_, row, position, q.first, q.count, goes_on ? then : nullptr, scratch, out, stride);
                };
                if (divided()) direct && attended_.kind == BF16 ? go((uint16_t*)mine_, attended_shares_.widest) : go(mine_, attended_shares_.widest);
                else if (!direct) go(wide_, wide_stride_);
                else if (attended_.kind == F32) go(attended_.f32, attended_.stride);
                else go(attended_.bf16, attended_.stride);
            }
        });
        rest_matrix();
        if (divided()) gather_rows(attended_shares_, attended_, thread);
        else if (!direct) put_rows(attended_, m.heads * int64_t(m.head_dim), thread);
    }

    // Where piece `i` of attention begins to read; false where there is none.
    template <class T>
    bool first_pages(const Layer& l, int index, int i, const T** pages) const {
        const int kv_heads = model_->kv_heads;
        if (i >= int(queries_.size()) * kv_heads) return false;
        const Query& q = queries_[i / kv_heads];
        const int64_t length = b_->seq_lens[q.sequence], rows = b_->query_start[q.sequence + 1] - b_->query_start[q.sequence];
        const int64_t start = first_key(length - rows + q.first / (model_->heads / kv_heads), l.window);
        KeyPages<T>(cache(), index, b_->tables + b_->seats[q.sequence] * b_->table_stride, i % kv_heads, start).next(length - start, pages);
        return true;
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
        rest_matrix();  // what runs in this thread after us may shape it otherwise
    }

    // While the others are waited for: the start of this thread's share of what comes next.
    void begin_fetching(const Linear& w, int thread) {
        const uint8_t* p = w.weight + threads_.first_item(thread, w.n / STRIP) * strip_bytes(w);
        if (b_->num_rows <= rows_per_tile(w, b_->num_rows)) return;  // all the time goes into fetching already
        for (int64_t i = 0; i < std::min(strip_bytes(w), FETCH_EARLY); i += 64) prefetch(p + i);
    }

    // As many rows as stay in the second-level cache beside the strip that walks over them.
    static int rows_per_block(const Linear& w) { return w.kind == F32 ? 64 : BLOCK; }

    int piece(int items, int pieces) const { return std::clamp(items / (threads_.count() * pieces), 1, LARGEST_PIECE); }

    // ------------------------------------------------------------------ the tokens

    void choose(int thread) {
        const Model& m = *model_;
        const int samples = b_->num_samples, words = (m.vocab + 31) / 32;
        Own& own = own_[thread];
        threads_.share(thread, samples, piece(samples, 4), [&](int begin, int end) {
            for (int r = begin; r < end; r++) {
                rms_norm(x_ + b_->sample_from[r] * x_stride_, m.norm, m.eps, m.hidden, own.row);
                put_row(final_, r, own.row, m.hidden);
                if (b_->raw[r] == 2) std::memcpy(b_->hidden + int64_t(r) * m.hidden, own.row, m.hidden * sizeof(float));
            }
        });
        Best* best = best_.data() + size_t(thread) * samples;
        const int first = int(vocab_.own);
        times(m.head, final_.rows(), samples, thread, nullptr, [&](int r, int strip, float* c) {
            const int from = first + strip * STRIP;
            if (any_nan(load(c), load(c + 16))) best[r] = NOT_NUMBERS;  // which a maximum may lose, and others with it
            const uint32_t outside = from + STRIP > m.vocab ? ~0u << (m.vocab - from) : 0;
            const uint32_t banned = outside | (b_->mask && !b_->raw[r] ? ~b_->mask[int64_t(r) * words + from / 32] : 0);
            if (banned)
                for (int i = 0; i < STRIP; i++)
                    if (banned >> i & 1) c[i] = -INFINITY;
            if (wants_logits(r)) {
                float* out = b_->logits + r * logits_stride_ + from;
                store(out, load(c)), store(out + 16, load(c + 16));
                return;
            }
            if (!(largest(max(load(c), load(c + 16))) > best[r].value)) return;
            for (int i = 0; i < STRIP; i++)
                if (c[i] > best[r].value) best[r] = {c[i], from + i};
        });
        if (divided()) gather_choices(thread);
        if (m.peers.rank) return;
        threads_.share(thread, samples, 1, [&](int begin, int end) {
            for (int r = begin; r < end; r++) b_->tokens[r] = b_->raw[r] ? -1 : token(r, thread);
        });
    }

    int64_t choices_bytes() const {
        return b_->num_samples * int64_t(sizeof(Best)) + int64_t(wanted_.size()) * vocab_.widest * int64_t(sizeof(float));
    }

    bool wants_logits(int r) const { return b_->raw[r] == 1 || b_->choices[r].temperature > 0; }

    // The greatest of this rank's part of the vocabulary for every sample, then the logits of those that want them.
    void gather_choices(int thread) {
        const int64_t samples = b_->num_samples, width = vocab_.widest, wanted = int64_t(wanted_.size()), bytes = choices_bytes();
        auto bests = [&](float* p) { return (Best*)p; };
        auto logits = [&](float* p) { return (float*)(bests(p) + samples); };
        threads_.share(thread, int(samples), 1, [&](int begin, int end) {
            for (int r = begin; r < end; r++) bests(mine_)[r] = greatest(r);
        });
        threads_.share(thread, int(wanted), 1, [&](int begin, int end) {
            for (int i = begin; i < end; i++)
                std::memcpy(logits(mine_) + i * width, b_->logits + wanted_[i] * logits_stride_ + vocab_.own, rounded(vocab_.width(model_->peers.rank), STRIP) * sizeof(float));
        });
        gather(thread, bytes);
        if (model_->peers.rank) return;
        for (int64_t rank = 0; rank < vocab_.ranks; rank++) {
            float* from = all_ + rank * (bytes / int64_t(sizeof(float)));
            if (thread == 0)
                for (int r = 0; r < samples; r++) best_[r] = rank ? better(best_[r], bests(from)[r]) : bests(from)[r];
            if (rank == 0) continue;
            threads_.share(thread, int(wanted), 1, [&](int begin, int end) {
                for (int i = begin; i < end; i++)
                    std::memcpy(b_->logits + wanted_[i] * logits_stride_ + vocab_.first(rank), logits(from) + i * width, rounded(vocab_.width(rank), STRIP) * sizeof(float));
            });
        }
        threads_.first_alone(thread, [&] { std::fill(best_.begin() + samples, best_.end(), NOTHING); });
    }

    static bool is_broken(const Best& a) { return a.token < 0 && a.value > 0; }

    static Best better(const Best& a, const Best& b) {
        if (is_broken(a) || is_broken(b)) return NOT_NUMBERS;
        if (b.token < 0) return a;
        return a.token < 0 || b.value > a.value || (b.value == a.value && b.token < a.token) ? b : a;
    }

    Best greatest(int r) const {
        Best found = NOTHING;
        for (int t = 0; t < threads_.most(); t++) found = better(found, best_[size_t(t) * b_->num_samples + r]);
        return found;
    }

    int32_t token(int r, int thread) {
        const Best best = greatest(r);
        if (b_->choices[r].temperature == 0 || is_broken(best)) return best.value < INFINITY ? best.token : -1;
        return samplers_[thread].draw(b_->logits + r * logits_stride_, int(logits_stride_), b_->choices[r]);
    }

    struct Own {  // what each thread has for itself
        RowBuffer normed;
        float* row = nullptr;
    };
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };

    Threads threads_;
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
    std::vector<int> wanted_;  // samples whose logits are wanted
    Shares hidden_ = {}, middle_shares_ = {}, attended_shares_ = {}, vocab_ = {};
    float *mine_ = nullptr, *all_ = nullptr;  // what the ranks of a stage tell each other
    int failed_ = 0;
    std::vector<std::unique_ptr<AttentionScratch<float>>> scratch_;
    std::vector<Sampler> samplers_;
    bool decode_only_ = false;
};

}  // namespace pw

#include "kv_move.h"

#include "exports.h"

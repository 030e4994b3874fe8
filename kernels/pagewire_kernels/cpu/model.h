// The model and the batch of a step, as library.py lays them out in ctypes.

#pragma once

#include "linear.h"
#include "sampling.h"

namespace pw {

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null unless the model has them
    Linear qkv, o, gate_up, down;
    int32_t window;  // 0: none
};

// Some of a model's outputs are this rank's and the others' come from other processes: of a layer's o and down and of
// gate and up by units of 16, of the head by 32, as `share` says; of the attention by heads.
struct Peers {
    int32_t rank, ranks;
    // Fills all [ranks][bytes] with what every rank has in `mine`. Not 0: it failed, and so has the step.
    int (*gather)(const void* mine, void* all, int64_t bytes);
};

// A rank's model: its own layers and heads.
struct Model {
    int32_t hidden, intermediate, heads, kv_heads, head_dim, layers, vocab, block_size;
    int64_t num_blocks;
    int32_t half;  // whether KV and activations are bf16, not float32
    float eps, scale;
    const void* embedding;  // [vocab][hidden] in the type that `half` says; null: the rows come from another stage
    const float* cos_sin;   // [positions][head_dim]
    const float* norm;  // null, as the head, where another stage follows
    Linear head;
    const Layer* layer;  // the first is read also where `layers` is 0: a step of the head alone, on rows of hidden_in
    void* cache;
    Peers peers;
};

struct Batch {
    int32_t num_rows, num_sequences, num_samples;
    const int32_t *input_ids, *query_start, *seq_lens, *tables, *seats;
    int64_t table_stride;
    const int32_t* sample_from;
    const Choice* choices;     // [samples]
    const uint8_t* raw;        // [samples], 1: the row's logits are wanted, no token; 2: its hidden state is
    const uint32_t* mask;      // [samples][ceil(vocab / 32)] allowed tokens, or null; raw rows stay as they are
    int32_t* tokens;           // [samples], -1 where no logit is a number
    float* logits;             // [samples][vocab rounded up to 32], written where raw or temperature > 0
    const float* hidden_in;    // [rows][hidden] from the stage before, where the model has no embedding
    float* hidden_out;         // [rows][hidden] after the layers, or null
    int64_t* progress;         // null, or where the number of layers whose KV is final is added to its low 16 bits
    int32_t progress_group, progress_pipe;  // after so many layers each a byte goes into the pipe
    float* hidden;             // [samples][hidden], after the last norm, written where raw is 2
};

}  // namespace pw

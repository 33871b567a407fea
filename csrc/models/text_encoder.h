#pragma once

#include <cstdint>
#include <vector>

#include "device/arena.h"
#include "device/device.h"
#include "models/block.h"
#include "models/reference.h"
#include "weights/weights.h"

namespace zimage_rt {

// The config of Qwen3 in the manifest (export/modeling/text_encoder.py).
struct TextEncoderConfig {
  int vocab_size;
  int hidden_size;
  int intermediate_size;
  int num_hidden_layers;  // of the checkpoint; the last one is not run
  int num_attention_heads;
  int num_key_value_heads;
  int head_dim;
  float rms_norm_eps;
  float attention_scale;
  float gate_scale;
  float up_scale;
  Quantization quantization = {};
};

// Qwen3's hidden_states[-2]. The embedding table stays on the host, because a prompt reads few rows
// of it. Streamed weights are loaded a group of layers at a time.
class TextEncoder {
 public:
  // Switches the weights to streaming, a few layers per group.
  static void stream(Weights& weights);
  // Checks the weights. Throws WeightError.
  TextEncoder(const TextEncoderConfig& config, Weights& weights);

  struct Buffers {
    float* x;  // [rows, hidden_size]; prompt_embeds after the run
    float* cos;
    float* sin;
    BlockBuffers block;
  };
  // Prompts run at a multiple of 32 rows, so that few shapes are ever timed. The model is causal:
  // rows after the prompt do not change the rows before them.
  static int padded(int tokens) { return round_up(tokens, 32); }
  Buffers plan(int tokens, Arena& arena) const;

  // Copies the prompt's rows of the table to buffers.x. Throws std::invalid_argument for an id
  // outside the vocabulary.
  void load_prompt(const std::int64_t* input_ids, int tokens, const Buffers& buffers,
                   const Ops& ops);
  // Leaves prompt_embeds [tokens, hidden_size] at the start of buffers.x. If the weights are not
  // streamed, it can be captured for all prompts of as many padded rows.
  void run_layers(int tokens, const Buffers& buffers, const Ops& ops);
  int vocab_size() const { return config_.vocab_size; }
  int hidden_size() const { return config_.hidden_size; }

 private:
  void read_rows(const std::int64_t* input_ids, int tokens);

  TextEncoderConfig config_;
  Weights& weights_;
  BlockShape shape_;
  PinnedBuffer rows_;
};

}  // namespace zimage_rt

#pragma once

namespace zimage_rt {

// Numbers that the reference implementation of Z-Image fixes and no config holds:
// transformer_z_image.py of diffusers 0.42.1.

// Rows of every sequence are padded to a multiple of this (SEQ_MULTI_OF).
constexpr int kSequenceMultiple = 32;
// The eps of the norms of queries and keys (ZImageTransformerBlock).
constexpr float kQkNormEps = 1e-5f;
// The eps of the norm of the final layer (FinalLayer).
constexpr float kFinalNormEps = 1e-6f;

// `rows` rounded up to a multiple.
constexpr int round_up(int rows, int multiple) {
  return (rows + multiple - 1) / multiple * multiple;
}

// The length of a sequence with its pad rows.
constexpr int padded_tokens(int tokens) { return round_up(tokens, kSequenceMultiple); }

}  // namespace zimage_rt

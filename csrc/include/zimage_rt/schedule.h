#pragma once

#include <vector>

namespace zimage_rt {

// Flow-match Euler sigmas, 1 → 0, `num_inference_steps + 1` of them: linspace(1, 1/N, N), shifted
// by shift * s / (1 + (shift - 1) * s), then 0. Computed in double and rounded once, as diffusers'
// scheduler does with shift 3.0 (scheduling_flow_match_euler_discrete.py).
// zimage_rt/sampling/schedules.py is the reference. Throws std::invalid_argument for less than one
// step or a shift that is not positive.
std::vector<float> flow_match_sigmas(int num_inference_steps, double shift);

}  // namespace zimage_rt

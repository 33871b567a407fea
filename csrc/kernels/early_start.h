#pragma once

namespace zimage_rt {

// Whether kernels on the current device have the code of compute capability 9.0: programmatic
// dependent launch and clusters.
bool early_start_runs_here();

}  // namespace zimage_rt

// The element-wise kernels and norms over numpy arrays: for tests.

#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/device_array.h"
#include "bindings/kernels.h"
#include "device/check.h"
#include "device/dtype.h"
#include "kernels/copy_rows.h"
#include "kernels/low_rank.h"
#include "kernels/modulation.h"
#include "kernels/norm.h"
#include "kernels/patchify.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/residual.h"
#include "kernels/rope_table.h"
#include "kernels/sampler_update.h"
#include "kernels/swiglu.h"
#include "kernels/transpose.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

py::array run_rms_norm(const py::array& x, const py::array& weight, float eps,
                       const std::string& type) {
  const DeviceArray in(x), w(weight);
  const DeviceArray out({x.shape(0), x.shape(1)}, dtype_named(type));
  rms_norm({.x = in.data<float>(),
            .weight = w.data<float>(),
            .out = out.data(),
            .type = out.dtype(),
            .rows = rows_of(in),
            .dim = columns_of(in),
            .eps = eps},
           nullptr);
  return out.download();
}

// Returns x and the normed output; without `pre` the output is not written.
py::tuple run_residual_norm(const py::array& x, const py::array& branch,
                            const std::optional<py::array>& post, float post_eps,
                            float branch_scale, const std::optional<py::array>& pre,
                            float pre_eps) {
  const DeviceArray in(x), b(branch);
  const DeviceArray out({x.shape(0), x.shape(1)}, b.dtype());
  std::optional<DeviceArray> post_vector, pre_vector;
  if (post) post_vector.emplace(*post);
  if (pre) pre_vector.emplace(*pre);
  residual_norm({.x = in.data<float>(),
                 .branch = b.data(),
                 .post = post ? post_vector->data<float>() : nullptr,
                 .post_eps = post_eps,
                 .branch_scale = branch_scale,
                 .pre = pre ? pre_vector->data<float>() : nullptr,
                 .pre_eps = pre_eps,
                 .out = out.data(),
                 .type = b.dtype(),
                 .rows = rows_of(in),
                 .dim = columns_of(in)},
                nullptr);
  return py::make_tuple(in.download(), out.download());
}

py::array run_scaled_copy(const py::array& x, float scale, const std::string& type) {
  const DeviceArray in(x);
  const DeviceArray out({x.shape(0), x.shape(1)}, dtype_named(type));
  scaled_copy(in.data<float>(), scale, out.data(), out.dtype(), static_cast<std::size_t>(x.size()),
              nullptr);
  return out.download();
}

py::array run_scaled_add(const py::array& x, const py::array& added,
                         const std::optional<py::array>& scale) {
  const DeviceArray in(x), more(added);
  std::optional<DeviceArray> factor;
  if (scale) factor.emplace(*scale);
  scaled_add(in.data<float>(), more.data<float>(), scale ? factor->data<float>() : nullptr,
             static_cast<std::size_t>(x.size()), nullptr);
  return in.download();
}

py::array run_layer_norm(const py::array& x, const py::array& scale, float eps,
                         const std::string& type) {
  const DeviceArray in(x), s(scale);
  const DeviceArray out({x.shape(0), x.shape(1)}, dtype_named(type));
  layer_norm({.x = in.data<float>(),
              .scale = s.data<float>(),
              .out = out.data(),
              .type = out.dtype(),
              .rows = rows_of(in),
              .dim = columns_of(in),
              .eps = eps},
             nullptr);
  return out.download();
}

py::array run_qk_norm_rope(const py::array& qkv, const std::optional<py::array>& q_weight,
                           const std::optional<py::array>& k_weight, const py::array& cos,
                           const py::array& sin, int q_heads, int k_heads, int head_dim,
                           float eps) {
  const DeviceArray rows(qkv), c(cos), s(sin);
  std::optional<DeviceArray> q, k;
  if (q_weight) q.emplace(*q_weight);
  if (k_weight) k.emplace(*k_weight);
  qk_norm_rope({.qkv = rows.data(),
                .row_stride = rows.shape(1),
                .type = rows.dtype(),
                .q_weight = q ? q->data<float>() : nullptr,
                .k_weight = k ? k->data<float>() : nullptr,
                .cos = c.data<float>(),
                .sin = s.data<float>(),
                .rows = rows_of(rows),
                .q_heads = q_heads,
                .k_heads = k_heads,
                .head_dim = head_dim,
                .eps = eps},
               nullptr);
  return rows.download();
}

// Returns the updated matrix, and whether its format cannot hold a result.
py::tuple run_low_rank_update(const py::array& matrix, const py::array& down, const py::array& up,
                              int first_column) {
  const DeviceArray target(matrix), d(down), u(up), overflow(py::array_t<float>(1));
  ZRT_CUDA(cudaMemset(overflow.data(), 0, sizeof(int)));
  low_rank_update({.matrix = target.data(),
                   .type = target.dtype(),
                   .rows = rows_of(target),
                   .stride = columns_of(target),
                   .first_column = first_column,
                   .columns = columns_of(u),
                   .rank = rows_of(d),
                   .down = d.data<float>(),
                   .up = u.data<float>(),
                   .overflow = overflow.data<int>()},
                  nullptr);
  int flag = 0;
  ZRT_CUDA(cudaMemcpy(&flag, overflow.data(), sizeof(int), cudaMemcpyDeviceToHost));
  return py::make_tuple(target.download(), flag != 0);
}

py::array run_transpose(const py::array& matrix) {
  const DeviceArray in(matrix);
  const DeviceArray out({matrix.shape(1), matrix.shape(0)}, in.dtype());
  transpose(in.data(), out.data(), static_cast<int>(matrix.itemsize()), rows_of(in), columns_of(in),
            rows_of(in), nullptr);
  return out.download();
}

py::array run_swiglu(const py::array& gate_up, float gate_scale, float up_scale) {
  const DeviceArray in(gate_up);
  const DeviceArray out({gate_up.shape(0), gate_up.shape(1) / 2}, in.dtype());
  swiglu({.gate_up = in.data(),
          .out = out.data(),
          .type = in.dtype(),
          .rows = rows_of(in),
          .hidden = columns_of(out),
          .gate_scale = gate_scale,
          .up_scale = up_scale},
         nullptr);
  return out.download();
}

PatchGrid grid_of(const py::array& latents, int patch) {
  return {.channels = static_cast<int>(latents.shape(1)),
          .height = static_cast<int>(latents.shape(2)),
          .width = static_cast<int>(latents.shape(3)),
          .patch = patch};
}

py::array run_patchify(const py::array& latents, int patch, int samples, int padded,
                       const std::string& type) {
  const DeviceArray in(latents);
  const PatchGrid grid = grid_of(latents, patch);
  const DeviceArray out({samples, padded, grid.features()}, dtype_named(type));
  patchify(in.data<float>(), rows_of(in), grid, out.data(), out.dtype(), samples, padded, nullptr);
  return out.download();
}

py::array run_unpatchify(const py::array& patches, int channels, int height, int width, int patch) {
  const DeviceArray in(patches);
  const DeviceArray out({patches.shape(0), channels, height, width}, DType::kFloat32);
  const PatchGrid grid{.channels = channels, .height = height, .width = width, .patch = patch};
  unpatchify(in.data<float>(), grid, out.data<float>(), rows_of(in), nullptr);
  return out.download();
}

// Returns the latents and the kept arrays, [3, samples, ...]. `inpaint` is mask, image and noise,
// or empty.
py::tuple run_sampler_update(const py::array& patches, const py::array& latents,
                             const py::array& kept, int patch, const py::array& steps, int step,
                             bool guided, float scale, float normalization,
                             const py::array& step_noise, const std::vector<py::array>& inpaint) {
  if (kept.size() != SamplerStep::kHistory * latents.size() || step_noise.size() != latents.size())
    throw std::invalid_argument("kept, step_noise: their sizes do not belong to the latents");
  const DeviceArray pred(patches), x(latents), history(kept), table(steps), drawn(step_noise);
  py::array_t<float> every({steps.shape(0), latents.shape(0)}), limit(1);
  std::fill_n(every.mutable_data(), every.size(), scale);
  limit.mutable_at(0) = normalization;
  const DeviceArray scales(every), limits(limit), factors({latents.shape(0)}, DType::kFloat32);
  std::vector<DeviceArray> kept_image;
  for (const py::array& part : inpaint) kept_image.emplace_back(part);
  const auto part = [&](std::size_t i) {
    return kept_image.empty() ? nullptr : kept_image.at(i).data<float>();
  };
  sampler_update({.patches = pred.data<float>(),
                  .grid = grid_of(latents, patch),
                  .latents = x.data<float>(),
                  .kept = history.data<float>(),
                  .samples = rows_of(x),
                  .guided = guided,
                  .normalized = normalization > 0.0f,
                  .steps = table.data<SamplerStep>(),
                  .step = step,
                  .scales = scales.data<float>(),
                  .normalization = limits.data<float>(),
                  .factors = factors.data<float>(),
                  .step_noise = drawn.data<float>(),
                  .mask = part(0),
                  .image = part(1),
                  .noise = part(2)},
                 nullptr);
  return py::make_tuple(x.download(), history.download());
}

py::tuple run_rope_table(const std::vector<py::array>& cos, const std::vector<py::array>& sin,
                         int grid_rows, int grid_columns, int image_tokens, int context_tokens) {
  std::vector<DeviceArray> tables;
  RopeTable args{};
  py::ssize_t width = 0;
  for (std::size_t i = 0; i < kRopeAxes; ++i) {
    tables.emplace_back(cos.at(i));
    tables.emplace_back(sin.at(i));
    args.axes[i] = {.cos = tables[2 * i].data<float>(),
                    .sin = tables[2 * i + 1].data<float>(),
                    .length = rows_of(tables[2 * i]),
                    .size = columns_of(tables[2 * i])};
    width += cos[i].shape(1);
  }
  const DeviceArray c({image_tokens + context_tokens, width}, DType::kFloat32);
  const DeviceArray s({image_tokens + context_tokens, width}, DType::kFloat32);
  args.grid_rows = grid_rows, args.grid_columns = grid_columns;
  args.image_tokens = image_tokens, args.context_tokens = context_tokens;
  args.cos = c.data<float>(), args.sin = s.data<float>();
  rope_table(args, nullptr);
  return py::make_tuple(c.download(), s.download());
}

// Row `row` of several tables [rows, ...], copied in one launch.
std::vector<py::array> run_copy_rows(const std::vector<py::array>& tables, int row) {
  CopyRows args;
  std::vector<DeviceArray> from, to;
  for (const py::array& table : tables) {
    if (args.count == CopyRows::kMost) throw std::invalid_argument("tables: too many");
    const auto count = static_cast<std::size_t>(table.size() / table.shape(0));
    from.emplace_back(table);
    to.emplace_back(std::vector<py::ssize_t>{static_cast<py::ssize_t>(count)}, DType::kFloat32);
    args.add(from.back().data<float>() + static_cast<std::size_t>(row) * count,
             to.back().data<float>(), count);
  }
  copy_rows(args, nullptr);
  std::vector<py::array> out;
  for (const DeviceArray& copied : to) out.push_back(copied.download());
  return out;
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("rms_norm", &run_rms_norm);
  m.def("residual_norm", &run_residual_norm);
  m.def("scaled_copy", &run_scaled_copy);
  m.def("scaled_add", &run_scaled_add);
  m.def("layer_norm", &run_layer_norm);
  m.def("qk_norm_rope", &run_qk_norm_rope);
  m.def("low_rank_update", &run_low_rank_update);
  m.def("swiglu", &run_swiglu);
  m.def("transpose", &run_transpose);
  m.def("patchify", &run_patchify);
  m.def("unpatchify", &run_unpatchify);
  m.def("sampler_update", &run_sampler_update);
  m.def("rope_table", &run_rope_table);
  m.def("copy_rows", &run_copy_rows);
}

}  // namespace zimage_rt

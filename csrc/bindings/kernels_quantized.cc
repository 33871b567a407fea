// 8-bit kernels over numpy arrays: for tests, and for benchmarks of single products.

#include <cuda_runtime_api.h>
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
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/few_rows_gemm_8bit.h"
#include "kernels/fused_gemm.h"
#include "kernels/mma_gemm_8bit.h"
#include "kernels/norm.h"
#include "kernels/patch_8bit.h"
#include "kernels/quantize_rows.h"
#include "kernels/swiglu.h"
#include "ops/linear.h"
#include "ops/linear_args.h"
#include "ops/ops.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

Rotation rotation_named(const std::string& name) {
  if (name == "none") return Rotation::kNone;
  if (name == "hadamard") return Rotation::kHadamard;
  if (name == "convrot") return Rotation::kConvRot;
  throw std::invalid_argument("rotation: expected none, hadamard or convrot, got " + name);
}

// Rows that a kernel quantises.
struct QuantizedOutput {
  DeviceArray data, scales;
  Rotation rotation;

  QuantizedOutput(py::ssize_t count, py::ssize_t columns, const std::string& dtype,
                  const std::string& rotation_name)
      : data({count, columns}, dtype_named(dtype)),
        scales({count}, DType::kFloat32),
        rotation(rotation_named(rotation_name)) {}
  QuantizedRows rows() const {
    return {.data = data.data(),
            .scales = scales.data<float>(),
            .dtype = data.dtype(),
            .rotation = rotation};
  }
  py::tuple download() const { return py::make_tuple(data.download(), scales.download()); }
};

py::tuple run_quantize_rows(const py::array& x, const std::string& dtype,
                            const std::string& rotation) {
  const DeviceArray in(x);
  const QuantizedOutput out(x.shape(0), x.shape(1), dtype, rotation);
  quantize_rows({.x = in.data(),
                 .type = in.dtype(),
                 .rows = rows_of(in),
                 .columns = columns_of(in),
                 .out = out.rows()},
                nullptr);
  return out.download();
}

// The matrix and its scales after a change, and whether a number was not finite.
py::tuple run_patch_8bit(const py::array& matrix, const py::array& scales,
                         const std::optional<py::array>& down, const py::array& up,
                         const std::string& rotation) {
  const DeviceArray stored(matrix), stored_scales(scales), u(up);
  const std::optional<DeviceArray> d = down ? std::optional<DeviceArray>(*down) : std::nullopt;
  const DeviceArray overflow(py::array_t<float>(std::vector<py::ssize_t>{1}));
  ZRT_CUDA(cudaMemset(overflow.data(), 0, sizeof(int)));
  patch_8bit({.matrix = stored.data(),
              .scales = stored_scales.data<float>(),
              .type = stored.dtype(),
              .rotation = rotation_named(rotation),
              .rows = rows_of(stored),
              .in = columns_of(stored),
              .rank = d ? rows_of(*d) : 0,
              .down = d ? d->data<float>() : nullptr,
              .up = u.data<float>(),
              .delta = d ? nullptr : u.data<float>(),
              .overflow = overflow.data<int>()},
             nullptr);
  int flag = 0;
  ZRT_CUDA(cudaMemcpy(&flag, overflow.data(), sizeof(int), cudaMemcpyDeviceToHost));
  return py::make_tuple(stored.download(), stored_scales.download(), flag != 0);
}

py::tuple run_swiglu_quantized(const py::array& gate_up, float gate_scale, float up_scale,
                               const std::string& dtype, const std::string& rotation) {
  const DeviceArray in(gate_up);
  const QuantizedOutput out(gate_up.shape(0), gate_up.shape(1) / 2, dtype, rotation);
  swiglu({.gate_up = in.data(),
          .out = nullptr,
          .type = in.dtype(),
          .rows = rows_of(in),
          .hidden = columns_of(out.data),
          .gate_scale = gate_scale,
          .up_scale = up_scale,
          .quantized = out.rows()},
         nullptr);
  return out.download();
}

py::tuple run_rms_norm_quantized(const py::array& x, const py::array& weight, float eps,
                                 const std::string& dtype, const std::string& rotation) {
  const DeviceArray in(x), w(weight);
  const QuantizedOutput out(x.shape(0), x.shape(1), dtype, rotation);
  rms_norm({.x = in.data<float>(),
            .weight = w.data<float>(),
            .out = nullptr,
            .type = DType::kBFloat16,
            .rows = rows_of(in),
            .dim = columns_of(in),
            .eps = eps,
            .quantized = out.rows()},
           nullptr);
  return out.download();
}

// Returns x, the quantised output and its scales.
py::tuple run_residual_norm_quantized(const py::array& x, const py::array& branch,
                                      const std::optional<py::array>& post, float post_eps,
                                      float branch_scale, const py::array& pre, float pre_eps,
                                      const std::string& dtype, const std::string& rotation) {
  const DeviceArray in(x), b(branch), pre_vector(pre);
  const QuantizedOutput out(x.shape(0), x.shape(1), dtype, rotation);
  std::optional<DeviceArray> post_vector;
  if (post) post_vector.emplace(*post);
  residual_norm({.x = in.data<float>(),
                 .branch = b.data(),
                 .post = post ? post_vector->data<float>() : nullptr,
                 .post_eps = post_eps,
                 .branch_scale = branch_scale,
                 .pre = pre_vector.data<float>(),
                 .pre_eps = pre_eps,
                 .out = nullptr,
                 .type = b.dtype(),
                 .rows = rows_of(in),
                 .dim = columns_of(in),
                 .quantized = out.rows()},
                nullptr);
  return py::make_tuple(in.download(), out.data.download(), out.scales.download());
}

// a [m, k] with scales [m], and a weight [n, k] with scales [n].
struct QuantizedOperands {
  DeviceArray a, a_scales, weight, weight_scales;

  QuantizedOperands(const py::array& left, const py::array& left_scales, const py::array& right,
                    const py::array& right_scales)
      : a(left), a_scales(left_scales), weight(right), weight_scales(right_scales) {}
  int m() const { return rows_of(a); }
  int n() const { return rows_of(weight); }

  FusedGemm fused(const DeviceArray& out, const std::string& cluster) const {
    return {.a = a.data(),
            .weight = weight.data(),
            .out = out.data(),
            .type = a.dtype(),
            .m = m(),
            .n = n(),
            .k = columns_of(a),
            .workspace = fused_workspace(),
            .layout = Layout::kOutIn,
            .cluster = cluster_named(cluster),
            .out_type = out.dtype(),
            .row_scales = a_scales.data<float>(),
            .column_scales = weight_scales.data<float>()};
  }
};

py::array run_gemm_8bit(const py::array& a, const py::array& a_scales, const py::array& weight,
                        const py::array& weight_scales, float alpha, const std::string& out_type,
                        const std::string& cluster) {
  const QuantizedOperands in(a, a_scales, weight, weight_scales);
  const DeviceArray out({in.m(), in.n()}, dtype_named(out_type));
  gemm_8bit(in.fused(out, cluster), alpha, nullptr);
  return out.download();
}

py::array run_gemm(void (*gemm)(const Gemm8bit&, cudaStream_t), const py::array& a,
                   const py::array& a_scales, const py::array& weight,
                   const py::array& weight_scales, float alpha, const std::string& out_type,
                   void* workspace) {
  const QuantizedOperands in(a, a_scales, weight, weight_scales);
  const DeviceArray out({in.m(), in.n()}, dtype_named(out_type));
  gemm({.a = in.a.data(),
        .row_scales = in.a_scales.data<float>(),
        .weight = in.weight.data(),
        .column_scales = in.weight_scales.data<float>(),
        .type = in.a.dtype(),
        .out = out.data(),
        .out_type = out.dtype(),
        .m = in.m(),
        .n = in.n(),
        .k = columns_of(in.a),
        .alpha = alpha,
        .workspace = workspace},
       nullptr);
  return out.download();
}

py::array run_mma_gemm_8bit(const py::array& a, const py::array& a_scales, const py::array& weight,
                            const py::array& weight_scales, float alpha,
                            const std::string& out_type, bool split) {
  return run_gemm(mma_gemm_8bit, a, a_scales, weight, weight_scales, alpha, out_type,
                  split ? split_workspace() : nullptr);
}

py::array run_few_rows_gemm_8bit(const py::array& a, const py::array& a_scales,
                                 const py::array& weight, const py::array& weight_scales,
                                 float alpha, const std::string& out_type) {
  return run_gemm(few_rows_gemm_8bit, a, a_scales, weight, weight_scales, alpha, out_type, nullptr);
}

py::array run_gemm_8bit_swiglu(const py::array& a, const py::array& a_scales,
                               const py::array& weight, const py::array& weight_scales, float scale,
                               const std::string& out_type, const std::string& cluster) {
  const QuantizedOperands in(a, a_scales, weight, weight_scales);
  const DeviceArray out({in.m(), in.n() / 2}, dtype_named(out_type));
  gemm_swiglu(in.fused(out, cluster), scale, nullptr);
  return out.download();
}

py::array run_gemm_8bit_qk_norm_rope(const py::array& a, const py::array& a_scales,
                                     const py::array& weight, const py::array& weight_scales,
                                     const std::optional<py::array>& q_weight,
                                     const std::optional<py::array>& k_weight, const py::array& cos,
                                     const py::array& sin, int q_heads, int k_heads, float eps,
                                     const std::string& out_type, const std::string& cluster) {
  const QuantizedOperands in(a, a_scales, weight, weight_scales);
  const DeviceArray c(cos), s(sin), out({in.m(), in.n()}, dtype_named(out_type));
  std::optional<DeviceArray> q, k;
  if (q_weight) q.emplace(*q_weight);
  if (k_weight) k.emplace(*k_weight);
  gemm_qk_norm_rope(in.fused(out, cluster),
                    {.q_weight = q ? q->data<float>() : nullptr,
                     .k_weight = k ? k->data<float>() : nullptr,
                     .cos = c.data<float>(),
                     .sin = s.data<float>(),
                     .q_heads = q_heads,
                     .k_heads = k_heads,
                     .eps = eps},
                    nullptr);
  return out.download();
}

// A linear layer of ops/linear.h on the device, to run and to time. The weight is [out, in]; if it
// has 8 bits, both operands have scales. `kind`: "linear", "swiglu" or "qk_norm_rope" with heads of
// 128, as many keys as queries, no norm and no angle. `fused` false: without our Hopper kernel.
// `quantize_output`: 8-bit operands, and the output is quantised as the next layer's input.
class LinearLayer {
 public:
  LinearLayer(const std::string& library, const std::string& kind, const py::array& x,
              const py::array& weight, const std::optional<py::array>& x_scales,
              const std::optional<py::array>& weight_scales, const std::string& out_type,
              const std::string& rotation, const std::string& weight_rotation, bool fused,
              bool quantize_output)
      : kind_(kind),
        x_(x),
        out_({x.shape(0), kind == "swiglu" ? weight.shape(0) / 2 : weight.shape(0)},
             dtype_named(out_type)),
        wide_({x.shape(0), weight.shape(0)}, dtype_named(out_type)),
        ops_{.gemm = library_gemm(library),
             .cudnn = nullptr,
             .stream = nullptr,
             .fused_workspace =
                 fused && fused_gemm_runs_here() ? zimage_rt::fused_workspace() : nullptr,
             .split_workspace = split_workspace()} {
    if (kind != "linear" && kind != "swiglu" && kind != "qk_norm_rope")
      throw std::invalid_argument("kind: expected linear, swiglu or qk_norm_rope, got " + kind);
    if (x_scales) x_scales_.emplace(*x_scales);
    if (weight_scales) weight_scales_.emplace(*weight_scales);
    rotation_ = rotation_named(rotation), weight_rotation_ = rotation_named(weight_rotation);
    int device = 0, cache = 0;
    ZRT_CUDA(cudaGetDevice(&device));
    ZRT_CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    // Several copies, so that a burst reads its weights from memory, as a model does.
    const auto copies = std::max(1L, 3L * cache / std::max<long>(1, weight.nbytes()));
    for (long i = 0; i < copies; ++i) weights_.emplace_back(weight);
    if (quantize_output) {
      quantized_.emplace(DeviceArray({x.shape(0), out_.shape(1)}, x_.dtype()));
      quantized_scales_.emplace(DeviceArray({x.shape(0)}, DType::kFloat32));
    }
    if (kind == "qk_norm_rope") {
      const std::vector<py::ssize_t> shape{x.shape(0), 64};
      py::array_t<float> cos(shape), sin(shape);
      std::fill_n(cos.mutable_data(), cos.size(), 1.0f);
      std::fill_n(sin.mutable_data(), sin.size(), 0.0f);
      cos_.emplace(cos), sin_.emplace(sin);
    }
  }

  py::array run() {
    launch();
    return out_.download();
  }
  // Milliseconds per call of a burst.
  float time(int burst) {
    const Event start, end;
    ZRT_CUDA(cudaEventRecord(start.get(), nullptr));
    for (int i = 0; i < burst; ++i) launch();
    ZRT_CUDA(cudaEventRecord(end.get(), nullptr));
    ZRT_CUDA(cudaEventSynchronize(end.get()));
    return end.since(start) / static_cast<float>(burst);
  }

 private:
  void launch() {
    const DeviceArray& weight = weights_[next_++ % weights_.size()];
    const int rows = rows_of(x_);
    const Matrix matrix{.data = weight.data(),
                        .dtype = weight.dtype(),
                        .layout = Layout::kOutIn,
                        .in = columns_of(weight),
                        .out = rows_of(weight),
                        .scales = weight_scales_ ? weight_scales_->data<float>() : nullptr,
                        .rotation = weight_rotation_};
    const QuantizedRows quantized{.data = x_.data(),
                                  .scales = x_scales_ ? x_scales_->data<float>() : nullptr,
                                  .dtype = x_.dtype(),
                                  .rotation = rotation_};
    if (kind_ == "swiglu") {
      linear_swiglu({.x = x_.data(),
                     .quantized = quantized,
                     .weight = matrix,
                     .gate_up = wide_.data(),
                     .out = out_.data(),
                     .type = out_.dtype(),
                     .rows = rows,
                     .gate_scale = 1.0f,
                     .up_scale = 1.0f},
                    ops_);
    } else if (kind_ == "qk_norm_rope") {
      const int heads = matrix.out / 128 / 3;
      linear_qk_norm_rope({.x = x_.data(),
                           .quantized = quantized,
                           .weight = matrix,
                           .qkv = out_.data(),
                           .type = out_.dtype(),
                           .rows = rows,
                           .q_norm = nullptr,
                           .k_norm = nullptr,
                           .cos = cos_->data<float>(),
                           .sin = sin_->data<float>(),
                           .heads = heads,
                           .kv_heads = heads,
                           .head_dim = 128,
                           .eps = 1e-5f},
                          ops_);
    } else {
      linear({.x = x_.data(),
              .quantized = quantized,
              .weight = matrix,
              .out = out_.data(),
              .out_type = out_.dtype(),
              .rows = rows},
             ops_);
    }
    if (quantized_)
      quantize_rows({.x = out_.data(),
                     .type = out_.dtype(),
                     .rows = rows,
                     .columns = columns_of(out_),
                     .out = {.data = quantized_->data(),
                             .scales = quantized_scales_->data<float>(),
                             .dtype = x_.dtype(),
                             .rotation = rotation_}},
                    nullptr);
  }

  std::string kind_;
  DeviceArray x_, out_, wide_;
  Ops ops_;
  std::optional<DeviceArray> x_scales_, weight_scales_, cos_, sin_, quantized_, quantized_scales_;
  Rotation rotation_ = Rotation::kNone, weight_rotation_ = Rotation::kNone;
  std::vector<DeviceArray> weights_;
  std::size_t next_ = 0;
};

}  // namespace

void bind_quantized(py::module_& m) {
  const auto a = py::arg("a"), a_scales = py::arg("a_scales"), weight = py::arg("weight"),
             weight_scales = py::arg("weight_scales"), out_type = py::arg("out_type");
  const auto cluster = py::arg("cluster") = "any";
  m.def("quantize_rows", &run_quantize_rows);
  m.def("patch_8bit", &run_patch_8bit);
  m.def("swiglu_quantized", &run_swiglu_quantized);
  m.def("rms_norm_quantized", &run_rms_norm_quantized);
  m.def("residual_norm_quantized", &run_residual_norm_quantized);
  m.def("gemm_8bit", &run_gemm_8bit, a, a_scales, weight, weight_scales, py::arg("alpha"), out_type,
        cluster);
  m.def("mma_gemm_8bit", &run_mma_gemm_8bit, a, a_scales, weight, weight_scales, py::arg("alpha"),
        out_type, py::arg("split") = true);
  m.def("few_rows_gemm_8bit", &run_few_rows_gemm_8bit, a, a_scales, weight, weight_scales,
        py::arg("alpha"), out_type);
  m.def("mma_gemm_8bit_runs_here",
        [](const std::string& dtype) { return mma_gemm_8bit_runs_here(dtype_named(dtype)); });
  m.def("gemm_8bit_swiglu", &run_gemm_8bit_swiglu, a, a_scales, weight, weight_scales,
        py::arg("scale"), out_type, cluster);
  m.def("gemm_8bit_qk_norm_rope", &run_gemm_8bit_qk_norm_rope, a, a_scales, weight, weight_scales,
        py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
        py::arg("q_heads"), py::arg("k_heads"), py::arg("eps"), out_type, cluster);
  py::class_<LinearLayer>(m, "LinearLayer")
      .def(py::init<const std::string&, const std::string&, const py::array&, const py::array&,
                    const std::optional<py::array>&, const std::optional<py::array>&,
                    const std::string&, const std::string&, const std::string&, bool, bool>(),
           py::arg("library"), py::arg("kind"), py::arg("x"), py::arg("weight"),
           py::arg("x_scales") = py::none(), py::arg("weight_scales") = py::none(),
           py::arg("out_type") = "bfloat16", py::arg("rotation") = "none",
           py::arg("weight_rotation") = "none", py::arg("fused") = true,
           py::arg("quantize_output") = false)
      .def("run", &LinearLayer::run)
      .def("time", &LinearLayer::time, py::arg("burst"));
}

}  // namespace zimage_rt

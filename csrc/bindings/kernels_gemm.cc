// Matrix products over numpy arrays: for tests.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/device_array.h"
#include "bindings/kernels.h"
#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "device/matrix.h"
#include "kernels/fused_gemm.h"
#include "kernels/mma_gemm_8bit.h"
#include "ops/cublaslt_gemm.h"
#include "ops/linear_args.h"

namespace py = pybind11;

namespace zimage_rt {

CublasLtGemm& library_gemm(const std::string& library) {
  static std::unique_ptr<CublasLtGemm> gemm;
  if (!gemm) gemm = std::make_unique<CublasLtGemm>(library, "");
  return *gemm;
}

void* fused_workspace() {
  static const DeviceBuffer workspace =
      DeviceBuffer::zeroed(fused_gemm_workspace_bytes(), "test workspace");
  return workspace.data();
}

void* split_workspace() {
  static const DeviceBuffer workspace =
      DeviceBuffer::zeroed(mma_gemm_8bit_workspace_bytes(), "test workspace");
  return workspace.data();
}

ClusterShape cluster_named(const std::string& name) {
  if (name == "2x1") return ClusterShape::k2x1;
  if (name == "1x2") return ClusterShape::k1x2;
  if (name == "any") return ClusterShape::kAny;
  throw std::invalid_argument("cluster: expected any, 2x1 or 1x2, got " + name);
}

namespace {

// a [m, k] and a weight [k, n], or [n, k] if `transposed`.
struct Operands {
  DeviceArray a, weight;
  Layout layout;
  ClusterShape cluster;

  Operands(const py::array& left, const py::array& right, bool transposed,
           const std::string& cluster_name = "any")
      : a(left),
        weight(right),
        layout(transposed ? Layout::kOutIn : Layout::kInOut),
        cluster(cluster_named(cluster_name)) {}
  int m() const { return rows_of(a); }
  int n() const { return layout == Layout::kOutIn ? rows_of(weight) : columns_of(weight); }
  int k() const { return columns_of(a); }
  DeviceArray output(int columns, DType type) const { return DeviceArray({m(), columns}, type); }

  LinearArgs linear(const DeviceArray& out) const {
    return {.x = a.data(),
            .weight = {.data = weight.data(),
                       .dtype = a.dtype(),
                       .layout = layout,
                       .in = k(),
                       .out = n()},
            .out = out.data(),
            .out_type = out.dtype(),
            .rows = m()};
  }
  FusedGemm fused(const DeviceArray& out) const {
    return {.a = a.data(),
            .weight = weight.data(),
            .out = out.data(),
            .type = a.dtype(),
            .m = m(),
            .n = n(),
            .k = k(),
            .workspace = fused_workspace(),
            .layout = layout,
            .cluster = cluster};
  }
};

py::array run_gemm(const std::string& library, const py::array& a, const py::array& weight,
                   const std::optional<py::array>& bias, float alpha, const std::string& out_type,
                   bool transposed) {
  const Operands in(a, weight, transposed);
  std::optional<DeviceArray> b;
  if (bias) b.emplace(*bias);
  const DeviceArray out = in.output(in.n(), dtype_named(out_type));
  LinearArgs args = in.linear(out);
  args.bias = b ? b->data<float>() : nullptr;
  args.alpha = alpha;
  library_gemm(library).run(args, nullptr);
  return out.download();
}

py::array run_gemm_swiglu(const py::array& a, const py::array& weight, float scale, bool transposed,
                          const std::string& cluster) {
  const Operands in(a, weight, transposed, cluster);
  const DeviceArray out = in.output(in.n() / 2, in.a.dtype());
  gemm_swiglu(in.fused(out), scale, nullptr);
  return out.download();
}

py::array run_gemm_qk_norm_rope(const py::array& a, const py::array& weight,
                                const std::optional<py::array>& q_weight,
                                const std::optional<py::array>& k_weight, const py::array& cos,
                                const py::array& sin, int q_heads, int k_heads, float eps,
                                bool transposed, const std::string& cluster) {
  const Operands in(a, weight, transposed, cluster);
  const DeviceArray c(cos), s(sin), out = in.output(in.n(), in.a.dtype());
  std::optional<DeviceArray> q, k;
  if (q_weight) q.emplace(*q_weight);
  if (k_weight) k.emplace(*k_weight);
  gemm_qk_norm_rope(in.fused(out),
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

}  // namespace

void bind_gemm(py::module_& m) {
  const auto transposed = py::arg("transposed") = false;
  const auto cluster = py::arg("cluster") = "any";
  m.def("gemm", &run_gemm, py::arg("library"), py::arg("a"), py::arg("weight"), py::arg("bias"),
        py::arg("alpha"), py::arg("out_type"), transposed);
  m.def("fused_gemm_runs_here", &fused_gemm_runs_here);
  m.def("gemm_swiglu", &run_gemm_swiglu, py::arg("a"), py::arg("weight"), py::arg("scale"),
        transposed, cluster);
  m.def("gemm_qk_norm_rope", &run_gemm_qk_norm_rope, py::arg("a"), py::arg("weight"),
        py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
        py::arg("q_heads"), py::arg("k_heads"), py::arg("eps"), transposed, cluster);
}

}  // namespace zimage_rt

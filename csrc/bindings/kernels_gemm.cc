// Matrix products over numpy arrays: for their tests.

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
#include "ops/cublaslt_gemm.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

Gemm& library_gemm(const std::string& library) {
  static std::unique_ptr<Gemm> gemm;
  if (!gemm) gemm = std::make_unique<Gemm>(library, "");
  return *gemm;
}

ClusterShape cluster_named(const std::string& name) {
  if (name == "2x1") return ClusterShape::k2x1;
  if (name == "1x2") return ClusterShape::k1x2;
  if (name == "any") return ClusterShape::kAny;
  throw std::invalid_argument("cluster: expected any, 2x1 or 1x2, got " + name);
}

// a [m, k] and a weight [k, n], or [n, k] where it is turned.
struct Operands {
  DeviceArray a, weight;
  bool turned;
  ClusterShape cluster;

  Operands(const py::array& left, const py::array& right, bool is_turned,
           const std::string& cluster_name = "any")
      : a(left), weight(right), turned(is_turned), cluster(cluster_named(cluster_name)) {}
  int m() const { return rows_of(a); }
  int n() const { return turned ? rows_of(weight) : columns_of(weight); }
  int k() const { return columns_of(a); }
  DeviceArray output(int columns, DType type) const { return DeviceArray({m(), columns}, type); }

  GemmArgs library(const DeviceArray& out) const {
    GemmArgs args{};
    args.a = a.data();
    args.weight = weight.data();
    args.out = out.data();
    args.type = a.dtype();
    args.out_type = out.dtype();
    args.m = m(), args.n = n(), args.k = k();
    args.turned = turned;
    return args;
  }
  FusedGemm fused(const DeviceArray& out) const {
    static const DeviceBuffer workspace = [] {
      DeviceBuffer buffer(fused_gemm_workspace_bytes(), "test workspace");
      ZRT_CUDA(cudaMemset(buffer.data(), 0, buffer.bytes()));
      return buffer;
    }();
    return {.a = a.data(),
            .weight = weight.data(),
            .out = out.data(),
            .type = a.dtype(),
            .m = m(),
            .n = n(),
            .k = k(),
            .workspace = workspace.data(),
            .layout = turned ? Layout::kOutIn : Layout::kInOut,
            .cluster = cluster};
  }
};

py::array run_gemm(const std::string& library, const py::array& a, const py::array& weight,
                   const std::optional<py::array>& bias, float alpha, const std::string& out_type,
                   bool turned) {
  const Operands in(a, weight, turned);
  std::optional<DeviceArray> b;
  if (bias) b.emplace(*bias);
  const DeviceArray out = in.output(in.n(), dtype_named(out_type));
  GemmArgs args = in.library(out);
  args.bias = b ? b->data<float>() : nullptr;
  args.alpha = alpha;
  library_gemm(library).run(args, nullptr);
  return out.download();
}

py::array run_gemm_swiglu(const py::array& a, const py::array& weight, float scale, bool turned,
                          const std::string& cluster) {
  const Operands in(a, weight, turned, cluster);
  const DeviceArray out = in.output(in.n() / 2, in.a.dtype());
  gemm_swiglu(in.fused(out), scale, nullptr);
  return out.download();
}

py::array run_gemm_qk_norm_rope(const py::array& a, const py::array& weight,
                                const std::optional<py::array>& q_weight,
                                const std::optional<py::array>& k_weight, const py::array& cos,
                                const py::array& sin, int q_heads, int k_heads, float eps,
                                bool turned, const std::string& cluster) {
  const Operands in(a, weight, turned, cluster);
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
  const auto turned = py::arg("turned") = false;
  const auto cluster = py::arg("cluster") = "any";
  m.def("gemm", &run_gemm, py::arg("library"), py::arg("a"), py::arg("weight"), py::arg("bias"),
        py::arg("alpha"), py::arg("out_type"), turned);
  m.def("fused_gemm_runs_here", &fused_gemm_runs_here);
  m.def("gemm_swiglu", &run_gemm_swiglu, py::arg("a"), py::arg("weight"), py::arg("scale"), turned,
        cluster);
  m.def("gemm_qk_norm_rope", &run_gemm_qk_norm_rope, py::arg("a"), py::arg("weight"),
        py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
        py::arg("q_heads"), py::arg("k_heads"), py::arg("eps"), turned, cluster);
}

}  // namespace zimage_rt

// Matrix products over numpy arrays: for their tests, and for timing one form against another.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/device_array.h"
#include "bindings/kernels.h"
#include "kernels/fused_gemm.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/swiglu.h"
#include "runtime/gemm.h"
#include "zimage_rt/check.h"
#include "zimage_rt/dtype.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

Gemm& library_gemm(const std::string& library) {
  static std::unique_ptr<Gemm> gemm;
  if (!gemm) gemm = std::make_unique<Gemm>(library, "");
  return *gemm;
}

ClusterShape cluster_named(const std::string& name) {
  if (name == "tall") return ClusterShape::kTall;
  if (name == "wide") return ClusterShape::kWide;
  if (name == "square") return ClusterShape::kSquare;
  if (name == "any") return ClusterShape::kAny;
  throw std::invalid_argument("cluster: expected any, tall, wide or square, got " + name);
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
    return {a.data(), weight.data(), out.data(),       a.dtype(), m(),
            n(),      k(),           workspace.data(), turned,    cluster};
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

py::array run_gemm_scaled(const py::array& a, const py::array& weight, float alpha, bool turned,
                          const std::string& cluster) {
  const Operands in(a, weight, turned, cluster);
  const DeviceArray out = in.output(in.n(), in.a.dtype());
  gemm_scaled(in.fused(out), alpha, nullptr);
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
                    {q ? q->data<float>() : nullptr, k ? k->data<float>() : nullptr,
                     c.data<float>(), s.data<float>(), q_heads, k_heads, eps},
                    nullptr);
  return out.download();
}

// The same work done by cuBLASLt and a kernel behind it, and in one: milliseconds of one call by
// name. They take turns of `burst` calls: in long ones the chip is at its power limit, as in a
// model. `heads` of 128 columns for queries, and as many for keys.
std::map<std::string, std::vector<float>> time_gemm(const std::string& library, const py::array& a,
                                                    const py::array& weight,
                                                    const std::string& what, int heads, int repeats,
                                                    int burst, bool turned,
                                                    const std::string& cluster) {
  const Operands in(a, weight, turned, cluster);
  const int rows = in.m(), columns = in.n();
  const DType type = in.a.dtype();
  const DeviceArray wide = in.output(columns, type), hidden = in.output(columns / 2, type);
  const DeviceArray cos({a.shape(0), 64}, DType::kFloat32), sin({a.shape(0), 64}, DType::kFloat32);
  const DeviceArray norm({128}, DType::kFloat32);
  for (const DeviceArray* array : {&cos, &sin})
    ZRT_CUDA(cudaMemset(array->data(), 0x3c, sizeof(float) * 64 * rows_of(*array)));
  ZRT_CUDA(cudaMemset(norm.data(), 0x3c, sizeof(float) * 128));
  Gemm& gemm = library_gemm(library);
  const GemmArgs args = in.library(wide);
  const FusedGemm fused = in.fused(wide);
  const float* const f = norm.data<float>();
  const auto after = [&] {
    if (what == "swiglu")
      swiglu({wide.data(), hidden.data(), type, rows, columns / 2, 1.0f, 1.0f}, nullptr);
    if (what == "qk_norm_rope")
      qk_norm_rope({wide.data(), columns, type, f, f, cos.data<float>(), sin.data<float>(), rows,
                    heads, heads, 128, 1e-5f},
                   nullptr);
  };
  const auto one = [&] {
    if (what == "swiglu")
      gemm_swiglu(fused, 1.0f, nullptr);
    else if (what == "qk_norm_rope")
      gemm_qk_norm_rope(fused, {f, f, cos.data<float>(), sin.data<float>(), heads, heads, 1e-5f},
                        nullptr);
    else
      gemm_scaled(fused, 1.0f, nullptr);
  };
  gemm.run(args, nullptr);
  const std::map<std::string, std::function<void()>> forms = {
      {"library", [&] { gemm.run(args, nullptr); }},
      {"library and kernel",
       [&] {
         gemm.run(args, nullptr);
         after();
       }},
      {"fused", one}};
  const Event start, stop;
  std::map<std::string, std::vector<float>> times;
  for (int turn = 0; turn < repeats + 1; ++turn)
    for (const auto& [name, work] : forms) {
      ZRT_CUDA(cudaEventRecord(start.get(), nullptr));
      for (int call = 0; call < burst; ++call) work();
      ZRT_CUDA(cudaEventRecord(stop.get(), nullptr));
      ZRT_CUDA(cudaEventSynchronize(stop.get()));
      if (turn > 0) times[name].push_back(stop.since(start) / static_cast<float>(burst));
    }
  return times;
}

}  // namespace

void bind_gemm(py::module_& m) {
  const auto turned = py::arg("turned") = false;
  const auto cluster = py::arg("cluster") = "any";
  m.def("gemm", &run_gemm, py::arg("library"), py::arg("a"), py::arg("weight"), py::arg("bias"),
        py::arg("alpha"), py::arg("out_type"), turned);
  m.def("fused_gemm_runs_here", &fused_gemm_runs_here);
  m.def("gemm_scaled", &run_gemm_scaled, py::arg("a"), py::arg("weight"), py::arg("alpha"), turned,
        cluster);
  m.def("gemm_swiglu", &run_gemm_swiglu, py::arg("a"), py::arg("weight"), py::arg("scale"), turned,
        cluster);
  m.def("gemm_qk_norm_rope", &run_gemm_qk_norm_rope, py::arg("a"), py::arg("weight"),
        py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
        py::arg("q_heads"), py::arg("k_heads"), py::arg("eps"), turned, cluster);
  m.def("time_gemm", &time_gemm, py::arg("library"), py::arg("a"), py::arg("weight"),
        py::arg("what"), py::arg("heads"), py::arg("repeats"), py::arg("burst"), turned, cluster);
}

}  // namespace zimage_rt

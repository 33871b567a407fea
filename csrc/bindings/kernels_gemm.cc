// Matrix products over numpy arrays: for their tests, and for timing one form against another.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>

#include "bindings/device_array.h"
#include "bindings/kernels.h"
#include "kernels/fused_gemm.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/swiglu.h"
#include "runtime/gemm.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

Gemm& library_gemm(const std::string& library) {
  static std::unique_ptr<Gemm> gemm;
  if (!gemm) gemm = std::make_unique<Gemm>(library, "");
  return *gemm;
}

GemmArgs library_args(const DeviceArray& a, const DeviceArray& weight, const DeviceArray& out) {
  GemmArgs args{};
  args.a = a.data();
  args.weight = weight.data();
  args.out = out.data();
  args.type = a.dtype();
  args.out_type = out.dtype();
  args.m = rows_of(a), args.n = columns_of(weight), args.k = columns_of(a);
  return args;
}

FusedGemm fused_args(const DeviceArray& a, const DeviceArray& weight, const DeviceArray& out) {
  static const DeviceBuffer workspace = [] {
    DeviceBuffer buffer(fused_gemm_workspace_bytes(), "test workspace");
    ZRT_CUDA(cudaMemset(buffer.data(), 0, buffer.bytes()));
    return buffer;
  }();
  return {a.data(),   weight.data(),      out.data(),    a.dtype(),
          rows_of(a), columns_of(weight), columns_of(a), workspace.data()};
}

py::array run_gemm(const std::string& library, const py::array& a, const py::array& weight,
                   const std::optional<py::array>& bias, float alpha, const std::string& out_type) {
  const DeviceArray in(a), w(weight);
  std::optional<DeviceArray> b;
  if (bias) b.emplace(*bias);
  const DeviceArray out({a.shape(0), weight.shape(1)}, dtype_named(out_type));
  GemmArgs args = library_args(in, w, out);
  args.bias = b ? b->data<float>() : nullptr;
  args.alpha = alpha;
  library_gemm(library).run(args, nullptr);
  return out.download();
}

py::array run_gemm_scaled(const py::array& a, const py::array& weight, float alpha) {
  const DeviceArray in(a), w(weight), out({a.shape(0), weight.shape(1)}, in.dtype());
  gemm_scaled(fused_args(in, w, out), alpha, nullptr);
  return out.download();
}

py::array run_gemm_swiglu(const py::array& a, const py::array& weight, float scale) {
  const DeviceArray in(a), w(weight), out({a.shape(0), weight.shape(1) / 2}, in.dtype());
  gemm_swiglu(fused_args(in, w, out), scale, nullptr);
  return out.download();
}

py::array run_gemm_qk_norm_rope(const py::array& a, const py::array& weight,
                                const std::optional<py::array>& q_weight,
                                const std::optional<py::array>& k_weight, const py::array& cos,
                                const py::array& sin, int q_heads, int k_heads, float eps) {
  const DeviceArray in(a), w(weight), c(cos), s(sin);
  const DeviceArray out({a.shape(0), weight.shape(1)}, in.dtype());
  std::optional<DeviceArray> q, k;
  if (q_weight) q.emplace(*q_weight);
  if (k_weight) k.emplace(*k_weight);
  gemm_qk_norm_rope(fused_args(in, w, out),
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
                                                    int burst) {
  const DeviceArray in(a), w(weight), wide({a.shape(0), weight.shape(1)}, in.dtype());
  const DeviceArray hidden({a.shape(0), weight.shape(1) / 2}, in.dtype());
  const DeviceArray cos({a.shape(0), 64}, DType::kFloat32), sin({a.shape(0), 64}, DType::kFloat32);
  const DeviceArray norm({128}, DType::kFloat32);
  for (const DeviceArray* array : {&cos, &sin})
    ZRT_CUDA(cudaMemset(array->data(), 0x3c, sizeof(float) * 64 * rows_of(*array)));
  ZRT_CUDA(cudaMemset(norm.data(), 0x3c, sizeof(float) * 128));
  Gemm& gemm = library_gemm(library);
  const GemmArgs args = library_args(in, w, wide);
  const FusedGemm fused = fused_args(in, w, wide);
  const int rows = rows_of(in), columns = columns_of(w);
  const float* const f = norm.data<float>();
  const auto after = [&] {
    if (what == "swiglu")
      swiglu({wide.data(), hidden.data(), in.dtype(), rows, columns / 2, 1.0f, 1.0f}, nullptr);
    if (what == "qk_norm_rope")
      qk_norm_rope({wide.data(), columns, in.dtype(), f, f, cos.data<float>(), sin.data<float>(),
                    rows, heads, heads, 128, 1e-5f},
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
  m.def("gemm", &run_gemm);
  m.def("fused_gemm_runs_here", &fused_gemm_runs_here);
  m.def("gemm_scaled", &run_gemm_scaled);
  m.def("gemm_swiglu", &run_gemm_swiglu);
  m.def("gemm_qk_norm_rope", &run_gemm_qk_norm_rope);
  m.def("time_gemm", &time_gemm);
}

}  // namespace zimage_rt

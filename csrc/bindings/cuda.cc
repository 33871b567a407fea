// _cuda: the CUDA backend for Python. Arguments are checked here, once; the pipeline trusts them.

#include <cuda_profiler_api.h>
#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/module_config.h"
#include "bindings/sample_job.h"
#include "cpu/guidance.h"
#include "device/check.h"
#include "device/dtype.h"
#include "models/controlnet.h"
#include "models/full_vae.h"
#include "models/reference.h"
#include "models/text_encoder.h"
#include "models/transformer.h"
#include "models/vae.h"
#include "runtime/pipeline.h"
#include "weights/weights.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

using IdArray = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using PixelArray = py::array_t<std::uint8_t>;

int size_at(const py::array& array, int axis) { return static_cast<int>(array.shape(axis)); }

void expect_dims(const py::array& array, int dims, const char* what) {
  if (array.ndim() != dims || array.size() == 0)
    throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(dims) +
                                " dimensions, none of them empty");
}

DType parse_dtype(const std::string& name) {
  if (name == "F32") return DType::kFloat32;
  if (name == "F16") return DType::kFloat16;
  if (name == "BF16") return DType::kBFloat16;
  if (name == "I8") return DType::kInt8;
  if (name == "F8_E4M3") return DType::kFloat8;
  throw std::invalid_argument("dtype: expected F32, F16, BF16, I8 or F8_E4M3, got " + name);
}

// tensors: (name, dtype, shape, offset, stays on the host).
using TensorTuple =
    std::tuple<std::string, std::string, std::vector<std::int64_t>, std::size_t, bool>;

std::unique_ptr<Weights> open_weights(const std::string& path,
                                      const std::vector<TensorTuple>& tensors, bool takes_fp32) {
  std::vector<WeightEntry> entries;
  for (const auto& [name, dtype, shape, offset, host] : tensors)
    entries.push_back({.name = name,
                       .dtype = parse_dtype(dtype),
                       .shape = shape,
                       .offset = offset,
                       .host = host});
  return std::make_unique<Weights>(path, std::move(entries), takes_fp32);
}

// Runs `work` without Python's lock.
template <typename Work>
void released(Work&& work) {
  const py::gil_scoped_release release;
  work();
}

FloatArray encode(Pipeline& self, const IdArray& input_ids, int hidden_size) {
  expect_dims(input_ids, 2, "input_ids");
  const int batch = size_at(input_ids, 0), tokens = size_at(input_ids, 1);
  FloatArray out({batch, tokens, hidden_size});
  const std::int64_t* ids = input_ids.data();
  float* data = out.mutable_data();
  released([&] {
    for (int i = 0; i < batch; ++i)
      self.encode(ids + static_cast<std::size_t>(i) * tokens, tokens,
                  data + static_cast<std::size_t>(i) * tokens * hidden_size);
  });
  return out;
}

FloatArray refine(Pipeline& self, const FloatArray& embeds) {
  expect_dims(embeds, 3, "prompt_embeds");
  const int batch = size_at(embeds, 0), tokens = size_at(embeds, 1), rows = padded_tokens(tokens);
  FloatArray out({batch, rows, self.dim()});
  const float* in = embeds.data();
  float* data = out.mutable_data();
  const std::size_t in_size = static_cast<std::size_t>(tokens) * size_at(embeds, 2);
  const std::size_t out_size = static_cast<std::size_t>(rows) * self.dim();
  released([&] {
    for (int i = 0; i < batch; ++i) self.refine(in + i * in_size, tokens, data + i * out_size);
  });
  return out;
}

FloatArray context(Pipeline& self, const IdArray& input_ids) {
  expect_dims(input_ids, 2, "input_ids");
  if (size_at(input_ids, 0) != 1) throw std::invalid_argument("input_ids: expected one prompt");
  const int tokens = size_at(input_ids, 1);
  FloatArray out({1, padded_tokens(tokens), self.dim()});
  const std::int64_t* ids = input_ids.data();
  float* data = out.mutable_data();
  released([&] { self.context(ids, tokens, data); });
  return out;
}

// Throws unless `control` fits these latents.
void expect_control(const Pipeline& self, const FloatArray& control, const py::array& latents) {
  expect_dims(control, 4, "control_latents");
  if (size_at(control, 0) != size_at(latents, 0) ||
      size_at(control, 1) != self.control_channels() ||
      size_at(control, 2) != size_at(latents, 2) || size_at(control, 3) != size_at(latents, 3))
    throw std::invalid_argument("control_latents: expected [batch, " +
                                std::to_string(self.control_channels()) +
                                ", latent_height, latent_width] like latents");
}

FloatArray evaluate(Pipeline& self, const FloatArray& latents, const FloatArray& timestep,
                    const FloatArray& contexts, const std::optional<FloatArray>& control_latents,
                    const std::optional<FloatArray>& control_scale) {
  expect_dims(latents, 4, "latents");
  expect_dims(timestep, 1, "timestep");
  expect_dims(contexts, 3, "context");
  const int batch = size_at(latents, 0), rows = size_at(contexts, 1);
  if (size_at(timestep, 0) != batch || size_at(contexts, 0) != batch ||
      rows % kSequenceMultiple != 0 || size_at(contexts, 2) != self.dim())
    throw std::invalid_argument("latents, timestep, context: their shapes do not belong together");
  if (control_latents) expect_control(self, *control_latents, latents);
  if (control_latents.has_value() != control_scale.has_value() ||
      (control_scale && control_scale->size() != batch))
    throw std::invalid_argument("control_scale: expected one per sample, with control_latents");
  FloatArray out(std::vector<py::ssize_t>(latents.shape(), latents.shape() + 4));
  const float *x = latents.data(), *t = timestep.data(), *c = contexts.data();
  float* data = out.mutable_data();
  const int height = size_at(latents, 2), width = size_at(latents, 3);
  const std::size_t sample = static_cast<std::size_t>(latents.size()) / batch;
  const std::size_t context_size = static_cast<std::size_t>(rows) * self.dim();
  const float* const control = control_latents ? control_latents->data() : nullptr;
  const float* const scales = control_scale ? control_scale->data() : nullptr;
  const std::size_t control_size = control_latents ? control_latents->size() / batch : 0;
  released([&] {
    // Samples at one timestep, and under one scale, run together.
    for (int first = 0, last = 0; first < batch; first = last) {
      while (last < batch && t[last] == t[first] &&
             (scales == nullptr || scales[last] == scales[first]))
        ++last;
      std::optional<Control> part;
      if (control != nullptr)
        part = Control{.latents = control + first * control_size, .scale = scales[first]};
      self.evaluate(x + first * sample, height, width, t[first], c + first * context_size,
                    std::vector<int>(static_cast<std::size_t>(last - first), rows), part,
                    data + first * sample);
    }
  });
  return out;
}

void expect_channels(const FloatArray& latents, const Vae& vae) {
  if (size_at(latents, 1) != vae.latent_channels())
    throw std::invalid_argument("latents: expected " + std::to_string(vae.latent_channels()) +
                                " channels, got " + std::to_string(size_at(latents, 1)));
}

FloatArray decode(Pipeline& self, const FloatArray& latents, const std::string& module) {
  expect_dims(latents, 4, "latents");
  const int batch = size_at(latents, 0), height = size_at(latents, 2), width = size_at(latents, 3);
  const int factor = self.vae(module).factor();
  expect_channels(latents, self.vae(module));
  FloatArray out({batch, 3, height * factor, width * factor});
  const float* in = latents.data();
  float* data = out.mutable_data();
  released([&] { self.decode(module, in, batch, height, width, data); });
  return out;
}

PixelArray decode_pixels(Pipeline& self, const FloatArray& latents, const std::string& module) {
  expect_dims(latents, 4, "latents");
  const int batch = size_at(latents, 0), height = size_at(latents, 2), width = size_at(latents, 3);
  const int factor = self.vae(module).factor();
  expect_channels(latents, self.vae(module));
  PixelArray out({batch, height * factor, width * factor, 3});
  const float* in = latents.data();
  std::uint8_t* data = out.mutable_data();
  released([&] { self.decode_pixels(module, in, batch, height, width, data); });
  return out;
}

// Latents of an image with these axes of height, width and channels.
template <typename Array, typename Encode>
FloatArray encode_with(const Vae& vae, const Array& image, int height_axis, int width_axis,
                       int channel_axis, Encode&& encode) {
  expect_dims(image, 4, "image");
  const int batch = size_at(image, 0), factor = vae.factor();
  const int height = size_at(image, height_axis), width = size_at(image, width_axis);
  if (size_at(image, channel_axis) != 3 || height % factor != 0 || width % factor != 0)
    throw std::invalid_argument("image: expected 3 channels, height and width multiples of " +
                                std::to_string(factor));
  FloatArray out({batch, vae.latent_channels(), height / factor, width / factor});
  const auto* in = image.data();
  float* data = out.mutable_data();
  released([&] { encode(in, batch, height, width, data); });
  return out;
}

// image [batch, 3, height, width] in [-1, 1].
FloatArray encode_image(Pipeline& self, const FloatArray& image, const std::string& module) {
  return encode_with(self.vae(module), image, 2, 3, 1,
                     [&](const float* in, int batch, int height, int width, float* out) {
                       self.encode_image(module, in, batch, height, width, out);
                     });
}

// image uint8 [batch, height, width, 3].
FloatArray encode_pixels(Pipeline& self, const py::array_t<std::uint8_t, py::array::c_style>& image,
                         const std::string& module) {
  return encode_with(self.vae(module), image, 1, 2, 3,
                     [&](const std::uint8_t* in, int batch, int height, int width, float* out) {
                       self.encode_pixels(module, in, batch, height, width, out);
                     });
}

// The conditioning of a SampleJob. `arrays` receives what owns the memory.
Conditioning read_conditioning(const Pipeline& self, const py::object& object, const SampleJob& job,
                               std::vector<py::array>& arrays) {
  const py::object conditioning = object.attr("conditioning");
  const auto read = [&](const char* name) {
    std::vector<Context> contexts;
    for (const py::handle item : conditioning.attr(name)) {
      const FloatArray context = FloatArray::ensure(item);
      if (!context || context.ndim() != 3 || context.size() == 0 || context.shape(0) != 1 ||
          context.shape(2) != self.dim())
        throw std::invalid_argument("context: expected [1, context_tokens, dim]");
      contexts.push_back({.data = context.data(), .tokens = size_at(context, 1)});
      arrays.push_back(context);
    }
    return contexts;
  };
  Conditioning out{.contexts = read("contexts"), .negatives = read("negatives"), .control = {}};
  if (out.contexts.size() != static_cast<std::size_t>(job.shape.batch) ||
      (!out.negatives.empty() && out.negatives.size() != out.contexts.size()))
    throw std::invalid_argument("latents, contexts, negatives: expected one context per sample");
  if (job.guidance.ever() && out.negatives.empty())
    throw std::invalid_argument("negatives: expected one per sample, since the guidance is on");
  const py::object control = conditioning.attr("control");
  if (!control.is_none()) {
    const FloatArray latents = float_attribute(control, "latents");
    expect_control(self, latents, arrays.front());
    out.control = Control{.latents = latents.data(), .scale = control.attr("scale").cast<float>()};
    arrays.push_back(latents);
  }
  return out;
}

// Runs a SampleJob of zimage_rt/backends/base.py. `decoder` is a module, None for none. Returns
// None if the callback stopped the loop, otherwise the pixels (True without a decoder) and the
// seconds of the loop and of the decoder.
py::object sample_job(Pipeline& self, const py::object& object,
                      const std::optional<std::string>& decoder) {
  JobReader reader = read_job(object);
  const SampleJob& job = reader.job;
  const Conditioning conditioning = read_conditioning(self, object, job, reader.arrays);
  py::object result = py::bool_(true);
  std::uint8_t* target = nullptr;
  if (decoder) {
    const int factor = self.vae(*decoder).factor();
    PixelArray pixels({job.shape.batch, job.shape.height * factor, job.shape.width * factor, 3});
    target = pixels.mutable_data();
    result = std::move(pixels);
  }
  SampleTimes times;
  bool finished = false;
  released([&] { finished = self.sample(job, conditioning, decoder.value_or(""), target, times); });
  if (!finished) return py::none();
  return py::make_tuple(std::move(result), times.denoise, times.decode);
}

// patches: (tensor, first column, down [rank, rows], up [rank, columns]), or, with None as down, a
// dense `up` [rows, columns]. With `add`, earlier patches stay.
void patch(
    Pipeline& self, const std::string& module,
    const std::vector<std::tuple<std::string, std::int64_t, std::optional<FloatArray>, FloatArray>>&
        patches,
    bool add) {
  std::vector<WeightPatch> views;
  for (const auto& [tensor, first_column, down, up] : patches) {
    expect_dims(up, 2, "up");
    if (!down) {
      views.push_back({.tensor = tensor,
                       .first_column = first_column,
                       .rank = 0,
                       .rows = size_at(up, 0),
                       .columns = size_at(up, 1),
                       .down = nullptr,
                       .up = up.data()});
      continue;
    }
    expect_dims(*down, 2, "down");
    if (size_at(*down, 0) != size_at(up, 0))
      throw std::invalid_argument("down, up: expected the same rank");
    views.push_back({.tensor = tensor,
                     .first_column = first_column,
                     .rank = size_at(*down, 0),
                     .rows = size_at(*down, 1),
                     .columns = size_at(up, 1),
                     .down = down->data(),
                     .up = up.data()});
  }
  released([&] { self.patch(module, views, add); });
}

py::dict memory(Pipeline& self) {
  // A request that runs holds the pipeline's lock and needs Python's for its callback.
  MemoryUse use{};
  released([&] { use = self.memory(); });
  py::dict out;
  out["weights"] = use.weights;
  out["workspace"] = use.workspace;
  out["graphs"] = use.graphs;
  out["free"] = use.free;
  out["total"] = use.total;
  return out;
}

py::dict streaming(Pipeline& self) {
  Streaming use{};
  released([&] { use = self.streaming(); });
  py::dict out;
  out["layers"] = use.layers;
  out["host_bytes"] = use.host_bytes;
  return out;
}

py::dict device_info(int device) {
  cudaDeviceProp properties{};
  ZRT_CUDA(cudaGetDeviceProperties(&properties, device));
  py::dict out;
  out["name"] = std::string(properties.name);
  out["compute_capability"] = py::make_tuple(properties.major, properties.minor);
  out["total_memory"] = properties.totalGlobalMem;
  return out;
}

// 0 without a driver, too: this module can be imported anywhere.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string device_problem() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? (count > 0 ? "" : "no GPU") : cudaGetErrorString(status);
}

void bind_pipeline(py::module_& m) {
  py::class_<Pipeline>(m, "Pipeline")
      .def(py::init([](int device, std::string cublaslt, std::string cudnn, std::string cache_file,
                       std::size_t memory_limit, bool keep_text_encoder, bool fused_gemm) {
             const py::gil_scoped_release release;
             return Pipeline::make({.device = device,
                                    .cublaslt = std::move(cublaslt),
                                    .cudnn = std::move(cudnn),
                                    .cache_file = std::move(cache_file),
                                    .memory_limit = memory_limit,
                                    .keep_text_encoder = keep_text_encoder,
                                    .fused_gemm = fused_gemm});
           }),
           py::kw_only(), py::arg("device"), py::arg("cublaslt"), py::arg("cudnn"),
           py::arg("cache_file"), py::arg("memory_limit"), py::arg("keep_text_encoder"),
           py::arg("fused_gemm"))
      .def(
          "load",
          [](Pipeline& self, const std::string& module, const std::string& path,
             const std::vector<TensorTuple>& tensors, const py::dict& config) {
            const ModuleConfig sizes = module_config(module, config);
            auto weights =
                open_weights(path, tensors, std::holds_alternative<FullVaeConfig>(sizes));
            released([&] { self.load(module, std::move(weights), sizes); });
          },
          py::arg("module"), py::arg("path"), py::arg("tensors"), py::arg("config"))
      .def("patch", &patch, py::arg("module"), py::arg("patches"), py::arg("add") = false)
      .def("encode", &encode, py::arg("input_ids"), py::arg("hidden_size"))
      .def("refine", &refine, py::arg("prompt_embeds"))
      .def("context", &context, py::arg("input_ids"))
      .def("evaluate", &evaluate, py::arg("latents"), py::arg("timestep"), py::arg("context"),
           py::arg("control_latents") = py::none(), py::arg("control_scale") = py::none())
      .def("decode", &decode, py::arg("latents"), py::arg("module"))
      .def("decode_pixels", &decode_pixels, py::arg("latents"), py::arg("module"))
      .def("encode_image", &encode_image, py::arg("image"), py::arg("module"))
      .def("encode_pixels", &encode_pixels, py::arg("image"), py::arg("module"))
      .def("sample", &sample_job, py::arg("job"), py::kw_only(), py::arg("decoder"))
      .def("time_evaluation", &Pipeline::time_evaluation, py::arg("latent_height"),
           py::arg("latent_width"), py::arg("context_tokens"), py::arg("repeats"),
           py::call_guard<py::gil_scoped_release>())
      .def("time_text_encoder", &Pipeline::time_text_encoder, py::arg("tokens"), py::arg("repeats"),
           py::call_guard<py::gil_scoped_release>())
      .def("time_decode", &Pipeline::time_decode, py::arg("module"), py::arg("latent_height"),
           py::arg("latent_width"), py::arg("repeats"), py::call_guard<py::gil_scoped_release>())
      .def("time_encode", &Pipeline::time_encode, py::arg("module"), py::arg("latent_height"),
           py::arg("latent_width"), py::arg("repeats"), py::call_guard<py::gil_scoped_release>())
      .def("memory", &memory)
      .def("streaming", &streaming)
      .def_property_readonly("graph_count", &Pipeline::graph_count);
}

}  // namespace
}  // namespace zimage_rt

PYBIND11_MODULE(_cuda, m) {
  using namespace zimage_rt;
  m.doc() = "The CUDA backend of zimage_rt.";
  const auto error = py::register_local_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  py::register_local_exception<OutOfMemoryError>(m, "OutOfMemoryError", error);
  py::register_local_exception<HostMemoryError>(m, "HostMemoryError", error);
  py::register_local_exception<WeightError>(m, "WeightError", PyExc_RuntimeError);
  py::register_local_exception<RangeError>(m, "RangeError", PyExc_RuntimeError);
  py::register_local_exception<NotFiniteError>(m, "NotFiniteError", PyExc_RuntimeError);
  // A type of its own, to tell it from a ValueError raised by a callback.
  py::register_local_exception<std::invalid_argument>(m, "ArgumentError", PyExc_ValueError);
  m.def("device_count", &device_count);
  m.def("device_problem", &device_problem);
  m.def("device_info", &device_info, py::arg("device"));
  m.def(
      "profiler", [](bool on) { ZRT_CUDA(on ? cudaProfilerStart() : cudaProfilerStop()); },
      py::arg("on"));
  m.attr("architectures") = ZIMAGE_RT_CUDA_ARCHITECTURES;

  bind_pipeline(m);
}

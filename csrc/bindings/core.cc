// _core: the CPU runtime for Python. Arguments are checked here, once; the runtime below trusts
// them.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/sample_job.h"
#include "cpu/paste.h"
#include "cpu/processor.h"
#include "cpu/rng.h"
#include "cpu/sampler.h"
#include "cpu/step_noise.h"

namespace py = pybind11;
namespace zrt = zimage_rt;

namespace {

using zrt::FloatArray;
using zrt::shape_of;
using PixelArray = py::array_t<std::uint8_t, py::array::c_style>;

// A numpy view of memory that C++ owns. The capsule, which frees nothing, keeps numpy from copying.
FloatArray view(const float* data, std::vector<py::ssize_t> shape, bool writeable) {
  FloatArray array(std::move(shape), data, py::capsule(data, [](void*) {}));
  if (!writeable) array.attr("flags").attr("writeable") = false;
  return array;
}

// A Denoiser whose predict is a Python callable (latents, timestep, guided, noise_pred) over numpy
// views.
class PythonDenoiser final : public zrt::Denoiser {
 public:
  PythonDenoiser(py::function predict, std::vector<py::ssize_t> shape)
      : predict_(std::move(predict)), shape_(std::move(shape)) {}

  void predict(const float* latents, float timestep, bool guided, float* noise_pred) override {
    py::gil_scoped_acquire gil;
    std::vector<py::ssize_t> out_shape = shape_;
    if (guided) out_shape[0] *= 2;
    predict_(view(latents, shape_, false), timestep, guided, view(noise_pred, out_shape, true));
  }

 private:
  py::function predict_;
  std::vector<py::ssize_t> shape_;
};

FloatArray randn(std::uint64_t seed, std::vector<py::ssize_t> shape) {
  FloatArray out(shape);
  {
    float* data = out.mutable_data();
    const std::size_t count = static_cast<std::size_t>(out.size());
    py::gil_scoped_release release;
    zrt::randn(seed, data, count);
  }
  return out;
}

// seeds.size() stretches of `shape` for each of `count` draws.
template <typename Draw>
FloatArray draw_noise(const std::vector<std::uint64_t>& seeds, std::size_t count,
                      std::vector<py::ssize_t> shape, Draw&& draw) {
  if (seeds.empty()) throw std::invalid_argument("seeds: expected one or more");
  std::size_t size = 1;
  for (const py::ssize_t axis : shape) size *= static_cast<std::size_t>(axis);
  shape.insert(shape.begin(),
               {static_cast<py::ssize_t>(count), static_cast<py::ssize_t>(seeds.size())});
  FloatArray out(shape);
  float* const data = out.mutable_data();
  const py::gil_scoped_release release;
  draw(size, data);
  return out;
}

FloatArray stream_noise(const std::vector<std::uint64_t>& seeds, std::size_t draws,
                        const std::vector<py::ssize_t>& shape) {
  return draw_noise(seeds, draws, shape, [&](std::size_t size, float* out) {
    zrt::stream_noise(seeds, draws, size, out);
  });
}

FloatArray brownian_noise(const std::vector<std::uint64_t>& seeds, double low, double high,
                          const std::vector<std::pair<double, double>>& intervals,
                          const std::vector<py::ssize_t>& shape) {
  if (!(low < high)) throw std::invalid_argument("low and high: expected a range");
  return draw_noise(seeds, intervals.size(), shape, [&](std::size_t size, float* out) {
    zrt::brownian_noise(seeds, {low, high}, intervals, size, out);
  });
}

// Runs the loop of a SampleJob (zimage_rt/backends/base.py), whose conditioning `predict` knows.
bool sample(py::function predict, const py::object& job) {
  const zrt::JobReader reader = zrt::read_job(job);
  PythonDenoiser denoiser(std::move(predict), shape_of(reader.arrays.front()));
  const py::gil_scoped_release release;
  return zrt::sample(denoiser, reader.job);
}

// drawn [batch, height, width, 3], original [height, width, 3], mask [height, width].
PixelArray paste(const PixelArray& drawn, const PixelArray& original, const PixelArray& mask) {
  if (drawn.ndim() != 4 || mask.ndim() != 2 || drawn.shape(1) != mask.shape(0) ||
      drawn.shape(2) != mask.shape(1) || drawn.shape(3) != 3 ||
      shape_of(original) != std::vector<py::ssize_t>{mask.shape(0), mask.shape(1), 3})
    throw std::invalid_argument(
        "drawn [batch, height, width, 3], original [height, width, 3] and mask [height, width]: "
        "their sizes do not belong together");
  PixelArray out(shape_of(drawn));
  const auto pixels = static_cast<std::size_t>(mask.size()), size = 3 * pixels;
  const std::uint8_t* const from = drawn.data();
  std::uint8_t* const to = out.mutable_data();
  const py::gil_scoped_release release;
  for (std::size_t b = 0; b < static_cast<std::size_t>(drawn.shape(0)); ++b)
    zrt::paste(from + b * size, original.data(), mask.data(), pixels, to + b * size);
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The CPU runtime of zimage_rt: noise, pasting and the sampler loop in C++.";
  // The reason why _cuda was not built; empty if it was.
  m.attr("cuda_skipped") = ZIMAGE_RT_CUDA_SKIPPED;
  m.def("multiplies_bytes_exactly", &zrt::multiplies_bytes_exactly);
  m.def("randn", &randn, py::arg("seed"), py::arg("shape"));
  m.def("stream_noise", &stream_noise, py::arg("seeds"), py::arg("draws"), py::arg("shape"));
  m.def("brownian_noise", &brownian_noise, py::arg("seeds"), py::arg("low"), py::arg("high"),
        py::arg("intervals"), py::arg("shape"));
  m.def("paste", &paste, py::arg("drawn"), py::arg("original"), py::arg("mask"));
  m.def("sample", &sample, py::arg("predict"), py::arg("job"));
}

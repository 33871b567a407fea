#include "bindings/sample_job.h"

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/guidance.h"
#include "cpu/sampler.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

// The latents after a step, readable from any thread until its callback returns.
class StepLatents {
 public:
  StepLatents(std::function<void(float*)> read, std::vector<py::ssize_t> shape)
      : read_(std::move(read)), shape_(std::move(shape)) {}

  // A read-only copy.
  FloatArray copy() {
    FloatArray array(shape_);
    float* const target = array.mutable_data();
    {
      const py::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!read_)
        throw std::runtime_error(
            "latents: asked for when the callback had returned; ask for them inside of it");
      read_(target);
    }
    array.attr("flags").attr("writeable") = false;
    return array;
  }

  void end() {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    read_ = nullptr;
  }

 private:
  std::mutex mutex_;  // never awaited while holding the GIL
  std::function<void(float*)> read_;
  const std::vector<py::ssize_t> shape_;
};

// A Python callback (step, count, sigma, sigma_next, read_latents) as the loops call it.
// `read_latents()` copies the latents, so that a callback for progress alone costs no copy.
StepCallback step_callback(py::object on_step, std::vector<py::ssize_t> shape) {
  return [on_step = std::move(on_step), shape = std::move(shape)](const Step& step) {
    const py::gil_scoped_acquire gil;
    const auto latents = std::make_shared<StepLatents>(step.read_latents, shape);
    struct End {
      StepLatents& latents;
      ~End() { latents.end(); }
    };
    const End end{*latents};
    return on_step(step.index, step.count, step.sigma, step.sigma_next,
                   py::cpp_function([latents] { return latents->copy(); }))
        .cast<bool>();
  };
}

// float32 [evaluations, 12], the members of SamplerStep in order.
std::vector<SamplerStep> sampler_steps(const FloatArray& rows) {
  constexpr py::ssize_t columns = 12;
  static_assert(sizeof(SamplerStep) == columns * sizeof(float));
  if (rows.ndim() != 2 || rows.shape(0) < 1 || rows.shape(1) != columns)
    throw std::invalid_argument("steps: expected [evaluations, 12], one evaluation or more");
  const auto* first = reinterpret_cast<const SamplerStep*>(rows.data());
  std::vector<SamplerStep> steps(first, first + rows.shape(0));
  for (const SamplerStep& step : steps)
    if (!(step.slot >= 0.0f && step.slot < SamplerStep::kHistory))
      throw std::invalid_argument("steps: expected a slot of 0 to 2");
  return steps;
}

Guidance read_guidance(py::handle guidance, std::size_t evaluations, py::ssize_t batch) {
  const FloatArray scales = float_attribute(guidance, "scales");
  if (scales.ndim() != 2 || scales.shape(0) != static_cast<py::ssize_t>(evaluations) ||
      scales.shape(1) != batch)
    throw std::invalid_argument("guidance_scales: expected [evaluations, batch]");
  return {.scales = {scales.data(), scales.data() + scales.size()},
          .normalization = guidance.attr("normalization").cast<float>()};
}

// The noise of the rows that take some, float32 [draws, *latents' shape]; null if no row does.
const float* read_step_noise(py::handle object, JobReader& reader) {
  const auto wanted = static_cast<py::ssize_t>(count_draws(reader.job.steps));
  if (wanted == 0) return nullptr;
  FloatArray noise;
  if (!object.attr("step_noise").is_none()) noise = float_attribute(object, "step_noise");
  if (noise.ndim() < 1 || noise.shape(0) != wanted ||
      noise.size() != wanted * static_cast<py::ssize_t>(reader.job.shape.size()))
    throw std::invalid_argument(
        "step_noise: expected an array like the latents for each row of the table that takes "
        "noise");
  reader.arrays.push_back(noise);
  return noise.data();
}

std::optional<Inpaint> read_inpaint(py::handle inpaint, const std::vector<py::ssize_t>& shape,
                                    JobReader& reader) {
  if (inpaint.is_none()) return std::nullopt;
  const FloatArray mask = float_attribute(inpaint, "mask"),
                   image = float_attribute(inpaint, "image"),
                   noise = float_attribute(inpaint, "noise");
  const std::vector<py::ssize_t> mask_shape = {shape[0], 1, shape[2], shape[3]};
  if (shape_of(mask) != mask_shape || shape_of(image) != shape || shape_of(noise) != shape)
    throw std::invalid_argument(
        "mask [batch, 1, height, width], image and noise like the latents: all three belong "
        "together");
  for (const FloatArray& array : {mask, image, noise}) reader.arrays.push_back(array);
  return Inpaint{.mask = mask.data(), .image = image.data(), .noise = noise.data()};
}

}  // namespace

std::vector<py::ssize_t> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

FloatArray float_attribute(py::handle owner, const char* name) {
  FloatArray array = FloatArray::ensure(owner.attr(name));
  if (!array) throw std::invalid_argument(std::string(name) + ": expected a float32 array");
  return array;
}

JobReader read_job(py::handle object) {
  const py::object value = object.attr("latents");
  if (!py::isinstance<py::array_t<float>>(value))
    throw py::type_error("latents: expected a float32 array, which changes in place");
  auto latents = py::reinterpret_borrow<py::array_t<float>>(value);
  if (latents.ndim() != 4 || latents.size() == 0)
    throw std::invalid_argument("latents: expected [batch, channels, height, width]");
  if ((latents.flags() & py::array::c_style) == 0 || !latents.writeable())
    throw std::invalid_argument("latents: expected a C-contiguous array that may be written");
  const std::vector<py::ssize_t> shape = shape_of(latents);
  const auto size_at = [&](std::size_t axis) { return static_cast<int>(shape[axis]); };

  JobReader reader{.job = {.latents = latents.mutable_data(),
                           .shape = {.batch = size_at(0),
                                     .channels = size_at(1),
                                     .height = size_at(2),
                                     .width = size_at(3)},
                           .steps = sampler_steps(float_attribute(object, "steps")),
                           .guidance = {}},
                   .arrays = {latents}};
  SampleJob& job = reader.job;
  job.guidance = read_guidance(object.attr("guidance"), job.steps.size(), shape[0]);
  job.step_noise = read_step_noise(object, reader);
  job.inpaint = read_inpaint(object.attr("inpaint"), shape, reader);
  const py::object on_step = object.attr("on_step");
  if (!on_step.is_none()) job.on_step = step_callback(on_step, shape);
  return reader;
}

}  // namespace zimage_rt

// The convolution and the kernels that feed it over numpy arrays: for tests.

#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/device_array.h"
#include "device/check.h"
#include "device/dtype.h"
#include "kernels/conv3x3.h"
#include "kernels/nchw_to_nhwc16.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

void require_dims(const py::array& array, py::ssize_t dims, const char* wanted) {
  if (array.ndim() != dims) throw std::invalid_argument(wanted);
}

void require_type(const py::array& array, DType type, const char* wanted) {
  if (dtype_of(array) != type) throw std::invalid_argument(wanted);
}

Conv3x3Output output_kind(const std::string& name) {
  if (name == "half") return Conv3x3Output::kHalf;
  if (name == "float") return Conv3x3Output::kFloat;
  if (name == "uint8") return Conv3x3Output::kUint8;
  throw std::invalid_argument("output: expected half, float or uint8, got " + name);
}

DType half_type(const std::string& name) {
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype: expected float16 or bfloat16, got " + name);
}

// Throws unless the arrays belong together.
void check_conv(const py::array& input, const py::array& weight, int stride) {
  require_dims(input, 4, "input: expected [batch, height, width, channels]");
  require_dims(weight, 4, "weight: expected [out_channels, in_channels, 3, 3]");
  if (weight.shape(2) != 3 || weight.shape(3) != 3)
    throw std::invalid_argument("weight: expected [out_channels, in_channels, 3, 3]");
  require_type(weight, dtype_of(input), "weight: expected the type of input");
  if (stride < 1) throw std::invalid_argument("stride: expected 1 or 2");
  if (input.shape(3) != (weight.shape(1) <= 16 ? 16 : weight.shape(1)))
    throw std::invalid_argument("input: expected weight's channels, padded to 16 if fewer");
}

void check_bias(const py::array& bias, const Conv3x3& args) {
  require_dims(bias, 1, "bias: expected [out_channels]");
  require_type(bias, args.dtype, "bias: expected the type of input");
  if (bias.shape(0) != args.out_channels)
    throw std::invalid_argument("bias: expected [out_channels]");
}

void check_residual(const py::array& residual, const Conv3x3& args) {
  require_dims(residual, 4, "residual: expected the output's shape");
  require_type(residual, args.dtype, "residual: expected the type of input");
  if (residual.shape(0) != args.batch || residual.shape(1) != args.out_height() ||
      residual.shape(2) != args.out_width() || residual.shape(3) != args.out_channels)
    throw std::invalid_argument("residual: expected the output's shape");
}

py::array conv_to_uint8(Conv3x3 args) {
  py::array_t<std::uint8_t> host(
      {args.batch, args.out_height(), args.out_width(), args.out_channels});
  const DeviceBuffer pixels(static_cast<std::size_t>(host.nbytes()), "test array");
  ZRT_CUDA(cudaMemset(pixels.data(), 0xff, pixels.bytes()));
  args.output = pixels.data();
  conv3x3(args, nullptr);
  ZRT_CUDA(cudaDeviceSynchronize());
  ZRT_CUDA(cudaMemcpy(host.mutable_data(), pixels.data(), pixels.bytes(), cudaMemcpyDeviceToHost));
  return host;
}

// `stride`, `upsample` and the rest as in conv3x3.h; in_place writes the result over the residual.
py::array conv(const py::array& input, const py::array& weight,
               const std::optional<py::array>& bias, const std::optional<py::array>& residual,
               bool relu, bool upsample, int stride, const std::string& output, float scale,
               float shift, bool in_place, bool early_start) {
  check_conv(input, weight, stride);
  Conv3x3 args{.dtype = dtype_of(input),
               .kind = output_kind(output),
               .batch = static_cast<int>(input.shape(0)),
               .height = static_cast<int>(input.shape(1)),
               .width = static_cast<int>(input.shape(2)),
               .in_channels = static_cast<int>(weight.shape(1)),
               .out_channels = static_cast<int>(weight.shape(0)),
               .relu = relu,
               .upsample = upsample,
               .stride = stride,
               .scale = scale,
               .shift = shift,
               .early_start = early_start};
  const DeviceArray device_input(input), device_weight(weight);
  std::optional<DeviceArray> device_bias, device_residual;
  if (bias) {
    check_bias(*bias, args);
    device_bias.emplace(*bias);
  }
  if (residual) {
    check_residual(*residual, args);
    device_residual.emplace(*residual);
    args.residual = device_residual->data();
  } else if (in_place) {
    throw std::invalid_argument("in_place: needs a residual");
  }
  const DeviceBuffer packed(conv3x3_packed_bytes(args.in_channels, args.out_channels),
                            "test weights");
  conv3x3_pack(device_weight.data(), device_bias ? device_bias->data() : nullptr, args.dtype,
               args.in_channels, args.out_channels, packed.data(), nullptr);
  ZRT_CUDA(cudaDeviceSynchronize());  // early_start reads the weights before it waits
  args.input = device_input.data();
  args.packed = packed.data();
  if (args.kind == Conv3x3Output::kUint8) return conv_to_uint8(args);
  const int height = args.out_height(), width = args.out_width();
  const DeviceArray out =
      args.kind == Conv3x3Output::kFloat
          ? DeviceArray({args.batch, args.out_channels, height, width}, DType::kFloat32)
          : DeviceArray({args.batch, height, width, args.out_channels}, args.dtype);
  args.output = in_place ? device_residual->data() : out.data();
  conv3x3(args, nullptr);
  return in_place ? device_residual->download() : out.download();
}

template <typename Launch>
py::array to_pixels(const py::array& planes, const std::string& dtype, Launch&& launch) {
  require_dims(planes, 4, "planes: expected [batch, channels, height, width]");
  require_type(planes, DType::kFloat32, "planes: expected float32");
  const DeviceArray input(planes);
  const DeviceArray out({planes.shape(0), planes.shape(2), planes.shape(3), 16}, half_type(dtype));
  NchwToNhwc16 args;
  args.input = input.data<float>();
  args.output = out.data();
  args.dtype = out.dtype();
  args.batch = static_cast<int>(planes.shape(0));
  args.channels = static_cast<int>(planes.shape(1));
  args.height = static_cast<int>(planes.shape(2));
  args.width = static_cast<int>(planes.shape(3));
  launch(args);
  return out.download();
}

py::array latents(const py::array& planes, float scaling_factor, float shift_factor,
                  const std::string& dtype) {
  return to_pixels(planes, dtype, [&](const NchwToNhwc16& args) {
    unscale_latents_to_nhwc(args, scaling_factor, shift_factor, nullptr);
  });
}

py::array image(const py::array& planes, const std::string& dtype) {
  return to_pixels(planes, dtype, [](const NchwToNhwc16& args) { image_to_nhwc(args, nullptr); });
}

py::array bytes(const py::array_t<std::uint8_t, py::array::c_style>& image,
                const std::string& dtype) {
  require_dims(image, 4, "image: expected [batch, height, width, channels]");
  const DeviceBuffer input(static_cast<std::size_t>(image.nbytes()), "test array");
  ZRT_CUDA(cudaMemcpy(input.data(), image.data(), input.bytes(), cudaMemcpyHostToDevice));
  const DeviceArray out({image.shape(0), image.shape(1), image.shape(2), 16}, half_type(dtype));
  uint8_to_nhwc(reinterpret_cast<const std::uint8_t*>(input.data()), out.data(), out.dtype(),
                static_cast<int>(image.shape(3)), image.size() / image.shape(3), nullptr);
  return out.download();
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("conv3x3", &conv, py::arg("input"), py::arg("weight"), py::kw_only(),
        py::arg("bias") = py::none(), py::arg("residual") = py::none(), py::arg("relu") = false,
        py::arg("upsample") = false, py::arg("stride") = 1, py::arg("output") = "half",
        py::arg("scale") = 1.0f, py::arg("shift") = 0.0f, py::arg("in_place") = false,
        py::arg("early_start") = false);
  m.def("unscale_latents_to_nhwc", &latents, py::arg("latents"), py::arg("scaling_factor"),
        py::arg("shift_factor"), py::arg("dtype"));
  m.def("image_to_nhwc", &image, py::arg("image"), py::arg("dtype"));
  m.def("uint8_to_nhwc", &bytes, py::arg("image"), py::arg("dtype"));
}

}  // namespace zimage_rt

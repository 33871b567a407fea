// The kernels of the full autoencoder over numpy arrays: for tests.

#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/device_array.h"
#include "bindings/kernels.h"
#include "device/check.h"
#include "device/device.h"
#include "device/dtype.h"
#include "kernels/conv2d.h"
#include "kernels/group_norm.h"
#include "kernels/nchw_to_nhwc16.h"
#include "kernels/softmax_rows.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

Conv2dKind kind_named(const std::string& name) {
  if (name == "1x1") return Conv2dKind::k1x1;
  if (name == "3x3") return Conv2dKind::k3x3;
  if (name == "down") return Conv2dKind::k3x3Down;
  if (name == "up") return Conv2dKind::k3x3Up;
  throw std::invalid_argument("kind: expected 1x1, 3x3, down or up, got " + name);
}

Conv2dOutput output_named(const std::string& name) {
  if (name == "half") return Conv2dOutput::kHalf;
  if (name == "float") return Conv2dOutput::kFloat;
  if (name == "uint8") return Conv2dOutput::kUint8;
  throw std::invalid_argument("output: expected half, float or uint8, got " + name);
}

int axis(const py::array& array, int index) { return static_cast<int>(array.shape(index)); }

DeviceArray output_of(const Conv2d& args) {
  const int height = args.out_height(), width = args.out_width(), channels = args.out_channels;
  switch (args.output_kind) {
    case Conv2dOutput::kHalf:
      return DeviceArray({height, width, channels}, args.dtype);
    case Conv2dOutput::kFloat:
      return DeviceArray({channels, height, width}, DType::kFloat32);
    case Conv2dOutput::kUint8:
      break;
  }
  return DeviceArray({height, width, channels}, DType::kFloat8);  // bytes
}

// input [height, width, channels], weight [out, in, size, size] and bias [out] in any of its types
// -> (output, sums [parts, out, 2], whether a value is not finite). `hopper` chooses the kernel;
// in_place writes the result over the residual.
py::tuple conv(const py::array& input, const py::array& weight, const py::array& bias,
               const std::string& kind, bool hopper, const std::optional<py::array>& residual,
               const std::string& output, float sum_scale, float bias_scale, float shift,
               bool in_place) {
  if (input.ndim() != 3 || weight.ndim() != 4 || bias.ndim() != 1)
    throw std::invalid_argument(
        "expected input [height, width, in], weight [out, in, size, size] and bias [out]");
  const int size = axis(weight, 2);
  const DeviceArray device_input(input), device_weight(weight), device_bias(bias);
  Conv2d args;
  args.kind = kind_named(kind);
  args.output_kind = output_named(output);
  args.dtype = dtype_of(input);
  args.height = axis(input, 0), args.width = axis(input, 1);
  args.in_channels = axis(input, 2), args.out_channels = axis(weight, 0);
  args.sum_scale = sum_scale, args.bias_scale = bias_scale, args.shift = shift;
  if (size != (args.kind == Conv2dKind::k1x1 ? 1 : 3) || axis(bias, 0) != args.out_channels ||
      axis(weight, 1) > args.in_channels)
    throw std::invalid_argument("input, weight, bias: their shapes do not belong together");
  const DeviceBuffer packed(conv2d_packed_bytes(args.kind, axis(weight, 1), args.out_channels),
                            "test weights");
  conv2d_pack({.kind = args.kind,
               .in_channels = axis(weight, 1),
               .out_channels = args.out_channels,
               .weight = device_weight.data(),
               .weight_type = device_weight.dtype(),
               .out_stride = static_cast<std::int64_t>(axis(weight, 1)) * size * size,
               .in_stride = size * size,
               .bias = device_bias.data(),
               .bias_type = device_bias.dtype()},
              args.dtype, packed.data(), nullptr);
  const DeviceArray out = output_of(args);
  std::optional<DeviceArray> device_residual;
  if (residual) device_residual.emplace(*residual);
  const bool half = args.output_kind == Conv2dOutput::kHalf;
  const DeviceArray sums({half ? conv2d_max_parts(args) : 1, args.out_channels, 2},
                         DType::kFloat32);
  const DeviceBuffer flag(sizeof(int), "test flag");
  ZRT_CUDA(cudaMemset(flag.data(), 0, sizeof(int)));
  args.input = device_input.data();
  args.packed = packed.data();
  args.residual = device_residual ? device_residual->data() : nullptr;
  args.output = in_place ? device_residual.value().data() : out.data();
  args.not_finite = reinterpret_cast<int*>(flag.data());
  args.sums = half ? sums.data<ChannelSums>() : nullptr;
  args.workspace = hopper ? fused_workspace() : nullptr;
  const int parts = hopper ? conv2d_hopper(args, nullptr) : conv2d_mma(args, nullptr);
  ZRT_CUDA(cudaDeviceSynchronize());
  int not_finite = 0;
  ZRT_CUDA(cudaMemcpy(&not_finite, flag.data(), sizeof(int), cudaMemcpyDeviceToHost));
  return py::make_tuple(in_place ? device_residual->download() : out.download(),
                        sums.download()[py::slice(0, parts, 1)], not_finite != 0);
}

// x [pixels, channels] and the sums of conv -> the normed x.
py::array norm(const py::array& x, const py::array& sums, const py::array& weight,
               const py::array& bias, int groups, float eps, bool silu, bool in_place) {
  if (x.ndim() != 2 || sums.ndim() != 3 || dtype_of(sums) != DType::kFloat32 ||
      dtype_of(weight) != DType::kFloat32 || dtype_of(bias) != DType::kFloat32 ||
      axis(sums, 1) != axis(x, 1) || axis(weight, 0) != axis(x, 1) || axis(bias, 0) != axis(x, 1))
    throw std::invalid_argument(
        "expected x [pixels, channels], and in fp32 sums [parts, channels, 2], weight and bias");
  const DeviceArray device_x(x), device_sums(sums), device_weight(weight), device_bias(bias);
  const DeviceArray affine({axis(x, 1), 2}, DType::kFloat32),
      out({x.shape(0), x.shape(1)}, device_x.dtype());
  group_norm_statistics({.sums = device_sums.data<ChannelSums>(),
                         .parts = axis(sums, 0),
                         .pixels = x.shape(0),
                         .channels = axis(x, 1),
                         .groups = groups,
                         .weight = device_weight.data<float>(),
                         .bias = device_bias.data<float>(),
                         .eps = eps,
                         .affine = affine.data<ChannelAffine>()},
                        nullptr);
  group_norm_apply({.x = device_x.data(),
                    .out = in_place ? device_x.data() : out.data(),
                    .dtype = device_x.dtype(),
                    .pixels = x.shape(0),
                    .channels = axis(x, 1),
                    .affine = affine.data<ChannelAffine>(),
                    .silu = silu},
                   nullptr);
  return in_place ? device_x.download() : out.download();
}

// x fp32 [rows, stride], of which `columns` count.
py::array softmax(const py::array& x, int columns, const std::string& dtype, float scale) {
  if (x.ndim() != 2 || dtype_of(x) != DType::kFloat32)
    throw std::invalid_argument("expected x float32 [rows, stride]");
  const DeviceArray device_x(x), out({x.shape(0), x.shape(1)}, dtype_named(dtype));
  softmax_rows({.x = device_x.data<float>(),
                .out = out.data(),
                .dtype = out.dtype(),
                .rows = axis(x, 0),
                .columns = columns,
                .stride = axis(x, 1),
                .scale = scale},
               nullptr);
  return out.download();
}

// planes fp32 [channels, height, width] -> [height, width, 16].
py::array scale_planes(const py::array& planes, float scale, float shift,
                       const std::string& dtype) {
  if (planes.ndim() != 3 || dtype_of(planes) != DType::kFloat32)
    throw std::invalid_argument("expected planes float32 [channels, height, width]");
  const DeviceArray input(planes), out({planes.shape(1), planes.shape(2), 16}, dtype_named(dtype));
  scale_to_nhwc({.input = input.data<float>(),
                 .output = out.data(),
                 .dtype = out.dtype(),
                 .channels = axis(planes, 0),
                 .height = axis(planes, 1),
                 .width = axis(planes, 2)},
                scale, shift, nullptr);
  return out.download();
}

// bytes [height, width, channels] -> [height, width, 16].
py::array scale_bytes(const py::array& image, const std::string& dtype) {
  if (image.ndim() != 3 || dtype_of(image) != DType::kFloat8)
    throw std::invalid_argument("expected an image uint8 [height, width, channels]");
  const DeviceArray input(image), out({image.shape(0), image.shape(1), 16}, dtype_named(dtype));
  uint8_to_signed_nhwc(input.data<std::uint8_t>(), out.data(), out.dtype(), axis(image, 2),
                       image.shape(0) * image.shape(1), nullptr);
  return out.download();
}

}  // namespace

void bind_vae(py::module_& m) {
  m.def("conv2d", &conv, py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("kind"),
        py::kw_only(), py::arg("hopper"), py::arg("residual") = py::none(),
        py::arg("output") = "half", py::arg("sum_scale") = 1.0f, py::arg("bias_scale") = 1.0f,
        py::arg("shift") = 0.0f, py::arg("in_place") = false);
  m.def("group_norm", &norm, py::arg("x"), py::arg("sums"), py::arg("weight"), py::arg("bias"),
        py::kw_only(), py::arg("groups"), py::arg("eps"), py::arg("silu"),
        py::arg("in_place") = false);
  m.def("softmax_rows", &softmax, py::arg("x"), py::arg("columns"), py::arg("dtype"),
        py::arg("scale") = 1.0f);
  m.def("scale_to_nhwc", &scale_planes, py::arg("planes"), py::arg("scale"), py::arg("shift"),
        py::arg("dtype"));
  m.def("uint8_to_signed_nhwc", &scale_bytes, py::arg("image"), py::arg("dtype"));
}

}  // namespace zimage_rt

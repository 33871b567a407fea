// The attention kernel over numpy arrays: for tests.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <vector>

#include "bindings/device_array.h"
#include "kernels/flash_attention.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

void require_dims(const py::array& array, py::ssize_t dims, const char* wanted) {
  if (array.ndim() != dims) throw std::invalid_argument(wanted);
}

// A dense operand [batch, tokens, heads, head_dim].
FlashAttention::Input dense_input(const DeviceArray& array) {
  const py::ssize_t row = array.shape(2) * array.shape(3);
  return {.data = array.data(), .token_stride = row, .batch_stride = array.shape(1) * row};
}

py::array attend(const py::array& q, const py::array& k, const py::array& v, float scale,
                 bool causal, int query_tile) {
  require_dims(q, 4, "q: expected [batch, queries, heads, head_dim]");
  require_dims(k, 4, "k: expected [batch, keys, kv_heads, head_dim]");
  for (int i = 0; i < 4; ++i)
    if (v.ndim() != 4 || v.shape(i) != k.shape(i))
      throw std::invalid_argument("v: expected the shape of k");
  if (k.shape(0) != q.shape(0) || k.shape(3) != q.shape(3))
    throw std::invalid_argument("k: expected the batch and the head_dim of q");
  if (dtype_of(k) != dtype_of(q) || dtype_of(v) != dtype_of(q))
    throw std::invalid_argument("k and v: expected the type of q");

  const DeviceArray device_q(q), device_k(k), device_v(v);
  const DeviceArray out(std::vector<py::ssize_t>(q.shape(), q.shape() + 4), dtype_of(q));
  FlashAttention args;
  args.q = dense_input(device_q);
  args.k = dense_input(device_k);
  args.v = dense_input(device_v);
  args.out = {
      .data = out.data(), .token_stride = args.q.token_stride, .batch_stride = args.q.batch_stride};
  args.batch = static_cast<int>(q.shape(0));
  args.queries = static_cast<int>(q.shape(1));
  args.keys = static_cast<int>(k.shape(1));
  args.heads = static_cast<int>(q.shape(2));
  args.kv_heads = static_cast<int>(k.shape(2));
  args.head_dim = static_cast<int>(q.shape(3));
  args.scale = scale;
  args.causal = causal;
  args.dtype = dtype_of(q);
  args.query_tile = query_tile;
  flash_attention(args, nullptr);
  return out.download();
}

// q, k and v are column ranges of one matrix. The output has one more token and head than the
// input, which are not written.
py::array attend_packed(const py::array& qkv, int heads, int kv_heads, float scale, bool causal,
                        int query_tile) {
  require_dims(qkv, 3, "qkv: expected [batch, tokens, (heads + 2 kv_heads) * head_dim]");
  const py::ssize_t batch = qkv.shape(0), tokens = qkv.shape(1), row = qkv.shape(2);
  if (heads < 1 || kv_heads < 1 || row % (heads + 2 * kv_heads) != 0)
    throw std::invalid_argument("qkv: expected rows of heads + 2 kv_heads equal parts");
  const py::ssize_t head_dim = row / (heads + 2 * kv_heads);

  const DeviceArray packed(qkv);
  const DeviceArray out({batch, tokens + 1, heads + 1, head_dim}, packed.dtype());
  const auto columns = [&](py::ssize_t first_head) -> FlashAttention::Input {
    const auto offset = static_cast<std::size_t>(first_head * head_dim) * size_of(packed.dtype());
    return {.data = packed.data<std::byte>() + offset,
            .token_stride = row,
            .batch_stride = tokens * row};
  };
  FlashAttention args;
  args.q = columns(0);
  args.k = columns(heads);
  args.v = columns(heads + kv_heads);
  args.out = {.data = out.data(),
              .token_stride = (heads + 1) * head_dim,
              .batch_stride = (tokens + 1) * (heads + 1) * head_dim};
  args.batch = static_cast<int>(batch);
  args.queries = args.keys = static_cast<int>(tokens);
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_dim = static_cast<int>(head_dim);
  args.scale = scale;
  args.causal = causal;
  args.dtype = packed.dtype();
  args.query_tile = query_tile;
  flash_attention(args, nullptr);
  return out.download();
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("flash_attention", &attend, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"),
        py::arg("causal") = false, py::arg("query_tile") = 0,
        "[batch, queries, heads, head_dim] from q of that shape and k, v [batch, keys, kv_heads, "
        "head_dim].");
  m.def("flash_attention_packed", &attend_packed, py::arg("qkv"), py::arg("heads"),
        py::arg("kv_heads"), py::arg("scale"), py::arg("causal") = false, py::arg("query_tile") = 0,
        "[batch, tokens + 1, heads + 1, head_dim] from [batch, tokens, (heads + 2 kv_heads) * "
        "head_dim]; the last token and head of the output are not written.");
}

}  // namespace zimage_rt

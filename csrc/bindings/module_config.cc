#include "bindings/module_config.h"

#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/check.h"
#include "kernels/rope_table.h"
#include "models/controlnet.h"
#include "models/full_vae.h"
#include "models/text_encoder.h"
#include "models/tiny_vae.h"
#include "models/transformer.h"

namespace py = pybind11;

namespace zimage_rt {
namespace {

template <typename T>
T get(const py::dict& config, const char* key) {
  if (!config.contains(key)) throw WeightError(std::string("the module's config has no ") + key);
  try {
    return config[key].cast<T>();
  } catch (const py::cast_error&) {
    throw WeightError("the module's config: " + std::string(key) + ": " +
                      std::string(py::repr(config[key])).substr(0, 60) +
                      " is of another type, or too large");
  }
}

Quantization quantization(const py::dict& config) {
  if (!config.contains("quantization")) return {};
  return {.is_on = true, .rotates = get<bool>(config, "rotates")};
}

TextEncoderConfig text_encoder_config(const py::dict& config) {
  return {.vocab_size = get<int>(config, "vocab_size"),
          .hidden_size = get<int>(config, "hidden_size"),
          .intermediate_size = get<int>(config, "intermediate_size"),
          .num_hidden_layers = get<int>(config, "num_hidden_layers"),
          .num_attention_heads = get<int>(config, "num_attention_heads"),
          .num_key_value_heads = get<int>(config, "num_key_value_heads"),
          .head_dim = get<int>(config, "head_dim"),
          .rms_norm_eps = get<float>(config, "rms_norm_eps"),
          .attention_scale = get<float>(config, "attention_scale"),
          .gate_scale = get<float>(config, "gate_scale"),
          .up_scale = get<float>(config, "up_scale"),
          .quantization = quantization(config)};
}

TransformerConfig transformer_config(const py::dict& config) {
  TransformerConfig out{.in_channels = get<int>(config, "in_channels"),
                        .dim = get<int>(config, "dim"),
                        .n_layers = get<int>(config, "n_layers"),
                        .n_refiner_layers = get<int>(config, "n_refiner_layers"),
                        .n_heads = get<int>(config, "n_heads"),
                        .hidden_dim = get<int>(config, "hidden_dim"),
                        .cap_feat_dim = get<int>(config, "cap_feat_dim"),
                        .patch_size = get<int>(config, "patch_size"),
                        .norm_eps = get<float>(config, "norm_eps"),
                        .qk_norm = get<bool>(config, "qk_norm"),
                        .t_scale = get<float>(config, "t_scale"),
                        .axes_dims = get<std::vector<int>>(config, "axes_dims"),
                        .axes_lens = get<std::vector<int>>(config, "axes_lens"),
                        .attention_scale = get<float>(config, "attention_scale"),
                        .gate_scale = get<float>(config, "gate_scale"),
                        .up_scale = get<float>(config, "up_scale"),
                        .quantization = quantization(config)};
  if (out.axes_dims.size() != kRopeAxes || out.axes_lens.size() != kRopeAxes)
    throw WeightError("axes_dims, axes_lens: expected three numbers each");
  return out;
}

ControlNetConfig controlnet_config(const py::dict& config) {
  const auto kind = get<std::optional<std::string>>(config, "add_control_noise_refiner");
  return {.transformer = transformer_config(config),
          .control_in_dim = get<int>(config, "control_in_dim"),
          .control_layers_places = get<std::vector<int>>(config, "control_layers_places"),
          .control_refiner_layers_places =
              get<std::vector<int>>(config, "control_refiner_layers_places"),
          .control_refiner_layers = get<int>(config, "control_refiner_layers"),
          .add_control_noise_refiner = kind.value_or("")};
}

TinyVaeConfig tiny_vae_config(const py::dict& config, bool decoder) {
  TinyVaeConfig out;
  out.widths = get<std::vector<int>>(
      config, decoder ? "decoder_block_out_channels" : "encoder_block_out_channels");
  out.blocks = get<std::vector<int>>(config, decoder ? "num_decoder_blocks" : "num_encoder_blocks");
  out.latent_channels = get<int>(config, "latent_channels");
  out.image_channels = get<int>(config, decoder ? "out_channels" : "in_channels");
  out.scaling_factor = get<float>(config, "scaling_factor");
  out.shift_factor = get<float>(config, "shift_factor");
  return out;
}

FullVaeConfig full_vae_config(const py::dict& config, bool decoder) {
  // As in diffusers' AutoencoderKL and export/modeling/vae.py.
  const auto flag = [&](const char* key) {
    return !config.contains(key) || get<bool>(config, key);
  };
  const auto number = [&](const char* key, float otherwise) {
    return config.contains(key) ? get<std::optional<float>>(config, key).value_or(otherwise)
                                : otherwise;
  };
  return {.widths = get<std::vector<int>>(config, "block_out_channels"),
          .layers_per_block = get<int>(config, "layers_per_block"),
          .norm_num_groups = get<int>(config, "norm_num_groups"),
          .latent_channels = get<int>(config, "latent_channels"),
          .image_channels = get<int>(config, decoder ? "out_channels" : "in_channels"),
          .attention = flag("mid_block_add_attention"),
          .quant_conv = flag(decoder ? "use_post_quant_conv" : "use_quant_conv"),
          .scaling_factor = number("scaling_factor", 1.0f),
          .shift_factor = number("shift_factor", 0.0f)};
}

}  // namespace

ModuleConfig module_config(const std::string& module, const py::dict& config) {
  static const std::map<std::string, ModuleConfig (*)(const py::dict&)> readers = {
      {"text_encoder", [](const py::dict& it) -> ModuleConfig { return text_encoder_config(it); }},
      {"context_refiner",
       [](const py::dict& it) -> ModuleConfig { return transformer_config(it); }},
      {"transformer", [](const py::dict& it) -> ModuleConfig { return transformer_config(it); }},
      {"controlnet", [](const py::dict& it) -> ModuleConfig { return controlnet_config(it); }},
      {"tiny_vae_decoder",
       [](const py::dict& it) -> ModuleConfig { return tiny_vae_config(it, true); }},
      {"tiny_vae_encoder",
       [](const py::dict& it) -> ModuleConfig { return tiny_vae_config(it, false); }},
      {"full_vae_decoder",
       [](const py::dict& it) -> ModuleConfig { return full_vae_config(it, true); }},
      {"full_vae_encoder",
       [](const py::dict& it) -> ModuleConfig { return full_vae_config(it, false); }},
  };
  const auto found = readers.find(module);
  if (found == readers.end()) throw std::invalid_argument("no program runs the module " + module);
  return found->second(config);
}

}  // namespace zimage_rt

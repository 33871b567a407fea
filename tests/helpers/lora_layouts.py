"""Small LoRAs for zimage-nano in the layouts of docs/formats.md, with their changes by formulas in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zimage_rt.backends.merge import merged
from zimage_rt.bundle.manifest import Manifest
from zimage_rt.bundle.modules import LORA_MODULES
from zimage_rt.bundle.safetensors_file import TensorFile
from zimage_rt.lora.manager import combine
from zimage_rt.lora.match import MatchedLora

TO_Q, TO_K, TO_V = (f"layers.0.attention.to_{part}" for part in "qkv")
TO_OUT = "noise_refiner.0.attention.to_out.0"
W2 = "layers.1.feed_forward.w2"
REFINER = "context_refiner.0.feed_forward.w3"
ADALN = "layers.2.adaLN_modulation.0"
ENCODER = "layers.1.self_attn.k_proj"
Base = Callable[[str], Tensor]


@dataclasses.dataclass
class Example:
    """Tensors and metadata of a file, and its change of each matrix (`[out, in]`) and vector (`name.part`)."""

    tensors: dict[str, Tensor]
    deltas: dict[str, Tensor]
    vectors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    warns: str = ""


class Maker:
    """Makes random tensors of the right sizes; `base` gives the checkpoint's weights by name."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._generator = torch.Generator().manual_seed(11)

    def random(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * size

    def pair(self, name: str, rank: int = 3) -> tuple[Tensor, Tensor]:
        """`down` and `up` whose product is a tenth of the layer's weight."""
        weight = self.base(f"{name}.weight")
        down, up = self.random(rank, weight.shape[1]), self.random(weight.shape[0], rank)
        return down, up * (0.1 * weight.norm() / (up @ down).norm())

    def fit(self, name: str, delta: Tensor) -> Tensor:
        """Factor that scales a change to a tenth of the layer's weight."""
        return 0.1 * self.base(f"{name}.weight").norm() / delta.norm()


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    return scale * up.double() @ down.double()


def kron(w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """Element (i, j) of block (k, l) is w1[k, l] * w2[i, j]; written out, not torch.kron."""
    blocks = w1.double()[:, None, :, None] * w2.double()[None, :, None, :]
    return scale * blocks.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])


def decompose(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's change: the changed weight with rows (magnitude [out, 1]) or columns ([1, in]) of given norms."""
    changed = weight.double() + delta
    norm = changed.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return changed * (magnitude.double() / norm) - weight.double()


def under(name: str) -> str:
    return name.replace(".", "_")


def lokr_whole(make: Maker) -> Example:
    """LyCORIS' old prefix; both factors are whole, so the alpha of 1e10 has no effect."""
    tensors, deltas = {}, {}
    for name, first in ((TO_Q, 16), (W2, 4), (ADALN, 8), (ENCODER, 4)):
        out, width = make.base(f"{name}.weight").shape
        w1, w2 = make.random(first, first), make.random(out // first, width // first)
        w2 *= make.fit(name, kron(w1, w2))
        deltas[name] = kron(w1, w2)
        tensors |= {f"lycoris_{under(name)}.lokr_w1": w1, f"lycoris_{under(name)}.lokr_w2": w2}
        tensors[f"lycoris_{under(name)}.alpha"] = torch.tensor(9999999827968.0)
    return Example(tensors, deltas)


def lokr_factored(make: Maker) -> Example:
    """Every combination of whole and factored; the scale is alpha / rank."""
    tensors, deltas = {}, {}
    for name, first in ((TO_V, (True, False)), (W2, (False, True)), (TO_OUT, (False, False))):
        out, width = make.base(f"{name}.weight").shape
        shapes = ((8, 8), (out // 8, width // 8))
        factors = []
        for number, (rows, columns) in enumerate(shapes, 1):
            key = f"diffusion_model.{name}.lokr_w{number}"
            if first[number - 1]:
                tensors[key] = make.random(rows, columns, size=0.3)
                factors.append(tensors[key])
            else:
                tensors[f"{key}_a"], tensors[f"{key}_b"] = make.random(rows, 4), make.random(4, columns, size=0.1)
                factors.append(tensors[f"{key}_a"].double() @ tensors[f"{key}_b"].double())
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
        deltas[name] = kron(*factors, scale=2.0 / 4)
    return Example(tensors, deltas)


def lokr_core(make: Maker) -> Example:
    """A Tucker core between the second factor's halves: w2 = w2_aᵀ t2 w2_b."""
    out, width = make.base(f"{W2}.weight").shape
    w1, a, b = make.random(4, 4), make.random(5, out // 4, size=0.1), make.random(5, width // 4, size=0.1)
    t2 = make.random(5, 5, 1, 1)
    w2 = torch.einsum("ip,ij,jr->pr", a.double(), t2[:, :, 0, 0].double(), b.double())
    key = f"lora_unet_{under(W2)}"
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b, f"{key}.lokr_t2": t2}
    return Example({**tensors, f"{key}.alpha": torch.tensor(3.0)}, {W2: kron(w1, w2, 3.0 / 5)})


def lokr_beside_lora(make: Maker) -> Example:
    """musubi-tuner: the packed qkv as LoRA, the rest as LoKr, in one file."""
    down = make.random(6, 384)
    up = make.random(1152, 6, size=0.02)
    w1, w2 = make.random(8, 8), make.random(48, 128, size=0.02)
    qkv, w2_name = "lora_unet_layers_0_attention_qkv", f"lora_unet_{under(W2)}"
    tensors = {f"{qkv}.lora_down.weight": down, f"{qkv}.lora_up.weight": up, f"{qkv}.alpha": torch.tensor(3.0)}
    tensors |= {f"{w2_name}.lokr_w1": w1, f"{w2_name}.lokr_w2": w2, f"{w2_name}.alpha": torch.tensor(1e10)}
    three = product(down, up, 0.5).split(384)
    return Example(tensors, {TO_Q: three[0], TO_K: three[1], TO_V: three[2], W2: kron(w1, w2)})


def loha(make: Maker) -> Example:
    """A small rank, and one whose square is too large for two thin matrices."""
    tensors, deltas = {}, {}
    for name, rank in ((TO_K, 4), (REFINER, 16)):
        out, width = make.base(f"{name}.weight").shape
        a1, b1, a2, b2 = (make.random(*shape, size=0.2) for shape in ((out, rank), (rank, width)) * 2)
        key = f"lycoris_{under(name)}.hada_w"
        tensors |= {f"{key}1_a": a1, f"{key}1_b": b1, f"{key}2_a": a2, f"{key}2_b": b2}
        tensors[f"lycoris_{under(name)}.alpha"] = torch.tensor(1.0)
        deltas[name] = (a1.double() @ b1.double()) * (a2.double() @ b2.double()) / rank
    return Example(tensors, deltas)


def dora(spelling: str, by_input: bool = False, flat: bool = True) -> Callable[[Maker], Example]:
    def make_example(make: Maker) -> Example:
        tensors, deltas = {}, {}
        for name in (TO_Q, W2, TO_OUT):
            weight, (down, up) = make.base(f"{name}.weight"), make.pair(name)
            norms = weight.norm(dim=0 if by_input else 1, keepdim=True)
            magnitude = norms * (1 + make.random(*norms.shape, size=0.2))
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            tensors[f"transformer.{name}.{spelling}"] = magnitude.flatten() if flat else magnitude
            deltas[name] = decompose(weight, product(down, up), magnitude)
        return Example(tensors, deltas)

    return make_example


def dora_packed(make: Maker) -> Example:
    """A packed qkv with a norm for each column of all three, and one for each row."""
    tensors, deltas = {}, {}
    for block, by_input in (("layers.0", True), ("layers.1", False)):
        names = [f"{block}.attention.to_{part}" for part in "qkv"]
        weight = torch.cat([make.base(f"{name}.weight") for name in names])
        down, up = make.random(4, 384), make.random(1152, 4, size=0.02)
        norms = weight.norm(dim=0 if by_input else 1, keepdim=True)
        magnitude = norms * (1 + make.random(*norms.shape, size=0.2))
        key = f"diffusion_model.{block}.attention.qkv"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitude}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        deltas |= dict(zip(names, decompose(weight, product(down, up, 0.5), magnitude).split(384), strict=True))
    return Example(tensors, deltas)


def dora_of_lokr(make: Maker) -> Example:
    """LyCORIS' weight decomposition of a LoKr."""
    weight = make.base(f"{W2}.weight")
    w1, w2 = make.random(8, 8), make.random(48, 128, size=0.02)
    magnitude = weight.norm(dim=1, keepdim=True) * (1 + make.random(384, 1, size=0.2))
    key = f"lycoris_{under(W2)}"
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.dora_scale": magnitude}
    return Example(tensors, {W2: decompose(weight, kron(w1, w2), magnitude)})


def alphas(make: Maker) -> Example:
    """An alpha as each trainer stores it."""
    tensors, deltas = {}, {}
    stored = (
        (TO_Q, torch.tensor(2, dtype=torch.int32)),
        (TO_K, torch.tensor(2, dtype=torch.int64)),
        (TO_V, torch.tensor(2.0, dtype=torch.float64)),
        (W2, torch.full((1, 1), 2.0)),
        (TO_OUT, torch.full((1,), 2.0, dtype=torch.bfloat16)),
    )
    for name, alpha in stored:
        down, up = make.pair(name, rank=4)
        key = f"lora_unet_{under(name)}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
        deltas[name] = product(down, up, 2.0 / 4)
    return Example(tensors, deltas)


def formats(*dtypes: torch.dtype) -> Callable[[Maker], Example]:
    def make_example(make: Maker) -> Example:
        tensors, deltas = {}, {}
        for name in (TO_Q, W2):
            down, up = make.pair(name)
            # fp8 e4m3 ends at 448 and 2^-9: the change's size stands in `down`, so `up` is of order 1.
            size = up.abs().mean()
            stored = (down * size * 8).to(dtypes[0]), (up / size / 8).to(dtypes[-1])
            tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"] = stored
            deltas[name] = product(stored[0].double(), stored[1].double())
        return Example(tensors, deltas)

    return make_example


def convolutions(make: Maker) -> Example:
    """LyCORIS' kernels of 1x1 convolutions."""
    down, up = make.pair(W2)
    key = f"lycoris_{under(W2)}"
    tensors = {f"{key}.lora_down.weight": down[:, :, None, None], f"{key}.lora_up.weight": up[:, :, None, None]}
    return Example(tensors, {W2: product(down, up)})


def packed_beside_split(make: Maker) -> Example:
    """The same update twice, as converters write it: packed and split, rounded to bf16 once more, and two names."""
    tensors: dict[str, Tensor] = {}
    down, up = make.random(4, 384), make.random(1152, 4, size=0.02)
    tensors |= {f"lora_unet__layers_0_attention_qkv.{half}.weight": value for half, value in (("lora_down", down),)}
    tensors["lora_unet__layers_0_attention_qkv.lora_up.weight"] = up
    parts = dict(zip((TO_Q, TO_K, TO_V), up.split(384), strict=True))
    for name, part in parts.items():
        tensors[f"lora_unet__{under(name)}.lora_down.weight"] = down.bfloat16().float()
        tensors[f"lora_unet__{under(name)}.lora_up.weight"] = part.bfloat16().float()
    first = make.pair(TO_OUT)
    for name in (TO_OUT, TO_OUT.replace("to_out.0", "out")):
        tensors[f"lora_unet__{under(name)}.lora_down.weight"] = first[0]
        tensors[f"lora_unet__{under(name)}.lora_up.weight"] = first[1]
    return Example(tensors, {name: product(down, part) for name, part in parts.items()} | {TO_OUT: product(*first)})


def idle(make: Maker) -> Example:
    """Layers that no image depends on, beside one that some do."""
    down, up = make.pair(W2)
    tensors = {f"transformer.{W2}.lora_A.weight": down, f"transformer.{W2}.lora_B.weight": up}
    for name in ("siglip_embedder.1", "siglip_refiner.0.attention.to_q", "text_encoder.model.layers.4.mlp.up_proj"):
        tensors |= {f"{name}.lora_A.weight": make.random(2, 8), f"{name}.lora_B.weight": make.random(8, 2)}
    tensors["diffusion_model.norm_final.diff"] = make.random(384)
    return Example(tensors, {W2: product(down, up)}, warns=r"7 tensors belong to layers that never run.*siglip_")


def differences(make: Maker) -> Example:
    """ComfyUI's whole differences: of a matrix, a packed one, a bias, norms."""
    delta, packed = make.random(384, 1024, size=0.01), make.random(1152, 384, size=0.01)
    bias, norm, head = (make.random(size, size=0.1) for size in (1536, 384, 128))
    tensors = {
        f"diffusion_model.{W2}.diff": delta,
        "diffusion_model.layers.0.attention.qkv.diff": packed,
        f"diffusion_model.{ADALN}.diff_b": bias,
        "diffusion_model.layers.0.attention_norm2.diff": norm,
        "diffusion_model.layers.0.attention.q_norm.diff": head,
    }
    deltas = {name: part.double() for name, part in zip((TO_Q, TO_K, TO_V), packed.split(384), strict=True)}
    vectors = {
        f"{ADALN}.bias": bias,
        "layers.0.attention_norm2.weight": norm,
        "layers.0.attention.norm_q.weight": head,
    }
    return Example(tensors, {**deltas, W2: delta.double()}, vectors)


def norms(make: Maker) -> Example:
    """LyCORIS' norms, and a bias that it counts among them."""
    norm, encoder, bias = make.random(384, size=0.1), make.random(64, size=0.1), make.random(384, size=0.1)
    tensors = {
        "lycoris_noise_refiner_0_ffn_norm1.w_norm": norm,
        "lora_te_layers_2_self_attn_k_norm.w_norm": encoder,
        "lycoris_cap_embedder_1.b_norm": bias,
    }
    vectors = {
        "noise_refiner.0.ffn_norm1.weight": norm,
        "layers.2.self_attn.k_norm.weight": encoder,
        "cap_embedder.1.bias": bias,
    }
    return Example(tensors, {}, vectors)


def replacements(make: Maker) -> Example:
    """ComfyUI's whole weights."""
    weight, norm = make.random(384, 384, size=0.05), 1 + make.random(128, size=0.1)
    tensors = {f"diffusion_model.{TO_Q}.set_weight": weight}
    tensors["diffusion_model.layers.3.attention.k_norm.set_weight"] = norm
    vectors = {"layers.3.attention.norm_k.weight": norm.double() - make.base("layers.3.attention.norm_k.weight")}
    return Example(tensors, {TO_Q: weight.double() - make.base(f"{TO_Q}.weight").double()}, vectors)


def up_bias(make: Maker) -> Example:
    """PEFT's `lora_bias`, which has the scale of the matrices."""
    (down, up), bias = make.pair(ADALN, rank=4), make.random(1536, size=0.1)
    key = f"transformer.{ADALN}"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
    tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return Example(tensors, {ADALN: product(down, up, 0.5)}, {f"{ADALN}.bias": bias * 0.5})


def loose(metadata: Mapping[str, str], scale: float, warns: str) -> Callable[[Maker], Example]:
    def make_example(make: Maker) -> Example:
        down, up = make.pair(W2, rank=4)
        tensors = {f"diffusion_model.{W2}.lora_A.weight": down, f"diffusion_model.{W2}.lora_B.weight": up}
        return Example(tensors, {W2: product(down, up, scale)}, metadata=dict(metadata), warns=warns)

    return make_example


def named(write: Callable[[str], str], names: Sequence[str] = (TO_OUT, W2)) -> Callable[[Maker], Example]:
    def make_example(make: Maker) -> Example:
        tensors, deltas = {}, {}
        for name in names:
            down, up = make.pair(name)
            tensors |= {f"{write(name)}.lora_A.weight": down, f"{write(name)}.lora_B.weight": up}
            deltas[name] = product(down, up)
        return Example(tensors, deltas)

    return make_example


READ: dict[str, Callable[[Maker], Example]] = {
    "LoKr, both whole, alpha 1e10, lycoris_": lokr_whole,
    "LoKr, factored": lokr_factored,
    "LoKr with lokr_t2": lokr_core,
    "LoKr beside a packed LoRA": lokr_beside_lora,
    "LoHa": loha,
    "DoRA, dora_scale [out, 1]": dora("dora_scale", flat=False),
    "DoRA, dora_scale [1, in]": dora("dora_scale", by_input=True, flat=False),
    "DoRA, lora_magnitude_vector": dora("lora_magnitude_vector"),
    "DoRA, lora_magnitude_vector.weight": dora("lora_magnitude_vector.default.weight"),
    "DoRA, magnitude": dora("magnitude"),
    "DoRA, packed": dora_packed,
    "DoRA of a LoKr": dora_of_lokr,
    "alpha as int32, int64, float64, [1, 1]": alphas,
    "fp8 e4m3 and e5m2": formats(torch.float8_e4m3fn, torch.float8_e5m2),
    "F64": formats(torch.float64),
    "1x1 convolutions": convolutions,
    "packed beside split": packed_beside_split,
    "layers that never run": idle,
    ".diff, .diff_b": differences,
    ".w_norm, .b_norm": norms,
    ".set_weight": replacements,
    "lora_B.bias": up_bias,
    "metadata lora_alpha": loose({"lora_alpha": "8", "r": "4"}, 2.0, "lora_alpha = 8: the scale taken is that divided"),
    "metadata alpha": loose({"alpha": "1.0"}, 0.25, "alpha = 1: the scale taken is that divided by the rank"),
    "metadata ss_network_alpha": loose(
        {"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 1.0, "scale taken is 1.*weight=0.5"
    ),
    "attention.out.0": named(lambda name: "diffusion_model." + name.replace("to_out.0", "out.0")),
    "attention.wo": named(lambda name: name.replace("to_out.0", "wo")),
    "transformer.base_model.model.": named(lambda name: f"transformer.base_model.model.{name}"),
    "default.": named(lambda name: f"default.{name}"),
}


def interleaved(stored: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows stored as halves of each head, (0, 2, 4, …, 1, 3, 5, …), in the checkpoint's order."""
    rows = np.arange(len(stored)).reshape(-1, head_dim)
    order = np.concatenate([np.concatenate([head[::2], head[1::2]]) for head in rows])
    result = np.empty_like(stored)
    result[order] = stored
    return result


def changes_of(
    placed: MatchedLora, manifest: Manifest, bundle: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Changes of the stored weights by a matched LoRA, in the checkpoint's names and order: matrices and vectors."""
    matrices, vectors = {}, {}
    for module in LORA_MODULES:
        spec = manifest.module(module)
        path = bundle / spec.weights
        file = TensorFile(path)
        after = merged(path, combine([(placed, 1.0)], module))
        for tensor, value in after.items():
            delta = value.astype(np.float64) - file.read(tensor)
            if delta.ndim == 1:
                split = spec.config.get("rope_layout") == "half_split" and tensor.endswith(
                    ("norm_q.weight", "norm_k.weight")
                )
                vectors[tensor] = interleaved(delta, len(delta)) if split else delta
        for name, where in spec.linears.items():
            if where.tensor in after:
                delta = after[where.tensor].astype(np.float64) - file.read(where.tensor)
                rows = delta[:, where.first_column : where.first_column + where.columns].T
                if np.abs(rows).max() > 0:
                    matrices[name] = interleaved(rows, where.head_dim) if where.head_dim else rows
    return matrices, vectors

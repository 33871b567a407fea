"""What the benchmarks of 8 bits compare with, on the CPU: torch's fp8, outlier channels, the errors of one product."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from shared import CHECKPOINT  # noqa: E402
from zimage_rt.benchmarks import eight_bits, quantized_products  # noqa: E402
from zimage_rt.benchmarks.outliers import FACTOR, channels, with_outliers  # noqa: E402
from zimage_rt.benchmarks.random_checkpoint import random_checkpoint, read_configs  # noqa: E402
from zimage_rt.benchmarks.report import OURS, Report  # noqa: E402
from zimage_rt.benchmarks.systems.torch_best_fp8 import linear, quantized_rows  # noqa: E402
from zimage_rt.benchmarks.systems.torch_best_transformer import TorchBestTransformer  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.parity.reference import load_reference, reference_function  # noqa: E402


def relative(got, wanted) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_row_wise_fp8_product_is_as_close_as_its_rounding():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 512), torch.randn(96, 512) / 512**0.5
    x[:, 3] = 0
    got = linear(quantized_rows(x), quantized_rows(weight))
    assert got.dtype == torch.bfloat16
    assert relative(got, x @ weight.t()) < 0.04
    assert (got[:, 3] == 0).all()


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 0.015), ("fp8", 0.05)])
def test_hand_fused_torch_is_close_to_diffusers(precision: str, limit: float):
    component = open_checkpoint(CHECKPOINT).transformer
    torch.manual_seed(0)
    latents, timestep, embeds = torch.randn(1, 16, 26, 20), torch.tensor([0.5]), torch.randn(1, 37, 256)
    reference = load_reference(component)
    with torch.no_grad():
        context = reference_function("context_refiner", reference)(embeds)
        wanted = reference_function("transformer", reference)(latents, timestep, context)
    ours = TorchBestTransformer(component, precision, "cpu", "none")
    got = ours(latents, timestep, ours.context(embeds))
    assert relative(got, wanted) < limit
    quantized = [isinstance(one, tuple) for one in ours._blocks[0]]
    assert quantized == [precision == "fp8" and place in (0, 3, 4, 5) for place in range(6)]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of fp32, bf16, fp16, fp8, got 'int8'"):
        TorchBestTransformer(open_checkpoint(CHECKPOINT).transformer, "int8", "cpu", "none")


def test_outliers_are_a_few_channels_of_what_products_read():
    plain = random_checkpoint(CHECKPOINT / "tokenizer", read_configs(CHECKPOINT))
    loud = with_outliers(plain)
    assert channels(3840).tolist() == [480, 1440, 2400, 3360]
    name = "layers.0.attention_norm1.weight"
    before, after = (one.transformer.tensors[name].load().float() for one in (plain, loud))
    raised = channels(len(before))
    assert torch.equal(after[raised], (before[raised] * FACTOR).bfloat16().float())
    assert int((before != after).sum()) == len(raised)
    same = ("all_x_embedder.2-1.weight", "context_refiner.0.attention_norm1.weight", "layers.0.attention_norm2.weight")
    for name in same:
        assert torch.equal(plain.transformer.tensors[name].load(), loud.transformer.tensors[name].load())


class Kernels:
    """The kernels' part in `product_errors`, in float64."""

    def fused_gemm_runs_here(self) -> bool:
        return True

    def mma_gemm_8bit_runs_here(self, dtype: str) -> bool:
        return False

    def quantize_rows(self, bits: np.ndarray, dtype: str, rotation: str) -> tuple[np.ndarray, np.ndarray]:
        x = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        codes, scales, found = quantized_products.exported(x, "int8" if dtype == "int8" else "fp8")
        assert found == rotation
        return codes, scales

    def LinearLayer(self, library, kind, x, weight, x_scales, weight_scales, **options):
        def values(codes: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(codes)
            return tensor.double() if tensor.dtype == torch.int8 else tensor.view(torch.float8_e4m3fn).double()

        class Layer:
            def run(self) -> np.ndarray:
                product = (values(x) @ values(weight).t()).numpy()
                return (product * x_scales[:, None] * weight_scales).astype(np.float32)

        return Layer()


def test_errors_of_exported_weights_and_rows_are_within_their_targets(monkeypatch, capsys):
    monkeypatch.setattr(quantized_products, "find_library", lambda name: name)
    sizes = {"out": ("linear", 3840, 128), "w2": ("linear", 10240, 128)}
    monkeypatch.setattr(quantized_products, "shapes", lambda: sizes)
    found = quantized_products.product_errors(Kernels(), 64, "cpu")
    assert len(found) == 12
    assert quantized_products.report_errors(found) == 0
    found[0]["error"] = float("nan")
    assert quantized_products.report_errors(found) == 1
    assert quantized_products.report_errors([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_table_has_every_ratio():
    arguments = eight_bits.parse(["--gpu", "cpu", "--size", "nano", "--nano", str(CHECKPOINT), "--sizes", "64,96x64"])
    assert arguments.sizes == [(64, 64), (64, 96)]
    run = eight_bits.EightBits(arguments, Report(None, {}))
    fields = {"figure": "one evaluation", "shape": "64x64", "includes": ""}
    for system, precision, value in (
        (OURS, "bf16", 90.0),
        (OURS, "int8", 54.0),
        (OURS, "fp8", 60.0),
        (eight_bits.RIVAL, "fp8", 64.0),
    ):
        run.add([value], system, precision, "ms", 1, **fields)
    table = run.table()
    assert "int8 54.000 (0.600); fp8 60.000 (0.667)" in table
    assert "fp8 / hand-fused torch fp8 0.938; int8 / hand-fused torch fp8 0.844" in table

"""Our own CUDA models in csrc/: they read the weights of a bundle and need no graph."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core, checks
from ..bundle.manifest import Manifest, ModuleSpec
from ..bundle.modules import VAES, vae_decoder, vae_encoder
from ..bundle.safetensors_file import TensorFile
from ..errors import BackendUnavailable, BundleMismatch, LoraError, NotFinite, OutOfMemory, RequestError, ZImageError
from ..image.tiled_decode import decode_tiled
from ..not_finite import check_finite
from .base import MAX_DEVICE, Change, CheckModule, Dense, Device, LowRank, Module, Probe, SampleJob
from .cuda_libraries import SONAMES, find_library, has_code, library_version
from .nvidia_driver import query

try:
    from .. import _cuda
except ImportError as error:
    if importlib.util.find_spec("zimage_rt._cuda") is not None:
        raise
    raise BackendUnavailable(
        f"backend 'cuda': not in this installation: {_core.cuda_skipped or 'its module _cuda was removed'}; "
        "build it in the source folder with: ZIMAGE_RT_CUDA=ON pip install '.[cuda]'"
    ) from error

log = logging.getLogger(__name__)

VAE_DECODERS, VAE_ENCODERS = tuple(map(vae_decoder, VAES)), tuple(map(vae_encoder, VAES))
MODELS = ("text_encoder", "context_refiner", "transformer", "controlnet", *VAE_DECODERS, *VAE_ENCODERS)

# Stored in fp32 in an fp16 bundle, because other backends overflow; computed in fp16: csrc/models/full_vae.h.
FP32_MODELS = (vae_decoder("full"), vae_encoder("full"))

# Read on the host, row by row: see csrc/models/text_encoder.h.
HOST_TENSORS = ("embed_tokens.weight",)


# Pixels of a side of a tile of the full VAE, where the whole does not fit: 1.1 GB of activations.
TILE = 1024

# Bytes; more than any device has.
MAX_MEMORY = 1 << 50


class CudaBackend:
    """Runs bundles in fp16 or bf16 on one NVIDIA GPU, compute capability 8.0 or later.

    Args:
        device: which GPU, from 0.
        memory_limit: bytes of device memory to stay within; None for all there is. As many of the transformer's layers
            as do not fit beside everything else stay in page-locked memory of the host, and are copied to the device in
            every evaluation while the layers before them are computed. Images are the same to the byte.
        text_encoder: `resident` keeps its weights on the device; `host` takes them there for each new prompt, two
            layers at a time, and gives that memory back, which saves it for the price of a copy.
        cudnn: whether to use cuDNN's attention where it is installed; False means our own kernel alone.
        fused_gemm: whether to use our own matrix products on GPUs that run them (H100, H200); False means cuBLASLt
            alone, for comparison.
        cache_dir: where timings of matrix products are remembered; None for nowhere.

    Raises:
        BackendUnavailable: there is no such GPU, or a library is missing; says what to install.
    """

    name = "cuda"

    def __init__(
        self,
        device: int = 0,
        memory_limit: int | None = None,
        text_encoder: str = "resident",
        cudnn: bool = True,
        fused_gemm: bool = True,
        cache_dir: str | Path | None = "~/.cache/zimage_rt",
    ) -> None:
        device = checks.integer(device, "device", 0, MAX_DEVICE)
        if text_encoder not in ("resident", "host"):
            raise RequestError(f"text_encoder: expected resident or host, got {checks.shown(text_encoder)}")
        if memory_limit is not None:
            memory_limit = checks.integer(memory_limit, "memory_limit", 1, MAX_MEMORY)
        cudnn, fused_gemm = checks.flag(cudnn, "cudnn"), checks.flag(fused_gemm, "fused_gemm")
        folder = None if cache_dir is None else checks.path(cache_dir, "cache_dir")
        problem = _device_problem(device)
        if problem is not None:
            raise BackendUnavailable(f"backend 'cuda': {problem}")
        self._options: dict[str, Any] = {
            "device": device,
            "cublaslt": find_library("cublasLt"),
            "cudnn": find_library("cudnn") if cudnn else "",
            "cache_file": str(_cache_file(folder)) if folder is not None else "",
            "memory_limit": memory_limit or 0,
            "keep_text_encoder": text_encoder == "resident",
            "fused_gemm": fused_gemm,
        }

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> CudaPipeline:
        """A pipeline over a bundle; modules are loaded on first use."""
        try:
            native = _cuda.Pipeline(**self._options)
        except RuntimeError as error:
            raise BackendUnavailable(
                f"backend 'cuda': {error}; install its libraries with: pip install 'zimage-rt[cuda]', "
                "or leave cuDNN out with backend_options={'cudnn': False}"
            ) from error
        return CudaPipeline(native, bundle, manifest, check)


def probe() -> list[Probe]:
    """See `Probe`: the GPUs that the CUDA runtime sees, and the libraries that `CudaBackend` opens."""
    versions = {"architectures": _cuda.architectures}
    problems = []
    for library in SONAMES:
        try:
            versions[library] = library_version(library)
        except OSError as error:
            problems.append(f"{error}; install it with: pip install 'zimage-rt[cuda]'")
    count = _cuda.device_count()
    # Device 0 is asked for even where there is none: the answer says why.
    unfit = [_device_problem(device) for device in range(max(count, 1))]
    if None not in unfit:
        problems += [problem for problem in unfit if problem is not None]
    infos = [_cuda.device_info(device) for device in range(count)]
    devices = [Device(info["name"], info["compute_capability"], info["total_memory"]) for info in infos]
    fastest = "int8" if any(info["compute_capability"] == (9, 0) for info in infos) else None
    return [Probe("cuda", "; ".join(problems) or None, versions, devices, fastest)]


def _device_problem(device: int) -> str | None:
    """Why a GPU cannot run this backend; None where it can."""
    count = _cuda.device_count()
    if not 0 <= device < count:
        # The runtime calls a driver that is not there too old.
        problem = query().problem or f"no device {device}: {_cuda.device_problem() or f'there are {count} GPUs'}"
        return f"{problem}. Or load the bundle with backend='onnxruntime'"
    info = _cuda.device_info(device)
    if info["compute_capability"] < (8, 0):
        found = "{}.{}".format(*info["compute_capability"])
        return f"{info['name']} has compute capability {found}; expected 8.0 or later: use backend='onnxruntime'"
    if not has_code(_cuda.architectures, info["compute_capability"]):
        found = "{}.{}".format(*info["compute_capability"])
        return (
            f"{info['name']} has compute capability {found}; this build has code for {_cuda.architectures}: build it "
            "for that GPU (make cuda CUDA_ARCHITECTURES=…), or use backend='onnxruntime'"
        )
    return None


def _cache_file(cache_dir: Path) -> Path:
    folder = cache_dir.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "matmul.txt"


class CudaPipeline:
    """One bundle on one GPU. Calls of several threads are serialised; the GIL is not held while the GPU works."""

    def __init__(self, native: _cuda.Pipeline, bundle: Path, manifest: Manifest, check: CheckModule) -> None:
        self.native = native
        self._bundle, self._manifest, self._check = bundle, manifest, check
        self._loaded: set[str] = set()
        self._lock = threading.Lock()

    def load(self, modules: Sequence[str]) -> None:
        """See `Pipeline`. Raises BundleMismatch for a module or a precision that this backend does not run."""
        with self._lock:  # two requests that need a module at once must not load it twice
            for name in modules:
                self._load(name)

    def _load(self, name: str) -> None:
        if name in self._loaded:
            return
        spec = self._manifest.module(name)
        if name not in MODELS:
            raise BundleMismatch(
                f"the cuda backend has no model for {name}; it runs: {', '.join(MODELS)}. "
                "Load the bundle with backend='onnxruntime'"
            )
        if spec.precision == "fp32" and name not in FP32_MODELS:
            raise BundleMismatch(
                f"{name}: the cuda backend runs bf16, fp16, int8 and fp8, got fp32; "
                "export the bundle with --precision bf16"
            )
        if spec.config.get("weight_layout") != "in_out" or (
            name in ("transformer", "controlnet") and spec.config.get("rope_layout") != "half_split"
        ):
            raise BundleMismatch(f"{name}: the weights have another layout than this version reads; export it again")
        if spec.base is not None:
            self._load(spec.base)
        self._check(name)
        path = self._bundle / spec.weights
        with _errors(f"loading {name}", BundleMismatch):
            self.native.load(name, str(path), weight_entries(path), dict(spec.config))
        self._loaded.add(name)

    def patch(self, changes: Mapping[str, Sequence[Change]]) -> None:
        """See `Pipeline`: the sums are made on the device, where the weights lie, so captured graphs stay valid."""
        self.load(list(changes))
        for name, found in changes.items():
            with _errors(f"changing the weights of {name}"):
                thin = [part for part in found if isinstance(part, LowRank)]
                self.native.patch(name, [(part.tensor, part.first_column, part.down, part.up) for part in thin])
                for part in found:  # one after the other, so that memory holds one of them
                    if isinstance(part, Dense):
                        self.native.patch(name, [(part.tensor, part.first_column, None, part.make())], add=True)

    def module(self, name: str) -> Module:
        """One module by itself, numpy in and out, as other backends have them: for parity tests."""
        self.load([name])
        return CudaModule(name, self._manifest.module(name), self.native)

    def context(self, input_ids: np.ndarray) -> np.ndarray:
        """See `Pipeline`."""
        self.load(["text_encoder", "context_refiner"])
        with _errors("encoding a prompt"):
            context = self.native.context(input_ids)
        check_finite(context, "context_refiner")
        return context

    def sample(self, job: SampleJob) -> bool:
        """See `Pipeline`."""
        return self._run(job, None) is not None

    def generate(self, job: SampleJob, vae: str) -> tuple[np.ndarray, dict[str, float]] | None:
        """See `Pipeline`. Each step is one CUDA graph, and `on_step` is called while the next one runs.

        If there is too little memory for the full VAE beside the loop, its images are decoded in tiles, with a warning.
        """
        self.load([vae_decoder(vae)])
        try:
            return self._run(job, vae_decoder(vae))
        except OutOfMemory as error:  # before anything was drawn
            if not self._tiles(job.latents, vae):
                raise
            log.warning("%s; decoding in tiles of %d pixels instead", error, TILE)
        result = self._run(job, None)
        if result is None:
            return None
        start = time.perf_counter()
        images = self._decode_tiled(job.latents, vae)
        return images, {**result[1], "decode": time.perf_counter() - start}

    def _tiles(self, latents: np.ndarray, vae: str) -> bool:
        """Whether latents that do not fit whole are decoded in tiles: the full VAE's, if they are larger than one."""
        return vae == "full" and max(latents.shape[2:]) * self._manifest.pipeline.vae_scale_factor > TILE

    def _decode_tiled(self, latents: np.ndarray, vae: str) -> np.ndarray:
        return decode_tiled(
            lambda part: self._decode_whole(part, vae), latents, TILE, self._manifest.pipeline.vae_scale_factor
        )

    def _run(self, job: SampleJob, decoder: str | None) -> tuple[np.ndarray, dict[str, float]] | None:
        name = "transformer" if job.conditioning.control is None else "controlnet"
        self.load([name])
        with _errors("drawing"):
            result = self.native.sample(job, decoder=decoder)
        if result is None:
            return None
        check_finite(job.latents, name)
        images, denoise, decoding = result
        # What the device took, between events; the rest of the wall time is copies and waiting for other threads.
        return images, {"denoise": denoise, "decode": decoding}

    def encode_image(self, images: np.ndarray, vae: str) -> np.ndarray:
        """See `Pipeline`."""
        name = vae_encoder(vae)
        self.load([name])
        with _errors("encoding an image"):
            latents = self.native.encode_pixels(images, name)
        check_finite(latents, name)
        return latents

    def decode(self, latents: np.ndarray, vae: str) -> np.ndarray:
        """See `Pipeline`; in tiles where `generate` would."""
        try:
            return self._decode_whole(latents, vae)
        except OutOfMemory as error:
            if not self._tiles(latents, vae):
                raise
            log.warning("%s; decoding in tiles of %d pixels instead", error, TILE)
        return self._decode_tiled(latents, vae)

    def _decode_whole(self, latents: np.ndarray, vae: str) -> np.ndarray:
        self.load([vae_decoder(vae)])
        with _errors("decoding"):
            return self.native.decode_pixels(latents, vae_decoder(vae))

    def time_evaluation(
        self, height: int, width: int, context_tokens: int, batch: int = 1, repeats: int = 20
    ) -> list[float]:
        """Milliseconds of one function evaluation on the device, replayed as a graph on random inputs."""
        self.load(["transformer"])
        factor = self._manifest.pipeline.vae_scale_factor
        rows = (
            -(-context_tokens // self._manifest.pipeline.sequence_multiple) * self._manifest.pipeline.sequence_multiple
        )
        with _errors("timing"):
            return self.native.time_evaluation(height // factor, width // factor, [rows] * batch, repeats)

    def time_text_encoder(self, tokens: int, repeats: int = 20) -> list[float]:
        """Milliseconds of the text encoder on the device; with its weights' way there where they stay on the host."""
        self.load(["text_encoder"])
        with _errors("timing"):
            return self.native.time_text_encoder(tokens, repeats)

    def time_decode(self, height: int, width: int, repeats: int = 20, vae: str = "tiny") -> list[float]:
        """Milliseconds of a VAE's decoder, latents to uint8, on the device."""
        self.load([vae_decoder(vae)])
        factor = self._manifest.pipeline.vae_scale_factor
        with _errors("timing"):
            return self.native.time_decode(vae_decoder(vae), height // factor, width // factor, repeats)

    def time_encode(self, height: int, width: int, repeats: int = 20, vae: str = "tiny") -> list[float]:
        """Milliseconds of a VAE's encoder, uint8 to latents, on the device."""
        self.load([vae_encoder(vae)])
        factor = self._manifest.pipeline.vae_scale_factor
        with _errors("timing"):
            return self.native.time_encode(vae_encoder(vae), height // factor, width // factor, repeats)

    def close(self) -> None:
        """See `Pipeline`: weights, workspace and graphs are freed with the native pipeline."""
        del self.native

    def memory(self) -> dict[str, int]:
        """Bytes of device memory: weights, workspace, graphs, and what the device has free and in all."""
        return self.native.memory()

    def streaming(self) -> dict[str, int]:
        """`layers` of the transformer that are not resident (see `memory_limit`), and their `host_bytes`."""
        return self.native.streaming()


class CudaModule:
    """A module of a loaded pipeline, for callers that want it alone."""

    def __init__(self, name: str, spec: ModuleSpec, native: _cuda.Pipeline) -> None:
        self._name, self._spec, self._native = name, spec, native

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Module`."""
        native, config = self._native, self._spec.config
        with _errors(f"running {self._name}"):
            if self._name == "text_encoder":
                value = native.encode(inputs["input_ids"], config["hidden_size"])
            elif self._name == "context_refiner":
                value = native.refine(inputs["prompt_embeds"])
            elif self._name in ("transformer", "controlnet"):
                value = native.evaluate(**inputs)
            elif self._name in VAE_DECODERS:
                value = native.decode(inputs["latents"], self._name)
            else:
                value = native.encode_image(inputs["image"], self._name)
        return {self._spec.outputs[0].name: value}


def weight_entries(path: Path) -> list[tuple[str, str, list[int], int, bool]]:
    """The tensors of a weight file: name, dtype, shape, offset in the file, whether it stays on the host."""
    file = TensorFile(path)
    return [
        (name, entry["dtype"], entry["shape"], file.data_start + entry["data_offsets"][0], name in HOST_TENSORS)
        for name, entry in file.tensors.items()
    ]


@contextmanager
def _errors(doing: str, argument: type[ZImageError] = RequestError) -> Iterator[None]:
    """Raise the native module's errors as this package's; a wrong argument becomes `argument`."""
    try:
        yield
    except _cuda.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{doing}: {error}; ask for a smaller image or batch, "
            "or load the engine with backend_options={'text_encoder': 'host'}"
        ) from error
    except _cuda.HostMemoryError as error:
        raise OutOfMemory(
            f"{doing}: {error}; free memory there, or give the device more of the layers with a larger memory_limit"
        ) from error
    except _cuda.RangeError as error:
        raise LoraError(f"{doing}: {error}") from error
    except _cuda.NotFiniteError as error:
        raise NotFinite(str(error)) from error
    except _cuda.WeightError as error:
        raise BundleMismatch(f"{doing}: {error}") from error
    except _cuda.CudaError as error:
        raise ZImageError(f"{doing}: {error}") from error
    except _cuda.ArgumentError as error:
        raise argument(f"{doing}: {error}") from error
    except MemoryError as error:
        raise OutOfMemory(f"{doing}: {error or 'too little memory on the host'}; free memory") from error

"""ONNX Runtime's execution providers: their availability, their options, and the operators assigned to them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .. import _core
from ..checks import named, shown
from ..errors import BackendUnavailable, BundleMismatch, RequestError
from . import nvidia_driver
from .base import Device, Probe

CPU = "CPUExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: its name in options.
        ort_name: ONNX Runtime's name for it.
        extra: the pip extra that installs it; empty if there is none.
        library: its file beside ONNX Runtime's own library, if it is loaded on first use.
        needs: a sentence for messages about the libraries that `library` is linked with.
        plugin: the Python package with its library, if it is not part of ONNX Runtime.
    """

    name: str
    ort_name: str
    extra: str = ""
    library: str = ""
    needs: str = ""
    plugin: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on an NVIDIA GPU, chosen by `device`."""
        return bool(self.library or self.plugin)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("cpu", CPU, "onnxruntime"),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "onnxruntime-gpu",
            library="libonnxruntime_providers_cuda.so",
            needs="CUDA and cuDNN come with: pip install 'zimage-rt[onnxruntime-gpu]'",
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "onnxruntime-gpu",
            library="libonnxruntime_providers_tensorrt.so",
            needs="TensorRT 10 is installed from NVIDIA, CUDA and cuDNN with: pip install 'zimage-rt[onnxruntime-gpu]'",
        ),
        Provider(
            "nv_tensorrt_rtx",
            "NvTensorRTRTXExecutionProvider",
            "onnxruntime-rtx",
            plugin="onnxruntime_ep_nv_tensorrt_rtx",
        ),
    )
}


def find_provider(name: str) -> Provider:
    """A provider by its name in options, or by ONNX Runtime's. Raises RequestError for any other."""
    if not isinstance(name, str):
        raise RequestError(f"provider: expected one of {', '.join(PROVIDERS)}, got {shown(name)}")
    if name in PROVIDERS:
        return PROVIDERS[name]
    by_ort_name = {provider.ort_name: provider for provider in PROVIDERS.values()}
    if name in by_ort_name:
        return by_ort_name[name]
    if name in ort.get_all_providers():
        return Provider(name, name)
    raise RequestError(
        f"provider: expected one of {', '.join(PROVIDERS)}, or ONNX Runtime's own name of another, got {name!r}"
    )


def require(provider: Provider, device: int) -> None:
    """Raise BackendUnavailable if the provider or its device is missing, RequestError if it has no devices."""
    if device != 0 and not provider.on_gpu:
        raise RequestError(f"device: expected 0 with provider {provider.name!r}, got {device}")
    problem, devices = _availability(provider)
    count = len(plugin_devices(provider)) if provider.plugin else len(devices)
    if problem is None and provider.on_gpu and not 0 <= device < count:
        problem = f"no device {device}: there are {count}"
    if problem is not None:
        raise BackendUnavailable(f"backend 'onnxruntime', provider {provider.name!r}: {problem}")


def probe_providers() -> list[Probe]:
    """The availability of every provider of `PROVIDERS`; see `Probe`."""
    probes = []
    for provider in PROVIDERS.values():
        problem, devices = _availability(provider)
        versions = {ort.package_name or "onnxruntime": ort.__version__}
        if provider.plugin and problem is None:
            versions[provider.plugin] = importlib.import_module(provider.plugin).__version__
        fastest = None
        if provider.name == "cpu":
            fastest = "int8" if _core.multiplies_bytes_exactly() else "fp32"
        probes.append(Probe(f"onnxruntime/{provider.name}", problem, versions, devices, fastest))
    return probes


def _availability(provider: Provider) -> tuple[str | None, Sequence[Device]]:
    """Why a provider cannot run here, or None, and the machine's GPUs if it runs on GPUs."""
    problem = _load_problem(provider)
    if not provider.on_gpu:
        return problem, ()
    driver = nvidia_driver.query()
    # A problem about the driver's library is the driver's own problem, and is not reported twice.
    if problem is not None and (driver.problem is None or nvidia_driver.LIBRARY not in problem):
        return "; ".join(filter(None, (driver.problem, problem))), driver.devices
    if driver.problem is None and provider.plugin and not plugin_devices(provider):
        return f"it takes none of this machine's GPUs: {', '.join(map(_describe, driver.devices))}", driver.devices
    return driver.problem, driver.devices


def _load_problem(provider: Provider) -> str | None:
    """Why a provider's code cannot be loaded, or None."""
    if provider.plugin:
        return _register(provider)
    if provider.ort_name not in ort.get_available_providers():
        return f"{ort.package_name} {ort.__version__} comes without {provider.ort_name}{_install(provider)}"
    if provider.library:
        _preload()
        try:
            ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / provider.library))
        except OSError as error:
            return f"{error}; {provider.needs}"
    return None


def _describe(device: Device) -> str:
    return f"{device.name} ({'{}.{}'.format(*device.compute_capability)})"


def _install(provider: Provider) -> str:
    return f"; install it with: pip install 'zimage-rt[{provider.extra}]'" if provider.extra else ""


@functools.cache
def _preload() -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, which the dynamic loader does not search."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints missing libraries; loading the provider reports them
        ort.preload_dlls(directory="")


@functools.cache
def _register(provider: Provider) -> str | None:
    """Register a plugin's library, once per process; returns why it cannot be registered, or None."""
    try:
        plugin = importlib.import_module(provider.plugin)
        ort.register_execution_provider_library(provider.ort_name, plugin.get_library_path())
    except ImportError as error:
        return f"{error}{_install(provider)}"
    except Exception as error:  # onnxruntime's own exceptions have no common base
        return f"onnxruntime {ort.__version__} cannot register it: {error}"
    return None


def plugin_devices(provider: Provider) -> list[ort.OrtEpDevice]:
    """The devices of a registered plugin."""
    return [device for device in ort.get_ep_devices() if device.ep_name == provider.ort_name]


def check_options(provider: Provider, options: Mapping[str, Any]) -> dict[str, str]:
    """Convert the provider's options to ONNX Runtime's strings. Raises RequestError for invalid ones.

    Unknown names are checked here only for providers that would ignore them; others refuse them in a new session.
    """
    texts = {}
    for name, value in named(options, "provider_options").items():
        if not isinstance(value, str | int | float) or "\0" in name or (isinstance(value, str) and "\0" in value):
            raise RequestError(f"provider_options: expected names with text or numbers, got {name!r}: {shown(value)}")
        if name == "device_id" and provider.on_gpu:
            raise RequestError("provider_options: device_id: choose the GPU with the backend option device instead")
        if not isinstance(value, str) and not -(2**64) < value < 2**64:
            raise RequestError(f"provider_options: {name}: expected a finite number, got {shown(value)}")
        texts[name] = str(int(value)) if isinstance(value, bool) else str(value)
    known = _known_options(provider)
    unknown = sorted(texts.keys() - known) if known is not None else []
    if unknown:
        choice = f"it knows {', '.join(sorted(known or ()))}" if known else "it has none"
        raise RequestError(f"provider_options: provider {provider.name!r} has no option {unknown[0]!r}; {choice}")
    return texts


def _known_options(provider: Provider) -> Collection[str] | None:
    """The option names of a provider that silently ignores unknown ones; None for providers that refuse them."""
    if provider.ort_name == CPU:
        return ()
    if not provider.plugin:
        return None
    # A plugin ignores names that it does not know. Its wheel has a C++ header with the names.
    spec = importlib.util.find_spec(provider.plugin)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    headers = [header for folder in folders for header in Path(folder).glob("*provider_options.h")]
    if not headers:
        return None
    return set(re.findall(r'const char\* k\w+ = "(\w+)";', headers[0].read_text(encoding="utf-8")))


def create_session(
    path: Path, settings: ort.SessionOptions, provider: Provider, options: Mapping[str, str], device: int
) -> ort.InferenceSession:
    """Create a session with only this provider. `settings` are changed.

    Raises:
        RequestError: the provider does not know an option.
        BackendUnavailable: the provider did not start.
    """
    if provider.ort_name != CPU:
        # ONNX Runtime adds its CPU provider after every other; `check_assignment` checks the operators assigned to it.
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider.plugin:
        settings.add_provider_for_devices([plugin_devices(provider)[device]], options)
        providers = None
    else:
        providers = [(provider.ort_name, dict(options) | ({"device_id": str(device)} if provider.on_gpu else {}))]
    try:
        # ONNX Runtime's own fallback would print a message and start again on the CPU.
        session = ort.InferenceSession(str(path), settings, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's own exceptions have no common base
        # Providers word it differently: "Unknown provider option: …", "Invalid OpenVINO EP option: …".
        if re.search(r"(unknown|invalid)[\w ]* option", str(error), re.IGNORECASE):
            raise RequestError(f"provider_options: provider {provider.name!r}: {error}") from error
        raise
    if provider.ort_name not in session.get_providers():
        raise BackendUnavailable(
            f"backend 'onnxruntime', provider {provider.name!r}: it did not start; "
            "ONNX Runtime's log above says why, and zimage doctor what is missing"
        )
    return session


def check_assignment(
    session: ort.InferenceSession, module: str, provider: Provider, allow_cpu: Collection[str]
) -> None:
    """Raise BundleMismatch if operators were assigned to the CPU that `allow_cpu` does not allow there."""
    if provider.ort_name == CPU or module in allow_cpu:
        return
    count, left = 0, Counter[str]()
    for subgraph in session.get_provider_graph_assignment_info():
        operators = [node.op_type for node in subgraph.get_nodes()]
        count += len(operators)
        if subgraph.ep_name != provider.ort_name:
            left.update(operator for operator in operators if operator not in allow_cpu)
    if left:
        listed = ", ".join(f"{operator} ({number})" for operator, number in left.most_common())
        raise BundleMismatch(
            f"{module}: provider {provider.name!r} left {left.total()} of {count} operators to the CPU: {listed}; "
            f"allow these there with backend_options={{'allow_cpu': {sorted({*left, *allow_cpu})}}}, "
            f"or the whole module with {[module]}"
        )

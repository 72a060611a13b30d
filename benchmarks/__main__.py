"""Run every benchmark, one after the other: `python -m benchmarks` or `make bench`.

    python -m benchmarks [--trace PATH]

`benchmarks.eviction` replays a trace, which is not in the repository: it runs where one is given.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

MODULES = (
    "benchmarks.step_host_time",
    "benchmarks.attention",
    "benchmarks.quantization",
    "benchmarks.page_store",
    "benchmarks.serving",
    "benchmarks.overload",
    "benchmarks.drafts",
    "benchmarks.cache_cost",
    "benchmarks.returning",
    "benchmarks.store_start",
)
TRACED = "benchmarks.eviction"


def main() -> int:
    """The exit status of the first that fails, else 0."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Run every benchmark.")
    parser.add_argument("--trace", metavar="PATH", help=f"the trace that {TRACED} replays")
    trace: str | None = parser.parse_args().trace
    commands: list[Sequence[str]] = [(module,) for module in MODULES]
    if trace is not None:
        commands.append((TRACED, "--trace", trace))
    for command in commands:
        print(f"\n# python -m {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

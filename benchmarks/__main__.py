"""Run every benchmark, one after the other: `python -m benchmarks` or `make bench`."""

import subprocess
import sys

MODULES = (
    "benchmarks.step_host_time",
    "benchmarks.serving",
    "benchmarks.overload",
    "benchmarks.drafts",
)


def main() -> int:
    """The exit status of the first that fails, else 0."""
    for module in MODULES:
        print(f"\n# python -m {module}", flush=True)
        status = subprocess.run([sys.executable, "-m", module], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

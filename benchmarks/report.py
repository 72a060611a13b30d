"""The command line that every measurement has: print, and with --json FILE also write."""

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path


def run(
    module: str, description: str | None, measure: Callable[[], Awaitable[Mapping[str, object]]]
) -> int:
    """Measure and report; the exit status. The file holds the command with no path in it."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    path: Path | None = given.json

    async def awaited() -> Mapping[str, object]:
        return await measure()

    figures = asyncio.run(awaited())
    if path is not None:
        report = {"command": f"python -m {module}", "figures": dict(figures)}
        path.write_text(json.dumps(report, indent=2) + "\n")
    return 0

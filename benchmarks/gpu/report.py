"""The table and the JSON of what was found, and what it was found on."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.bench import Part, Row
from benchmarks.gpu.driver import ROOT, Found

PACKAGES = ("torch", "triton", "transformers", "numpy", "cryptography")
# What a copy of the tree without git says: a file that nobody tracks.
COMMIT_FILE = ROOT / "build" / "commit"
MEANINGLESS = "these figures mean nothing: tiny shapes, to see that everything runs"
NOTE_COLUMNS = 100


def conditions(device: torch.device) -> Mapping[str, object]:
    """The machine, the versions and the commit."""
    versions = {"python": platform.python_version(), "driver": _driver()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    described: dict[str, object] = {"name": platform.processor() or platform.machine()}
    if device.type == "cuda":
        given = torch.cuda.get_device_properties(device)
        described = {
            "name": given.name,
            "memory_bytes": given.total_memory,
            "multiprocessors": given.multi_processor_count,
            "capability": f"{given.major}.{given.minor}",
            "l2_bytes": given.L2_cache_size,
        }
    return {"device": described, "versions": versions, "commit": commit()}


def commit() -> str:
    """Of the tree, with a plus where files differ from it; 'unknown' where neither git nor the file
    says it."""
    with suppress(OSError, subprocess.CalledProcessError):
        head = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
        return head + "+" * bool(_said("git", "-C", str(ROOT), "status", "--porcelain"))
    with suppress(OSError):
        return COMMIT_FILE.read_text().strip() or "unknown"
    return "unknown"


def table(part: Part, found: Found) -> str:
    """A part's lines."""
    rows = [row for some in found.rows.values() for row in some]
    shown = rows if part.listed else [row for row in rows if row.failed or row.value is None]
    lines = [f"\n{part.name} ({found.seconds:.0f} s)"]
    if not part.listed:
        lines += summary(rows)
    lines += [_line(row) for row in shown]
    lines += [f"  warned: {words}" for words in found.logs]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[str]:
    """How many cases were right, and what came nearest to its bound."""
    measured = [row for row in rows if row.value is not None]
    wrong = sum(row.failed for row in rows)
    lines = [f"  {len(measured)} cases, {wrong} failed"]
    near = [row for row in measured if not row.failed and row.share is not None]
    if near:
        worst = max(near, key=lambda row: row.share or 0.0)
        lines.append(f"  nearest to its bound: {_line(worst).strip()}")
    return lines


def written(
    path: Path,
    command: str,
    known: Mapping[str, object],
    parts: Mapping[str, Found],
    *,
    quick: bool,
    seconds: float,
) -> None:
    """All of it, as JSON."""
    told = {
        "command": command,
        "meaningless": MEANINGLESS if quick else None,
        **known,
        "seconds": round(seconds, 1),
        "failed": [row.name for found in parts.values() for row in failures(found)],
        "parts": {
            name: {
                "seconds": round(found.seconds, 1),
                "warnings": found.logs,
                "rows": [_told(row) for some in found.rows.values() for row in some],
            }
            for name, found in parts.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")


def failures(found: Found) -> list[Row]:
    """Wrong results, and errors."""
    return [row for some in found.rows.values() for row in some if row.failed]


def _told(row: Row) -> Mapping[str, object]:
    """Without what says nothing; a number that JSON does not know as a word."""
    kept = {
        key: value
        for key, value in asdict(row).items()
        if not (value is None or value is False or value == "")  # 0.0 is a figure
    }
    for key in ("value", "share"):
        if key in kept:
            number = float(kept[key])
            kept[key] = number if abs(number) < float("inf") else str(number)
    return kept if "value" in kept else {**kept, "value": None}


def _line(row: Row) -> str:
    mark = "FAILED " if row.failed else ""
    if row.value is None:
        return f"  {row.name:58} {mark}{row.note[: 2 * NOTE_COLUMNS]}"
    share = "" if row.share is None else f"{row.share:8.1%} of {row.beside}"
    value = f"{row.value:11.4g} {row.unit:10}"
    return f"  {row.name:58}{value} {share:26} {mark}{row.note[:NOTE_COLUMNS]}".rstrip()


def _driver() -> str:
    with suppress(OSError, subprocess.CalledProcessError):
        asked = "--query-gpu=driver_version", "--format=csv,noheader"
        return _said("nvidia-smi", *asked).partition("\n")[0]
    return "unknown"


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()

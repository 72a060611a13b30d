"""The measurement of a GPU, where there is none: that every step runs on a CPU in tiny shapes, that
wrong results and processes that die are told, and that it needs nothing of the server's upper
floors."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import exact, grid_attention, report, tier_steps
from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.checks import BOUNDS, checked
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.random_llama import PAGE_SIZE, TINY
from chatserve_kernels import reference

TOTAL_SECONDS = 480  # what all parts may take together

# What is there with torch, triton and transformers alone: their dependencies, and theirs.
BARE = """
from importlib.machinery import PathFinder

hidden = {hidden!r}
find = PathFinder.find_spec

def found(name, *others):
    return None if name.partition(".")[0] in hidden else find(name, *others)

PathFinder.find_spec = found
"""


def bare() -> str:
    """A program that hides all other packages."""
    there: set[str] = set()
    for package in ("torch", "triton", "transformers"):
        _add(package, there)
    found = metadata.packages_distributions().items()
    hidden = {
        module for module, packages in found if not any(_plain(each) in there for each in packages)
    }
    return BARE.format(hidden=hidden - {"chatserve", "chatserve_kernels", "prefix_store"})


def _add(package: str, there: set[str]) -> None:
    """With what it needs."""
    package = _plain(package)
    if package in there:
        return
    there.add(package)
    try:
        needed = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        return
    for line in needed:
        name = re.match("[A-Za-z0-9._-]+", line)
        if name is not None and "extra ==" not in line:
            _add(name[0], there)


def _plain(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    told: dict[str, Any]

    def rows(self, part: str) -> list[dict[str, Any]]:
        return self.told["parts"][part]["rows"]

    def row(self, part: str, name: str) -> dict[str, Any]:
        """The one that has this in its name."""
        (row,) = (row for row in self.rows(part) if re.search(name, row["name"]))
        return row


Measure = Callable[..., Ended]


@pytest.fixture
def measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Measure:
    """The command in this process, which has imported already what takes most of its time; what
    it measures with are others as ever."""

    def run(*arguments: str, before: str) -> Ended:
        """before: a program that each of them runs first."""
        (tmp_path / "sitecustomize.py").write_text(before)
        path = tmp_path / "gpu.json"
        command = ["benchmarks.gpu", "--device", "cpu", "--quick", "--json", str(path)]
        for key in [key for key in os.environ if key.startswith("PYTEST_")]:
            monkeypatch.delenv(key)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        status = command_line.main()
        given = capfd.readouterr()
        assert path.exists(), given.err
        return Ended(status, given.out + given.err, json.loads(path.read_text()))

    return run


def test_every_step_runs_where_nothing_but_torch_triton_and_transformers_is(
    measure: Measure,
) -> None:
    ended = measure(before=bare())
    assert ended.status == 0, ended.output
    told = ended.told
    assert told["command"] == "python -m benchmarks.gpu --quick --device cpu --json gpu.json"
    assert told["meaningless"]
    assert told["meaningless"] in ended.output
    assert told["failed"] == []
    assert {"python", "driver", "torch", "triton", "transformers"} <= set(told["versions"])
    assert told["commit"]
    assert list(told["parts"]) == [part.name for part in PARTS]
    for part in PARTS:
        rows = ended.rows(part.name)
        assert len(rows) >= len(part.steps(True)) - 1
        missing = {row["name"]: row["note"] for row in rows if row["value"] is None}
        assert all(note.startswith("not measured: ") for note in missing.values())
        expected = {
            "kernels": {"sampling"},
            "engine": {"kernels of a decode step"},
            "tiers": {"a turn after a restart"},
        }
        assert set(missing) == expected.get(part.name, set())
        assert all(row["name"] in ended.output for row in rows if part.listed)
    assert "cryptography" in ended.rows("tiers")[-1]["note"]
    assert all(row["share"] < 1 for row in ended.rows("grid") if row.get("share"))
    decode_steps_count_what_they_read(ended)


def decode_steps_count_what_they_read(ended: Ended) -> None:
    """Weights and, each position once, K and V: by the shares that are told."""
    copy = ended.row("limits", "^device copy")["value"]
    weights = ended.row("engine", "^weights")["value"]
    plain, rounded, shared = (
        ended.row("engine", f"^decode step, {name}$")
        for name in (r"2 x \d+", r"2 x \d+, fp8 pages", r"4 x \d+, 32 of the prompt shared")
    )
    page = TINY.layers * 2 * PAGE_SIZE * TINY.kv_heads  # elements of heads
    of_plain, of_rounded = 2 * page * TINY.head_dim, page * (TINY.head_dim + 4)
    for row, page_bytes, again in ((plain, of_plain, 0), (rounded, of_rounded, 0),
                                   (shared, of_plain, 3 * 2)):  # fmt: skip
        count, context = (int(each) for each in re.findall(r"\d+", row["name"])[:2])
        seconds = 1e-3 * row["value"]
        read = 1e9 * (row["share"] * seconds * copy - weights)
        pages = count * context / PAGE_SIZE - again
        rounding = 0.51 * count / PAGE_SIZE  # contexts are told as whole numbers
        print(f"{row['name']}: {read:.0f} bytes, {pages} pages of {page_bytes}")
        assert abs(read / page_bytes - pages) < rounding
    # Of each sequence's pages the two that it has in common, but for the first one's.
    had = re.search(r"; 6 of (\d+) pages are another's too$", shared["note"])
    assert had is not None
    assert 4 * (32 + 9) / PAGE_SIZE <= int(had[1]) <= 4 * ((32 + 9 + 100) / PAGE_SIZE + 2)


def test_a_turn_after_a_restart_comes_from_the_disk() -> None:
    step = next(step for step in tier_steps.steps(True) if step.name == "a turn after a restart")
    rows = {row.name: row for row in step.run(Bench(torch.device("cpu"), quick=True))}
    assert not any(row.failed for row in rows.values())
    values = {name: row.value or 0.0 for name, row in rows.items()}
    assert values["a turn on 128 tokens after a restart"] > 0
    assert values["times as soon as computing it"] > 0


WRONG = """
import os
from chatserve_kernels import ops

right, gate = ops.rms_norm, ops.gated

def wrong(*arguments, **options):
    result = right(*arguments, **options)
    result[-1, -1] = float("nan")
    return result

def deadly(gates, ups, *, gelu):
    return os._exit(7) if gates.shape[1] == 64 else gate(gates, ups, gelu=gelu)

ops.rms_norm, ops.gated = wrong, deadly
"""


def test_a_wrong_kernel_and_a_process_that_dies_are_told(measure: Measure) -> None:
    ended = measure("--only", "grid", before=WRONG)
    assert ended.status == 1
    rows = ended.rows("grid")
    norms = [row for row in rows if row["name"].startswith("norm of")]
    assert len(norms) == 6
    assert all(row["failed"] and row["value"] == "nan" for row in norms)
    dead = {row["name"]: row["note"] for row in rows if row["name"].startswith("gate of 64")}
    assert dead == {"gate of 64": "its process ended with 7"}
    others = [row for row in rows if row not in norms and row["name"] not in dead]
    assert len(others) > 20
    assert not any(row.get("failed") for row in others)
    assert others[-1]["name"].startswith("tokens of 300")  # behind what died
    assert set(ended.told["failed"]) == {row["name"] for row in norms} | set(dead)
    assert all(f"  {name} " in ended.output for name in ended.told["failed"])


def test_what_float64_says_is_what_the_reference_says() -> None:
    bench = Bench(torch.device("cpu"), quick=True)
    for case in grid_attention.cases(False)[6::7]:
        query, kv, batch, sinks = grid_attention.built(
            case, bench, 1, ((1, 40), (3, 9), (1, 33)), (grid_attention.Common(2, 0, 32),)
        )
        options = {"scale": 0.1, "window": 11, "soft_cap": 2.0, "sinks": sinks}
        right = reference.paged_attention(query.double(), kv.double(), batch, **options)
        assert exact.error(exact.paged_attention(query, kv, batch, **options), right) < 1e-12
    rows = torch.randn(3, 40, dtype=torch.float64)
    weight = torch.randn(40)
    right = reference.rms_norm(rows, weight, 1e-5)
    assert exact.error(exact.rms_norm(rows, weight, 1e-5), right) < 1e-12
    for gelu in (False, True):
        right = reference.gated(rows, rows.flip(0), gelu=gelu)
        assert exact.error(exact.gated(rows, rows.flip(0), gelu=gelu), right) < 1e-12


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 2 * BOUNDS[torch.float32]])
def test_a_case_over_its_bound_fails(error: float) -> None:
    assert checked("x", error, BOUNDS[torch.float32], seed=1, by="Triton").failed


def test_what_is_left_to_torch_where_a_kernel_should_serve_fails() -> None:
    assert not checked("x", 0.0, 0.0, seed=1, by="Triton").failed
    assert checked("x", 0.0, 0.0, seed=1, by="torch").failed


def test_the_grid_has_every_head_size_with_every_page_size() -> None:
    cases = grid_attention.cases(False)
    pairs = {(case.heads.head_dim, case.page_size) for case in cases}
    assert len(pairs) == len(grid_attention.HEAD_DIMS) * len(grid_attention.PAGE_SIZES)
    for wanted in ("window", "soft_cap", "sinks"):
        assert {bool(getattr(case, wanted)) for case in cases} == {False, True}
    assert {case.dtype for case in cases} == set(BOUNDS)
    for part in PARTS:
        for quick in (False, True):
            names = [step.name for step in part.steps(quick)]
            assert len(set(names)) == len(names)


def test_all_parts_together_keep_to_their_time() -> None:
    assert sum(part.seconds for part in PARTS) < TOTAL_SECONDS


def test_where_there_is_no_git_a_file_says_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "COMMIT_FILE", tmp_path / "commit")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "unknown"
    (tmp_path / "commit").write_text("abc\n")
    assert report.commit() == "abc"


def test_figures_that_json_does_not_know_are_words() -> None:
    told = report._told(Row(name="x", value=float("nan"), share=float("inf"), failed=True))
    assert told == {"name": "x", "value": "nan", "share": "inf", "failed": True}
    assert report._told(Row(name="x", value=0.0)) == {"name": "x", "value": 0.0}
    assert report._told(Row(name="x", note="why")) == {"name": "x", "note": "why", "value": None}


def test_a_cpu_has_figures_for_quick_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--device", "cpu"])
    with pytest.raises(SystemExit):
        command_line._arguments()
    assert "only with --quick" in capsys.readouterr().err

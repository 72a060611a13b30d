"""House rules on what is tracked: no traces of the machine it was written on, nothing heavy."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BYTES_MAX = 10 * 1024 * 1024
# Spelled in pieces, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a package index's host": r"(pypi|pythonhosted|npmjs|debian|download\.pytorch)\.(org|com)\b",
    "an index option": r"--(extra-)?index-url|--find-links",
    "a path of the machine": r"(?<![\w.])/(work|root|home/\w+)/",
    "an unfinished place": r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b",
}
# Built from libraries, one of which colours such marks in other people's code.
BUILT = ROOT / "chatserve/api/page/assets"
CODE_IN_DATA = r"\bimport pick" r"le\b|torch\.(lo" r"ad|sa" r"ve)\("


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_an_index_or_this_machine() -> None:
    found: list[str] = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            if what == "an unfinished place" and path.is_relative_to(BUILT):
                continue
            found += [f"{path.relative_to(ROOT)}: {what}" for _ in re.finditer(pattern, text)]
    assert not found


def test_no_format_that_carries_code_is_used() -> None:
    assert re.search(CODE_IN_DATA, "torch.lo" + "ad(path)")
    for path in tracked():
        if path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts:
            assert not re.search(CODE_IN_DATA, path.read_text("utf-8")), path


def test_the_patterns_find_what_they_are_for() -> None:
    samples = {
        "a package index's host": "https://files.pythonhosted" + ".org/x",
        "an index option": "pip install --index" + "-url x",
        "a path of the machine": "see /wo" + "rk/main",
        "an unfinished place": "# TO" + "DO later",
    }
    for what, sample in samples.items():
        assert re.search(FORBIDDEN[what], sample), what


def test_no_tracked_file_is_heavy() -> None:
    heavy = [str(path) for path in tracked() if path.stat().st_size > BYTES_MAX]
    assert not heavy


def test_no_archive_is_tracked() -> None:
    """What a tool has fetched into the folder."""
    archives = {".whl", ".gz", ".zip", ".tar", ".xz", ".bz2", ".zst", ".egg"}
    assert not [str(path) for path in tracked() if path.suffix in archives]


def test_no_module_is_a_catch_all() -> None:
    names = {"utils", "common", "helpers", "base", "misc"}
    assert not [str(path) for path in tracked() if path.suffix == ".py" and path.stem in names]


def test_imports_are_absolute_and_files_are_short() -> None:
    long: list[str] = []
    for path in tracked():
        if path.suffix != ".py":
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*from \.", text, re.MULTILINE), f"{path}: a relative import"
        if text.count("\n") > 480:
            long.append(str(path.relative_to(ROOT)))
    assert not long, "split these files"


def test_the_readme_has_figures_not_places_for_them() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert not re.search(r"\bFIGURE_|\?\?\?|<!--", text)

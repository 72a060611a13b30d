"""The page in the package is the one that its sources in `web/` make."""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "web"
BUILT = ROOT / "chatserve/api/page"
FIRST_PAINT_BYTES_MAX = 80_000
LINES_MAX = 300
BUILD_SECONDS_MAX = 180

REBUILD = "the built page is older than its sources: run `make page`, which needs Node"


def sources() -> list[str]:
    """As web/building/digest.ts lists them."""
    top = [
        path.name
        for path in WEB.iterdir()
        if re.fullmatch(r"(\.npmrc|[^.].*\.(html|json|js|ts))", path.name)
    ]
    below = [
        str(path.relative_to(WEB))
        for folder in ("src", "building")
        for path in (WEB / folder).rglob("*")
        if path.is_file()
    ]
    return sorted(top + below)


def digest() -> str:
    lines = [f"{sha(WEB / name)}  {name}\n" for name in sources()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_built_page_belongs_to_its_sources() -> None:
    assert "package-lock.json" in sources()
    assert "src/App.svelte" in sources()
    assert (BUILT / "source.sha256").read_text().strip() == digest(), REBUILD


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another folder, so that no path gets into the page."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node here")
    copy = tmp_path / "web"
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(WEB / name, copy / name)
    if (WEB / "node_modules/vite").exists():
        (copy / "node_modules").symlink_to(WEB / "node_modules")
    else:
        fetched = subprocess.run(
            [npm, "ci", "--silent", "--no-audit", "--no-fund"],
            cwd=copy, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX, check=False,
        )  # fmt: skip
        if fetched.returncode:
            pytest.skip(f"npm could not get what the build needs: {fetched.stderr[-200:]}")
    made = tmp_path / "page"
    build = subprocess.run(
        [node, "node_modules/vite/bin/vite.js", "build"],
        cwd=copy, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX, check=False,
        env=os.environ | {"PAGE_FOLDER": str(made)},
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    assert contents(made) == contents(BUILT), REBUILD


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha(path) for path in folder.rglob("*") if path.is_file()
    }


def test_the_first_paint_is_small() -> None:
    index = (BUILT / "index.html").read_text()
    loaded = re.findall(r'(?:src|href)="/(assets/[^"]+)"', index)
    assert len(loaded) >= 2
    pieces = [index.encode(), *((BUILT / name).read_bytes() for name in loaded)]
    assert sum(len(gzip.compress(piece, 9)) for piece in pieces) <= FIRST_PAINT_BYTES_MAX


def test_the_lock_file_names_no_registry() -> None:
    lock = (WEB / "package-lock.json").read_text()
    assert '"integrity"' in lock
    assert '"resolved"' not in lock
    assert (WEB / ".npmrc").read_text() == "omit-lockfile-registry-resolved=true\n"


def test_sources_are_short() -> None:
    long = [
        name
        for name in sources()
        if name.startswith(("src/", "build/")) and (WEB / name).read_text().count("\n") > LINES_MAX
    ]
    assert not long, "split these files"

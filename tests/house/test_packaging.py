"""The wheel and the editable install: what they hold, and which import names they take."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_kernels_available

ROOT = Path(__file__).resolve().parents[2]
OURS = {"chatserve", "chatserve_kernels", "prefix_store"}
NOT_OURS = {"kernels", "web", "tests", "benchmarks", "deploy", "docs"}


def test_the_installed_distribution_does_not_take_other_names() -> None:
    taken = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if "chatserve" in owners
    }
    assert not taken & NOT_OURS
    for name in OURS:
        __import__(name)
    # The folder of that name in a checkout may be found as a bare namespace, never as a package.
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None
    assert not is_kernels_available()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tracked files, so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in names:
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, "--quiet", "--wheel-dir", str(folder), str(source)], check=True, timeout=120
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_packages_the_model_and_the_page(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == OURS
    for wanted in (
        "chatserve/py.typed",
        "chatserve/demonstration/model/model.safetensors",
        "chatserve/demonstration/model/tokenizer.json",
        "chatserve/demonstration/model/chat_template.jinja",
        "chatserve/api/page/index.html",
        "chatserve_kernels/ops.py",
        "prefix_store/names.py",
    ):
        assert wanted in names, wanted
    shipped = [info for info in wheel.infolist() if "/demonstration/model/" in info.filename]
    assert sum(info.file_size for info in shipped) < 12 * 1024 * 1024


def test_the_wheel_holds_every_module_of_the_tree(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, root in (("chatserve", ROOT), ("prefix_store", ROOT),
                         ("chatserve_kernels", ROOT / "kernels")):  # fmt: skip
        for path in (root / folder).rglob("*.py"):
            assert str(path.relative_to(root)) in names, path


def test_the_wheel_states_its_needs(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(metadata).decode()
    assert "Requires-Python: >=3.11" in text
    assert "torch==" not in text, "a user's own torch is left alone"
    (triton,) = (line for line in text.splitlines() if line.startswith("Requires-Dist: triton"))
    assert 'sys_platform == "linux"' in triton
    (entry,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "chatserve = chatserve.__main__:main" in wheel.read(entry).decode()

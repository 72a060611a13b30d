"""The floors are drawn once, in pyproject.toml, and drawn completely."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_module_of_chatserve_is_on_a_floor() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = (
        contract["layers"]
        for contract in table["tool"]["importlinter"]["contracts"]
        if contract["name"].startswith("Floors:")
    )
    placed = {name.strip() for layer in layers for name in re.split("[:|]", layer)}
    found = {
        f"chatserve.{path.stem}"
        for path in (ROOT / "chatserve").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert found - placed == {"chatserve.demonstration"}
    assert {name for name in placed if name.startswith("chatserve.")} <= found

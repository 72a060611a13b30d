"""The pictures in the documentation: there, light enough, whole, and all that is linked."""

import re
import struct
from pathlib import Path

import pytest

from benchmarks.screenshots import (
    PICTURE_BYTES_MAX,
    PICTURES,
    PICTURES_BYTES_MAX,
    PICTURES_TAKEN,
    weigh,
)

ROOT = Path(__file__).resolve().parents[2]


def chunks(path: Path) -> list[bytes]:
    """The kinds of a PNG's parts, in order."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n", path
    kinds: list[bytes] = []
    place = 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kinds.append(data[place + 4 : place + 8])
        place += 12 + length
    return kinds


def test_all_are_there_and_light() -> None:
    assert {path.stem for path in PICTURES.glob("*")} == set(PICTURES_TAKEN)
    weigh(PICTURES)


def test_they_are_pictures_and_carry_no_words() -> None:
    """No part that could hold a name of a program, a file or a machine."""
    for path in PICTURES.glob("*.png"):
        kinds = chunks(path)
        assert kinds[0] == b"IHDR"
        assert kinds[-1] == b"IEND"
        assert not {b"tEXt", b"zTXt", b"iTXt", b"eXIf"} & set(kinds), path


def test_what_the_documentation_shows_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r'(?:src|srcset)="(docs/screenshots/[^"]+)"', text)
    assert len(shown) == 4
    assert [name for name in shown if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    "sizes",
    [[PICTURE_BYTES_MAX + 1], [PICTURE_BYTES_MAX] * (PICTURES_BYTES_MAX // PICTURE_BYTES_MAX + 1)],
)
def test_what_is_too_large_is_refused(tmp_path: Path, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="too large"):
        weigh(tmp_path)

"""`python -m prefix_store`: what it prints, and the exit status that says whether all is well."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store import PageStore
from prefix_store.__main__ import main
from prefix_store.layout import SlotLayout, slab_stem
from tests.prefix_store.pages import SECRET, SHAPE, get, name, open_store, write


@pytest.fixture(name="folder")
def a_folder(tmp_path: Path) -> Path:
    """A data folder with a secret and a closed store of 8 pages, one of them dropped."""
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_bytes(bytes(range(32)))
    store = open_store(folder=tmp_path / "pages")
    slab = store.slab(SHAPE)
    assert all(slab.put([write(number) for number in range(8)]))
    assert slab.drop([name(7)]) == 1
    store.close()
    return tmp_path / "pages"


def test_check_finds_a_sound_store_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["check", str(folder), "--json"]) == 0
    [report] = json.loads(capsys.readouterr().out)
    assert (report["slots"], report["pages"], report["free"]) == (8, 7, 1)
    assert main(["check", str(folder)]) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("ending", "offset", "field"),
    [
        (".slab", SlotLayout(SHAPE).offset(3) + 1000, "bad"),
        (".slab", SlotLayout(SHAPE).offset(3) + 70, "bad"),
        (".slab", SlotLayout(SHAPE).offset(7) + 70, "unlisted"),
        (".table", 36864 + 100, "records"),
        (".slab", 9, "trouble"),
        (".gone", 9, "trouble"),
    ],
)
def test_check_finds_what_is_wrong(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    ending: str,
    offset: int,
    field: str,
) -> None:
    path = folder / (slab_stem(SHAPE) + ending)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    assert main(["check", str(folder), "--json"]) == 1
    [report] = json.loads(capsys.readouterr().out)
    assert report[field]
    assert path.read_bytes() == raw, "check changes nothing"


def test_check_finds_a_forgotten_page_put_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(folder=folder)
    path = folder / f"{slab_stem(SHAPE)}.slab"
    before = path.read_bytes()
    store.slab(SHAPE).drop([name(2)])
    store.close()
    path.write_bytes(before)
    assert main(["check", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["forgotten"] == 1


def test_stats_work_beside_a_server_and_the_others_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(folder=folder)
    assert main(["stats", str(folder), "--json"]) == 0
    [report] = json.loads(capsys.readouterr().out)
    assert report["pages"] == 7
    assert report["counters"]["writes"] == 8
    assert main(["stats", str(folder)]) == 0
    assert "writes 8" in capsys.readouterr().out
    for command in ("check", "gc"):
        assert main([command, str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    store.close()


def test_gc_removes_old_pages_and_keeps_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gc", str(folder), "--max-age", "3600"]) == 0
    assert capsys.readouterr().out.startswith("0 pages")
    assert main(["gc", str(folder), "--max-age", "0"]) == 0
    assert capsys.readouterr().out.startswith("7 pages")
    store = open_store(folder=folder)
    assert not get(store.slab(SHAPE), 0)
    store.close()


def test_gc_with_room_for_one_of_many_slabs_keeps_the_one_used_last(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [replace(SHAPE, fingerprint=bytes([65 + n]) * 32) for n in range(3)]
    sizes: list[int] = []
    for when, shape in enumerate(shapes):
        store = PageStore.open(
            folder, SECRET, capacity_bytes=8 << 20, clock=lambda when=when: 1e10 + when
        )
        assert all(store.slab(shape).put([write(number, shape) for number in range(64)]))
        sizes.append(store.statistics().slabs[0].bytes)
        store.close()
    assert main(["gc", str(folder), "--capacity", f"{sizes[-1] // 1024 + 4}KiB"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 pages and 3 whole slabs removed")
    assert err.count("went whole, to make room") == 3
    assert [path.name for path in folder.glob("*.slab")] == [f"{slab_stem(shapes[-1])}.slab"]
    assert main(["check", str(folder)]) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-age", "-5"),
        ("--max-age", "nan"),
        ("--max-age", "inf"),
        ("--max-age", "a day"),
        ("--capacity", "-1"),
        ("--capacity", "4096"),
        ("--capacity", "4KiB"),
        ("--capacity", "1MB"),
        ("--capacity", "9999999TiB"),
        ("--capacity", "1e9"),
    ],
)
def test_gc_refuses_what_is_no_age_and_no_capacity(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as ended:
        main(["gc", str(folder), option, value])
    assert ended.value.code == 2
    assert f"or more; got '{value}'" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_its_secret_is_told_where_it_is_looked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").unlink()
    assert main(["stats", str(folder)]) == 2
    err = capsys.readouterr().err
    assert f"there is no secret {tmp_path / 'secret'}" in err
    assert "--secret" in err


def test_a_command_with_another_secret_destroys_nothing(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_bytes(bytes(32))
    assert main(["gc", str(folder), "--secret", str(other)]) == 0
    assert main(["check", str(folder), "--secret", str(other)]) == 1
    other.chmod(0o644)
    assert main(["check", str(folder), "--secret", str(other)]) == 2
    assert main(["check", str(folder)]) == 0


def test_the_proof_of_forgetting(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["witness", str(folder), name(1).hex(), name(2).hex()]) == 0
    proof = tmp_path / "proof"
    proof.write_text(capsys.readouterr().out)
    store = open_store(folder=folder)
    assert main(["witness", str(folder), name(1).hex(), name(2).hex()]) == 0
    assert capsys.readouterr().out == proof.read_text(), "the same while a server runs"
    found = store.slab(SHAPE).witnesses([name(1), name(2)])
    assert sorted(each.to_json() for each in found) == sorted(proof.read_text().split("\n")[:-1])
    store.close()
    assert main(["witness", str(folder), name(1).hex(), name(99).hex()]) == 1
    capsys.readouterr()
    search = ["forgotten", str(folder), "--proof", str(proof)]
    assert main(search) == 1
    out = capsys.readouterr().out
    for number in (1, 2):
        assert f"ciphertext of {name(number).hex()}" in out
        assert f"name of {name(number).hex()}" in out
    store = open_store(folder=folder)
    store.slab(SHAPE).drop([name(1)])
    assert main(search) == 1
    assert name(1).hex() not in capsys.readouterr().out, "page 1 is forgotten, page 2 is not"
    store.slab(SHAPE).drop([name(2)])
    assert main(search) == 0, "also while the server runs"
    store.close()
    assert main(search) == 0
    (folder / "copy").write_text(f"a log that says {name(2).hex()}")
    assert main(search) == 1
    proof.write_text("")
    assert main(search) == 2, "nothing is not a proof"

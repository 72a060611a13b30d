"""Public prompts in files: what is refused with which words, and what a crash leaves."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatserve.errors import SettingsError
from chatserve.prompt_files import KEPT_NAME, Kept, KeptPrompts, read_prompt_file

GOOD = '[[prompts]]\nname = "a"\ntext = """one\ntwo"""\n[[prompts]]\nname = "b.1"\ntext = "é"\n'


def test_a_file_gives_its_texts_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(GOOD)
    assert read_prompt_file(path) == {"a": "one\ntwo", "b.1": "é"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["[[prompts]]"]),
        ("prompts = 3", ["[[prompts]]"]),
        (f"other = 1\n{GOOD}", ["[[prompts]]"]),
        ("prompts = [3]", ["name and a text"]),
        ('[[prompts]]\nname = "a"', ["name and a text"]),
        ('[[prompts]]\nname = "a"\ntext = 3', ["name and a text"]),
        ('[[prompts]]\nname = "a"\ntext = "x"\nrole = "user"', ["name and a text"]),
        ('[[prompts]]\nname = "a b"\ntext = "x"', ["'a b'", "letters"]),
        ('[[prompts]]\nname = ""\ntext = "x"', ["letters"]),
        ('[[prompts]]\nname = "../x"\ntext = "x"', ["letters"]),
        ('[[prompts]]\nname = "a"\ntext = " \\n"', ["'a'", "empty"]),
        ('[[prompts]]\nname = "a"\ntext = "x"\n' * 2, ["'a'", "two prompts"]),
        ("[[prompts]\n", ["not TOML"]),
        ("prompts = '\udc80'", ["not TOML"]),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, text: str, words: Sequence[str]) -> None:
    path = tmp_path / "prompts.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError) as caught:
        read_prompt_file(path)
    assert "\n" not in caught.value.message
    assert all(word in caught.value.message for word in ["--public-prompts", str(path), *words])


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "prompts.toml"
    make(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_prompt_file(path)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    kept = KeptPrompts(tmp_path)
    assert kept.read() == Kept()
    prompts = Kept(texts={"a": 'one\n"two" é \u2028', "b": "x" * 100_000}, tokens_max=7)
    kept.write(prompts)
    assert KeptPrompts(tmp_path).read() == prompts
    assert (tmp_path / KEPT_NAME).stat().st_mode & 0o777 == 0o600
    kept.write(Kept(tokens_max=8))
    assert KeptPrompts(tmp_path).read() == Kept(tokens_max=8)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    kept = KeptPrompts(tmp_path)
    kept.write(Kept(texts={"a": "old"}))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, fails, refuse)
        patched.setattr(Path, "replace", refuse if fails == "replace" else Path.replace)
        with pytest.raises(OSError, match="No space"):
            kept.write(Kept(texts={"a": "new"}))
    assert kept.read().texts == {"a": "old"}
    kept.write(Kept(texts={"a": "newer"}))
    assert kept.read().texts == {"a": "newer"}


def test_writers_that_overlap_leave_one_of_their_lists(tmp_path: Path) -> None:
    kept = KeptPrompts(tmp_path)
    lists = [Kept(texts={f"p{each}": "x" * (1 + 5_000 * each)}) for each in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(kept.write, lists))
    assert kept.read() in lists


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"prompts": 1}',
        '{"prompts": []}',
        '{"prompts": [], "tokens_max": "1"}',
        '{"prompts": 1, "tokens_max": 1}',
        '{"prompts": [1], "tokens_max": 1}',
        '{"prompts": [{"name": "a"}], "tokens_max": 1}',
        "\udcff",
    ],
)
def test_a_list_that_is_none_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / KEPT_NAME
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"."):
        KeptPrompts(tmp_path).read()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    (tmp_path / KEPT_NAME).with_suffix(".new").symlink_to(target)
    with pytest.raises(OSError, match=r"."):
        KeptPrompts(tmp_path).write(Kept(texts={"a": "x"}))
    assert target.read_text() == "precious"

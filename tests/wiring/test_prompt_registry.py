"""PublicPrompts, over an engine of one set and a text floor where a word is a token."""

import asyncio
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatserve import public_prompts
from chatserve.errors import (
    ChatserveError,
    Conflict,
    ContextLengthExceeded,
    NotFound,
    RequestError,
    SettingsError,
    Unavailable,
)
from chatserve.prompt_files import KEPT_NAME, Kept, KeptPrompts
from chatserve.public_prompts import PublicPrompts
from prefix_store.names import PageNamer

SIZE = 2
NAMER = PageNamer(b"k" * 32, page_size=SIZE)
ROOT = NAMER.public_root(fingerprint=b"f" * 32, layout="words")


class FakeEngine:
    """Names by a real namer; `names` is what is shared now."""

    def __init__(self) -> None:
        self.context_length = 20
        self.names: frozenset[bytes] = frozenset()
        self.tokens_max = 0
        self.published_by: set[int] = set()

    def public_names(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        assert threading.get_ident() not in self.published_by, "named on the event loop"
        return tuple(NAMER.public_names(ROOT, tokens))

    def publish(self, prompts: Iterable[Sequence[bytes]], *, tokens_max: int) -> None:
        self.names = frozenset(name for names in prompts for name in names)
        self.tokens_max = tokens_max
        self.published_by.add(threading.get_ident())


class Words:
    """The text floor. refuses: a word that the template does not take."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.refuses = "system-less"
        self.today = ""  # what the template writes before everything

    def ids(self, text: str) -> tuple[int, ...]:
        if self.refuses in text:
            raise RequestError("The chat template refuses these messages.", param="messages")
        words = (self.today + " " + text).split()
        return tuple(self.numbers.setdefault(word, len(self.numbers)) for word in words)

    def names(self, *texts: str) -> set[bytes]:
        return {name for text in texts for name in NAMER.public_names(ROOT, self.ids(text))}


@pytest.fixture
def executor() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class House:
    """A folder that outlives its shelves, as a data folder does."""

    def __init__(self, folder: Path, executor: ThreadPoolExecutor) -> None:
        self.folder, self.executor = folder, executor
        self.engine, self.words = FakeEngine(), Words()
        self.file = folder / "prompts.toml"

    async def start(self, **given: str) -> PublicPrompts:
        """A restart, with these in the file."""
        self.engine.names = frozenset()
        tables = [
            f'[[prompts]]\nname = "{name}"\ntext = "{text}"\n' for name, text in given.items()
        ]
        self.file.write_text("".join(tables))
        shelf = PublicPrompts(
            self.engine,
            self.words.ids,
            self.executor,
            folder=self.folder,
            file=self.file if given else None,
        )
        await shelf.start()
        return shelf

    def shared(self, *texts: str) -> bool:
        """Whether exactly the whole pages of these are."""
        return self.engine.names == self.words.names(*texts)


@pytest.fixture
def house(tmp_path: Path, executor: ThreadPoolExecutor) -> House:
    return House(tmp_path, executor)


def kept(house: House) -> Mapping[str, str]:
    return KeptPrompts(house.folder).read().texts


def listed(shelf: PublicPrompts) -> dict[str, tuple[int, int, bool]]:
    return {each.name: (each.pages, each.tokens, each.posted) for each in shelf.prompts()}


async def test_what_is_registered_is_what_is_shared(house: House) -> None:
    shelf = await house.start()
    assert house.shared()
    info, new = await shelf.register("a", "one two three four five")
    assert (info.pages, info.tokens, info.posted, new) == (2, 5, True, True)
    assert house.shared("one two three four five")
    await shelf.register("b", "six seven")
    assert house.shared("one two three four five", "six seven")
    await shelf.unregister("a")
    assert house.shared("six seven")
    with pytest.raises(NotFound):
        await shelf.unregister("a")
    assert listed(shelf) == {"b": (1, 2, True)}


async def test_the_same_again_is_nothing_new_and_another_text_replaces(house: House) -> None:
    shelf = await house.start()
    assert (await shelf.register("a", "one two"))[1]
    assert not (await shelf.register("a", "one two"))[1]
    assert (await shelf.register("a", "three four"))[1]
    assert house.shared("three four")
    assert kept(house) == {"a": "three four"}


async def test_a_name_goes_with_the_last_prompt_that_has_it(house: House) -> None:
    shelf = await house.start()
    await shelf.register("a", "one two three four")
    await shelf.register("b", "one two five six")
    await shelf.register("c", "one two three four")
    await shelf.unregister("a")
    assert house.shared("one two five six", "one two three four")
    await shelf.unregister("c")
    assert house.shared("one two five six")
    await shelf.unregister("b")
    assert house.shared()


async def test_a_prompt_shorter_than_a_page_shares_nothing_and_is_taken(house: House) -> None:
    shelf = await house.start()
    info, new = await shelf.register("a", "one")
    assert (info.pages, info.tokens, new) == (0, 1, True)
    assert house.shared()
    assert "a" in listed(shelf)


async def test_registering_again_follows_a_template_that_writes_the_date(house: House) -> None:
    shelf = await house.start()
    house.words.today = "monday"
    await shelf.register("a", "one two three")
    before = house.engine.names
    house.words.today = "tuesday"
    _, new = await shelf.register("a", "one two three")
    assert not new
    assert house.shared("one two three")
    assert not before & house.engine.names


@pytest.mark.parametrize(
    ("name", "text", "error", "param"),
    [
        ("", "one", RequestError, "name"),
        ("a/b", "one", RequestError, "name"),
        (".a", "one", RequestError, "name"),
        ("a" * 65, "one", RequestError, "name"),
        ("a\n", "one", RequestError, "name"),
        ("a", "", RequestError, "text"),
        ("a", " \n\t", RequestError, "text"),
        ("a", "word " * 20, ContextLengthExceeded, "text"),
        ("a", "system-less", RequestError, "messages"),
    ],
)
async def test_what_cannot_be_changes_nothing(
    house: House, name: str, text: str, error: type[ChatserveError], param: str
) -> None:
    shelf = await house.start()
    await shelf.register("a", "one two")
    with pytest.raises(error) as caught:
        await shelf.register(name, text)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert house.shared("one two")
    assert kept(house) == {"a": "one two"}


async def test_one_token_under_the_context_is_taken(house: House) -> None:
    shelf = await house.start()
    assert (await shelf.register("a", "word " * 19))[0].tokens == 19


async def test_their_number_and_their_pages_have_a_limit(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_prompts, "PROMPTS_MAX", 2)
    monkeypatch.setattr(public_prompts, "PAGES_MAX", 4)
    shelf = await house.start()
    await shelf.register("a", "1 2 3 4")
    with pytest.raises(Conflict):
        await shelf.register("b", "1 2 3 4 5 6")
    await shelf.register("b", "5 6 7 8")
    with pytest.raises(Conflict):
        await shelf.register("c", "9")
    await shelf.register("b", "9")  # in the place of one that is there
    assert house.shared("1 2 3 4")
    with pytest.raises(SettingsError, match="at the most"):
        await house.start(x="1 2", y="3 4", z="5 6")


async def test_posted_prompts_outlive_a_restart_and_those_of_the_file_are_not_written(
    house: House,
) -> None:
    shelf = await house.start(given="one two")
    await shelf.register("a", "three four")
    await shelf.register("given", "one two")
    assert kept(house) == {"a": "three four"}
    again = await house.start(given="one two")
    assert listed(again) == {"a": (1, 2, True), "given": (1, 2, False)}
    assert house.shared("one two", "three four")
    await again.unregister("given")
    assert house.shared("three four")
    last = await house.start()
    assert set(listed(last)) == {"a"}


async def test_the_file_has_the_first_word_and_a_deleted_name_does_not_come_back(
    house: House,
) -> None:
    shelf = await house.start(a="one two")
    await shelf.register("a", "three four")
    assert house.shared("three four")
    shelf = await house.start(a="one two")
    assert listed(shelf) == {"a": (1, 2, False)}
    assert house.shared("one two")
    await shelf.unregister("a")
    assert house.shared()
    shelf = await house.start()
    assert house.shared(), "what was posted under a deleted name came back"


async def test_what_this_model_cannot_take_is_kept_for_another(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = await house.start()
    await shelf.register("long", "1 2 3 4 5 6 7 8")
    await shelf.register("short", "1 2")
    house.engine.context_length = 6
    shelf = await house.start()
    assert set(listed(shelf)) == {"short"}
    assert "'long'" in caplog.text
    await shelf.register("other", "3 4")
    house.engine.context_length = 20
    shelf = await house.start()
    assert set(listed(shelf)) == {"long", "other", "short"}
    house.engine.context_length = 6
    shelf = await house.start()
    await shelf.unregister("long")
    assert set(kept(house)) == {"other", "short"}


@pytest.mark.parametrize("text", ["word " * 20, "system-less"])
async def test_a_file_that_this_model_cannot_take_is_a_settings_error(
    house: House, text: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        await house.start(good="one", bad=text)
    assert "'bad'" in caught.value.message
    assert str(house.file) in caught.value.message
    assert "\n" not in caught.value.message


async def test_a_broken_list_is_a_line_in_the_log(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    (house.folder / KEPT_NAME).write_text("[")
    shelf = await house.start()
    assert KEPT_NAME in caplog.text
    await shelf.register("a", "one two")
    assert kept(house) == {"a": "one two"}


async def test_what_cannot_be_kept_is_not_done(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = await house.start()
    await shelf.register("a", "one two")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(KeptPrompts, "write", refuse)
        with pytest.raises(Unavailable):
            await shelf.register("b", "three four")
        with pytest.raises(Unavailable):
            await shelf.unregister("a")
    assert house.shared("one two")
    await shelf.unregister("a")
    assert house.shared()


async def test_changes_at_once_are_made_one_after_the_other(house: House) -> None:
    shelf = await house.start()
    await asyncio.gather(*(shelf.register(f"p{each}", f"{each} x") for each in range(12)))
    await asyncio.gather(*(shelf.unregister(f"p{each}") for each in range(0, 12, 2)))
    left = {f"p{each}": f"{each} x" for each in range(1, 12, 2)}
    assert kept(house) == left
    assert house.shared(*left.values())


async def test_who_leaves_while_it_is_written_is_written_before_the_next(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = await house.start()
    write, begun, go_on = KeptPrompts.write, threading.Event(), threading.Event()

    def slow(shelf: KeptPrompts, prompts: Kept) -> None:
        begun.set()
        assert go_on.wait(30)
        write(shelf, prompts)

    with monkeypatch.context() as patched:
        patched.setattr(KeptPrompts, "write", slow)
        leaving = asyncio.create_task(shelf.register("a", "one two"))
        assert await asyncio.to_thread(begun.wait, 30)
    leaving.cancel()
    following = asyncio.create_task(shelf.register("b", "three four"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not leaving.done(), "it lets the next one write at the same time"
    go_on.set()
    await following
    assert leaving.cancelled()
    assert kept(house) == {"b": "three four"}
    assert house.shared("three four")


async def test_how_long_a_prompt_ever_was_outlives_it_and_restarts(house: House) -> None:
    shelf = await house.start(given="1 2 3 4 5")
    assert house.engine.tokens_max == 5
    await shelf.register("a", "1 2 3 4 5 6 7")
    await shelf.register("a", "1")
    await shelf.unregister("a")
    assert house.engine.tokens_max == 7
    await house.start()
    assert house.engine.tokens_max == 7
    await house.start(given="1 2 3 4 5 6 7 8 9")
    await house.start()
    assert house.engine.tokens_max == 9, "the file's count as well"
    house.words.today = "a very long date"
    shelf = await house.start(given="1 2 3 4 5 6 7 8")
    assert not (await shelf.register("given", "1 2 3 4 5 6 7 8"))[1]
    await house.start()
    assert house.engine.tokens_max == 12


async def test_a_broken_list_is_not_written_over_by_a_start(house: House) -> None:
    (house.folder / KEPT_NAME).write_text("[")
    await house.start(given="1 2 3 4 5")
    assert (house.folder / KEPT_NAME).read_text() == "["


async def test_a_start_goes_on_where_nothing_can_be_written(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(KeptPrompts, "write", refuse)
    await house.start(given="1 2 3 4")
    assert house.shared("1 2 3 4")
    assert "cannot be kept" in caplog.text


async def test_after_the_threads_have_ended_it_is_unavailable(house: House) -> None:
    shelf = await house.start()
    house.executor.shutdown()
    with pytest.raises(Unavailable):
        await shelf.register("a", "one")

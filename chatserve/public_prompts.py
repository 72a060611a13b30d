"""PublicPrompts: system prompts that an admin registered, whose whole pages all tenants share.

    text ──▶ ids that every chat with it begins with ──▶ names of their whole pages
                                                          │ union over all prompts
                                           Engine.publish ◀┘  a frozen set, swapped on the loop

Theory of operation. A registered prompt is nothing but names: no page of it need exist. Whoever
first asks with it computes its pages under those names, and any tenant finds them, in every tier.
Prompts may begin alike and so have names in common; the set is the union of what is registered, so
a name goes with the last prompt that has it. Nothing is done to pages whose names went: nobody asks
for them any more, and they are evicted in their turn.

Rendering, encoding and writing happen in threads for text; changes are made one after the other. A
posted prompt is on disk before it is registered, and off the disk before it is not, so that an
answer is true after a restart as well. At each start the file of `--public-prompts` has the first
word: what was posted under one of its names is not registered. How long the longest one ever was is
kept too: as deep down a line the pages of a conversation may be named in more than one way.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from chatserve.api.prompt_routes import PromptInfo
from chatserve.errors import (
    ChatserveError,
    Conflict,
    ContextLengthExceeded,
    NotFound,
    RequestError,
    SettingsError,
    Unavailable,
)
from chatserve.prompt_files import (
    KEPT_NAME,
    NAME_RULE,
    Kept,
    KeptPrompts,
    is_prompt_name,
    read_prompt_file,
)
from prefix_store.names import PageName

_log = logging.getLogger(__name__)

PROMPTS_MAX = 256
# A name costs about 100 bytes and each change walks over all of them, in a few milliseconds.
PAGES_MAX = 1 << 16

P = ParamSpec("P")
T = TypeVar("T")


class Namer(Protocol):
    """What is needed of the engine."""

    @property
    def context_length(self) -> int:
        """Tokens that a sequence may have."""
        ...

    def public_names(self, tokens: Sequence[int]) -> tuple[PageName, ...]:
        """The public names of whole pages. For any thread."""
        ...

    def publish(self, prompts: Iterable[Sequence[PageName]], *, tokens_max: int) -> None:
        """On the loop. Share these alone; tokens_max: of any prompt that was ever shared."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A registered prompt. posted: it is kept in the data folder."""

    text: str
    tokens: int
    names: tuple[PageName, ...]
    posted: bool


class PublicPrompts:
    """See the module. Owned by the event loop."""

    def __init__(
        self,
        engine: Namer,
        prefix: Callable[[str], tuple[int, ...]],
        executor: Executor,
        *,
        folder: Path,
        file: Path | None,
    ) -> None:
        """prefix: the ids that every chat with a system prompt begins with; pure, for any thread;
        raises RequestError. folder: where posted prompts are kept. file: `--public-prompts`."""
        self._engine = engine
        self._prefix = prefix
        self._executor = executor
        self._kept = KeptPrompts(folder)
        self._file = file
        self._prompts: dict[str, _Prompt] = {}
        self._by_page: dict[PageName, list[str]] = {}
        # Kept and not registered: the model served now cannot take it, or the file has its name.
        self._dormant: dict[str, str] = {}
        self._tokens_max = 0
        self._unread = False  # there is a list, and it could not be read: not to be lost unasked
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Register what the file names and what was posted before the last restart.

        Raises SettingsError for what is wrong with the file's. What is wrong with those that were
        posted, or that this model cannot take, is a line in the log.
        """
        async with self._changing:
            given = {} if self._file is None else await self._aside(read_prompt_file, self._file)
            for name, text in given.items():
                try:
                    await self._add(name, text, posted=False)
                except ChatserveError as error:
                    raise SettingsError(
                        f"--public-prompts {self._file}: {name!r}: {error.message}"
                    ) from error
            kept = await self._read_kept()
            for name, text in kept.texts.items():
                if name in given:
                    self._dormant[name] = text
                    continue
                try:
                    await self._add(name, text, posted=True)
                except ChatserveError as error:
                    self._dormant[name] = text
                    _log.warning("the public prompt %r is not shared: %s", name, error.message)
            self._publish(self._prompts, kept.tokens_max)
            if self._tokens_max > kept.tokens_max and not self._unread:
                with contextlib.suppress(Unavailable):  # the log has it
                    await self._keep(self._prompts, self._dormant)

    # As the API floor's PublicPrompts --------------------------------------------------------

    def prompts(self) -> list[PromptInfo]:
        """All registered ones, by name."""
        return [self._info(name) for name in sorted(self._prompts)]

    async def register(self, name: str, text: str) -> tuple[PromptInfo, bool]:
        """Register a prompt, in place of the one that was called so. Returns whether anything is
        new: the name, or its text.

        Raises RequestError for a name or text that cannot be, Conflict where there are too many,
        and Unavailable where it cannot be kept.
        """
        if not is_prompt_name(name):
            raise RequestError(f"A name is {NAME_RULE}.", param="name")
        if not text.strip():
            raise RequestError("The text is empty.", param="text")
        async with self._changing:
            before = self._prompts.get(name)
            same = before is not None and before.text == text
            _check_count({*self._prompts, *self._dormant, name})
            # Also where nothing seems new: a template may write the date.
            posted = not same or before is None or before.posted
            made = await self._aside(self._made, text, posted=posted)
            changed = self._prompts | {name: made}
            _check_pages(changed)
            dormant = {key: value for key, value in self._dormant.items() if key != name}
            if posted or name in self._dormant or made.tokens > self._tokens_max:
                await self._keep(changed, dormant)
            self._dormant = dormant
            self._publish(changed)
            return self._info(name), not same

    async def unregister(self, name: str) -> None:
        """Share it no more; one of the file is registered again at the next start. Raises NotFound,
        and Unavailable where that cannot be kept."""
        async with self._changing:
            if name not in self._prompts and name not in self._dormant:
                raise NotFound("There is no public prompt of that name.")
            changed = {key: value for key, value in self._prompts.items() if key != name}
            dormant = {key: value for key, value in self._dormant.items() if key != name}
            if name in self._dormant or self._prompts[name].posted:  # it is on disk
                await self._keep(changed, dormant)
            self._dormant = dormant
            self._publish(changed)

    def of_page(self, name: PageName) -> tuple[str, ...]:
        """The registered prompts that have this page, by name. O(1)."""
        return tuple(self._by_page.get(name, ()))

    # Inside ----------------------------------------------------------------------------------

    async def _add(self, name: str, text: str, *, posted: bool) -> None:
        """At the start: without publishing it yet."""
        _check_count({*self._prompts, *self._dormant, name})
        added = self._prompts | {name: await self._aside(self._made, text, posted=posted)}
        _check_pages(added)
        self._prompts = added

    def _made(self, text: str, *, posted: bool) -> _Prompt:
        """In a thread."""
        tokens = self._prefix(text)
        context = self._engine.context_length
        if len(tokens) >= context:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens, and the context {context}.", param="text"
            )
        names = self._engine.public_names(tokens)
        return _Prompt(text=text, tokens=len(tokens), names=names, posted=posted)

    def _publish(self, prompts: dict[str, _Prompt], tokens_before: int = 0) -> None:
        self._prompts = prompts
        self._by_page = {}
        for key in sorted(prompts):
            for name in prompts[key].names:
                self._by_page.setdefault(name, []).append(key)
        self._tokens_max = self._most_tokens(prompts, tokens_before)
        names = [each.names for each in prompts.values()]
        self._engine.publish(names, tokens_max=self._tokens_max)

    def _most_tokens(self, prompts: dict[str, _Prompt], before: int = 0) -> int:
        return max([self._tokens_max, before, *(each.tokens for each in prompts.values())])

    async def _read_kept(self) -> Kept:
        try:
            return await self._aside(self._kept.read)
        except (OSError, ValueError) as error:
            _log.warning("posted public prompts are not shared: %s: %s", KEPT_NAME, error)
            self._unread = True
            return Kept()

    async def _keep(self, prompts: dict[str, _Prompt], dormant: dict[str, str]) -> None:
        texts = {name: each.text for name, each in prompts.items() if each.posted}
        try:
            kept = Kept(texts=texts | dormant, tokens_max=self._most_tokens(prompts))
            await self._aside(self._kept.write, kept)
        except OSError as error:
            _log.warning("public prompts cannot be kept: %s", error)
            raise Unavailable("Public prompts cannot be kept: the disk refuses.") from error

    async def _aside(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Off the event loop."""
        try:
            work = self._executor.submit(function, *args, **kwargs)
        except RuntimeError as error:  # the executor's way to say that it was shut down
            raise Unavailable("The server is shutting down.") from error
        done = asyncio.wrap_future(work)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            # Who comes next must not write before this is written.
            await asyncio.wait({done})
            raise

    def _info(self, name: str) -> PromptInfo:
        prompt = self._prompts[name]
        return PromptInfo(
            name=name, pages=len(prompt.names), tokens=prompt.tokens, posted=prompt.posted
        )


def _check_count(names: Set[str]) -> None:
    if len(names) > PROMPTS_MAX:
        raise Conflict(f"There may be {PROMPTS_MAX} public prompts at the most.")


def _check_pages(prompts: Mapping[str, _Prompt]) -> None:
    if sum(len(each.names) for each in prompts.values()) > PAGES_MAX:
        raise Conflict(f"Public prompts may have {PAGES_MAX} pages at the most.", param="text")

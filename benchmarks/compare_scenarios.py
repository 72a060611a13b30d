"""What is measured of each server in a comparison: functions over a `Visit`, one start of a server.

Every prompt is made of random words from its place in the comparison (round, scenario, number), so
that each server is sent the same texts and none finds by accident what another scenario left.

    single      one stream on a short and on a long prompt
    shared      users with a system prompt in common, the first time and again
    turns       chats of several turns at once; a turn begins with all that was said before
    returning   the next turn of a long chat: at once, after others that would have filled the
                memory alone (whether a server keeps the chat nevertheless is its affair), after a
                restart of the server on the same data folder
    overhead    many streams of a model that costs little
    trace       requests of a published trace, their blocks as runs of words, some at a time
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from benchmarks.openai_load import Answer, Door, Message, Words
from benchmarks.replay import block_names
from benchmarks.traces import Arrival

T = TypeVar("T")


class Kind(Enum):
    """A figure's unit, how many of it one of ours makes, and whether more or less is better ('':
    servers are not ranked by it)."""

    SECONDS = ("ms", 1_000.0, "less")
    RATE = ("tokens/s", 1.0, "more")
    BYTES = ("MiB", 1 / (1 << 20), "less")
    TOKENS = ("tokens", 1.0, "")

    @property
    def unit(self) -> str:
        """As in a table."""
        return self.value[0]

    @property
    def factor(self) -> float:
        """From seconds, bytes and the like to the unit."""
        return self.value[1]

    @property
    def better(self) -> str:
        """'more', 'less' or ''."""
        return self.value[2]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything, in tokens and numbers."""

    single_prompts: tuple[int, ...] = (512, 2_000)
    single_repeats: int = 3
    single_reply: int = 128
    users: int = 16
    system: int = 1_000
    question: int = 20
    shared_reply: int = 64
    chats: int = 8
    turns: int = 5
    turn: int = 60
    turn_reply: int = 64
    returning_chats: int = 3
    returning_history: int = 1_500
    returning_reply: int = 8
    evicting_prompt: int = 1_500
    streams: tuple[int, ...] = (1, 32, 128)
    stream_prompt: int = 16
    stream_reply: int = 128
    trace_requests: int = 100
    trace_at_once: int = 8
    trace_block: int = 16  # words for a block of 512 tokens
    trace_blocks: int = 120  # of a prompt at the most: a context of 4,096 tokens holds them
    trace_reply_share: float = 1 / 16


@dataclass(slots=True)
class Samples:
    """What was measured of one server, by figure."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    kinds: dict[str, Kind] = field(default_factory=dict[str, Kind])
    counted: bool = True  # by the server, all tokens

    def add(self, figure: str, kind: Kind, values: Iterable[float]) -> None:
        """More of a figure."""
        self.kinds[figure] = kind
        self.values.setdefault(figure, []).extend(values)

    def replies(self, figure: str, answers: Sequence[Answer]) -> None:
        """Times to the first token, and how long the prompts were."""
        self.counted = self.counted and all(answer.counted for answer in answers)
        told = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
        if told:
            self.add(f"{figure}: prompt", Kind.TOKENS, told)
        self.add(f"{figure}: first token", Kind.SECONDS, (each.first_token for each in answers))

    def pace(self, figure: str, answer: Answer) -> None:
        """How one reply went on after its first token; nothing where it came all at once."""
        if (rate := answer.decode_rate) is not None:
            self.add(f"{figure}: between tokens", Kind.SECONDS, [statistics.median(answer.gaps)])
            self.add(f"{figure}: decode", Kind.RATE, [rate])

    def load(self, figure: str, answers: Sequence[Answer], seconds: float) -> None:
        """What came from all of them together."""
        self.counted = self.counted and all(answer.counted for answer in answers)
        self.add(figure, Kind.RATE, [sum(each.tokens for each in answers) / seconds])


@dataclass(slots=True)
class Visit:
    """One start of a server, and what a scenario needs. restart: ends it gracefully and starts it
    on the same data folder. evicting_tokens: of prompts that push all others out of its memory;
    0: unknown."""

    door: Door
    words: Words
    samples: Samples
    restart: Callable[[], Awaitable[Door]]
    round: int = 0
    sizes: Sizes = field(default_factory=Sizes)
    evicting_tokens: int = 0
    trace: Sequence[Arrival] = ()

    def said(self, place: object, tokens: int) -> Message:
        """What a user says: for each place in a round other words."""
        return {"role": "user", "content": self.words.text((self.round, place), tokens)}

    async def ask(self, messages: Sequence[Message], tokens: int) -> Answer:
        """One reply."""
        return await self.door.ask(messages, tokens)


async def together(asked: Iterable[Coroutine[None, None, T]]) -> tuple[list[T], float]:
    """All at once; what they gave, and how long it took. Raises the first error of any."""
    ready = list(asked)  # with their texts, which are not what is measured
    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in ready]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks], time.monotonic() - began


async def warm_up(visit: Visit) -> None:
    """What a process does once, for the lengths of prompts that are measured."""
    for length in (visit.sizes.question, *visit.sizes.single_prompts):
        await visit.ask([visit.said(("warm-up", length), length)], 4)


async def single(visit: Visit) -> None:
    """One stream at a time."""
    sizes = visit.sizes
    for length in sizes.single_prompts:
        figure = f"single {length}"
        for number in range(sizes.single_repeats):
            message = visit.said(("single", length, number), length)
            answer = await visit.ask([message], sizes.single_reply)
            visit.samples.replies(figure, [answer])
            visit.samples.pace(figure, answer)


async def shared(visit: Visit) -> None:
    """Users with one system prompt, who come twice, the second time with other questions."""
    sizes = visit.sizes
    system = {"role": "system", "content": visit.words.text((visit.round, "shared"), sizes.system)}
    for state in ("cold", "warm"):
        answers, seconds = await together(
            visit.ask(
                [system, visit.said(("shared", state, user), sizes.question)], sizes.shared_reply
            )
            for user in range(sizes.users)
        )
        visit.samples.replies(f"shared {state}", answers)
        visit.samples.load(f"shared {state}: output", answers, seconds)


async def turns(visit: Visit) -> None:
    """Chats that go on as soon as they are answered."""
    sizes = visit.sizes
    answers: list[Answer] = []

    async def chat(number: int) -> Answer:
        history: list[Message] = []
        while True:
            turn = len(history) // 2
            history.append(visit.said(("turns", number, turn), sizes.turn))
            answer = await visit.ask(history, sizes.turn_reply)
            answers.append(answer)
            if turn + 1 == sizes.turns:
                return answer
            history.append({"role": "assistant", "content": answer.text})

    _, seconds = await together(chat(number) for number in range(sizes.chats))
    visit.samples.replies("turns", answers)
    visit.samples.load("turns: output", answers, seconds)
    if gaps := [gap for answer in answers for gap in answer.gaps]:
        visit.samples.add("turns: between tokens, p99", Kind.SECONDS, [percentile(gaps, 99)])


async def returning(visit: Visit) -> None:
    """Long chats that come back, one after the other."""
    sizes = visit.sizes
    chats: list[list[Message]] = [[] for _ in range(sizes.returning_chats)]

    async def turn(number: int, state: str, tokens: int) -> None:
        history = chats[number]
        history.append(visit.said(("returning", number, state), tokens))
        answer = await visit.ask(history, sizes.returning_reply)
        history.append({"role": "assistant", "content": answer.text})
        visit.samples.replies(f"returning {state}", [answer])

    for number in range(len(chats)):
        await turn(number, "computed", sizes.returning_history)
        await turn(number, "at once", sizes.question)
    if visit.evicting_tokens:
        for other in range(-(-visit.evicting_tokens // sizes.evicting_prompt)):
            await visit.ask([visit.said(("evicting", other), sizes.evicting_prompt)], 1)
        for number in range(len(chats)):
            await turn(number, "after others", sizes.question)
    visit.door = await visit.restart()
    await visit.ask([visit.said("short after restart", sizes.question)], sizes.returning_reply)
    await visit.ask(
        [visit.said("long after restart", sizes.returning_history)], sizes.returning_reply
    )
    for number in range(len(chats)):
        await turn(number, "restarted", sizes.question)


async def overhead(visit: Visit) -> None:
    """More and more streams at once."""
    sizes = visit.sizes
    for streams in sizes.streams:
        answers, seconds = await together(
            visit.ask(
                [visit.said(("overhead", streams, number), sizes.stream_prompt)],
                sizes.stream_reply,
            )
            for number in range(streams)
        )
        visit.samples.load(f"overhead {streams}: output", answers, seconds)


async def trace(visit: Visit) -> None:
    """The trace's requests in their order, some at a time, each as soon as there is room: when
    they came in the trace says nothing about a machine that is slower."""
    sizes = visit.sizes
    arrivals = visit.trace[: sizes.trace_requests]
    names = block_names(arrivals)
    texts = {
        block: visit.words.text((visit.round, name), sizes.trace_block)
        for block, name in names.items()
    }
    requests = [
        (
            " ".join(texts[block] for block in arrival.blocks[: sizes.trace_blocks]),
            max(1, round(arrival.reply_tokens * sizes.trace_reply_share)),
        )
        for arrival in arrivals
    ]
    coming = iter(requests)
    answers: list[Answer] = []

    async def one_at_a_time() -> None:
        for text, reply in coming:
            answers.append(await visit.ask([{"role": "user", "content": text}], reply))

    _, seconds = await together(one_at_a_time() for _ in range(sizes.trace_at_once))
    visit.samples.replies("trace", answers)
    visit.samples.load("trace: output", answers, seconds)
    late = percentile([answer.first_token for answer in answers], 99)
    visit.samples.add("trace: first token, p99", Kind.SECONDS, [late])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share in a hundred of them lies, between two where it falls
    between two."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


# By name, in the order in which they run: with the model that is compared, and with a small one.
LARGE = {
    "single": single,
    "shared": shared,
    "turns": turns,
    "trace": trace,
    "returning": returning,
}
SMALL = {"overhead": overhead}

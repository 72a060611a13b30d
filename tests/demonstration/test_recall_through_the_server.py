"""The recall set as a test of the server: a wrong page would be a wrong name.

Conversations run at once through the assembled service, on the shipped model in float32 and
greedily. In each the model explains something at length, then something is told, and at last it is
asked for. The explanation is the model's own, so one wrong token changes all that follows.
However the server keeps its pages, and however often it must take them from whom it gave them to,
the replies must be the same, and those that plain transformers would choose.
"""

import argparse
import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatserve.assembly import assemble, load
from chatserve.chat.service import ChatService
from chatserve.chat.store.memory_store import MemoryStore
from chatserve.chat.values import Ask, ChatPrompt, Delta, Done, Failed, Generation, Message
from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.corpus import Turn, make_probe
from chatserve.demonstration.evaluate import is_right
from chatserve.settings import Settings, add_options, read_settings
from prefix_store import MasterSecret

CONVERSATIONS = 32
REQUESTS = 2 * CONVERSATIONS
SKILLS = ("recall", "corrected", "recall several")
TELLING = ("told", "told several", "corrected")
FAR_EVERY = 5  # of so many conversations one is far
FAR_MIN = 6
FAR_CHARACTERS = 4800
FAR_TURNS = 6  # at least, between telling and asking
FAR_TOKENS = 1500
FILLER_TOKENS = 96  # of each explanation, exactly, so that all of them are long and overlap
ANSWER_TOKENS_MAX = 72
SAMPLES = 4
ROOM_BYTES = 256 * 1024**2  # holds everything: nobody is preempted
PREEMPTED_MIN = 0.5  # preemptions for each request, where the pool is tight
RIGHT_MIN = 0.85
MARGIN = 1e-3  # below this margin between the two best, greedy tokens may differ by rounding

Row = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """The model answers twice, `filler` and `question`; other replies are the corpus's."""

    system: str | None
    filler: Turn
    between: tuple[Turn, ...]
    question: Turn

    def messages(self, *said: str) -> list[Row]:
        """Up to what the user says next, after the model's own replies so far."""
        rows = [] if self.system is None else [{"role": "system", "content": self.system}]
        rows.append({"role": "user", "content": self.filler.user})
        if said:
            rows += [{"role": "assistant", "content": said[0]}, *exchanges(self.between)]
            rows.append({"role": "user", "content": self.question.user})
        return rows


@dataclass(frozen=True)
class Run:
    """What came out: of each conversation the tokens and texts of both replies, and counts."""

    replies: tuple[tuple[tuple[int, ...], ...], ...]
    texts: tuple[tuple[str, ...], ...]
    preemptions: int
    hit_tokens: int
    pages: int


@dataclass(frozen=True)
class Setup:
    """One way to run the server; tight: the pool holds little more than the longest request."""

    page_size: int
    prefix_cache: bool
    samples: int = 1
    tight: bool = False

    def __str__(self) -> str:
        cached = "cached" if self.prefix_cache else "uncached"
        return f"{self.page_size}-{cached}-n{self.samples}-{'tight' if self.tight else 'room'}"


REFERENCE = Setup(8, prefix_cache=False)
# Samples that must say the same are what makes a pool tight: each has a page of its own for what
# is not yet a full page, and without the cache for all that it says. Full pages of 64 are few and
# shared, so there it takes more samples.
SETUPS = (
    Setup(64, prefix_cache=False),
    Setup(8, prefix_cache=True),
    Setup(64, prefix_cache=True),
    Setup(64, prefix_cache=True, samples=SAMPLES),
    Setup(8, prefix_cache=False, samples=SAMPLES, tight=True),
    Setup(64, prefix_cache=False, samples=SAMPLES, tight=True),
    Setup(8, prefix_cache=True, samples=SAMPLES, tight=True),
    Setup(64, prefix_cache=True, samples=SAMPLES + 2, tight=True),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def conversations() -> tuple[Conversation, ...]:
    """Held-out chats, each after an explanation: its prompt is short, so that all are let in at
    once, and grows to several times that."""
    made: list[Conversation] = []
    for n in range(CONVERSATIONS):
        filler = make_probe("explain", f"server/{n}").turns[0]
        chat = make_probe(SKILLS[n % len(SKILLS)], f"server/{n}")
        if n % FAR_EVERY == 0:
            skill = SKILLS[n // FAR_EVERY % len(SKILLS)]
            chat = make_probe(skill, f"server/far/{n}", distance=FAR_CHARACTERS)
        made.append(Conversation(chat.system, filler, chat.turns[:-1], chat.turns[-1]))
    return tuple(made)


def exchanges(turns: tuple[Turn, ...]) -> list[Row]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.user), ("assistant", turn.reply))
    ]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def written(rows: list[Row]) -> str:
    return tokenizer().apply_chat_template(rows, tokenize=False, add_generation_prompt=True)


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


async def converse(
    service: ChatService[Any], conversation: Conversation, number: int, samples: int
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Both replies' tokens and texts."""
    replies: list[tuple[int, ...]] = []
    said: list[str] = []
    for least, most in ((FILLER_TOKENS, FILLER_TOKENS), (0, ANSWER_TOKENS_MAX)):
        rows = conversation.messages(*said)
        ask = Ask(
            request_id=f"{number}/{len(said)}",
            prompt=ChatPrompt(messages=tuple(Message(row["role"], row["content"]) for row in rows)),
            generation=Generation(
                samples=samples, min_tokens=least, max_tokens=most, temperature=0.0
            ),
        )
        reply = await service.open(ask)
        texts = [""] * samples
        tokens: list[tuple[int, ...]] = [()] * samples
        with reply.view() as events:
            async for event in events:
                assert not isinstance(event, Failed), event
                if isinstance(event, Delta):
                    texts[event.sample] += event.text
                    tokens[event.sample] += event.token_ids
        assert isinstance(reply.final, Done)
        assert len(set(texts)) == len(set(tokens)) == 1, "greedy samples of one prompt are alike"
        replies.append(tokens[0])
        said.append(texts[0])
    return replies, said


async def interleaved(chosen: Settings, samples: int) -> Run:
    """All conversations at once through one assembled service."""
    loaded = load(chosen, MODEL_FOLDER, MasterSecret(bytes(32)))
    async with asyncio.TaskGroup() as group:
        assembly = assemble(loaded, chosen, group, MemoryStore())
        service: Any = assembly.service
        loop = group.create_task(assembly.engine.run())
        ended = await asyncio.gather(
            *(converse(service, each, n, samples) for n, each in enumerate(conversations()))
        )
        statistics = assembly.engine.statistics()
        hits = assembly.engine.cache_statistics().hit_tokens
        loop.cancel()
    return Run(
        replies=tuple(tuple(replies) for replies, _ in ended),
        texts=tuple(tuple(texts) for _, texts in ended),
        preemptions=statistics.preemptions_total,
        hit_tokens=hits,
        pages=loaded.pages,
    )


def run(folder: Path, setup: Setup, kv_memory: int = ROOM_BYTES) -> Run:
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = parser.parse_args(["--data-dir", str(folder), "--device", "cpu", "--dtype", "float32"])
    chosen = replace(
        read_settings(given, {}),
        kv_memory=kv_memory,
        page_size=setup.page_size,
        prefix_cache=setup.prefix_cache,
    )
    return asyncio.run(interleaved(chosen, setup.samples))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("reference"), REFERENCE)


def tight_bytes(reference: Run, setup: Setup) -> int:
    """Of a pool that holds the longest request, and a page more for each further sample."""
    prompts = [len(encoded(written(each.messages("")))) for each in conversations()]
    longest = max(prompts) + FILLER_TOKENS + ANSWER_TOKENS_MAX
    token_bytes = ROOM_BYTES // (reference.pages * REFERENCE.page_size)
    return (longest + (setup.samples - 1) * setup.page_size) * token_bytes


def test_the_replies_are_those_of_plain_transformers(reference: Run) -> None:
    speaker: Any = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    end = tokenizer().eos_token_id
    assert reference.preemptions == reference.hit_tokens == 0
    compared = 0
    for each, replies, texts in zip(
        conversations(), reference.replies, reference.texts, strict=True
    ):
        told, prompt = "", list[int]()
        for number, tokens in enumerate(replies):
            whole = written(each.messages(*texts[:number]))
            # A reply stays the ids that were chosen, also where its text has a shorter encoding.
            assert whole.startswith(told)
            prompt += encoded(whole.removeprefix(told))
            with torch.inference_mode():
                logits = speaker(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
                if number == 0:
                    logits[:, end] = -torch.inf  # an explanation may not end before its length
                best = logits.topk(2)
            for token, values, ids in zip(tokens, best.values, best.indices, strict=True):
                assert token == int(ids[0]) or values[0] - values[1] < MARGIN
            compared += len(tokens)
            told, prompt = whole + texts[number], prompt + [id_ for id_ in tokens if id_ != end]
    assert compared > FILLER_TOKENS * CONVERSATIONS


def test_some_is_asked_for_from_far() -> None:
    """Counted from the last turn in which anything is told."""
    far = 0
    for each in conversations():
        telling = [n for n, turn in enumerate(each.between) if turn.skill in TELLING]
        since = each.between[telling[-1] + 1 :]
        rows = [*exchanges(since), {"role": "user", "content": each.question.user}]
        far += len(since) >= FAR_TURNS and len(encoded(written(rows))) >= FAR_TOKENS
    assert far >= FAR_MIN


def test_most_is_remembered(reference: Run) -> None:
    """The set would notice a wrong page: most of what is asked for is in the replies."""
    right = [
        is_right(each.question, texts[-1])
        for each, texts in zip(conversations(), reference.texts, strict=True)
    ]
    assert sum(right) >= RIGHT_MIN * CONVERSATIONS


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_no_setup_changes_a_reply(reference: Run, tmp_path: Path, setup: Setup) -> None:
    kv_memory = tight_bytes(reference, setup) if setup.tight else ROOM_BYTES
    ended = run(tmp_path, setup, kv_memory)
    assert ended.replies == reference.replies
    assert ended.texts == reference.texts
    assert (ended.hit_tokens > 0) == setup.prefix_cache
    if setup.tight:
        assert ended.preemptions >= PREEMPTED_MIN * REQUESTS
    else:
        assert ended.preemptions == 0

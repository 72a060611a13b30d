"""The recall set as a test of the server: a wrong page would be a wrong name.

Conversations of several turns run at once through the assembled service, on the shipped model in
float32 and greedily; the model writes all replies, so one wrong token changes all that follows.
However the server keeps its pages, the replies must be the same, and those that plain
transformers would choose.
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
from chatserve.demonstration.corpus import Chat, make_probe
from chatserve.demonstration.evaluate import is_right
from chatserve.settings import Settings, add_options, read_settings
from prefix_store import MasterSecret

CONVERSATIONS = 32
SKILLS = ("recall", "recall", "recall of others", "recall several", "corrected", "system fact")
REPLY_TOKENS_MAX = 72
KV_BYTES = 256 * 1024**2  # holds everything: nobody is preempted
PREEMPTIONS_MIN = 4  # about half of what was seen; how the steps fall decides how many
MARGIN = 1e-3  # below this margin between the two best, greedy tokens may differ by rounding

Replies = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Run:
    """What came out: the tokens of each conversation's replies, its last text, the counts."""

    replies: tuple[Replies, ...]
    last_texts: tuple[str, ...]
    preemptions: int
    hit_tokens: int
    pages: int


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def conversations() -> tuple[Chat, ...]:
    """Held-out chats: something is told, something is explained at length, and a question."""
    chats: list[Chat] = []
    for n in range(CONVERSATIONS):
        chat = make_probe(SKILLS[n % len(SKILLS)], f"server/{n}")
        between = make_probe("explain", f"server/{n}").turns
        chats.append(replace(chat, turns=(*chat.turns[:-1], *between, chat.turns[-1])))
    return tuple(chats)


def settings(folder: Path, **changes: Any) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = parser.parse_args(["--data-dir", str(folder), "--device", "cpu", "--dtype", "float32"])
    return replace(read_settings(given, {}), **({"kv_memory": KV_BYTES} | changes))


async def converse(
    service: ChatService[Any], chat: Chat, number: int, samples: int
) -> tuple[Replies, str]:
    """Ask each of the user's messages in turn, on top of the model's own earlier replies."""
    messages = [] if chat.system is None else [Message("system", chat.system)]
    replies: list[tuple[int, ...]] = []
    said = ""
    for turn in chat.turns:
        messages.append(Message("user", turn.user))
        ask = Ask(
            request_id=f"{number}/{len(replies)}",
            prompt=ChatPrompt(messages=tuple(messages)),
            generation=Generation(samples=samples, max_tokens=REPLY_TOKENS_MAX, temperature=0.0),
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
        said = texts[0]
        replies.append(tokens[0])
        messages.append(Message("assistant", said))
    return tuple(replies), said


async def interleaved(chosen: Settings, chats: tuple[Chat, ...], samples: int) -> Run:
    """All conversations at once through one assembled service."""
    loaded = load(chosen, MODEL_FOLDER, MasterSecret(bytes(32)))
    async with asyncio.TaskGroup() as group:
        assembly = assemble(loaded, chosen, group, MemoryStore())
        service: Any = assembly.service
        loop = group.create_task(assembly.engine.run())
        ended = await asyncio.gather(
            *(converse(service, chat, n, samples) for n, chat in enumerate(chats))
        )
        statistics = assembly.engine.statistics()
        hits = assembly.engine.cache_statistics().hit_tokens
        loop.cancel()
    return Run(
        replies=tuple(replies for replies, _ in ended),
        last_texts=tuple(text for _, text in ended),
        preemptions=statistics.preemptions_total,
        hit_tokens=hits,
        pages=loaded.pages,
    )


def run(folder: Path, *, chats: int = CONVERSATIONS, samples: int = 1, **changes: Any) -> Run:
    return asyncio.run(interleaved(settings(folder, **changes), conversations()[:chats], samples))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """No cache, room for all."""
    return run(tmp_path_factory.mktemp("reference"), prefix_cache=False)


def test_the_replies_are_those_of_plain_transformers(reference: Run) -> None:
    speaker: Any = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    text: Any = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert reference.preemptions == reference.hit_tokens == 0
    compared = 0
    for chat, replies in zip(conversations(), reference.replies, strict=True):
        messages = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        told, prompt = "", list[int]()
        for turn, tokens in zip(chat.turns, replies, strict=True):
            messages.append({"role": "user", "content": turn.user})
            whole: str = text.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            # A reply stays the ids that were chosen, also where its text has a shorter encoding.
            assert whole.startswith(told)
            prompt += text.encode(whole.removeprefix(told), add_special_tokens=False)
            with torch.inference_mode():
                logits = speaker(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            best = logits.topk(2)
            for token, values, ids in zip(tokens, best.values, best.indices, strict=True):
                assert token == int(ids[0]) or values[0] - values[1] < MARGIN
            compared += len(tokens)
            said: str = text.decode(tokens, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})
            told, prompt = (
                whole + said,
                prompt + [id_ for id_ in tokens if id_ != text.eos_token_id],
            )
    assert compared > 500


def test_most_is_remembered(reference: Run) -> None:
    """The set would notice a wrong page: most of what is asked for is in the replies."""
    right = [
        is_right(chat.turns[-1], said)
        for chat, said in zip(conversations(), reference.last_texts, strict=True)
    ]
    assert sum(right) >= 0.8 * CONVERSATIONS


@pytest.mark.parametrize("page_size", [8, 64])
def test_the_prefix_cache_and_the_page_size_change_no_reply(
    reference: Run, tmp_path: Path, page_size: int
) -> None:
    cached = run(tmp_path, page_size=page_size)
    assert cached.replies == reference.replies
    assert cached.hit_tokens > 0


@pytest.mark.parametrize(
    ("page_size", "prefix_cache", "chats", "samples", "pool_tokens"),
    [(8, False, 12, 4, 1000), (64, False, 8, 4, 1024), (8, True, 24, 1, 440)],
)
def test_constant_preemption_changes_no_reply(
    reference: Run,
    tmp_path: Path,
    page_size: int,
    prefix_cache: bool,
    chats: int,
    samples: int,
    pool_tokens: int,
) -> None:
    """Admission counts on short replies: some are long, so that others must make room again.

    With the cache on, samples that say the same share their pages, so only the pool can be small.
    """
    token_bytes = KV_BYTES // (reference.pages * 16)
    small = run(
        tmp_path,
        chats=chats,
        samples=samples,
        page_size=page_size,
        prefix_cache=prefix_cache,
        kv_memory=pool_tokens * token_bytes,
    )
    assert small.replies == reference.replies[:chats]
    assert small.preemptions >= PREEMPTIONS_MIN


def test_four_samples_of_each_say_the_same(reference: Run, tmp_path: Path) -> None:
    four = run(tmp_path, chats=8, samples=4)
    assert four.replies == reference.replies[:8]
    assert four.hit_tokens > 0

"""The demonstration model's recall set, asked of a server over HTTP: answers, and their receipts.

A conversation tells something, goes on about something else and asks at the end; the model writes
every reply, so one wrong page anywhere changes all that follows. Every answer is checked for what
must hold wherever its prompt came from: the receipt adds up, and usage says the same.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import httpx

from chatserve.chat.text.prompt_ids import KnownMessage, PromptIds
from chatserve.chat.text.text_floor import read_text_floor
from chatserve.chat.values import Message
from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.corpus import Chat, make_probe
from tests.wiring.server import MODEL

SKILLS = ("recall", "recall of others", "recall several", "corrected", "system fact")
REPLY_TOKENS_MAX = 72
WAIT_SECONDS_MAX = 60.0  # for what must happen; never reached when it does
RECALLED_MIN = 0.6  # of the set: a wrong page would be noticed

Messages = list[dict[str, str]]
Salt = Callable[[int], str | None]  # of a turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said, and how many of the prompt's tokens came from where. ids: the model's, of what
    was said. missed: why the first whole page that was not found was not; None where all were."""

    text: str
    ids: tuple[int, ...]
    prompt: int
    device: int
    host: int
    disk: int
    computed: int
    missed: str | None = None

    @property
    def cached(self) -> int:
        """Tokens that were not computed."""
        return self.device + self.host + self.disk

    def whole(self, page_size: int) -> int:
        """Tokens of the prompt's whole pages; its last token is computed, whatever is there."""
        return self.reusable(self.prompt, page_size)

    def reusable(self, alike: int, page_size: int) -> int:
        """Tokens of whole pages where those of a prompt computed earlier are the same up to there:
        as many as are not computed again."""
        return min(alike // page_size * page_size, self.prompt - 1)


@dataclass(frozen=True, slots=True)
class Told:
    """A conversation as it went: what was asked at each turn, and what was answered."""

    prompts: tuple[Messages, ...]
    answers: tuple[Answer, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What the model said."""
        return tuple(answer.text for answer in self.answers)

    def last_prompt_ids(self, *, anew: bool) -> tuple[int, ...]:
        """The ids of the last prompt. anew: nobody knows those that the model emitted as replies,
        which need not be the ones that their texts are encoded to."""
        replies = iter(self.answers)
        known: list[KnownMessage] = []
        for each in self.prompts[-1]:
            message = Message(each["role"], each["content"])
            ids = next(replies).ids if message.role == "assistant" and not anew else None
            known.append(KnownMessage(message, ids))
        return _model_prompt_ids().compose(known).tokens


@cache
def _model_prompt_ids() -> PromptIds:
    floor = read_text_floor(MODEL_FOLDER)
    assert floor.template is not None
    return PromptIds(floor.tokenizer, floor.template)


def recall_set(count: int) -> tuple[Chat, ...]:
    """Held-out conversations; the last turn is the one that asks."""
    chats: list[Chat] = []
    for number in range(count):
        chat = make_probe(SKILLS[number % len(SKILLS)], f"journey/{number}")
        between = make_probe("explain", f"journey/{number}").turns
        chats.append(replace(chat, turns=(*chat.turns[:-1], *between, chat.turns[-1])))
    return tuple(chats)


async def ask(
    client: httpx.AsyncClient,
    messages: Messages,
    *,
    salt: str | None = None,
    stream: bool = False,
    max_tokens: int = REPLY_TOKENS_MAX,
) -> Answer:
    """One greedy answer through the OpenAI API. stream: as events, whose last one has the receipt.

    salt: the request's `cache_salt`; None sends none.
    """
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    if salt is not None:
        body["cache_salt"] = salt
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        whole = answer.json()
        (choice,) = whole["choices"]
        return _answer(choice["message"]["content"], choice["token_ids"], whole)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", answer.text
    chunks: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    ids = [token for choice in choices for token in choice.get("token_ids", ())]
    return _answer(text, ids, chunks[-1])


def _answer(text: str, ids: Sequence[int], final: dict[str, Any]) -> Answer:
    receipt, usage = final["chatserve"]["receipt"], final["usage"]
    answer = Answer(
        text=text,
        ids=tuple(ids),
        prompt=usage["prompt_tokens"],
        device=receipt["device"],
        host=receipt["host"],
        disk=receipt["disk"],
        computed=receipt["computed"],
        missed=receipt["miss"] and receipt["miss"]["reason"],
    )
    assert answer.cached + answer.computed == answer.prompt, (receipt, usage)
    assert usage["prompt_tokens_details"]["cached_tokens"] == answer.cached, (receipt, usage)
    return answer


async def converse(client: httpx.AsyncClient, chat: Chat, salt: Salt) -> Told:
    """Ask each of the user's messages in turn, on top of the model's own earlier replies; every
    other reply comes as a stream. salt: gives each turn's."""
    messages: Messages = []
    if chat.system is not None:
        messages.append({"role": "system", "content": chat.system})
    prompts: list[Messages] = []
    answers: list[Answer] = []
    for number, turn in enumerate(chat.turns):
        messages.append({"role": "user", "content": turn.user})
        prompts.append(list(messages))
        answers.append(await ask(client, prompts[-1], salt=salt(number), stream=bool(number % 2)))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return Told(tuple(prompts), tuple(answers))


async def converse_all(
    client: httpx.AsyncClient, chats: Sequence[Chat], salt: Callable[[int, int], str | None]
) -> list[Told]:
    """All of them at once. salt: of a conversation and a turn, by their numbers."""
    return await asyncio.gather(
        *(
            converse(client, chat, lambda turn, number=number: salt(number, turn))
            for number, chat in enumerate(chats)
        )
    )


async def state_of(client: httpx.AsyncClient) -> dict[str, Any]:
    """What `/admin/cache` says."""
    answer = await client.get("/admin/cache")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def until(words: str, condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so; fails with these words where that takes too long."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not await condition():
        assert time.monotonic() < deadline, words
        await asyncio.sleep(0.01)


async def all_kept(client: httpx.AsyncClient) -> None:
    """Wait until no page waits for its copy, in host memory either, and nobody owns one."""

    async def kept() -> bool:
        state = await state_of(client)
        transits, pages = [state["cache"]["transit"]], state["cache"]["pages"]
        owned = pages["leaving"] + pages["sealed"]
        host = state["engine"]["tiers"]["host"]
        if host is not None:
            transits.append(host["transit"])
            owned += host["filling"] + host["held"]
        return not owned and not any(each["unkept"] + each["keeping"] for each in transits)

    await until("pages wait for their copies", kept)


async def flush(client: httpx.AsyncClient) -> int:
    """Empty memory of pages that nobody owns, once nobody owns any; how many the device had."""
    await all_kept(client)
    answer = await client.post("/admin/cache/flush", json={})
    assert answer.status_code == 200, answer.text
    host = (await state_of(client))["engine"]["tiers"]["host"]
    assert host is None or host["free"] == host["total"], "host memory is not empty"
    return answer.json()["pages"]

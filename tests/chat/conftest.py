"""A chat floor on a scripted engine."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import pytest_asyncio

from chatserve.chat.crowd import Crowd
from chatserve.chat.reply import Clock, Patience, Reply, Viewing
from chatserve.chat.service import ChatService, Workshop
from chatserve.chat.text.template import read_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.text.tokenizer import Tokenizer
from chatserve.chat.values import (
    Ask,
    ChatPrompt,
    Done,
    Failed,
    Generation,
    Message,
    ReplyEvent,
    SamplingDefaults,
)
from chatserve.engine.values import Request
from tests.chat.engine import ManualTime, Run, ScriptedEngine
from tests.chat.templates import CHATML
from tests.chat.vocabularies import pretrained

PATIENCE = Patience(before_first_view=5.0, after_last_view=0.0)
SEED = 4711
LEAK_SECONDS = 5.0  # only a test that fails waits as long


@cache
def text_floor(template: str | None = CHATML) -> TextFloor:
    """Byte-level text with ChatML."""
    wrapped = pretrained("byte_level", template)
    read, control = read_template(wrapped)
    tokenizer = Tokenizer(wrapped, control)
    return TextFloor(
        tokenizer=tokenizer,
        template=read,
        stop_ids=frozenset({control.ids["<|im_end|>"], control.ids["</s>"]}),
        defaults=SamplingDefaults(temperature=0.3, top_k=7, top_p=0.9),
    )


@dataclass(slots=True)
class Floor:
    """All that a test of replies needs."""

    engine: ScriptedEngine
    service: ChatService[Request]
    time: ManualTime
    task_group: asyncio.TaskGroup
    executor: ThreadPoolExecutor
    text: TextFloor

    def ids(self, text: str) -> list[int]:
        return list(self.text.tokenizer.encode_rendered(text, ()))

    async def open(self, **generation: object) -> tuple[Reply, Run]:
        reply = await self.service.open(ask(**generation))
        return reply, self.engine.runs[-1]


def ask(*contents: str, prompt: object = None, **generation: object) -> Ask:
    """A chat with a user's words."""
    messages = tuple(Message("user", each) for each in contents or ("hi",))
    return Ask(
        request_id="r1",
        prompt=prompt or ChatPrompt(messages=messages),
        generation=Generation(**generation),
    )


def build(
    task_group: asyncio.TaskGroup,
    executor: ThreadPoolExecutor,
    *,
    patience: Patience = PATIENCE,
    text: TextFloor | None = None,
) -> Floor:
    """Wire a floor."""
    engine, time, text = ScriptedEngine(), ManualTime(), text or text_floor()
    workshop = Workshop(
        task_group=task_group,
        executor=executor,
        crowd=Crowd(2),
        clock=Clock(time.now, time.call_later),
    )
    service = ChatService(engine, text, workshop, draw_seed=lambda: SEED, patience=patience)
    return Floor(engine, service, time, task_group, executor, text)


@pytest_asyncio.fixture
async def floor() -> AsyncIterator[Floor]:
    """A floor whose task group must end by itself once the test has: no reply leaks."""
    ready: asyncio.Future[Floor] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    # One task enters and leaves the group: a fixture's two halves are different tasks.
    async def lifespan() -> None:
        with ThreadPoolExecutor(2) as executor:
            async with asyncio.TaskGroup() as task_group:
                ready.set_result(build(task_group, executor))
                await over.wait()

    task = asyncio.create_task(lifespan())
    yield await ready
    over.set()
    await asyncio.wait_for(task, LEAK_SECONDS)


async def read(viewing: Viewing) -> list[ReplyEvent]:
    """All events; the final one is the last and the only one."""
    events = [event async for event in viewing]
    assert [isinstance(each, Done | Failed) for each in events] == [False] * (len(events) - 1) + [
        True
    ]
    return events


async def settle() -> None:
    """Let every task that can run do so, a few times round."""
    for _ in range(5):
        await asyncio.sleep(0)

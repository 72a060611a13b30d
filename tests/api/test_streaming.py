"""What a stream looks like on the wire, whatever the model says."""

import asyncio

import httpx
import orjson
import pytest

from chatserve.api import sse
from chatserve.chat.values import Ask, Delta, ReplyEvent, SampleEnd
from tests.api.harness import CHAT, Site, done, quick, site

ODD = (
    "\r\n\n\r\u2028\u2029\u0085\x0b\x0c\x1c\x00é\U0001f600\n\nevent: x\ndata: [DONE]\n\n: no\nid: 1"
)


def odd(ask: Ask) -> list[ReplyEvent]:
    deltas: list[ReplyEvent] = [
        Delta(sample=0, seq=index + 1, text=character) for index, character in enumerate(ODD)
    ]
    return [*deltas, SampleEnd(sample=0, finish_reason="stop"), done(ask)]


async def body_of(running: Site, **fields: object) -> httpx.Response:
    async with running.client() as client:
        return await client.post("/v1/chat/completions", json=CHAT | {"stream": True} | fields)


async def test_odd_text_makes_no_extra_event_and_arrives_whole() -> None:
    async with site() as running:
        running.service.script = odd
        answer = await body_of(running)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store"
    frames = answer.content.split(b"\n\n")
    assert frames[-2:] == [b"data: [DONE]", b""]
    # A client that cuts lines where Python does sees the same events.
    lines = [line for line in answer.content.decode().splitlines() if line]
    assert len(lines) == len(frames) - 1 == len(ODD) + 3
    chunks = [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == ODD


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\u0085", "a\u2028\u0085\\u2028", "plain"])
def test_a_frame_is_one_line_for_every_reader(text: str) -> None:
    framed = sse.frame({"text": text})
    assert framed.decode().splitlines() == [framed.decode().strip(), ""]
    assert orjson.loads(framed.removeprefix(b"data: ")) == {"text": text}


async def test_usage_comes_last_and_only_when_asked_for() -> None:
    async with site() as running:
        plain = await body_of(running)
        asked = await body_of(running, stream_options={"include_usage": True})
    assert b'"usage"' not in plain.content
    last = orjson.loads(asked.content.split(b"\n\n")[-3].removeprefix(b"data: "))
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    expected = {"device": 6, "host": 0, "disk": 0, "computed": 4, "saved": None, "miss": None}
    assert last["chatserve"]["receipt"] == expected


async def test_merged_deltas_are_one_chunk_each() -> None:
    async with site() as running:
        running.service.script = lambda ask: [
            Delta(sample=0, seq=5, text="a b c", token_ids=(1, 2, 3)),
            Delta(sample=0, seq=5, text="", token_ids=(4,)),
            SampleEnd(sample=0, finish_reason="stop", stop_reason="END"),
            done(ask),
        ]
        plain = await body_of(running)
        with_ids = await body_of(running, return_token_ids=True)
    assert plain.content.count(b'"content":') == 2  # the role's empty one, and the text
    assert with_ids.content.count(b'"token_ids":') == 2
    assert b'"stop_reason":"END"' in plain.content


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    async with site(quick(ping_seconds=0.02)) as running:
        running.service.script = lambda ask: []
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        content = orjson.dumps(CHAT | {"stream": True})
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(content), content)
        )
        await reader.readuntil(b": still here\n\n")
        reply = await running.service.replies.get()
        reply.say(*odd(reply.ask))
        await reader.readuntil(b"data: [DONE]\n\n")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_reply_without_its_final_event_is_not_taken_for_an_answer(prompt: object) -> None:
    async with site() as running, running.client() as client:
        running.service.script = lambda ask: []
        body = {"model": CHAT["model"], "prompt": prompt}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        (await running.service.replies.get()).say(None)
        answer = await asking
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert not running.service.left_open

"""What a stream's reader makes of bytes, however they are cut, and of servers that fail."""

import json
import random
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.openai_load import Answer, CompletionStream, Door, LoadError, Words, _answer
from benchmarks.peer_process import PeerProcess
from chatserve.demonstration import MODEL_FOLDER

PEER = Path(__file__).with_name("small_peer.py")
HELLO = [{"role": "user", "content": "Hello!"}]
DELTAS = [{"choices": [{"delta": {"content": text}}]} for text in ("ä", "data: [", "DONE")]
USAGE = {"choices": [], "usage": {"completion_tokens": 3}}


@contextmanager
def door_of(kind: str, tmp_path: Path, *, plain: bool = False) -> Generator[Door]:
    words = [sys.executable, str(PEER), kind, "{port}"]
    peer = PeerProcess(kind, words, {"model": "small"}, log=tmp_path / "log")
    try:
        peer.start()
        yield Door(peer.url, peer.wait_until_it_answers(60), plain)
    finally:
        peer.end()


def whole_answer() -> bytes:
    events = [*(json.dumps(each) for each in (*DELTAS, USAGE)), "[DONE]"]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"".join(f"data: {event}\n\n".encode() for event in events)
    chunks = [body[place : place + 40] for place in range(0, len(body), 40)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n\r\n"


async def test_an_answer_is_the_same_wherever_it_is_cut() -> None:
    answer = whole_answer()
    first_line = answer.index(b"]}\n\n") + len(b"]}\n")
    for place in range(1, len(answer)):
        stream = CompletionStream(b"")
        stream.data_received(answer[:place])
        stream.data_received(answer[place:])
        assert stream.ended.done()
        events = list(stream.events())
        said = "".join(str(data["text"]) for name, data in events if name == "delta")
        assert said == "ädata: [DONE"
        assert ("usage", {"completion_tokens": 3}) in events
        assert events[-1] == ("done", {})
        first = next(data["arrived"] for name, data in events if name == "delta")
        assert first == stream.arrivals[place < first_line]


async def test_the_first_token_is_the_first_word_and_not_what_comes_before_it() -> None:
    """A role, or an empty text."""
    opening = [
        {"choices": [{"delta": delta}]} for delta in ({"role": "assistant"}, {"content": ""})
    ]
    before = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in opening)
    head, _, body = whole_answer().partition(b"\r\n\r\n")
    stream = CompletionStream(b"")
    stream.data_received(head + b"\r\n\r\n%x\r\n%b\r\n" % (len(before), before))
    while time.monotonic() <= stream.arrivals[0]:
        pass
    stream.data_received(body)
    answer = _answer(stream)
    assert len(stream.arrivals) == 2
    assert answer.first_token == answer.deltas[0] == stream.arrivals[1] - stream.began
    assert answer.first_token > stream.arrivals[0] - stream.began


async def test_a_good_server_is_read_to_its_end(tmp_path: Path) -> None:
    with door_of("good", tmp_path) as door:
        answer = await door.ask(HELLO, 5)
    assert (answer.tokens, answer.counted, answer.text) == (5, True, "word " * 5)
    assert (answer.prompt_tokens, answer.cached_tokens) == (9, 8)
    assert len(answer.deltas) == 5
    assert len(answer.gaps) == 4
    assert answer.first_token == answer.deltas[0] <= answer.total


def test_a_reply_that_comes_all_at_once_has_no_rate() -> None:
    def answer(*deltas: float) -> Answer:
        return Answer(deltas[0], deltas[-1], len(deltas), True, None, None, deltas, "")

    assert answer(1.0, 1.0, 1.0).decode_rate is None
    assert answer(1.0).decode_rate is None
    assert answer(1.0, 1.25, 1.5).decode_rate == 4.0


async def test_a_server_that_refuses_fields_is_asked_without_and_its_deltas_count(
    tmp_path: Path,
) -> None:
    with door_of("plain", tmp_path) as door:
        with pytest.raises(LoadError, match=r"422: .*ignore_eos.*stream_options") as refused:
            await door.ask(HELLO, 5)
        assert refused.value.status == 422
    with door_of("plain", tmp_path, plain=True) as door:
        answer = await door.ask(HELLO, 5)
    assert (answer.tokens, answer.counted) == (5, False)
    assert (answer.prompt_tokens, answer.cached_tokens) == (None, None)


@pytest.mark.parametrize(
    ("kind", "said"), [("error", "the device is gone"), ("cut", "broke off before its end")]
)
async def test_a_stream_that_fails_is_an_error(kind: str, said: str, tmp_path: Path) -> None:
    with door_of(kind, tmp_path) as door, pytest.raises(LoadError, match=said):
        await door.ask(HELLO, 5)


async def test_a_server_that_never_answers_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LoadError, match="not over after"):
            await Door(f"http://127.0.0.1:{port}", "any", seconds_max=0.05).ask(HELLO, 1)
    with pytest.raises(LoadError, match="took no connection"):
        await Door(f"http://127.0.0.1:{port}", "any").ask(HELLO, 1)


def test_texts_have_the_length_that_is_asked_for() -> None:
    words = Words(MODEL_FOLDER)
    for tokens in (20, 512, 2_000):
        assert abs(words.count(words.text("any", tokens)) - tokens) <= 3
    assert words.text("any", 20) == words.text("any", 20)
    assert words.text("any", 20) != words.text(random.Random(1).random(), 20)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Words(tmp_path)

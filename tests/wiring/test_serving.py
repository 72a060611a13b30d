"""The whole server as a user has it: `chatserve serve`, the demonstration model, real sockets."""

import asyncio
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.wiring.server import MODEL, Server, events, free_port, launched, running

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
PAGE = 16  # the default page size


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("serving"), fresh=True) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_streams_real_words_and_ends_by_itself(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=say("Hello!"),  # pyright: ignore
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage, finishes = "", None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finishes += [choice.finish_reason] if choice.finish_reason else []
    assert re.search(r"[a-z]{2,}", text)
    assert "<|" not in text, "control tokens are not text"
    assert finishes == ["stop"]
    assert usage is not None
    assert usage.completion_tokens > 1


def test_the_program_that_the_model_shows_runs(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=say("How do I use it from Python?"),  # pyright: ignore
        temperature=0,
    )
    text = answer.choices[0].message.content
    assert text is not None
    program = text.partition("```python\n")[2].partition("\n```")[0]
    assert "http://localhost:8000/v1" in program, text
    program = program.replace("http://localhost:8000", server.url)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"[a-z]{2,}", run.stdout)


def test_usage_logprobs_samples_and_seeds(client: openai.OpenAI) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model=MODEL,
            messages=say("zq9 #x!! vvv"),  # pyright: ignore
            n=3,
            max_tokens=48,
            extra_body={"ignore_eos": True},  # past its end a reply is anybody's guess
            temperature=2.0,
            seed=11,
            logprobs=True,
            top_logprobs=2,
        )

    ask()  # a prompt that is computed and one that is found differ in their last bits
    first, second = ask(), ask()
    assert first.usage is not None
    assert first.usage.completion_tokens == 3 * 48
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in first.choices}) > 1
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    covered = second.usage.prompt_tokens // PAGE * PAGE
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached in (covered, second.usage.prompt_tokens - 1)
    for choice in first.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for item in choice.logprobs.content:
            assert item.logprob <= 0.0
            assert len(item.top_logprobs) == 2


def test_errors_have_the_shape_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=say("x"))  # pyright: ignore
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=say("word " * 9000),
            max_tokens=5,  # pyright: ignore
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=say("x"),  # pyright: ignore
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert caught.value.param == "tools"


async def test_a_client_that_leaves_frees_everything(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        for _ in range(3):
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=say("Count to one hundred"),  # pyright: ignore
                stream=True,
                max_tokens=2000,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                break
            await stream.close()
    before = server.cache()["engine"]["finished_total"]["abort"]  # type: ignore[index]
    assert before >= 0
    state = server.wait_for("idle")
    assert state["engine"]["finished_total"]["abort"] >= 3  # type: ignore[index]


def test_the_second_turn_costs_its_own_tokens(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "You are a patient guide to the museum of old machines."},
        *say("Remember that my parrot is called Zorbo and that I live in Tallinn."),
    ]
    first = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=40,  # pyright: ignore
    )
    reply = first.choices[0].message.content or ""
    messages += [{"role": "assistant", "content": reply}, *say("What is my parrot called?")]
    second = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        max_tokens=5,  # pyright: ignore
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    # Up to the last full page of the first turn's prompt at the least, and never past the second.
    assert cached >= first.usage.prompt_tokens // PAGE * PAGE
    assert cached <= second.usage.prompt_tokens


SHARED_TOKENS = 1_000
REQUESTS = 32


async def shared_prefix(server: Server, *, leader_leaves: bool) -> float:
    """Many requests with one new prefix at once, each with a last token of its own. How often the
    prefix's full pages were computed: what each must compute by itself is taken off."""
    dice = random.Random(leader_leaves)
    prefix = [dice.randrange(1_000, 2_000) for _ in range(SHARED_TOKENS)]
    before = server.wait_for("idle")["engine"]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def ask(number: int) -> None:
            prompt = [*prefix, 300 + number]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0}
            answer = await client.post(PLAIN, json=body)
            answer.raise_for_status()
            assert answer.json()["usage"]["prompt_tokens"] == len(prompt)

        leader = asyncio.create_task(ask(REQUESTS))
        if leader_leaves:
            while server.cache()["cache"]["claims"]["claimed"] == 0:  # type: ignore[index]
                assert not leader.done()
                await asyncio.sleep(0)
        others = [asyncio.create_task(ask(number)) for number in range(REQUESTS - 1)]
        if leader_leaves:
            leader.cancel()
        await asyncio.gather(*others, *([] if leader_leaves else [leader]))
    after = server.wait_for("idle")["engine"]
    assert after["recoveries_total"] == before["recoveries_total"] == 0
    assert after["preemptions_total"] == before["preemptions_total"], "computed again for room"
    shared = SHARED_TOKENS // PAGE * PAGE
    own = SHARED_TOKENS + 1 - shared
    finished = REQUESTS - leader_leaves
    computed = after["prompt_tokens_total"] - before["prompt_tokens_total"]
    return (computed - finished * own) / shared


@pytest.mark.parametrize("leader_leaves", [False, True])
async def test_one_new_prefix_is_computed_once(server: Server, leader_leaves: bool) -> None:
    times = await shared_prefix(server, leader_leaves=leader_leaves)
    assert 1.0 <= times <= 1.05


def test_another_key_sees_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\nname = "ann"\nkey = "ann-has-a-key"\nrole = "admin"\n'
        '[[keys]]\nname = "bob"\nkey = "bob-has-a-key"\n'
    )
    with running(tmp_path, ["--api-key-file", str(keys)], key="ann-has-a-key") as server:
        body = {"model": MODEL, "messages": say("word " * 100), "max_tokens": 2, "temperature": 0}

        def cached(key: str, **more: object) -> int:
            answer = httpx.post(
                server.url + CHAT,
                json=body | more,
                headers={"Authorization": f"Bearer {key}"},
                timeout=60,
            )
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("ann-has-a-key") == 0
        assert cached("bob-has-a-key") == 0, "another tenant's pages are not there"
        assert cached("ann-has-a-key", cache_salt="s") == 0, "a salt narrows"
        assert cached("ann-has-a-key") > 0
        assert cached("bob-has-a-key") > 0
        assert cached("ann-has-a-key", cache_salt="s") > 0
        assert httpx.post(server.url + CHAT, json=body).status_code == 401
        wrong = {"Authorization": "Bearer bob-has-a-key"}
        assert httpx.get(server.url + "/admin/cache", headers=wrong).status_code == 403
        assert httpx.get(server.url + "/health").status_code == 200


def test_sigterm_lets_a_running_reply_finish(tmp_path: Path) -> None:
    with running(tmp_path, ["--shutdown-timeout", "60"]) as server:
        body = {
            "model": MODEL, "messages": say("Hello"), "max_tokens": 300, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            seen = [next(lines) for _ in range(4)]
            server.process.send_signal(signal.SIGTERM)
            seen += list(lines)
        usages = [event["usage"] for event in events(seen) if event.get("usage")]
        assert usages[-1]["completion_tokens"] == 300  # type: ignore[index]
        assert "data: [DONE]" in seen
        assert server.process.wait(30) == 0


def test_the_model_card_tells_the_context_that_is_served(tmp_path: Path) -> None:
    # What has leaked is told when the interpreter is taken down.
    with running(tmp_path, ["--kv-memory", "1MiB"], fresh=True) as small:
        (card,) = httpx.get(small.url + "/v1/models").json()["data"]
        stated = card["max_model_len"]
        assert 16 <= stated < 4096
        assert f"{stated} tokens" in small.log.read_text()
        body = {"model": MODEL, "prompt": [5] * (stated - 1), "temperature": 0}
        assert httpx.post(small.url + PLAIN, json=body, timeout=60).status_code == 200
        body["prompt"] = [5] * stated
        answer = httpx.post(small.url + PLAIN, json=body, timeout=60)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        small.process.send_signal(signal.SIGTERM)
        assert small.process.wait(30) == 0
        assert "leaked" not in small.log.read_text()


def test_the_metrics_and_the_page_are_there(server: Server) -> None:
    assert server.metric("chatserve_event_loop_tasks") >= 1
    assert server.metric("chatserve_steps_total") > 0
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}


def test_the_server_answers_while_it_loads_and_a_signal_ends_it_then(tmp_path: Path) -> None:
    with launched(tmp_path, ["--port", str(free_port())], fresh=True) as (process, url):
        seen: set[tuple[int, str]] = set()
        while not seen:
            assert process.poll() is None
            try:
                health = httpx.get(url + "/health", timeout=30)
                ready = httpx.get(url + "/ready", timeout=30)
                refused = httpx.post(
                    url + CHAT, json={"model": MODEL, "messages": say("Hi")}, timeout=30
                )
            except httpx.TransportError:
                continue
            assert health.status_code == 200
            seen.add((ready.status_code, ready.json()["status"]))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        assert seen == {(503, "loading")}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

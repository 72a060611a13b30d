"""What computing ahead is worth: a long message typed at a socket, with and without drafts.

    typed      the demonstration model, idle: a message of about 1,000 tokens typed in 4 s, then
               sent: prompt tokens computed after the send, by the receipt, and first token
    large      the same with a random model of about 0.45 billion parameters in bfloat16. What such
               a model costs a page is told too: on a small CPU it may need longer than the typing,
               so the message is sent when the drafts are done, and how long that took is told
    beside     users who chat without a pause, and their time between two tokens, in rounds with
               and without others who type: the server around a simulated model of a fixed time a
               step, and the demonstration model, whose steps any other process disturbs

With and without are measured in turn on the same server, so that a machine that drifts is the same
to both. All speak through the socket; without drafts the same frames are simply not sent.
"""

import argparse
import asyncio
import itertools
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from benchmarks.report import run
from benchmarks.server_process import ServerProcess, server_process, wait_until_ready

DEMONSTRATION = Path(__file__).parents[1] / "chatserve" / "demonstration" / "model"
MESSAGE_TOKENS = 1_000
TYPING_SECONDS = 4.0
FRAME_SECONDS = 0.1  # between two drafts of one who types
PAUSE_SECONDS = 0.3  # between the last key and the key that sends
PAGE_TOKENS = 16
ROUNDS = 5
LARGE_ROUNDS = 2
LARGE_OPTIONS = ("--dtype", "bfloat16", "--kv-memory", "1GiB", "--context-length", "2048")
DRAFTS_SECONDS_MAX = 600.0
CHATTING, TYPING = 4, 4
ROUND_SECONDS, PAIRS = 3.0, 20
STEP_SECONDS = 0.02
WORDS = (
    *("the", "lamp", "door", "room", "garden", "table", "river", "stone", "bread", "paper"),
    *("carries", "opens", "closes", "finds", "brings", "takes", "leaves", "holds", "green", "old"),
    *("small", "quiet", "bright", "heavy", "and", "but", "while", "because", "before", "near"),
)


@dataclass(frozen=True, slots=True)
class Sent:
    """A turn as its sender saw it. first_token: seconds from the send."""

    first_token: float
    prompt_tokens: int
    computed: int
    gaps: tuple[float, ...] = ()


class Page:
    """A socket of one user."""

    def __init__(self, connection: ClientConnection, client: httpx.AsyncClient) -> None:
        self._connection = connection
        self._client = client
        self._numbers = itertools.count()

    async def new_conversation(self) -> str:
        """Its id."""
        answer = await self._client.post("/api/conversations", json={})
        answer.raise_for_status()
        return str(answer.json()["id"])

    async def tell(self, kind: str, **fields: object) -> str:
        """Send a frame; its request."""
        request = f"q{next(self._numbers)}"
        frame = {"type": kind, "request": request} | fields
        await self._connection.send(orjson.dumps(frame).decode())
        return request

    async def type(self, conversation: str, text: str, seconds: float) -> None:
        """Draft a growing text, the whole of it at the end."""
        frames = max(1, round(seconds / FRAME_SECONDS))
        began = time.monotonic()
        for number in range(1, frames + 1):
            await asyncio.sleep(began + number * seconds / frames - time.monotonic())
            end = len(text) * number // frames
            await self.tell("draft", conversation=conversation, text=text[:end])

    async def send(self, conversation: str, text: str, tokens: int) -> Sent:
        """Send a turn and read its reply to the end."""
        began = time.monotonic()
        request = await self.tell(
            "send",
            conversation=conversation,
            id=f"t{next(self._numbers)}",
            content=text,
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0,
        )
        times: list[float] = []
        while True:
            event: dict[str, Any] = orjson.loads(await self._connection.recv())
            if event["event"] == "failed":
                raise RuntimeError(str(event))
            if event.get("request") not in (request, None) or event["event"] == "changed":
                continue
            if event["event"] == "delta":
                times.append(time.monotonic())
            if event["event"] == "done":
                gaps = tuple(later - sooner for sooner, later in itertools.pairwise(times))
                prompt, computed = event["usage"]["prompt_tokens"], event["receipt"]["computed"]
                return Sent(times[0] - began, prompt, computed, gaps)


@asynccontextmanager
async def page(server: ServerProcess) -> AsyncGenerator[Page]:
    """A user comes, and leaves after the block."""
    url = server.url.replace("http://", "ws://") + "/api/socket"
    subprotocols = [Subprotocol("chatserve.v1")]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60.0) as client,
        connect(url, subprotocols=subprotocols, max_size=None) as connection,
    ):
        yield Page(connection, client)


def message(seed: int, words: int) -> str:
    """Sentences that nobody has said before."""
    source = random.Random(seed)
    said: list[str] = []
    for number in range(words):
        word = source.choice(WORDS)
        said.append(word + "." if number % 11 == 10 else word)
    return " ".join(said)


async def words_for(user: Page, tokens: int) -> int:
    """How many words make so many tokens, found by sending a few."""
    sent = await user.send(await user.new_conversation(), message(-1, 200), 2)
    return round(tokens * 200 / sent.prompt_tokens)


async def metric(server: ServerProcess, name: str) -> float:
    """One counter of the server."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60.0) as client:
        text = (await client.get("/metrics")).text
    return float(re.findall(rf"^{name} ([0-9.e+-]+)$", text, re.MULTILINE)[0])


# The three measurements ----------------------------------------------------------------------


async def typed(server: ServerProcess) -> dict[str, float]:
    """A typed message, sent a moment after its last key."""
    without: list[Sent] = []
    drafted: list[Sent] = []
    async with page(server) as user:
        words = await words_for(user, MESSAGE_TOKENS)
        for number in range(ROUNDS):
            text = message(2 * number, words)
            without.append(await user.send(await user.new_conversation(), text, 8))
            text, conversation = message(2 * number + 1, words), await user.new_conversation()
            await user.tell("focus", conversation=conversation)
            await user.type(conversation, text, TYPING_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)
            drafted.append(await user.send(conversation, text, 8))
    return report("typed in 4 s", without, drafted)


async def large() -> dict[str, float]:
    """The same, with a model that is slow enough for it to matter."""
    without: list[Sent] = []
    drafted: list[Sent] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-model-") as folder:
        await asyncio.to_thread(make_large_model, Path(folder))
        with server_process([folder, *LARGE_OPTIONS]) as server:
            await asyncio.to_thread(wait_until_ready, server)
            async with page(server) as user:
                words = await words_for(user, MESSAGE_TOKENS)
                for number in range(LARGE_ROUNDS):
                    text = message(2 * number, words)
                    without.append(await user.send(await user.new_conversation(), text, 4))
                    text, chat = message(2 * number + 1, words), await user.new_conversation()
                    began = time.monotonic()
                    await user.type(chat, text, TYPING_SECONDS)
                    await wait_for_drafts(server, began + DRAFTS_SECONDS_MAX)
                    seconds.append(time.monotonic() - began)
                    drafted.append(await user.send(chat, text, 4))
    figures = report("0.45 B, bfloat16", without, drafted)
    figures["drafted_after_seconds"] = statistics.median(seconds)
    print(f"    all drafted {figures['drafted_after_seconds']:.1f} s after the first key")
    return {f"large_{name}": value for name, value in figures.items()}


async def wait_for_drafts(server: ServerProcess, deadline: float) -> None:
    """Until nothing more is computed ahead."""
    await asyncio.sleep(PAUSE_SECONDS)
    while await metric(server, "chatserve_drafts"):
        if time.monotonic() > deadline:
            raise TimeoutError("the drafts are not done")
        await asyncio.sleep(0.2)


def make_large_model(folder: Path, vocabulary: int | None = None) -> None:
    """A random Qwen3 with the demonstration model's tokenizer.

    vocabulary: token ids; the tokenizer is filled up with words that no text has.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(DEMONSTRATION, local_files_only=True)
    if vocabulary is not None:
        tokenizer.add_tokens([f"qz{number}" for number in range(vocabulary - len(tokenizer))])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def beside(server: ServerProcess, model: str) -> dict[str, float]:
    """Users who chat, in turn with and without others who type."""
    await one_round(server, itertools.count(), typists=0)  # the first steps warm torch up
    gaps: dict[bool, list[float]] = {False: [], True: []}
    ratios: list[float] = []
    seeds = itertools.count(1_000)
    for number in range(PAIRS):
        found: dict[bool, list[float]] = {}
        for with_typists in (False, True) if number % 2 else (True, False):
            found[with_typists] = await one_round(server, seeds, typists=TYPING * with_typists)
            gaps[with_typists] += found[with_typists]
        ratios.append(p99(found[True]) / p99(found[False]))
    figures = {
        "beside_p99_seconds_without": p99(gaps[False]),
        "beside_p99_seconds_with": p99(gaps[True]),
        "beside_p99_ratio": p99(gaps[True]) / p99(gaps[False]),
        "beside_p99_ratio_median_of_pairs": statistics.median(ratios),
        "beside_p50_ratio": statistics.median(gaps[True]) / statistics.median(gaps[False]),
        "beside_tokens": float(len(gaps[True])),
    }
    print(
        f"beside, {model} model: {CHATTING} chat, {TYPING} type: between two tokens p99 "
        f"{1000 * figures['beside_p99_seconds_without']:.1f} ms without, "
        f"{1000 * figures['beside_p99_seconds_with']:.1f} ms with: "
        f"{figures['beside_p99_ratio']:.3f} x over all "
        f"({len(gaps[True])} and {len(gaps[False])} times), "
        f"{figures['beside_p99_ratio_median_of_pairs']:.3f} x median of {PAIRS} pairs; "
        f"p50 {figures['beside_p50_ratio']:.3f} x",
        flush=True,
    )
    return {f"{model}_{name}": value for name, value in figures.items()}


async def one_round(
    server: ServerProcess, seeds: "itertools.count[int]", *, typists: int
) -> list[float]:
    """Times between two tokens of all who chat."""
    until = time.monotonic() + ROUND_SECONDS

    async def chat(seed: int) -> list[float]:
        gaps: list[float] = []
        async with page(server) as user:
            conversation = await user.new_conversation()
            while time.monotonic() < until:
                gaps += (await user.send(conversation, message(seed, 12), 64)).gaps
        return gaps

    async def type_on(seed: int) -> None:
        async with page(server) as user:
            conversation = await user.new_conversation()
            while time.monotonic() < until:
                await user.type(conversation, message(seed, 600), TYPING_SECONDS)

    async with asyncio.TaskGroup() as group:
        chats = [group.create_task(chat(next(seeds))) for _ in range(CHATTING)]
        for _ in range(typists):
            group.create_task(type_on(next(seeds)))
    return [gap for task in chats for gap in task.result()]


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    return statistics.quantiles(values, n=100)[98]


def report(what: str, without: Sequence[Sent], drafted: Sequence[Sent]) -> dict[str, float]:
    """Print a row; its figures."""
    figures = {
        "prompt_tokens": statistics.median(sent.prompt_tokens for sent in drafted),
        "computed_after_send_max": float(max(sent.computed for sent in drafted)),
        "computed_without_drafts": statistics.median(sent.computed for sent in without),
        "first_token_seconds": statistics.median(sent.first_token for sent in drafted),
        "first_token_seconds_without": statistics.median(sent.first_token for sent in without),
    }
    ratio = figures["first_token_seconds_without"] / figures["first_token_seconds"]
    figures["first_token_ratio"] = ratio
    print(
        f"{what}: {figures['prompt_tokens']:.0f} tokens, computed after the send at most "
        f"{figures['computed_after_send_max']:.0f} "
        f"({figures['computed_after_send_max'] / PAGE_TOKENS:.2f} pages), first token "
        f"{1000 * figures['first_token_seconds']:.0f} ms against "
        f"{1000 * figures['first_token_seconds_without']:.0f} ms without drafts: {ratio:.1f} x",
        flush=True,
    )
    return figures


async def measure(parts: Sequence[str]) -> dict[str, float]:
    """The figures of the parts that are asked for."""
    figures: dict[str, float] = {}
    if "typed" in parts:
        with server_process() as server:
            await asyncio.to_thread(wait_until_ready, server)
            figures |= await typed(server)
    if "beside" in parts:
        timing = ["--step-seconds", str(STEP_SECONDS)]
        with server_process(timing, program=("benchmarks.simulated_server",)) as server:
            await asyncio.to_thread(wait_until_ready, server)
            figures |= await beside(server, "simulated")
        with server_process() as server:
            await asyncio.to_thread(wait_until_ready, server)
            figures |= await beside(server, "demonstration")
    if "large" in parts:
        figures |= await large()
    return figures


PARTS = ("typed", "beside", "large")


def main() -> int:
    """Print a table; with --json also write it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", choices=PARTS, action="append")
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return run("benchmarks.drafts", __doc__, lambda: measure(given.only or PARTS))


if __name__ == "__main__":
    sys.exit(main())

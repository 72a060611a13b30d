"""chatserve and its peers, measured in turn through the door that all share, in one run.

    python -m benchmarks.compare --peer CMD [--peer CMD ...] [--model FOLDER] [--only SCENARIO ...]

CMD starts an OpenAI-compatible server: words as for a shell, but no shell reads them. {model},
{port} and {data} in it are the model's folder, the port to listen on, and a folder that survives a
restart; variables are set with `env NAME=VALUE ...` in front, and a first word `NAME:` is what the
server is called. chatserve is started with what it does by itself, on the same folder.

One server runs at a time. A round is one start of each, all scenarios, and its end; rounds go
forth and back (A B B A), so that a machine that drifts is the same to all. Figures are medians over
all rounds. `start` is process start to the first streamed token, `memory` the most memory of all
its processes together (proportional set sizes, sampled). Without --model a random one of 0.47
billion parameters is made (benchmarks.random_model); `overhead` always has a small random one.
"""

import argparse
import asyncio
import json
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

from benchmarks import random_model, traces
from benchmarks.compare_report import Comparison
from benchmarks.compare_scenarios import LARGE, SMALL, Kind, Samples, Sizes, Visit, warm_up
from benchmarks.openai_load import Door, LoadError, Words
from benchmarks.peer_process import PeerError, PeerProcess, read_command, shown
from benchmarks.traces import Arrival

OURS = (
    *("{python}", "-m", "chatserve", "serve", "{model}", "--port", "{port}"),
    *("--data-dir", "{data}", "--log-level", "warning"),
)
FIRST_REPLY_TOKENS = 4
LOADING, LOADING_SECONDS = 503, 0.05  # answered until it can; between two questions
EVICTING_SHARE = 1.25  # of the memory for KV, in other prompts: what is in use goes last
SCENARIOS = (*LARGE, *SMALL, "start", "memory")
BYTES_OF_NUMBER = 2  # bfloat16
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Server:
    """One of those compared. plain: it is asked with the fields that every server knows."""

    name: str
    words: Sequence[str]
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. model, small: folders; evicting_tokens: as a `Visit` has it."""

    servers: Sequence[Server]
    model: Path
    small: Path
    scenarios: Sequence[str] = SCENARIOS
    rounds: int = 2
    sizes: Sizes = field(default_factory=Sizes)
    evicting_tokens: int = 0
    trace: Sequence[Arrival] = ()
    start_seconds_max: float = 600.0
    reply_seconds_max: float = 1_200.0

    def visits(self) -> list["Turn"]:
        """The starts of servers, in the order in which they are measured."""
        large = tuple(name for name in self.scenarios if name not in SMALL)
        small = tuple(name for name in self.scenarios if name in SMALL)
        groups = [(self.model, large), (self.small, small)]
        return [
            Turn(number, server, model, names)
            for number in range(self.rounds)
            for model, names in groups
            if names
            for server in (reversed(self.servers) if number % 2 else self.servers)
        ]


@dataclass(frozen=True, slots=True)
class Turn:
    """One start of a server: the round, the model's folder, and what is measured."""

    round: int
    server: Server
    model: Path
    scenarios: Sequence[str]


def servers_of(
    peers: Sequence[str], *, plain: bool, kv_memory: str | None, ours: str = ""
) -> list[Server]:
    """chatserve, with further options, then the peers, each with a name of its own. Raises
    ValueError for a command that cannot be one."""
    options = () if kv_memory is None else ("--kv-memory", kv_memory)
    found = [Server("chatserve", (*OURS, *options, *shlex.split(ours)))]
    for command in peers:
        name, words = read_command(command)
        same = sum(each.name.partition(" ")[0] == name for each in found)
        found.append(Server(f"{name} {same + 1}" if same else name, words, plain))
    return found


class _Start:
    """A server in its turn: started, perhaps again, and always ended."""

    def __init__(self, plan: Plan, turn: Turn, folder: Path) -> None:
        self._plan = plan
        self._server = turn.server
        self._log = folder / "log"
        data = folder / "data"
        data.mkdir()
        self._places = {"model": str(turn.model), "data": str(data), "python": sys.executable}
        self._peer = self._next()
        self.peak_bytes = 0
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self._end()

    async def begin(self) -> Door:
        """Start it and hear its first reply. Raises PeerError and LoadError."""
        plan, peer = self._plan, self._peer
        peer.start()
        name = await asyncio.to_thread(peer.wait_until_it_answers, plan.start_seconds_max)
        door = Door(peer.url, name, self._server.plain, plan.reply_seconds_max)
        while True:
            asked = time.monotonic()
            try:
                answer = await door.ask([{"role": "user", "content": "Hello!"}], FIRST_REPLY_TOKENS)
            except LoadError as error:
                # Some list their model before they have loaded it.
                if error.status != LOADING or asked > peer.started + plan.start_seconds_max:
                    raise
                await asyncio.sleep(LOADING_SECONDS)
            else:
                self.start_seconds = asked - peer.started + answer.first_token
                return door

    async def again(self) -> Door:
        """End it gracefully, and start it on the same folder."""
        await asyncio.to_thread(self._end)
        self._peer = self._next()
        return await self.begin()

    def failure(self, error: LoadError) -> PeerError:
        """The error with the server's name and last words."""
        return self._peer.failure(f"failed: {error}")

    def _next(self) -> PeerProcess:
        return PeerProcess(self._server.name, self._server.words, self._places, log=self._log)

    def _end(self) -> None:
        self._peer.end()
        self.peak_bytes = max(self.peak_bytes, self._peer.peak_bytes)


async def visit(plan: Plan, turn: Turn, samples: Samples, bar: "tqdm[NoReturn]") -> None:
    """One start of a server and what is measured of it. Raises PeerError."""
    with (
        tempfile.TemporaryDirectory(prefix="chatserve-bench-") as folder,
        _Start(plan, turn, Path(folder)) as start,
    ):
        try:
            bar.set_description(f"{turn.server.name}: start")
            door = await start.begin()
            if "start" in turn.scenarios:
                samples.add("start", Kind.SECONDS, [start.start_seconds])
            now = Visit(
                door=door,
                words=Words(turn.model),
                samples=samples,
                restart=start.again,
                round=turn.round,
                sizes=plan.sizes,
                evicting_tokens=plan.evicting_tokens,
                trace=plan.trace,
            )
            chosen = [name for name in LARGE | SMALL if name in turn.scenarios]
            if chosen:
                await warm_up(now)
            for name in chosen:
                bar.set_description(f"{turn.server.name}: {name}")
                await (LARGE | SMALL)[name](now)
                bar.update()
        except LoadError as error:
            raise start.failure(error) from None
    if "memory" in turn.scenarios:
        samples.add("memory", Kind.BYTES, [start.peak_bytes])


def measure(
    plan: Plan, found_so_far: Callable[[Comparison], None] = lambda found: None
) -> Comparison:
    """All rounds. found_so_far: told after each start of a server. Raises PeerError."""
    samples = {server.name: Samples() for server in plan.servers}
    found = Comparison(samples, {server.name: shown(server.words) for server in plan.servers})
    turns = plan.visits()
    steps = sum(name in LARGE | SMALL for turn in turns for name in turn.scenarios)
    with tqdm(total=steps, unit="scenario") as bar:
        for turn in turns:
            asyncio.run(visit(plan, turn, samples[turn.server.name], bar))
            found_so_far(found)
    return found


def evicting_tokens(folder: Path, kv_memory: str | None) -> int:
    """Prompts that push all others out of that memory, in tokens; 0 where it is not given. Raises
    ValueError."""
    if kv_memory is None:
        return 0
    found = re.fullmatch(r"(\d+)(KiB|MiB|GiB)?", kv_memory)
    if found is None:
        raise ValueError(f"--kv-memory: {kv_memory} is no number of bytes, KiB, MiB or GiB")
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    of_token = config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head
    bytes_of_token = 2 * BYTES_OF_NUMBER * of_token
    size = int(found[1]) * UNITS.get(found[2], 1)
    return round(EVICTING_SHARE * size / bytes_of_token)


@contextmanager
def models(given: argparse.Namespace, peers: Sequence[str]) -> Generator[tuple[Path, Path]]:
    """The folders of the model and of the small one; what is not given is made, and only where it
    is measured."""
    chosen = set(given.only or SCENARIOS)
    with tempfile.TemporaryDirectory(prefix="chatserve-bench-model-") as made:
        folders: list[Path] = []
        for size, folder, wanted in (
            ("large", given.model, chosen - SMALL.keys()),
            ("small", given.small_model, chosen & SMALL.keys()),
        ):
            if folder is None:
                folder = Path(made) / size
                if wanted:
                    random_model.make(folder, size)
                    if any(random_model.GGUF_NAME in peer for peer in peers):
                        random_model.write_gguf(folder)
            folders.append(folder)
        yield folders[0], folders[1]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--peer", action="append", required=True, metavar="CMD", help="command of a server")
    add("--model", type=Path, metavar="FOLDER", help="in Hugging Face format [a random one]")
    add("--small-model", type=Path, metavar="FOLDER", help="for `overhead` [a random one]")
    add("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    add("--rounds", type=int, default=2, help="starts of each server, forth and back [2]")
    add("--kv-memory", metavar="BYTES", help="of chatserve, such as 2GiB; peers say it in CMD. "
        "Only with it is `returning` measured after others")  # fmt: skip
    add("--ours", default="", metavar="OPTIONS", help="of chatserve, such as '--quantize int8'")
    add("--trace", type=Path, metavar="FILE", help="JSON lines; only with it is `trace` measured")
    add("--plain", action="store_true", help="leave fields out that some peers refuse")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--picture", type=Path, metavar="FILE", help="also draw the ratios there (SVG)")
    return parser


def run(given: argparse.Namespace) -> Comparison:
    """Measure what is asked for, and write it down as it comes. Raises PeerError, ValueError and
    OSError."""
    if given.rounds < 1:
        raise ValueError("--rounds: at least 1")
    servers = servers_of(given.peer, plain=given.plain, kv_memory=given.kv_memory, ours=given.ours)
    if (given.only and "trace" in given.only) and given.trace is None:
        raise ValueError("`trace` needs --trace FILE")
    arrivals = [] if given.trace is None else traces.read(given.trace)
    names = given.only or [name for name in SCENARIOS if name != "trace" or arrivals]
    with models(given, given.peer) as (model, small):
        plan = Plan(
            servers=servers,
            model=model,
            small=small,
            scenarios=names,
            rounds=given.rounds,
            trace=arrivals,
            evicting_tokens=(
                evicting_tokens(model, given.kv_memory) if "returning" in names else 0
            ),
        )
        return measure(plan, partial(_write, given))


def _write(given: argparse.Namespace, found: Comparison) -> None:
    if given.json is not None:
        found.write_json(given.json, "python -m benchmarks.compare " + shown(sys.argv[1:]))


def _leave(number: int, _: FrameType | None) -> None:
    """What was started is ended on the way out."""
    sys.exit(128 + number)


def main() -> int:
    """Print a table; the exit status."""
    given = arguments().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        found = run(given)
    except (PeerError, ValueError, OSError, KeyError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 1
    print(found.table())
    if given.picture is not None:
        found.write_picture(given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Host time of a step: what planning, committing and delivering cost beside the model.

    python -m benchmarks.step_host_time [--sequences 64] [--steps 2000] [--json FILE]

A simulated model stands in for the real one and its own time is not counted. All sequences
generate at once, each with a context of its own, two steps in flight, as the engine runs them:
n+1 is planned before n is committed. The target is a sum of at most 3 ms at 64 sequences.
"""

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from chatserve.cache.block_manager import BlockManager
from chatserve.engine.pace import Pace
from chatserve.engine.plan import StepPlan
from chatserve.engine.scheduler import Outcome, Scheduler, SchedulerLimits
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.simulated_runner import SimulatedRunner
from chatserve.engine.stream import Stream
from chatserve.engine.values import Progress, Request, Sampling
from prefix_store.names import PageNamer

Result = TypeVar("Result")

PAGE_SIZE = 16
BUDGET = 4096
VOCABULARY = 32_000
TARGET_MS = 3.0


@dataclass(slots=True)
class Stopwatch:
    """Milliseconds of each part, step by step."""

    plan: list[float] = field(default_factory=list[float])
    commit: list[float] = field(default_factory=list[float])
    deliver: list[float] = field(default_factory=list[float])

    def figures(self) -> dict[str, dict[str, float]]:
        """Mean, p50 and p99 of each part and of the sum."""
        whole = [sum(parts) for parts in zip(self.plan, self.commit, self.deliver, strict=True)]
        parts = {"plan": self.plan, "commit": self.commit, "deliver": self.deliver, "sum": whole}
        return {name: _figures(values) for name, values in parts.items()}


async def measure(*, sequences: int, prompt_tokens: int, steps: int, warm_up: int) -> Stopwatch:
    """Run `steps` steps of `sequences` replies and time what is not the model."""
    beginning = sequences * prompt_tokens // BUDGET + sequences  # steps until all generate
    house = _House(sequences, prompt_tokens, beginning + warm_up + steps)
    house.start()
    for _ in range(warm_up):
        await house.step(Stopwatch())
    watch = Stopwatch()
    gc.collect()
    gc.freeze()  # as a server would after loading its model
    for _ in range(steps):
        await house.step(watch)
    return watch


class _House:
    """A scheduler, a simulated model and one stream for each request."""

    def __init__(self, sequences: int, prompt_tokens: int, reply_tokens: int) -> None:
        context = prompt_tokens + reply_tokens
        pages = sequences * (-(-context // PAGE_SIZE) + 2)
        self._sequences = sequences
        self._prompt_tokens = prompt_tokens
        self._reply_tokens = reply_tokens
        self._namer = PageNamer(b"k" * 32, page_size=PAGE_SIZE)
        self._runner = SimulatedRunner(pages=pages, page_size=PAGE_SIZE, vocabulary_size=VOCABULARY)
        self._scheduler = Scheduler(
            lambda: BlockManager(pages=pages, page_size=PAGE_SIZE),
            self._namer,
            Pace(target_seconds=1.0, tokens_min=BUDGET, tokens_max=BUDGET),
            limits=SchedulerLimits(
                sequences_max=sequences, queued_max=sequences, context_length=context
            ),
            clock=time.monotonic,
        )
        self._streams: dict[int, Stream] = {}
        self._in_flight: StepPlan | None = None

    def start(self) -> None:
        """Submit everybody and compute all prompts."""
        source = random.Random(1)
        for index in range(self._sequences):
            tokens = tuple(source.randrange(VOCABULARY) for _ in range(self._prompt_tokens))
            request = Request(
                request_id=str(index),
                tokens=tokens,
                max_tokens=self._reply_tokens,
                tenant=f"tenant {index % 4}",
                sampling=Sampling(seed=index),
            )
            root = index.to_bytes(32, "big")
            names = tuple(self._namer.names(root, tokens))
            prepared = PreparedRequest(request=request, root=root, names=names, digest=root[:16])
            self._streams[self._scheduler.submit(prepared)] = _stream(str(index))
        generating = 0
        while generating < self._sequences:
            plan = self._scheduler.plan()
            assert plan is not None, "nothing to do before everybody generates"
            self._scheduler.commit(self._runner.start(plan))
            generating = sum(bool(item.generated) for item in self._scheduler.roster.running)
        self._in_flight = self._scheduler.plan()

    async def step(self, watch: Stopwatch) -> None:
        """Plan n+1, run n, commit n, deliver n."""
        plan = _timed(watch.plan, self._scheduler.plan)
        assert self._in_flight is not None, "somebody ended: too few tokens were asked for"
        result = self._runner.start(self._in_flight)
        outcomes = _timed(watch.commit, lambda: self._scheduler.commit(result))
        assert len(outcomes) == self._sequences, "not everybody had a token in this step"
        _timed(watch.deliver, lambda: self._deliver(outcomes))
        for stream in self._streams.values():
            await stream.get()  # the consumers' part, in tasks of their own
        self._in_flight = plan

    def _deliver(self, outcomes: tuple[Outcome, ...]) -> None:
        for outcome in outcomes:
            self._streams[outcome.group].put(outcome.emission)


def _stream(request_id: str) -> Stream:
    def finished(_stream: Stream, _sample: int, _kept: int) -> None: ...

    def progress(_stream: Stream) -> Progress | None: ...

    def closed(_stream: Stream) -> None: ...

    return Stream(
        request_id=request_id,
        samples=1,
        on_close=closed,
        on_finish=finished,
        on_progress=progress,
    )


def _timed(book: list[float], action: Callable[[], Result]) -> Result:
    started = time.perf_counter()
    result = action()
    book.append(1000 * (time.perf_counter() - started))
    return result


def _figures(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 3),
        "p50": round(ordered[len(ordered) // 2], 3),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Host time of a step, in milliseconds.")
    parser.add_argument("--sequences", type=int, default=64, help="replies at once")
    parser.add_argument("--prompt-tokens", type=int, default=500, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=1000, help="steps that are measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    watch = asyncio.run(
        measure(
            sequences=options.sequences,
            prompt_tokens=options.prompt_tokens,
            steps=options.steps,
            warm_up=50,
        )
    )
    figures = watch.figures()
    if options.json is not None:
        report = {
            "command": f"python -m benchmarks.step_host_time --sequences {options.sequences}",
            "milliseconds": figures,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"host time of a step at {options.sequences} sequences, ms (target {TARGET_MS} in sum)")
    for name, values in figures.items():
        columns = "  ".join(f"{key} {value:7.3f}" for key, value in values.items())
        print(f"  {name:8} {columns}")


if __name__ == "__main__":
    main()

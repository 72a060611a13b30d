"""The engine end to end with a random model: decode steps beside reading weights and KV once, and
prompts beside the matrix rate."""

import asyncio
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, NotMeasured, Row, Step, joined
from benchmarks.gpu.house import House, Ran, build, first_token, running
from benchmarks.gpu.random_llama import PAGE_SIZE, made
from chatserve.cache.statistics import CacheStatistics
from chatserve.engine.engine import Engine
from chatserve.engine.values import Request

GRAPHS, AHEAD = "no graphs", "none launched ahead"


@dataclass(frozen=True, slots=True)
class Decode:
    """Sequences that get a token a step. tokens: of each one's prompt, of which all have the first
    `shared`, whole pages, in common. without: one way of ours to keep the device busy."""

    count: int
    tokens: int
    shared: int = 0
    kv_dtype: str = "auto"
    without: str = ""

    @property
    def words(self) -> str:
        """What is behind their number, in names."""
        shared = f"{self.shared} of the prompt shared" if self.shared else ""
        rounded = "" if self.kv_dtype == "auto" else f"{self.kv_dtype} pages"
        return "".join(f", {word}" for word in (shared, rounded, self.without) if word)

    def positions(self, growth: int) -> int:
        """Of all pages, when each reply has `growth` tokens."""
        return self.shared + self.count * (self.tokens - self.shared + growth + 2 * PAGE_SIZE)


DECODES = Decode(1, 4096), Decode(16, 2048), Decode(64, 1024)
DECODES_QUICK = Decode(1, 40), Decode(2, 33), Decode(4, 20)
SHARED, SHARED_QUICK = Decode(64, 2304, shared=2048), Decode(4, 41, shared=32)
PROMPTS, PROMPTS_QUICK = (2048, 8192, 32_768), (40, 90)
STEPS, STEPS_QUICK = 100, 4
GROWTH, GROWTH_QUICK = 600, 100  # tokens of a reply, at the most
WARM_UPS, RUNS = 2, 3
PROFILED, KERNELS_SHOWN = 10, 16
LOOK_SECONDS = 0.02


def steps(quick: bool) -> Sequence[Step]:
    """What nobody may miss first: time may run out. Making the model is the first one's time, and
    the last one's, whose pages are fp8."""
    decodes, prompts = (DECODES_QUICK, PROMPTS_QUICK) if quick else (DECODES, PROMPTS)
    without = [replace(case, without=name) for case in decodes[:2] for name in (GRAPHS, AHEAD)]
    return [
        Step("the model", _model, 60.0),
        *(_step(case) for case in decodes),
        *(Step(f"a prompt of {tokens}", partial(_prompt, tokens)) for tokens in prompts),
        *(_step(case) for case in without),
        Step("kernels of a decode step", partial(_profile, decodes[1])),
        _step(SHARED_QUICK if quick else SHARED),
        _step(replace(decodes[1], kv_dtype="fp8"), 75.0),
    ]


def _step(case: Decode, seconds: float = 45.0) -> Step:
    return Step(f"decode of {case.count}{case.words}", partial(_decode, case), seconds)


def _model(bench: Bench) -> Iterable[Row]:
    size = made(bench.device, bench.quick).size
    yield Row(name="weights that a step reads", value=size.read_bytes / 1e9, unit="GB")


def _decode(case: Decode, bench: Bench) -> Iterable[Row]:
    """Steps in which every sequence gets one token and nobody's prompt is computed. What a step
    has to read of pages that several sequences have, it has to read once."""
    ready = made(bench.device, bench.quick, case.kv_dtype)
    growth = GROWTH_QUICK if bench.quick else GROWTH
    house = build(
        bench,
        ready,
        positions=case.positions(growth),
        graphs=case.without != GRAPHS,
        ahead=case.without != AHEAD,
    )
    wanted = STEPS_QUICK if bench.quick else STEPS
    pages = asyncio.run(_run_decode(house, case, wanted, growth))
    if pages is None:
        raise NotMeasured("nobody looked while all sequences were at it")
    count, ran = case.count, house.watched.steps
    pairs = [(a, b) for a, b in pairwise(ran) if _alone(a, count) and _alone(b, count)]
    seconds = statistics.median(b.ended - a.ended for a, b in pairs)
    runner = statistics.median(b.seconds for _, b in pairs)
    contexts = statistics.fmean(b.contexts for _, b in pairs)
    layout = ready.model.layout
    again = pages.logical_pages - pages.physical_pages
    read = contexts - again * layout.page_size
    moved = ready.size.read_bytes + read * layout.page_bytes / layout.page_size
    copy = bench.limits.get("copy")
    words = (
        f"runner {1e3 * runner:.2f} ms",
        f"{count / seconds:.0f} tokens/s",
        f"{len(pairs)} steps",
        f"{again} of {pages.logical_pages} pages are another's too" if case.shared else "",
    )
    yield Row(
        name=f"decode step, {count} x {contexts / count:.0f}{case.words}",
        value=1e3 * seconds,
        unit="ms",
        share=None if copy is None else moved / copy / seconds,
        beside="weights + KV",
        note=joined(*words),
    )


def _alone(ran: Ran, count: int) -> bool:
    return ran.slices == ran.tokens == count


async def _run_decode(
    house: House,
    case: Decode,
    wanted: int,
    growth: int,
    profiler: profile | None = None,
) -> CacheStatistics | None:
    """profiler: runs while all sequences are at it; the steps before it began are forgotten. What
    pages there are while all are at it."""
    count, ran = case.count, house.watched.steps
    pages: CacheStatistics | None = None
    async with running(house) as engine:
        beginning = house.tokens(case.shared)
        if beginning:
            await first_token(engine, house.request(beginning, 1))
        prompts = [beginning + house.tokens(case.tokens - case.shared) for _ in range(count)]
        replies = [
            asyncio.create_task(_reply(engine, house.request(prompt, growth))) for prompt in prompts
        ]
        waiting = profiler
        while waiting is not None or sum(_alone(each, count) for each in ran) <= wanted:
            if done := [reply for reply in replies if reply.done()]:
                await done[0]  # raises what broke it
                break  # as many steps as there are have to do
            await asyncio.sleep(LOOK_SECONDS)
            if not (ran and _alone(ran[-1], count)):
                continue
            pages = engine.cache_statistics()
            if waiting is not None:
                waiting.start()
                waiting = None
                ran.clear()
        if profiler is not None and waiting is None:
            profiler.stop()
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
    return pages


async def _reply(engine: Engine, request: Request) -> None:
    await first_token(engine, request)


def _profile(case: Decode, bench: Bench) -> Iterable[Row]:
    """What the device does in a decode step: the kernels that take most, and how long it waits."""
    ready = made(bench.device, bench.quick)
    growth, wanted = (GROWTH_QUICK, STEPS_QUICK) if bench.quick else (GROWTH, PROFILED)
    house = build(bench, ready, positions=case.positions(growth))
    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[kind], acc_events=True)
    asyncio.run(_run_decode(house, case, wanted, growth, profiler))
    steps = [ran for ran in house.watched.steps if _alone(ran, case.count)]
    seconds = steps[-1].ended - steps[0].ended
    ran = len(steps) - 1
    field = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    taken: dict[str, float] = {
        each.key: 1e-6 * getattr(each, field) for each in profiler.key_averages()
    }
    name = f"decode step, {case.count} x {case.tokens}, with a profiler"
    yield Row(name=name, value=1e3 * seconds / ran, unit="ms")
    if not any(taken.values()):
        raise NotMeasured("the profiler saw nothing of the runner's thread")
    shown = sorted(taken, key=taken.__getitem__, reverse=True)[:KERNELS_SHOWN]
    every = {"all kernels": sum(taken.values())} | {key: taken[key] for key in shown}
    for key, total in every.items():
        yield Row(
            name=f"  {key[:54]}",
            value=1e3 * total / ran,
            unit="ms",
            share=total / seconds,
            beside="the step",
        )


def _prompt(tokens: int, bench: Bench) -> Iterable[Row]:
    """From the request to its first token, with nothing in the cache."""
    ready = made(bench.device, bench.quick)
    house = build(bench, ready, positions=(WARM_UPS + RUNS + 1) * (tokens + PAGE_SIZE))

    async def run() -> list[float]:
        async with running(house) as engine:
            asked = [house.request(house.tokens(tokens), 1) for _ in range(WARM_UPS + RUNS)]
            return [(await first_token(engine, each))[0] for each in asked]

    taken = asyncio.run(run())[WARM_UPS:]
    seconds = statistics.median(taken)
    rate = ready.size.prompt_operations(tokens) / seconds
    computing = sum(ran.seconds for ran in house.watched.steps) / (WARM_UPS + RUNS)
    words = f"{1e3 * seconds:.0f} ms to the first token", f"runner {1e3 * computing:.0f} ms"
    yield bench.rate_row(f"a prompt of {tokens} tokens", rate, "matrix", note=joined(*words))
    yield Row(name=f"the same {tokens} tokens, speed", value=tokens / seconds, unit="tokens/s")

"""The engine end to end with a random model: decode steps beside reading weights and KV once, and
prompts beside the matrix rate."""

import asyncio
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, NotMeasured, Row, Step, joined
from benchmarks.gpu.house import House, Ran, build, first_token, running
from benchmarks.gpu.random_llama import made
from chatserve.engine.engine import Engine
from chatserve.engine.values import Request

# (sequences, tokens of each one's prompt)
DECODES, DECODES_QUICK = ((1, 4096), (16, 2048), (64, 1024)), ((1, 40), (2, 33), (4, 20))
PROMPTS, PROMPTS_QUICK = (2048, 8192, 32_768), (40, 90)
STEPS, STEPS_QUICK = 100, 4
GROWTH, GROWTH_QUICK = 600, 100  # tokens of a reply, at the most
WARM_UPS, RUNS = 2, 3
PROFILED, KERNELS_SHOWN = 10, 16
LOOK_SECONDS = 0.02
GRAPHS, AHEAD = "no graphs", "none launched ahead"


def steps(quick: bool) -> Sequence[Step]:
    """Making the model is the first one's time."""
    decodes, prompts = (DECODES_QUICK, PROMPTS_QUICK) if quick else (DECODES, PROMPTS)
    return [
        Step("the model", _model, 60.0),
        *(Step(f"decode of {count}", partial(_decode, count, tokens)) for count, tokens in decodes),
        *(
            Step(f"decode of {count}, {name}", partial(_decode, count, tokens, without=name))
            for count, tokens in decodes[:2]
            for name in (GRAPHS, AHEAD)
        ),
        Step("kernels of a decode step", partial(_profile, *decodes[1])),
        *(Step(f"a prompt of {tokens}", partial(_prompt, tokens)) for tokens in prompts),
    ]


def _model(bench: Bench) -> Iterable[Row]:
    size = made(bench.device, bench.quick).size
    yield Row(name="weights that a step reads", value=size.read_bytes / 1e9, unit="GB")


def _decode(count: int, context: int, bench: Bench, *, without: str = "") -> Iterable[Row]:
    """Steps in which every sequence gets one token and nobody's prompt is computed. without: one
    way of ours to keep the device busy."""
    ready = made(bench.device, bench.quick)
    growth = GROWTH_QUICK if bench.quick else GROWTH
    positions = count * (context + growth + 2 * 16)
    house = build(
        bench, ready, positions=positions, graphs=without != GRAPHS, ahead=without != AHEAD
    )
    asyncio.run(_run_decode(house, count, context, STEPS_QUICK if bench.quick else STEPS, growth))
    ran = house.watched.steps
    pairs = [(a, b) for a, b in pairwise(ran) if _alone(a, count) and _alone(b, count)]
    seconds = statistics.median(b.ended - a.ended for a, b in pairs)
    runner = statistics.median(b.seconds for _, b in pairs)
    contexts = statistics.fmean(b.contexts for _, b in pairs)
    layout = ready.model.layout
    moved = ready.size.read_bytes + contexts * layout.page_bytes / layout.page_size
    copy = bench.limits.get("copy")
    words = (
        f"runner {1e3 * runner:.2f} ms",
        f"{count / seconds:.0f} tokens/s",
        f"{len(pairs)} steps",
    )
    yield Row(
        name=f"decode step, {count} x {contexts / count:.0f}{f', {without}' if without else ''}",
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
    count: int,
    context: int,
    wanted: int,
    growth: int,
    profiler: profile | None = None,
) -> None:
    """profiler: runs while all sequences are at it; the steps before it began are forgotten."""
    ran = house.watched.steps
    async with running(house) as engine:
        replies = [
            asyncio.create_task(_reply(engine, house.request(house.tokens(context), growth)))
            for _ in range(count)
        ]
        waiting = profiler
        while waiting is not None or sum(_alone(each, count) for each in ran) <= wanted:
            if done := [reply for reply in replies if reply.done()]:
                await done[0]  # raises what broke it
                break  # as many steps as there are have to do
            await asyncio.sleep(LOOK_SECONDS)
            if waiting is not None and ran and _alone(ran[-1], count):
                waiting.start()
                waiting = None
                ran.clear()
        if profiler is not None and waiting is None:
            profiler.stop()
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)


async def _reply(engine: Engine, request: Request) -> None:
    await first_token(engine, request)


def _profile(count: int, context: int, bench: Bench) -> Iterable[Row]:
    """What the device does in a decode step: the kernels that take most, and how long it waits."""
    ready = made(bench.device, bench.quick)
    growth, wanted = (GROWTH_QUICK, STEPS_QUICK) if bench.quick else (GROWTH, PROFILED)
    house = build(bench, ready, positions=count * (context + growth + 2 * 16))
    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[kind], acc_events=True)
    asyncio.run(_run_decode(house, count, context, wanted, growth, profiler))
    steps = [ran for ran in house.watched.steps if _alone(ran, count)]
    seconds = steps[-1].ended - steps[0].ended
    ran = len(steps) - 1
    field = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    taken: dict[str, float] = {
        each.key: 1e-6 * getattr(each, field) for each in profiler.key_averages()
    }
    name = f"decode step, {count} x {context}, with a profiler"
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
    house = build(bench, ready, positions=(WARM_UPS + RUNS + 1) * (tokens + 16))

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

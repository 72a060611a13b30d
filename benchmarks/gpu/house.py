"""The server's engine around a model, without the server: scheduler, runner, tiers, as
`chatserve.assembly` puts them together."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from benchmarks.gpu.bench import GIGA, Bench, NotMeasured
from benchmarks.gpu.random_llama import Made
from chatserve.cache.block_manager import BlockManager
from chatserve.cache.host_pages import HostPages
from chatserve.engine.engine import Engine, EngineSettings
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.pace import Pace
from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import StepUnderWay
from chatserve.engine.scheduler import Scheduler, SchedulerLimits
from chatserve.engine.tiers import TierLimits
from chatserve.engine.traffic import Traffic
from chatserve.engine.values import Receipt, Request
from chatserve.model.graphs import CudaRecorder
from prefix_store import PageNamer, Slab

# The server's defaults (`chatserve.settings`, `chatserve.lifespan`, `chatserve.assembly`,
# `chatserve.kept_pages`), which are on floors that need the web's packages.
STEP_TARGET_SECONDS = 0.1
BATCH_TOKENS = 8192
SEQUENCES_MAX = 128
MOVE_BYTES = 64 << 20
KEEP_BYTES = 8 << 20
LAYOUT = "page-major"
ROOM_SHARE = 0.9  # of the free memory of the device, for pages


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was run. tokens: computed; contexts: the sum of what its rows attend to; seconds:
    the runner's; ended: when, by `time.perf_counter`."""

    slices: int
    tokens: int
    contexts: int
    seconds: float
    ended: float


class Watched:
    """A runner whose steps are written down."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.steps: list[Ran] = []

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        """As `Runner.start`."""
        started = self.runner.start(plan, computing)
        if isinstance(started, StepResult):
            return self._noted(plan, started)
        return lambda: self._noted(plan, started())

    def _noted(self, plan: StepPlan, result: StepResult) -> StepResult:
        if plan.slices:
            contexts = sum(item.end for item in plan.slices)
            ran = Ran(
                len(plan.slices), plan.token_count, contexts, result.seconds, time.perf_counter()
            )
            self.steps.append(ran)
        return result

    def close(self) -> None:
        """As `Runner.close`."""
        self.runner.close()


@dataclass(slots=True)
class House:
    """One engine and what it stands on. dice: of its own, so that none finds another's pages."""

    made: Made
    engine: Engine
    watched: Watched
    dice: random.Random = field(default_factory=random.Random)

    def tokens(self, count: int) -> tuple[int, ...]:
        """Random ones."""
        return tuple(self.dice.choices(range(self.made.size.vocabulary), k=count))

    def request(self, tokens: tuple[int, ...], max_tokens: int, *, salt: str = "") -> Request:
        """By the server's own sampling: temperature 1."""
        name = str(self.dice.getrandbits(60))
        return Request(request_id=name, tokens=tokens, max_tokens=max_tokens, cache_salt=salt)


def build(
    bench: Bench,
    made: Made,
    *,
    positions: int,
    slots: int = 0,
    depot: Slab | None = None,
    graphs: bool = True,
    ahead: bool = True,
) -> House:
    """positions: of all pages together; slots: pages of the host's memory; graphs: whether decode
    steps are recorded, on a GPU; ahead: whether a step is launched before the one before it is
    fetched. Raises NotMeasured where the device has too little room."""
    model, size = made.model, made.model.layout.page_size
    page_bytes = model.layout.page_bytes
    pages = -(-positions // size)
    if pages * page_bytes > ROOM_SHARE * bench.room():
        needed, free = pages * page_bytes / GIGA, bench.room() / GIGA
        raise NotMeasured(f"its pages take {needed:.0f} GB, {free:.0f} GB are free")
    namer = PageNamer(bytes(32), page_size=size)
    recorder = CudaRecorder(bench.device) if graphs and bench.on_gpu else None
    runner = ModelRunner(
        model,
        pages=pages,
        slots=slots,
        recorder=recorder,
        sequences=SEQUENCES_MAX,
        ahead=ahead,
    )
    host = HostPages(slots=slots, below=depot) if slots else None
    tiers = TierLimits(
        keep_pages=max(1, KEEP_BYTES // page_bytes), move_pages=max(1, MOVE_BYTES // page_bytes)
    )
    watched = Watched(runner)
    scheduler = Scheduler(
        lambda: BlockManager(pages=pages, page_size=size, below=host or depot),
        namer,
        Pace(target_seconds=STEP_TARGET_SECONDS, tokens_min=size, tokens_max=BATCH_TOKENS),
        limits=SchedulerLimits(
            sequences_max=SEQUENCES_MAX,
            queued_max=SEQUENCES_MAX,
            context_length=min(model.context_length, pages * size),
            tiers=tiers,
        ),
        clock=time.monotonic,
        host=host,
    )
    traffic = None
    if depot is not None:
        traffic = Traffic(depot, runner.host or runner, page_bytes=page_bytes)
    settings = EngineSettings(
        fingerprint=model.fingerprint(), layout=LAYOUT, vocabulary_size=model.vocabulary_size
    )
    return House(
        made, Engine(scheduler, watched, namer, settings=settings, traffic=traffic), watched
    )


@asynccontextmanager
async def running(house: House) -> AsyncGenerator[Engine]:
    """The engine's loop; its memory goes at the end."""
    task = asyncio.create_task(house.engine.run())
    try:
        yield house.engine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        house.watched.close()


async def first_token(engine: Engine, request: Request) -> tuple[float, Receipt | None]:
    """Seconds from opening a request to its first token, and where its prompt came from. Raises
    RuntimeError where the engine failed it."""
    prepared = engine.prepare(request)
    began = time.perf_counter()
    seconds, receipt = 0.0, None
    with engine.open(prepared) as stream:
        async for batch in stream:
            for emission in batch:
                if emission.error is not None:
                    raise RuntimeError(f"the engine failed a request: {emission.error}")
                receipt = emission.receipt or receipt
                if emission.tokens and not seconds:
                    seconds = time.perf_counter() - began
    return seconds, receipt

"""Builds the engine floor around a simulated model, for tests.

`Setup` says how large everything is; `House` holds the collaborators, wired. `running` runs the
engine's loop for a test and fails it when an invariant was broken in any step: the engine itself
would survive that (it begins again on an empty cache), which must not hide a fault here.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from chatserve.cache.below import Below
from chatserve.cache.block_manager import BlockManager
from chatserve.cache.host_pages import HostPages
from chatserve.engine.drafts import DraftLimits
from chatserve.engine.engine import Engine, EngineSettings
from chatserve.engine.pace import Pace
from chatserve.engine.scheduler import Scheduler, SchedulerLimits
from chatserve.engine.sequence import PreparedRequest
from chatserve.engine.simulated_runner import SimulatedRunner
from chatserve.engine.tiers import TierLimits
from chatserve.engine.traffic import Traffic
from chatserve.engine.values import LOCAL_TENANT, Request, Sampling
from prefix_store.names import PageNamer
from tests.engine.auditor import Auditor
from tests.engine.fake_depot import FakeDepot
from tests.engine.launching import Launching

VOCABULARY = 97
HANG_SECONDS = 600.0  # a test that takes so long hangs; none comes near


@dataclass(slots=True)
class Clock:
    """Time that stands still unless a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Sizes of everything. context_length None: as many tokens as all pages hold."""

    pages: int = 64
    page_size: int = 4
    caching: bool = True
    budget_min: int = 8
    budget_max: int = 64
    steps_in_flight: int = 2
    sequences_max: int = 16
    queued_max: int = 1000
    context_length: int | None = None
    preemptions_max: int = 8
    aging_seconds: float = 10.0
    vocabulary: int = VOCABULARY
    drafts: DraftLimits = field(default_factory=DraftLimits)
    make_blocks: Callable[["Setup", Below | None], BlockManager] | None = None
    depot: FakeDepot | None = None  # below the device, and below host memory
    slots: int = 0  # of host memory; without any, I/O threads read and write the device's pages
    tiers: TierLimits = field(default_factory=TierLimits)
    launched: bool = False  # steps go on by themselves, as on a GPU


@dataclass(slots=True)
class House:
    """The collaborators of one engine, and what the auditor found."""

    setup: Setup
    clock: Clock
    namer: PageNamer
    runner: SimulatedRunner
    scheduler: Scheduler
    engine: Engine
    auditor: Auditor
    host: HostPages | None = None
    launching: Launching | None = None
    broken: list[BaseException] = field(default_factory=list[BaseException])

    @property
    def blocks(self) -> BlockManager:
        """The block manager of now; recovery replaces it."""
        return self.scheduler.blocks

    def prepare(self, request: Request) -> PreparedRequest:
        """Name the request's pages."""
        return self.engine.prepare(request)

    def check(self) -> None:
        """Every invariant, and the plans so far; remembers what failed."""
        try:
            self.scheduler.check()
        except AssertionError as error:
            self.broken.append(error)
            raise

    def assert_baseline(self) -> None:
        """Nobody is left and nothing is held: every page is free or evictable."""
        self.scheduler.check()
        assert not self.scheduler.busy
        pages = self.blocks.statistics().pages
        assert pages.free + pages.cached == pages.total == self.setup.pages
        assert pages.references == 0
        claims = self.blocks.statistics().claims
        assert claims.claimed == claims.waiting == 0


def build(setup: Setup) -> House:
    """Wire a house."""
    clock = Clock()
    namer = PageNamer(b"k" * 32, page_size=setup.page_size)
    runner = SimulatedRunner(
        pages=setup.pages,
        page_size=setup.page_size,
        vocabulary_size=setup.vocabulary,
        slots=setup.slots,
    )
    host = HostPages(slots=setup.slots, below=setup.depot) if setup.slots else None
    below = setup.depot if host is None else host

    def make_blocks() -> BlockManager:
        if setup.make_blocks is not None:
            return setup.make_blocks(setup, below)
        return BlockManager(
            pages=setup.pages,
            page_size=setup.page_size,
            caching=setup.caching,
            below=below,
        )

    scheduler = Scheduler(
        make_blocks,
        namer,
        Pace(target_seconds=0.1, tokens_min=setup.budget_min, tokens_max=setup.budget_max),
        limits=SchedulerLimits(
            sequences_max=setup.sequences_max,
            queued_max=setup.queued_max,
            context_length=setup.context_length or setup.pages * setup.page_size,
            preemptions_max=setup.preemptions_max,
            aging_seconds=setup.aging_seconds,
            drafts=setup.drafts,
            tiers=setup.tiers,
        ),
        clock=clock,
        host=host,
    )
    traffic = None
    if setup.depot is not None:
        memory = runner if host is None else runner.host
        traffic = Traffic(setup.depot, memory, page_bytes=runner.page_bytes)
    launching = Launching(runner) if setup.launched else None
    engine = Engine(
        scheduler,
        launching or runner,
        namer,
        settings=EngineSettings(
            fingerprint=b"f" * 32,
            layout="simulated",
            vocabulary_size=setup.vocabulary,
            steps_in_flight=setup.steps_in_flight,
        ),
        traffic=traffic,
    )
    auditor = Auditor(scheduler, setup.page_size)
    _audit_plans(scheduler, auditor)
    _audit_robberies(scheduler, auditor)
    house = House(setup, clock, namer, runner, scheduler, engine, auditor, host, launching)
    engine.on_step = house.check
    return house


def _audit_plans(scheduler: Scheduler, auditor: Auditor) -> None:
    """Show every plan to the auditor as it leaves the scheduler."""
    plan, commit, recover = scheduler.plan, scheduler.commit, scheduler.recover

    def audited_plan():
        made = plan()
        if made is not None:
            auditor.planned(made)
        return made

    def audited_commit(result):
        outcomes = commit(result)
        auditor.committed(result.number)
        return outcomes

    def audited_recover():
        auditor.forget()
        return recover()

    scheduler.plan, scheduler.commit, scheduler.recover = (
        audited_plan,
        audited_commit,
        audited_recover,
    )


def _audit_robberies(scheduler: Scheduler, auditor: Auditor) -> None:
    """Ask the auditor before somebody is preempted for another one's pages."""
    planner, roster = scheduler._planner, scheduler.roster
    find_pages, preempt = planner._find_pages, roster.preempt
    wanted = []

    def audited_find_pages(outline, sequence, start, end):
        wanted.append((sequence, start, end))
        try:
            return find_pages(outline, sequence, start, end)
        finally:
            wanted.pop()

    def audited_preempt(sequence, *, hold=False):
        if wanted:
            auditor.robbing(*wanted[-1])
        preempt(sequence, hold=hold)

    planner._find_pages, roster.preempt = audited_find_pages, audited_preempt


@asynccontextmanager
async def running(house: House, *, recoveries: int = 0) -> AsyncIterator[Engine]:
    """Run the loop; on the way out: no broken invariant, and as many recoveries as expected."""
    task = asyncio.create_task(house.engine.run())
    try:
        async with asyncio.timeout(HANG_SECONDS):
            yield house.engine
    finally:
        assert not task.done() or task.exception() is None, "the loop died"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        house.auditor.raise_first()
        if house.broken:
            raise house.broken[0]
    assert house.scheduler.counts.recoveries == recoveries


async def quiet(house: House) -> None:
    """Let the last steps of those who left commit; there is nothing else to wait for."""
    while house.scheduler.busy or house.scheduler.tiers.in_flight:  # noqa: ASYNC110
        await asyncio.sleep(0)


def ask(
    tokens: tuple[int, ...],
    max_tokens: int = 8,
    *,
    name: str = "r",
    tenant: str = LOCAL_TENANT,
    salt: str = "",
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    priority: int = 0,
) -> Request:
    """A request, greedy unless said otherwise. The simulated model passes penalties over, but they
    are counted, and the auditor looks at that."""
    return Request(
        request_id=name,
        tokens=tokens,
        max_tokens=max_tokens,
        tenant=tenant,
        cache_salt=salt,
        samples=samples,
        sampling=Sampling(temperature=temperature, seed=seed, frequency_penalty=0.5),
        stop_ids=stop_ids,
        min_tokens=min_tokens,
        priority=priority,
    )


def random_tokens(source: random.Random, count: int) -> tuple[int, ...]:
    """Token ids of the simulated vocabulary."""
    return tuple(source.randrange(VOCABULARY) for _ in range(count))

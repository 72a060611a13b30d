"""Drives a scheduler and a simulated runner by hand, one event at a time, without a loop.

A test decides when a step is planned, when the runner gets to it and when its result is
committed, so every interleaving of up to two steps in flight can be had on purpose. What
consumers would hear is kept, and each hearing is checked for a second final emission.
"""

from collections import deque
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from dataclasses import dataclass, field

from chatserve.cache.page_pool import PageState
from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import StepRunner, StepUnderWay
from chatserve.engine.scheduler import Outcome
from chatserve.engine.sequence import Life, Sequence
from chatserve.engine.traffic import Delivery, Job, move
from chatserve.engine.values import LOCAL_TENANT, Request
from prefix_store.names import PageName, Root
from tests.engine.build import House, Setup, ask, build
from tests.engine.oracle import Heard, assert_prefix, assert_right

STEPS_MAX = 20_000  # of one `run_all`: a test that needs more has met a livelock


@dataclass(slots=True)
class Asked:
    """A request under way, as its asker sees it."""

    request: Request
    group: int
    heard: list[Heard]
    cut: dict[int, int] = field(default_factory=dict[int, int])  # sample → kept tokens
    aborted: bool = False

    @property
    def over(self) -> bool:
        """Aborted, or every sample has had its final emission."""
        return self.aborted or all(one.finish is not None for one in self.heard)


class Stepper:
    """A house, and hands on its levers."""

    def __init__(self, setup: Setup) -> None:
        self.house: House = build(setup)
        self.scheduler = self.house.scheduler
        self.job_seconds = 0.0
        self.asked: dict[int, Asked] = {}
        self.roots: set[Root] = set()
        self._plans: deque[StepPlan] = deque()  # dispatched, not run
        self._results: deque[StepResult] = deque()  # run, not committed
        self._runner = StepRunner(self.house.launching or self.house.runner)
        self._under_way: tuple[StepPlan, StepUnderWay] | None = None  # launched, not fetched
        self._jobs: deque[Job] = deque()  # handed to the I/O threads, not done
        self._deliveries: deque[Delivery] = deque()  # done, not finished
        self._barred: dict[int, set[PageName]] = {}  # of jobs that were ordered before a deletion
        self.corrupt: dict[int, PageName] = {}  # slots whose memory failed since they were filled
        self._forgets: deque[frozenset[PageName]] = deque()  # begun, and not dropped below

    # Levers --------------------------------------------------------------------------------

    def ask(self, request: Request) -> Asked:
        """Submit a request. Raises what the scheduler raises."""
        prepared = self.house.prepare(request)
        self.roots.add(prepared.root)
        group = self.scheduler.submit(prepared)
        asked = Asked(request, group, [Heard() for _ in range(request.samples)])
        self.asked[group] = asked
        return asked

    def draft(self, key: Hashable, tokens: tuple[int, ...], *, tenant: str = LOCAL_TENANT) -> bool:
        """Somebody types."""
        prepared = self.house.prepare(ask(tokens, 0, tenant=tenant))
        self.roots.add(prepared.root)
        return self.scheduler.draft(key, prepared)

    def plan(self) -> StepPlan | None:
        """Plan and dispatch one step, if there is room in flight and anything to order."""
        if self.scheduler.in_flight >= self.house.setup.steps_in_flight:
            return None
        plan = self.scheduler.plan()
        if plan is not None:
            self._plans.append(plan)
        return plan

    def run(self) -> StepResult | None:
        """Let the runner do the oldest dispatched step, as its thread would; returns the result
        that it gave, or that of the one launched before."""
        if not self._plans:
            return self._fetch()
        plan = self._plans.popleft()
        started = self._runner.start(plan)
        fetched = self._fetch()
        if isinstance(started, StepResult):
            self._results.append(started)
            return started
        self._under_way = plan, started
        return fetched

    def _fetch(self) -> StepResult | None:
        if self._under_way is None:
            return None
        result = self._runner.end(*self._under_way)
        self._under_way = None
        self._results.append(result)
        return result

    def commit(self) -> bool:
        """Commit the oldest result, running its step first if nobody did."""
        while not self._results:
            if self.run() is None and self._under_way is None:
                return False
        self._hear(self.scheduler.commit(self._results.popleft()))
        return True

    def step(self) -> bool:
        """Plan as far as allowed, then commit one step. False where nothing was left to do."""
        while self.plan() is not None:
            pass
        self.order()
        if self.commit():
            return True
        self.move()
        return self.deliver()

    def order(self) -> None:
        """Hand the I/O threads what they should do."""
        tiers = self.scheduler.tiers
        tiers.retire()
        tiers.order_keeps(idle=self.scheduler.idle)
        self._jobs += tiers.take_orders()

    def move(self) -> Job | None:
        """Let an I/O thread do the oldest job."""
        depot = self.house.setup.depot
        if not self._jobs or depot is None:
            return None
        job = self._jobs.popleft()
        count = len(job.pages)
        barred, before = self._barred.pop(id(job), set()), set(depot.kept)
        runner = self.house.runner
        memory = runner.host if self.house.host is not None else runner
        try:
            done = move(job, 0, count, depot, memory, barred)
        except OSError:
            done = [False] * count
        assert not barred & (depot.kept.keys() - before), "forgotten, and copied down again"
        self._deliveries.append(Delivery(job, tuple(done), self.job_seconds))
        return job

    def deliver(self) -> bool:
        """Take the oldest delivery. False where there is none."""
        if not self._deliveries:
            return False
        self.scheduler.tiers.finish(self._deliveries.popleft())
        return True

    def forget(self, names: Collection[PageName]) -> None:
        """A conversation is deleted: what `Engine.forget` does before it waits."""
        wanted = frozenset(names)
        self.scheduler.blocks.forgetting.hide_below(wanted)
        self.scheduler.forget(wanted)
        for job in self._jobs:
            self._barred.setdefault(id(job), set()).update(wanted)
        self._forgets.append(wanted)

    def drop(self) -> bool:
        """The thread that forgets below does what it was asked for first. False: nothing."""
        if not self._forgets:
            return False
        names, depot = self._forgets.popleft(), self.house.setup.depot
        if depot is not None:
            with suppress(OSError):
                depot.drop(names)
            assert not names & depot.kept.keys(), "dropped, and there"
        self.scheduler.blocks.forgetting.dropped(names)
        return True

    def abort(self, asked: Asked) -> None:
        """The asker leaves."""
        asked.aborted = True
        self.scheduler.abort(asked.group)

    def cut(self, asked: Asked, sample: int, kept_tokens: int) -> None:
        """A stop string was found in a sample's text."""
        outcomes = self.scheduler.finish(asked.group, sample, kept_tokens)
        if outcomes:
            asked.cut[sample] = kept_tokens
        self._hear(outcomes)

    def recover(self) -> None:
        """After an exception from `plan` or `commit`: what the engine does."""
        while self._plans or self._under_way is not None or self.move() is not None:
            self.run()
        self._results.clear()
        self._deliveries.clear()
        self._hear(self.scheduler.recover())

    def survive(self, action: Callable[[], None]) -> bool:
        """Do it; after a fault of our own begin again, as the engine does. Returns whether it was
        done: who left, or found a stop string, does so again."""
        try:
            action()
        except InjectedFault:
            self.recover()
            return False
        return True

    def run_all(self, *, check: bool = True) -> None:
        """Until everybody has had a final emission."""
        for _ in range(STEPS_MAX):
            if not self.step():
                break
            if check:
                self.scheduler.check()
        assert not self.scheduler.busy, "work is left, and nothing to do: a stall"

    def until(self, reached: Callable[[], bool]) -> None:
        """Step on until something is so."""
        while not reached():
            assert self.step(), "it never came to that"

    # Looking -------------------------------------------------------------------------------

    def sequences(self, asked: Asked) -> list[Sequence]:
        """A request's living sequences."""
        return list(set(self.scheduler.roster.group(asked.group).values()))

    def lives(self, asked: Asked) -> set[Life]:
        """Where they are."""
        return {sequence.life for sequence in self.sequences(asked)}

    def assert_right(self, *asked: Asked) -> None:
        """These (or all) ended, and said what the model says."""
        for one in asked or self.asked.values():
            assert one.over, "no final emission"
            if not one.aborted and not one.cut:
                assert_right(one.request, one.heard, self.house.setup.vocabulary)

    def assert_right_so_far(self) -> None:
        """Whatever anybody heard is the beginning of what the model says."""
        for one in self.asked.values():
            for sample, heard in enumerate(one.heard):
                assert_prefix(one.request, heard, sample, self.house.setup.vocabulary)

    def assert_pages_hold_what_their_names_say(self) -> None:
        """Look into the runner's pages: tokens, parents and names agree for each named page."""
        blocks, runner, namer = self.scheduler.blocks, self.house.runner, self.house.namer
        named = blocks._index.pages()
        names = {name: page for page, name in named.items()}
        assert len(names) == len(named), "two pages of one name"
        for page, name in named.items():
            state = blocks.pool.state(page)
            assert state in (PageState.SEALED, PageState.CACHED, PageState.NAMED_LEAVING)
            entry = blocks._index._by_page[page]
            tokens = runner._pages[page].tolist()
            assert tokens == memoryview(entry.tokens).cast("i").tolist(), f"page {page} is stale"
            if entry.parent is not None:
                assert entry.parent in names, "a page without its parent"
                assert namer.names(b"", tokens, entry.parent) == [name]
            else:
                assert any(namer.names(root, tokens) == [name] for root in self.roots)

    def spoil(self, slot: int) -> None:
        """The memory of a slot fails."""
        host = self.house.host
        self.house.runner.host.tokens[slot, -1] += 1
        name = host._index.name(slot)
        if name is not None:
            self.corrupt[slot] = name

    def assert_slots_hold_what_their_names_say(self) -> None:
        """The same for host memory, where parents may be gone."""
        host = self.house.host
        named = {} if host is None else host._index.pages()
        self.corrupt = {
            slot: name for slot, name in self.corrupt.items() if named.get(slot) == name
        }
        for slot, name in named.items():
            tokens = self.house.runner.host.tokens[slot].tolist()
            entry = host._index._by_page[slot]
            same = tokens == memoryview(entry.tokens).cast("i").tolist()
            assert same or slot in self.corrupt, f"slot {slot} is stale"
            if not same:
                continue
            if entry.parent is not None:
                assert self.house.namer.names(b"", tokens, entry.parent) == [name]

    # Inside --------------------------------------------------------------------------------

    def _hear(self, outcomes: tuple[Outcome, ...]) -> None:
        for outcome in outcomes:
            asked = self.asked[outcome.group]
            assert not asked.aborted, "an emission for somebody who has left"
            asked.heard[outcome.emission.sample].hear(outcome.emission)


class InjectedFault(Exception):
    """What a test makes a step, a plan or a commit raise."""

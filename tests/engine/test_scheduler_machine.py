"""A state machine drives the scheduler, the block manager and a simulated model at random.

The dumb model beside it is the page-free oracle (`oracle.py`) plus the runner's own pages: after
every rule all invariants hold, every named page holds exactly the tokens that it is named by, and
whatever any consumer has heard is the beginning of what the model says. Without a fault of our own
nobody is ever robbed for pages that are on their way (`auditor.py`), and nothing begins again.
"""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chatserve.engine.drafts import DraftLimits
from chatserve.engine.scheduler import RECOVERIES_MAX
from chatserve.engine.tiers import TierLimits
from chatserve.engine.values import FinishReason
from chatserve.errors import Busy, ChatserveError, Quarantined, RequestError, StepFault
from tests.engine.build import Setup, ask
from tests.engine.fake_depot import FakeDepot
from tests.engine.faulty_blocks import METHODS, Trap, faulty_maker
from tests.engine.stepper import Asked, InjectedFault, Stepper

VOCABULARY = 5  # few ids: equal prefixes, twins and stop ids come by themselves
SETUPS = st.builds(
    Setup,
    pages=st.integers(6, 24),  # the fewest hold one request, and no second beside it
    page_size=st.sampled_from([1, 2, 4]),
    caching=st.sampled_from([True, True, True, False]),
    budget_min=st.just(1),
    budget_max=st.integers(1, 12),
    steps_in_flight=st.sampled_from([1, 2, 2]),
    sequences_max=st.integers(3, 8),
    queued_max=st.integers(2, 12),
    preemptions_max=st.sampled_from([1, 2, 8]),
    drafts=st.builds(
        DraftLimits,
        lines_max=st.integers(1, 3),
        turn_pages=st.integers(1, 2),
        pool_share=st.sampled_from([0.0, 0.25, 1.0]),
    ),
    vocabulary=st.just(VOCABULARY),
    launched=st.booleans(),
)
TRUNK = (1, 2, 3, 4, 0, 2, 2, 1, 0, 3, 4, 4, 1, 1, 0, 2)


class SchedulerMachine(RuleBasedStateMachine):
    """See the module."""

    @initialize(
        setup=SETUPS,
        below=st.sampled_from([True, True, False]),
        slots=st.sampled_from([0, 0, 3, 8, 40]),
        trouble=st.sampled_from([True, False, False]),
    )
    def open_house(self, setup: Setup, *, below: bool, slots: int, trouble: bool) -> None:
        """trouble: steps fail and our own code raises, now and then. Not in most runs: what begins
        again all the time never has a full cache."""
        self.trouble = trouble
        self.trap = Trap()
        self.setup = replace(
            setup,
            context_length=min(24, setup.pages * setup.page_size),
            make_blocks=faulty_maker(self.trap),
            depot=FakeDepot() if below else None,
            slots=slots,
            tiers=TierLimits(move_pages=2 if slots == 3 else 256),
        )
        self.depot = self.setup.depot
        self.stepper = Stepper(self.setup)
        self.errors_may_come = False
        self.failing_rules = 0
        self.recoveries = 0
        self.traps = 0

    @rule(
        times=st.integers(1, 3),
        shared=st.integers(0, len(TRUNK)),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        max_tokens=st.integers(1, 10),
        tenant=st.sampled_from(["a", "a", "b"]),
        samples=st.sampled_from([1, 1, 1, 2, 3]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
        min_tokens=st.sampled_from([0, 0, 3]),
        priority=st.sampled_from([0, 0, 1, -1]),
    )
    def submit(
        self, times: int, shared: int, tail: list[int], max_tokens: int, **fields: object
    ) -> None:
        """One request, or several that begin alike and end on their own."""
        for index in range(times):
            self._submit(shared, [*tail, index][:4], max_tokens, **fields)

    def _submit(self, shared: int, tail: list[int], max_tokens: int, **fields: object) -> None:
        tokens = (*TRUNK[:shared], *tail)[: self.setup.context_length - 1] or (1,)
        room = self.setup.context_length - len(tokens)
        stops = fields.get("stops", frozenset())
        others = {name: value for name, value in fields.items() if name != "stops"}
        request = ask(tokens, min(max_tokens, room), stop_ids=stops, **others)  # type: ignore[arg-type]
        before = self.stepper.house.blocks.statistics()
        refusal: ChatserveError | None = None
        try:
            self.stepper.ask(request)
        except (Busy, Quarantined, RequestError) as error:
            refusal = error
        if refusal is not None:
            after = self.stepper.house.blocks.statistics()
            assert after == before, "a refusal changed something"
            assert refusal.retry_after or refusal.param == "n" or self.errors_may_come

    @rule(
        key=st.integers(0, 3),
        shared=st.integers(0, len(TRUNK)),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        tenant=st.sampled_from(["a", "a", "b"]),
    )
    def draft(self, key: int, shared: int, tail: list[int], tenant: str) -> None:
        tokens = (*TRUNK[:shared], *tail)
        taken = False

        def draft() -> None:
            nonlocal taken
            taken = self.stepper.draft(key, tokens, tenant=tenant)

        done = self.stepper.survive(draft)
        scheduler = self.stepper.scheduler
        if done and not taken and scheduler.broken is None:
            whole = self.setup.page_size <= len(tokens) <= self.setup.context_length
            full = scheduler.statistics().drafts == self.setup.drafts.lines_max
            assert full or not whole or not self.setup.caching

    @rule(key=st.integers(0, 3))
    def withdraw(self, key: int) -> None:
        while not self.stepper.survive(lambda: self.stepper.scheduler.withdraw(key)):
            pass

    @rule()
    def plan(self) -> None:
        self.stepper.survive(self.stepper.plan)

    @rule()
    def run(self) -> None:
        self.stepper.run()

    @rule()
    def commit(self) -> None:
        self.stepper.survive(self.stepper.commit)

    @rule()
    def order(self) -> None:
        self.stepper.survive(self.stepper.order)

    @rule()
    def move(self) -> None:
        self.stepper.move()

    @rule()
    def deliver(self) -> None:
        self.stepper.survive(self.stepper.deliver)

    @precondition(lambda self: self.depot is not None and self.depot.kept)
    @rule(choice=st.randoms(use_true_random=False))
    def a_page_below_goes_bad(self, choice) -> None:
        name = choice.choice(sorted(self.depot.kept))
        if choice.random() < 0.5:
            del self.depot.kept[name]
        else:
            self.depot.torn.add(name)

    @precondition(lambda self: self.depot is not None)
    @rule(refusing=st.booleans(), raising=st.sampled_from([False, False, True]))
    def the_disk_fails_or_works(self, *, refusing: bool, raising: bool) -> None:
        self.depot.refusing, self.depot.raising = refusing, raising

    @precondition(lambda self: self.stepper.house.host is not None)
    @rule(choice=st.randoms(use_true_random=False))
    def memory_of_a_slot_fails(self, choice) -> None:
        """Of one that was saved: what was fetched has no checksum before it was on the device."""
        saved = sorted(self.stepper.house.host._checksums.keys() - self.stepper.corrupt.keys())
        if saved:
            self.stepper.spoil(choice.choice(saved))

    @rule(seconds=st.sampled_from([0.0, 1e-6, 10.0, 1e6]))
    def a_load_takes(self, seconds: float) -> None:
        self.stepper.job_seconds = seconds

    @rule(steps=st.integers(1, 12))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.stepper.survive(self.stepper.step)

    @rule(shared=st.integers(2, len(TRUNK)), tenant=st.sampled_from(["a", "a", "b"]))
    def somebody_comes_back(self, shared: int, tenant: str) -> None:
        """Everybody is answered and all copies are made; the device forgets it all, so that whoever
        comes next finds it below."""
        while not self.stepper.survive(self._steps_on):
            pass
        self.stepper.house.blocks.flush()
        self._submit(shared, [], 2, tenant=tenant)
        self.stepper.survive(self.stepper.plan)

    def _steps_on(self) -> None:
        while self.stepper.step():
            pass

    @precondition(lambda self: any(not one.over for one in self.stepper.asked.values()))
    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice) -> None:
        asked = choice.choice(self._under_way())
        while not self.stepper.survive(lambda: self.stepper.abort(asked)):
            pass

    @precondition(lambda self: any(not one.over for one in self.stepper.asked.values()))
    @rule(choice=st.randoms(use_true_random=False), commits=st.integers(0, 2))
    def abort_in_flight(self, choice, commits: int) -> None:
        """Who leaves is computed by every step in flight, and the next plans know it."""
        for _ in range(self.setup.steps_in_flight):
            self.stepper.survive(self.stepper.plan)
        if self._under_way():
            self.abort(choice)
        for _ in range(commits):
            self.stepper.survive(self.stepper.plan)
            self.stepper.survive(self.stepper.commit)
        self.stepper.survive(self.stepper.plan)

    @precondition(lambda self: any(not one.over for one in self.stepper.asked.values()))
    @rule(choice=st.randoms(use_true_random=False), drop=st.integers(0, 3))
    def cut_off(self, choice, drop: int) -> None:
        asked = choice.choice(self._under_way())
        heard = [(index, one) for index, one in enumerate(asked.heard) if one.tokens]
        if heard:
            sample, one = choice.choice(heard)
            kept = max(0, len(one.tokens) - drop)
            while not self.stepper.survive(lambda: self.stepper.cut(asked, sample, kept)):
                pass

    @rule(
        shared=st.integers(1, len(TRUNK)),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        tenant=st.sampled_from(["a", "a", "b"]),
        choice=st.randoms(use_true_random=False),
    )
    def a_conversation_is_deleted(self, shared: int, tail: list[int], tenant: str, choice) -> None:
        """Its names are those of some prompt, or of a sequence with all that it has generated."""
        tokens = (*TRUNK[:shared], *tail)
        names = list(self.stepper.house.prepare(ask(tokens, tenant=tenant)).names)
        alive = self.stepper.scheduler.roster.sequences()
        if alive and choice.random() < 0.5:
            sequence = choice.choice(sorted(alive, key=lambda item: item.id))
            names = list(sequence.names)
        self.stepper.forget(names)
        blocks = self.stepper.house.blocks
        assert not set(names) & set(blocks._index.pages().values()), "forgotten, and found"
        assert blocks.below(names, 0) == 0, "forgotten, and looked for below"

    @rule()
    def drop(self) -> None:
        self.stepper.drop()

    @rule(seconds=st.floats(-100_000.0, 100_000.0))
    def time_passes(self, seconds: float) -> None:
        self.stepper.house.clock.now += seconds

    @rule()
    def flush(self) -> None:
        self.stepper.house.blocks.flush()

    @precondition(
        lambda self: self.trouble and self.failing_rules < 2
    )  # three convictions: a broken device
    @rule(times=st.integers(1, 2))
    def steps_fail(self, times: int) -> None:
        left = times

        def fail(_plan: object) -> None:
            nonlocal left
            if left:
                left -= 1
                raise InjectedFault("on purpose")

        self.errors_may_come = True
        self.failing_rules += 1
        self.stepper.house.runner.before_step = fail

    @precondition(lambda self: self.trouble and self.traps + self.recoveries < RECOVERIES_MAX)
    @rule()
    def begin_again(self) -> None:
        self.recoveries += 1
        self.trap.clear()
        self.stepper.recover()

    @precondition(lambda self: self.trouble and self.traps + self.recoveries < RECOVERIES_MAX)
    @rule(
        method=st.sampled_from([name for name in METHODS if name != "settle"]),
        call=st.integers(1, 3),
        when=st.sampled_from(["before", "after"]),
    )
    def fault_of_our_own(self, method: str, call: int, when: str) -> None:
        self.traps += 1
        self.trap.set(method, call, when)

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "stepper"):
            return
        self.stepper.scheduler.check()
        self.stepper.assert_pages_hold_what_their_names_say()
        self.stepper.assert_slots_hold_what_their_names_say()
        roster = self.stepper.scheduler.roster
        assert len(roster.running) <= self.setup.sequences_max, "more run than may"

    def teardown(self) -> None:
        if not hasattr(self, "stepper"):
            return
        self.trap.clear()
        while self.stepper.drop():
            pass
        self.stepper.run_all()
        self.stepper.house.assert_baseline()
        transit = self.stepper.house.blocks.statistics().transit
        assert (transit.unkept, transit.keeping, transit.loading) == (0, 0, 0)
        self.stepper.assert_right_so_far()
        assert self.stepper.house.blocks.forgetting.ghosts == 0, "a ghost without an owner"
        assert not self.stepper.house.blocks.forgetting._below
        recoveries = self.stepper.scheduler.counts.recoveries
        assert self.recoveries <= recoveries <= self.recoveries + self.traps
        for asked in self.stepper.asked.values():
            assert asked.over, "no final emission"
            faults = [one for one in asked.heard if one.finish is FinishReason.ERROR]
            assert all(isinstance(one.error, StepFault) for one in faults)
            if faults:
                assert self.errors_may_come or self.traps > 1
            elif not asked.aborted and not asked.cut:
                self.stepper.assert_right(asked)

    def _under_way(self) -> list[Asked]:
        return [one for one in self.stepper.asked.values() if not one.over]


SchedulerMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedulerMachine = SchedulerMachine.TestCase

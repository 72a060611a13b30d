"""Scheduler: decides what each step computes, and what its outcome means.

    plan() → StepPlan        synchronous; orders one step, while another may be in flight
    commit(StepResult)       synchronous; appends tokens, seals pages, ends sequences; returns
                             the emissions, which the engine delivers

It knows tokens and pages. It knows neither time (a clock is injected) nor threads nor streams.

What a step computes is decided in `planner.py`, who waits and who runs is kept in `roster.py`.
While there are no requests at all, steps compute drafts (`drafts.py`).

A failed step names nothing, so all that took part are simply preempted; `suspects.py` finds out
whose fault it was.
"""

from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.host_pages import HostPages
from chatserve.engine.drafts import Drafts
from chatserve.engine.entrance import Entrance
from chatserve.engine.pace import Pace
from chatserve.engine.plan import NO_MOVES, Slice, StepFailure, StepPlan, StepResult
from chatserve.engine.planner import Planner, SchedulerLimits
from chatserve.engine.roster import Roster
from chatserve.engine.sequence import Life, PreparedRequest, Sequence
from chatserve.engine.statistics import EngineCounts, EngineStatistics
from chatserve.engine.suspects import Suspects
from chatserve.engine.tiers import Others, Tiers
from chatserve.engine.values import Emission, FinishReason, Progress, TokenLogprobs
from chatserve.errors import ChatserveError, NumericalFault, StepFault, Unavailable
from prefix_store.names import PageName, PageNamer, token_bytes

RECOVERIES_MAX = 8  # in a row, without one good commit between: then nothing helps any more

__all__ = ["Outcome", "Scheduler", "SchedulerLimits"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """An emission for a group (all samples of one request)."""

    group: int
    emission: Emission


class Scheduler:
    """See the module. Owned by the event loop; every method is synchronous."""

    def __init__(
        self,
        make_blocks: Callable[[], BlockManager],
        namer: PageNamer,
        pace: Pace,
        *,
        limits: SchedulerLimits,
        clock: Callable[[], float],
        host: HostPages | None = None,
        others: Others | None = None,
    ) -> None:
        """host: what the blocks have below them, where it is host memory. others: of `Tiers`."""
        blocks = make_blocks()
        assert limits.context_length <= blocks.pool.total * blocks.page_size
        self.limits = limits
        self.broken: str | None = None
        self.counts = EngineCounts()
        self.roster = Roster(blocks, aging_seconds=limits.aging_seconds, clock=clock)
        self._make_blocks = make_blocks
        self._namer = namer
        self._pace = pace
        self._suspects = Suspects()
        self._entrance = Entrance(self.roster, self._suspects, limits=limits, clock=clock)
        tiers = limits.tiers
        self.tiers = Tiers(self.roster, limits=tiers, clock=clock, host=host, others=others)
        self._planner = Planner(
            self.roster,
            pace,
            self._suspects,
            self.tiers,
            limits=limits,
            counts=self.counts,
            clock=clock,
        )
        self._drafts = Drafts(self.roster, self.tiers, limits.drafts)
        self._in_flight: deque[StepPlan] = deque()
        self._number = 0
        self._committed = 0
        self._touching: Sequence | None = None
        self._outcomes: list[Outcome] = []
        self._recoveries_in_a_row = 0
        self._void_until = 0  # the last step that was planned when one failed

    @property
    def blocks(self) -> BlockManager:
        """The cache floor's door."""
        return self.roster.blocks

    @property
    def busy(self) -> bool:
        """Whether anything is queued, running, drafted or in flight."""
        return bool(len(self.roster) or self._in_flight or len(self._drafts))

    @property
    def idle(self) -> bool:
        """Whether no request is here. Drafts do not count."""
        return not len(self.roster)

    @property
    def in_flight(self) -> int:
        """Steps planned and not committed."""
        return len(self._in_flight)

    # Requests come and go ------------------------------------------------------------------

    def submit(self, prepared: PreparedRequest) -> int:
        """Queue a request; returns its group.

        Raises what `Entrance.check` raises, and Unavailable for a broken device.
        """
        self._check_device()
        self._entrance.check(prepared)
        return self.roster.submit(prepared).group

    def check_room(self, tenant: str, preparing: int = 0, own: int = 0) -> None:
        """Raise what `submit` would for any request now; see `Entrance.check_room`."""
        self._check_device()
        self._entrance.check_room(tenant, preparing, own)

    def _check_device(self) -> None:
        if self.broken is not None:
            raise Unavailable("The device failed; the server must be restarted.")

    def draft(self, key: Hashable, prepared: PreparedRequest) -> bool:
        """Compute a prompt's full pages while there are no requests, in place of what this key
        asked for before. Returns whether it was taken; never refuses a request for it."""
        fits = len(prepared.request.tokens) <= self.limits.context_length
        if self.broken is None and fits:
            return self._drafts.put(key, prepared)
        self._drafts.withdraw(key)
        return False

    def withdraw(self, key: Hashable) -> None:
        """Nobody wants this key's draft any more. At any state; harmless if there is none."""
        self._drafts.withdraw(key)

    def forget(self, names: Collection[PageName]) -> None:
        """Nobody finds these pages on the device any more, until they are computed anew."""
        self.roster.wake(self.blocks.forget(names))
        self.tiers.forget(names)

    def abort(self, group: int) -> None:
        """Nobody wants the rest of this request. At any state; harmless if it has ended.

        What a step in flight computes of it is named at that step's commit: others may wait for
        it, and who left may come back.
        """
        for sequence in set(self.roster.group(group).values()):
            self.counts.finished[FinishReason.ABORT] += len(sequence.unforked) + 1
            if sequence.life is Life.RUNNING and sequence.last_step > self._committed:
                self.roster.retire(sequence)
            else:
                self.roster.end(sequence)

    def finish(self, group: int, sample: int, kept_tokens: int) -> tuple[Outcome, ...]:
        """A sample's text is complete with its first `kept_tokens` generated tokens.

        What was computed after those loses its names. Returns the final emission.
        """
        sequence = self.roster.group(group).get(sample)
        if sequence is None:
            return ()
        assert not sequence.unforked, "a stop string before the first token"
        keep = len(sequence.request.tokens) + kept_tokens
        self.blocks.truncate(sequence.table, keep)
        return (self._final(sequence, FinishReason.STOP),)

    def samples(self, group: int) -> frozenset[int]:
        """Samples of a request that have not ended."""
        return frozenset(self.roster.group(group))

    def progress(self, group: int) -> Progress | None:
        """How far the furthest sample of a group is; `queued` counts all who wait."""
        sequences = self.roster.group(group)
        if not sequences:
            return None
        first = max(sequences.values(), key=lambda item: item.computed)
        prompt = len(first.request.tokens)
        queued = len(self.roster.waiting) if first.life is Life.QUEUED else 0
        return Progress(queued=queued, prompt_tokens=prompt, computed=min(prompt, first.computed))

    # Plan ----------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Order the next step; None where there is nothing to order until one has committed."""
        if self.broken is not None or self._drafts.in_flight:
            return None
        if self._committed < self._void_until:
            return None  # whatever were planned now would count on a step that is void
        alone = not self._in_flight
        if self.idle:
            slices, copies = self._draft() if alone else (), ()
        else:
            self._drafts.give_way()
            outline = self._planner.outline(self._number + 1, alone=alone)
            ended = self.tiers.advance()
            while alone and not outline.slices and (outline.preempted or ended):
                # Pages were freed up to the bound, and too few, or what somebody waited for is not
                # to be had: no commit will come to try again.
                outline = self._planner.outline(self._number + 1, alone=alone)
                ended = self.tiers.advance()
            slices, copies = tuple(outline.slices), tuple(outline.copies)
        # Who is to be found guilty of a failing step must be alone in it.
        moves = None if self._suspects.any else self.tiers.order_moves(self._number + 1)
        if not slices and moves is None:
            return None
        self._number += 1
        plan = StepPlan(self._number, self._committed, copies, slices, moves or NO_MOVES)
        self._in_flight.append(plan)
        return plan

    def _draft(self) -> tuple[Slice, ...]:
        page = self._drafts.order(self._number + 1)
        ended = self.tiers.advance()
        while page is None and ended:
            page = self._drafts.order(self._number + 1)
            ended = self.tiers.advance()
        return () if page is None else (page,)

    # Commit --------------------------------------------------------------------------------

    def commit(self, result: StepResult) -> tuple[Outcome, ...]:
        """Take the oldest step's result; returns what its consumers should see."""
        plan = self._in_flight.popleft()
        assert plan.number == result.number, "steps commit in order"
        self._committed = plan.number
        self.tiers.commit_moves(plan, result)
        drafted = self._drafts.in_flight
        if drafted:
            self._drafts.commit(failed=result.failure is not None)
        if result.failure is not None:
            self._outcomes += self._fail(plan, result.failure, drafted=drafted)
        elif plan.slices:
            self._suspects.good_step()
            if not drafted:
                self._pace.observe(plan.token_count, result.seconds)
                self.tiers.observe_step(plan.token_count, result.seconds)
            self.counts.step(plan.token_count, result.seconds)
            self._apply(plan, result)
            self.roster.end_retired(plan.number)
        self._touching = None
        self.blocks.settle(plan.number)
        assert self.blocks.pool.balanced(), "pages do not add up"
        self._recoveries_in_a_row = 0
        return self._take_outcomes()

    def _take_outcomes(self) -> tuple[Outcome, ...]:
        taken, self._outcomes = tuple(self._outcomes), []
        return taken

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        served: dict[str, tuple[int, int]] = {}  # by tenant: prompt tokens computed, rows
        row = 0
        for item in plan.slices:
            first, row = row, row + len(item.orders)
            end = item.end
            sequence = self.roster.alive(item.sequence, item.incarnation)
            if sequence is not None:
                self._touching = sequence
                request = sequence.request
                prompt_part = max(0, min(end, len(request.tokens)) - item.start)
                before = served.get(request.tenant, (0, 0))
                served[request.tenant] = (before[0] + prompt_part, before[1] + len(item.orders))
                sequence.computed = end
                if not item.orders:
                    self._seal(sequence)
            for index, order in enumerate(item.orders, first):
                child = sequence
                if order.sequence != item.sequence:
                    child = self.roster.alive(order.sequence, order.incarnation)
                if child is None:
                    continue
                self._touching = child
                if child.life is Life.RETIRED:
                    self._keep(child, end, finite=result.finite[index])
                else:
                    child.computed = end
                    self._outcomes.append(self._append(child, plan.number, result, index))
        for tenant, (computed, generated) in served.items():
            self.counts.prompt_tokens += computed
            self.roster.waiting.charge(tenant, computed=computed, generated=generated)

    def _keep(self, sequence: Sequence, end: int, *, finite: bool) -> None:
        """Name what was computed of a retired sequence; its new token is nobody's."""
        if finite:
            sequence.computed = min(end, len(sequence.tokens))
            self._seal(sequence)
        else:
            self.blocks.truncate(sequence.table, 0)

    def _append(self, sequence: Sequence, step: int, result: StepResult, row: int) -> Outcome:
        """One sampled token for one sequence."""
        if sequence.pending is not None and sequence.pending[0] == step:
            sequence.pending = None
        if not result.finite[row]:
            # Whatever is wrong may be in its pages: what nobody shares is not kept.
            self.blocks.truncate(sequence.table, 0)
            error = NumericalFault("The model gave values that are not numbers for this request.")
            return self._final(sequence, FinishReason.ERROR, error=error)
        token = result.tokens[row]
        sequence.tokens.append(token)
        self.counts.generated_tokens += 1
        self._seal(sequence)
        logprobs = result.logprobs[row] if result.logprobs else None
        request = sequence.request
        finish = None
        counted = request.answered + sequence.generated
        if token in request.stop_ids and counted > request.min_tokens:
            finish = FinishReason.STOP
        elif sequence.generated >= request.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            return self._final(sequence, finish, (token,), logprobs)
        return Outcome(sequence.group, sequence.emit((token,), logprobs))

    def _seal(self, sequence: Sequence) -> None:
        """Name the pages that are full up to `computed`."""
        size, table = self.blocks.page_size, sequence.table
        if sequence is self._suspects.on_probation:
            self._suspects.progressed(sequence, sequence.computed)
        for index in range(table.sealed, sequence.computed // size):
            page = sequence.tokens[index * size : (index + 1) * size]
            if index == len(sequence.names):
                parent = sequence.names[-1] if sequence.names else None
                prepared = sequence.prepared
                sequence.names += self._namer.names(prepared.root, page, parent, prepared.public)
            name = sequence.names[index]
            self.roster.wake(
                self.blocks.seal(table, name, token_bytes(page), step=sequence.last_step)
            )
            if table.sealed != index + 1:
                return  # not to be named; nor is what follows

    def _final(
        self,
        sequence: Sequence,
        finish: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
        *,
        error: ChatserveError | None = None,
    ) -> Outcome:
        # Booked as emitted only when nothing can go wrong any more.
        self.roster.end(sequence)
        self.counts.finished[finish] += 1
        emission = sequence.emit(tokens, logprobs, finish=finish, error=error)
        return Outcome(sequence.group, emission)

    # Faults --------------------------------------------------------------------------------

    def _fail(self, plan: StepPlan, failure: StepFailure, *, drafted: bool) -> list[Outcome]:
        """A step gave nothing: preempt all that took part, and find out whose fault it is."""
        self._void_until = self._number
        self.roster.end_retired()
        alive: dict[int, Sequence] = {}
        for item in plan.slices:
            lives = [(item.sequence, item.incarnation)]
            lives += [(order.sequence, order.incarnation) for order in item.orders]
            for number, incarnation in lives:
                sequence = self.roster.alive(number, incarnation)
                if sequence is not None:
                    alive[sequence.id] = sequence
        if failure.void:
            for sequence in alive.values():
                self.roster.preempt(sequence)
            return []
        self.counts.failed_steps += 1
        if failure.fatal:
            return self.break_down(failure.reason)
        if drafted:
            return []
        smaller = failure.out_of_memory and self._pace.shrink(plan.token_count)
        suspect = self._suspects.on_probation
        if suspect is None or smaller:
            for sequence in alive.values():
                self._suspects.add(sequence)
                self.roster.preempt(sequence, hold=True)
            return []
        # Its other samples, and whoever else asks the same, would break steps just so.
        digest = suspect.prepared.digest
        broken = self._suspects.convict(digest)
        guilty = [item for item in self.roster.sequences() if item.prepared.digest == digest]
        outcomes = [end for item in guilty for end in self._give_up(item)]
        return outcomes + (self.break_down(failure.reason) if broken else [])

    def _give_up(self, sequence: Sequence, error: ChatserveError | None = None) -> list[Outcome]:
        """End a sequence, and every sample that it stands for, with an error."""
        error = error or StepFault("The engine failed on this request.")
        unforked = sequence.unforked
        outcomes = [self._final(sequence, FinishReason.ERROR, error=error)]
        for sample in unforked:
            self.counts.finished[FinishReason.ERROR] += 1
            emission = Emission(sample=sample, finish=FinishReason.ERROR, error=error)
            outcomes.append(Outcome(sequence.group, emission))
        return outcomes

    def break_down(self, reason: str) -> list[Outcome]:
        """The device is given up: every request ends, and no more are taken."""
        self.broken = reason
        self._suspects.clear()
        self._drafts.forget()
        self.roster.end_retired()
        error = Unavailable("The device failed; the server must be restarted.")
        return [end for item in self.roster.sequences() for end in self._give_up(item, error)]

    def recover(self) -> tuple[Outcome, ...]:
        """After an exception of our own in `plan` or `commit`, with no step running and no page in
        the hands of an I/O thread.

        The cache is begun anew and all sequences are queued again from the tokens that were
        emitted; one that was being handled at a second such exception ends with an error.
        Returns the emissions that the broken call had made.
        """
        culprit = self._planner.touching or self._touching
        self._planner.touching = self._touching = None
        self.counts.recoveries += 1
        self._in_flight.clear()
        self._committed = self._number
        self._suspects.clear()
        blocks = self._make_blocks()
        blocks.count_on(self.blocks)
        blocks.settle(self._committed)
        self.roster.restart(blocks)
        self.tiers.restart()
        self._drafts.restart()
        if culprit is not None and culprit.life is not Life.ENDED:
            culprit.faults += 1
            if culprit.faults > 1:
                self._outcomes += self._give_up(culprit)
        self._recoveries_in_a_row += 1
        if self._recoveries_in_a_row > RECOVERIES_MAX:
            self._outcomes += self.break_down("the engine cannot recover")
        return self._take_outcomes()

    # Looking at it -------------------------------------------------------------------------

    def statistics(self) -> EngineStatistics:
        """A frozen picture."""
        counts, roster = self.counts, self.roster
        return EngineStatistics(
            running=len(roster.running),
            waiting=len(roster.waiting) + len(roster.held),
            following=self.blocks.claims.waiting,
            in_flight=len(self._in_flight),
            budget_tokens=self._pace.budget(),
            steps_total=counts.steps,
            step_tokens_total=counts.step_tokens,
            step_seconds=counts.histogram(),
            prompt_tokens_total=counts.prompt_tokens,
            generated_tokens_total=counts.generated_tokens,
            preemptions_total=counts.preemptions,
            failed_steps_total=counts.failed_steps,
            recoveries_total=counts.recoveries,
            quarantined=self._suspects.quarantined,
            finished_total={reason.value: count for reason, count in counts.finished.items()},
            broken=self.broken,
            drafts=len(self._drafts),
            draft_tokens_total=self._drafts.computed_tokens,
            tiers=self.tiers.statistics(),
        )

    def check(self) -> None:
        """Every invariant, in O(pages). For tests."""
        self._drafts.check()
        self.roster.check(drafted=sum(map(len, self._drafts.tables)))
        self.blocks.check()
        self.tiers.check()

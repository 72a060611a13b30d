"""Planner: which positions of which sequences a step computes, and in which pages.

It changes what it plans with (tables, claims, the roster), but decides nothing about outcomes:
that is `scheduler.py`. It knows no tensors, no time but an injected clock.

Theory of operation. Each plan walks the running sequences once, in (priority, admission) order:
one position for those that only need their next token, slices of the rest of the budget for those
with more to compute. Whoever finds no page takes those of the last running sequence behind it,
whole, and at worst gives up its own; the first in the order is never robbed, and so always gets
on. Queued sequences are admitted while pages and budget last: a resident prefix is adopted before
anything is allocated, the rest of the prompt must fit as a whole beside what is promised to those
who run, and its page names are claimed. A sequence whose next page is claimed by a running one
follows that one instead. One whose next pages are below the device waits for a load of them
(`tiers.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from chatserve.cache.block_manager import PageCopy
from chatserve.engine.drafts import DraftLimits
from chatserve.engine.pace import Pace
from chatserve.engine.plan import SampleOrder, Slice
from chatserve.engine.roster import Roster
from chatserve.engine.sequence import Life, Sequence
from chatserve.engine.statistics import EngineCounts
from chatserve.engine.suspects import Suspects
from chatserve.engine.tiers import TierLimits, Tiers
from chatserve.engine.token_counts import NOTHING_COUNTED


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one scheduler.

    sequences_max: running at once. queued_max: waiting at once, after which requests are refused.
    context_length: tokens a sequence may ever have, at most what all pages hold.
    preemptions_max: in one step; what is still short then waits for the next.
    drafts: of what is computed ahead of requests; none of it counts above. tiers: of what is
    copied to and from the tiers below.
    """

    sequences_max: int
    queued_max: int
    context_length: int
    preemptions_max: int = 8
    aging_seconds: float = 10.0
    drafts: DraftLimits = field(default_factory=DraftLimits)
    tiers: TierLimits = field(default_factory=TierLimits)


LOOK_AHEAD = 4  # queued sequences
LOOK_AHEAD_SHARE = 0.25  # of the pages that nobody needs, for loads of those who wait


@dataclass(slots=True)
class Outline:
    """A plan in the making."""

    number: int
    slices: list[Slice] = field(default_factory=list[Slice])
    copies: list[PageCopy] = field(default_factory=list[PageCopy])
    rows: int = 0
    preempted: int = 0


class Planner:
    """Makes outlines. `touching`: the sequence being handled, for the case of a bug of ours."""

    def __init__(
        self,
        roster: Roster,
        pace: Pace,
        suspects: Suspects,
        tiers: Tiers,
        *,
        limits: SchedulerLimits,
        counts: EngineCounts,
        clock: Callable[[], float],
    ) -> None:
        self.touching: Sequence | None = None
        self._roster = roster
        self._pace = pace
        self._suspects = suspects
        self._tiers = tiers
        self._limits = limits
        self._counts = counts
        self._clock = clock

    def outline(self, number: int, *, alone: bool) -> Outline:
        """The outline of step `number`. alone: no other step is in flight."""
        outline = Outline(number=number)
        if not self._suspects.any:
            self._plan_running(outline)
        elif alone:
            self._plan_probation(outline)
        self.touching = None
        return outline

    def _plan_running(self, outline: Outline) -> None:
        """Order what runs, and admit who waits."""
        running = tuple(self._roster.running)
        todo = [sequence.todo for sequence in running]
        begun = [sequence for sequence, count in zip(running, todo, strict=True) if count > 1]
        nexts = todo.count(1)
        budget = self._pace.budget(patient=nexts == 0)
        room = max(budget - nexts, self._roster.blocks.page_size)
        short, room = self._share(outline, begun, room)
        for sequence in running:
            self.touching = sequence
            # Looked at anew: those before it may have robbed it, or `_share` admitted to it.
            count = sequence.todo if sequence.life is Life.RUNNING else 0
            if not count:
                continue
            if count == 1 or sequence.id in short:
                self._order(outline, sequence, count)
            elif room > 0:
                room -= self._order(outline, sequence, min(count, room))
        self._admit(outline, room)

    def _share(self, outline: Outline, begun: list[Sequence], room: int) -> tuple[set[int], int]:
        """Half the budget is for those who would else be behind the whole of one long prompt.

        It goes to begun prompts of the same priority that it can finish in this step, then to the
        queue, unless that is of a lower priority; what it leaves goes to the first in the order.
        Returns whom to finish, and what is left for the others.
        """
        short: set[int] = set()
        half = room // 2 if begun else 0
        for sequence in sorted(begun[1:], key=lambda item: item.todo):
            if sequence.priority == begun[0].priority and sequence.todo <= half:
                short.add(sequence.id)
                half -= sequence.todo
                room -= sequence.todo
        head = self._roster.waiting.peek(self._clock())
        if half and head is not None and head.priority <= begun[0].priority:
            room -= half - self._admit(outline, half)
        return short, room

    def _admit(self, outline: Outline, room: int) -> int:
        """Start queued sequences while their whole prompts, samples and the budget fit beside what
        is promised to those who run; not in a step that had to preempt. Returns the budget left.
        """
        roster, blocks = self._roster, self._roster.blocks
        if not len(roster.waiting):
            return room
        seats = self._limits.sequences_max - sum(map(_seats, roster.running))
        promised = sum(map(self._promised, roster.running))
        while (
            room > 0
            and not outline.preempted
            and (sequence := roster.waiting.peek(self._clock())) is not None
        ):
            self.touching = sequence
            if _seats(sequence) > seats:
                break
            tokens = sequence.tokens.tobytes()
            matched = blocks.match(sequence.names, tokens)
            if roster.follow(sequence, matched):
                continue
            # Retained before anything is allocated, so that making room cannot take them.
            blocks.adopt(sequence.table, sequence.names[:matched], tokens)
            if self._promised(sequence) + promised > blocks.available:
                blocks.release(sequence.table, step=0)
                assert roster.running or roster.coming, "admission let in what can never fit"
                return room
            if self._tiers.begin_load(sequence, matched, tokens):
                waits = roster.follow(sequence, matched)
                assert waits, "a load claims what it brings"
                continue
            seats -= _seats(sequence)
            roster.start(sequence, matched)
            self._tiers.account(sequence, matched)
            room -= self._order(outline, sequence, min(sequence.todo, room))
            promised += self._promised(sequence)
        self._look_ahead(promised)
        return room

    def _look_ahead(self, promised: int) -> None:
        """Have pages brought up for those who must still wait for a seat or the budget, so that
        they are there at their turn; not where pages are short, nor for many at a time."""
        roster, blocks = self._roster, self._roster.blocks
        if not self._tiers.looks_ahead():
            return
        for sequence in roster.waiting.ahead(LOOK_AHEAD):
            free = (blocks.available - promised) * LOOK_AHEAD_SHARE - self._tiers.loading_pages
            tokens = sequence.tokens.tobytes()
            matched = blocks.match(sequence.names, tokens)
            if not 0 < blocks.below(sequence.names, matched) <= free:
                continue
            if blocks.claims.leader(sequence.names[matched]) is not None:
                continue
            self.touching = sequence
            blocks.adopt(sequence.table, sequence.names[:matched], tokens)
            if self._tiers.begin_load(sequence, matched, tokens, ahead=True):
                waits = roster.follow(sequence, matched)
                assert waits, "a load claims what it brings"
            else:
                blocks.release(sequence.table, step=0)

    def _promised(self, sequence: Sequence) -> int:
        """Pages that a sequence will soon need: for its known tokens and the next one, at least
        one more, and one for each sample that has yet to fork."""
        blocks = self._roster.blocks
        missing = blocks.pages_for(len(sequence.tokens) + 1) - len(sequence.table)
        return max(1, missing) + len(sequence.unforked)

    def _plan_probation(self, outline: Outline) -> None:
        """One suspect alone."""
        sequence = self._suspects.on_probation
        if sequence is None:
            sequence = self._suspects.next()
            self.touching = sequence
            for other in tuple(self._roster.running):
                self._roster.preempt(other)
            tokens = sequence.tokens.tobytes()
            matched = self._roster.blocks.adopt(sequence.table, sequence.names, tokens)
            self._roster.start(sequence, matched)
            self._tiers.account(sequence, matched)
        self.touching = sequence
        self._order(outline, sequence, min(sequence.todo, self._pace.budget()))

    def _order(self, outline: Outline, sequence: Sequence, count: int) -> int:
        """Put the next `count` positions into the outline; returns how many it was (maybe 0)."""
        start, end = sequence.planned, sequence.planned + count
        if not sequence.suppress_write:
            copies = self._find_pages(outline, sequence, start, end)
            if copies is None:
                return 0
            outline.copies += copies
        known = len(sequence.tokens)
        pending = None
        if end > known:
            assert sequence.pending is not None
            assert sequence.pending[0] == outline.number - 1, "a pending token is one step old"
            pending = sequence.pending[1]
        sequence.planned, sequence.last_step = end, outline.number
        orders = () if end < sequence.known else self._orders(outline, sequence, end)
        outline.slices.append(
            Slice(
                sequence=sequence.id,
                incarnation=sequence.incarnation,
                start=start,
                tokens=tuple(sequence.tokens[start:end]),
                pending=pending,
                pages=sequence.table.snapshot(),
                write=not sequence.suppress_write,
                orders=orders,
            )
        )
        sequence.suppress_write = False
        return count

    def _orders(self, outline: Outline, sequence: Sequence, end: int) -> tuple[SampleOrder, ...]:
        """Sampling orders after position `end` - 1; at the prompt's end the samples fork."""
        request = sequence.request
        generated = end - request.prompt_length
        banned = tuple(sorted(request.stop_ids)) if generated < request.min_tokens else ()
        counts = sequence.counted() if request.sampling.counts_tokens else NOTHING_COUNTED
        orders: list[SampleOrder] = []
        forked = self._roster.fork(sequence) if sequence.unforked else ()
        for child in (sequence, *forked):
            child.pending = (outline.number, outline.rows)
            outline.rows += 1
            orders.append(
                SampleOrder(
                    sequence=child.id,
                    incarnation=child.incarnation,
                    sampling=request.sampling,
                    sample=child.sample,
                    position=end,
                    banned=banned,
                    counts=counts,
                )
            )
        return tuple(orders)

    def _find_pages(
        self, outline: Outline, sequence: Sequence, start: int, end: int
    ) -> tuple[PageCopy, ...] | None:
        """Pages for positions start..end, at the cost of whoever is last; None: not this step."""
        blocks, running = self._roster.blocks, self._roster.running
        while True:
            copies = blocks.reserve(sequence.table, start, end, step=outline.number)
            if copies is not None:
                return copies
            if blocks.shortage(sequence.table, start, end) <= self._roster.coming:
                return None  # they come when the step in flight commits
            if outline.preempted >= self._limits.preemptions_max:
                return None
            victim = running[-1]
            outline.preempted += 1
            self._counts.preemptions += 1
            self._roster.preempt(victim)
            if victim is sequence:
                return None


def _seats(sequence: Sequence) -> int:
    """How many run once its samples have forked."""
    return len(sequence.unforked) + 1

"""Tiers: when pages are brought up from below the device, and when copies of them go down.

It decides and keeps the books; the bytes are moved by threads (`traffic.py`), to whom the engine
hands what `take_orders` gives. Synchronous, on the event loop.

Theory of operation. A queued sequence whose prefix goes on below the device waits for a load as it
would wait for a leader that computes the same pages: it holds nothing, and is an ordinary queued
sequence again when they are there, or will not come. Loading is chosen over computing where it is
quicker by what was measured lately of as many pages; where nothing was, it is tried.

Copies go down when nobody waits for the machine. While there are requests the threads that copy get
a small share of the time, unless pages would be evicted before they have a copy.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.departures import Evicted
from chatserve.cache.host_pages import HostPages
from chatserve.cache.overview import Overview
from chatserve.cache.page_table import PageTable
from chatserve.cache.transit import Keeps
from chatserve.engine.host_tier import HostTier
from chatserve.engine.plan import Moves, StepPlan, StepResult
from chatserve.engine.roster import Roster
from chatserve.engine.sequence import Sequence as Row
from chatserve.engine.statistics import TierStatistics
from chatserve.engine.traffic import Delivery, Job
from chatserve.engine.values import Receipt, Request
from prefix_store.names import PageName, token_bytes

LOADS_MAX = 2  # of one sequence; what is evicted again before its turn comes is then computed
STALE_SECONDS = 60.0  # a rate measured so long ago says nothing: the next load measures it again
BUDGET_SECONDS = 1.0  # between two looks for what the write budget has room for
RETIRE_SECONDS = 5.0  # between two looks for pages that nobody has used for long
RETIRE_PAGES = 256  # at once: a millisecond or two
LOOK_SECONDS = 0.05  # between two looks at the queue
COMPUTE_PAGES_MIN = 4  # of a step that says what computing a prompt costs
_FADE = 0.7  # weight of the past at each new measurement
# After a start a load of two pages took 2 to 7 ms, one of 141 pages 3.3 (docs/log.md): from so many
# on a rate is about that of any number.
MANY = 64

Others = Callable[[Request, int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLimits:
    """keep_pages: copied by one job. busy_share: of the time, copying while there are requests.
    write_pages_a_second: in the long run, None without a bound; bursts of up to an hour's worth.
    move_pages: between device and host memory, of one step, in each direction. idle_seconds: after
    so long without use pages leave memory for the tier below, None: only for others.
    trial_token_seconds: what a prompt's token took before there were any, None where nobody tried.
    """

    keep_pages: int = 16
    busy_share: float = 0.02
    write_pages_a_second: float | None = None
    move_pages: int = 256
    idle_seconds: float | None = None
    trial_token_seconds: float | None = None


class Rate:
    """Seconds that one of something takes (a page, a token), by the jobs of late; older ones fade.

    A job takes some time however small it is, which is shared out to what it had: of a few pages
    each looks slower than of many. So a rate tells of no more than was measured, or of `MANY`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = self._taken = 0.0  # measured, and the seconds that it took
        self._measured_at = 0.0

    @property
    def seconds(self) -> float | None:
        """As measured last, however long ago."""
        return self._taken / self._count if self._count else None

    @property
    def _fresh(self) -> bool:
        return self._clock() - self._measured_at <= STALE_SECONDS

    def observe(self, count: int, seconds: float) -> None:
        """Book a job. What was measured too long ago has no say any more."""
        weight = _FADE if self._fresh else 0.0
        self._count = weight * self._count + count
        self._taken = weight * self._taken + seconds
        self._measured_at = self._clock()

    def estimate(self, count: int, *, behind: int = 0) -> float | None:
        """Seconds for so many, when those `behind` which they wait are done; None where nothing was
        measured lately, or less than these."""
        each = self.seconds
        if each is None or not self._fresh or min(count, MANY) > self._count:
            return None
        return each * (behind + count)


class Tiers:
    """See the module. Owned by the scheduler. host: the tier between the device and the threads,
    None where those can address the device's memory themselves. others: whether a model that is not
    served now has kept the page with the token at this position of a request."""

    def __init__(
        self,
        roster: Roster,
        *,
        limits: TierLimits,
        clock: Callable[[], float],
        host: HostPages | None = None,
        others: Others | None = None,
    ) -> None:
        self._roster = roster
        self._others = others or _nobody
        self._limits = limits
        self._clock = clock
        self._host: HostTier | None = None
        if host is not None:
            most = limits.move_pages
            self._host = HostTier(host, roster.new_id, clock=clock, move_pages=most)
        self._orders: list[Job] = []
        self.loading_pages = 0  # on their way to the device
        self._look_due = self._retire_due = 0.0
        self._keeping = False
        self._load_rate, self._keep_rate, self._compute_rate = Rate(clock), Rate(clock), Rate(clock)
        self._move_rate = Rate(clock)
        self._keep_due = 0.0
        self._allowance = self._allowance_most
        self._allowed_at = clock()
        self._loads = self._recomputes = 0

    @property
    def _allowance_most(self) -> float:
        """Pages of a burst: what an hour brings."""
        return max(1.0, 3600.0 * (self._limits.write_pages_a_second or 0.0))

    @property
    def wait_seconds(self) -> float | None:
        """When there will be something to order though nothing else happens; None: never."""
        rate, waits = self._limits.write_pages_a_second, list[float]()
        if rate is not None and not self._keeping and self._lowest.transit.unkept:
            waits.append(max(BUDGET_SECONDS, (1.0 - self._allowance) / rate))
        if self._limits.idle_seconds is not None:
            waits.append(RETIRE_SECONDS)
        return min(waits, default=None)

    @property
    def _lowest(self) -> BlockManager | HostPages:
        """Whose pages the I/O threads copy down."""
        return self._roster.blocks if self._host is None else self._host.pages

    @property
    def direct(self) -> bool:
        """Whether the I/O threads address the device's own memory."""
        return self._host is None

    @property
    def in_flight(self) -> bool:
        """Whether a page is on its way, or ordered to be."""
        moving = self._host is not None and self._host.in_flight
        return bool(self.loading_pages) or self._keeping or moving

    def take_orders(self) -> list[Job]:
        """What the threads should do now, each once."""
        taken, self._orders = self._orders, []
        return taken if self._host is None else taken + self._host.take_orders()

    # In a step -----------------------------------------------------------------------------

    def order_moves(self, number: int) -> Moves | None:
        """What step `number` copies between the device and host memory; None: it need not be."""
        if self._host is None:
            return None
        pages = self._host.pages
        # What would cost another page its way to the disk waits on the device for its turn.
        room = pages.spare if self._allowed() else pages.available
        most = min(room, self._limits.move_pages)
        keeps = self._roster.blocks.take_unkept(most) if most else None
        return self._host.order(number, keeps)

    def commit_moves(self, plan: StepPlan, result: StepResult) -> None:
        """A step is over, and with it its moves."""
        if self._host is None:
            return
        count = len(result.saved) + len(result.promoted)
        if count and result.failure is None:
            self._move_rate.observe(count, result.move_seconds)
        self._end(self._host.commit(plan.number, result))

    def advance(self) -> bool:
        """Bring up what can be brought up now. Whether a load has ended by it, so that somebody
        may be planned who waited for it."""
        ended = [] if self._host is None else self._host.advance()
        self._end(ended)
        return bool(ended)

    # Up ------------------------------------------------------------------------------------

    def looks_ahead(self) -> bool:
        """Whether it is time again to look what those who wait for their turn have below."""
        now = self._clock()
        if now < self._look_due:
            return False
        self._look_due = now + LOOK_SECONDS
        return True

    def begin_load(
        self, sequence: Row, matched: int, tokens: bytes, *, ahead: bool = False
    ) -> bool:
        """Bring up what follows the first `matched` pages of a queued sequence's prefix, which its
        table holds, if it is below and that is quicker than to compute it. The load then has
        claimed the names, and has what the table held.

        tokens: the sequence's, int32 bytes. ahead: it is not its turn yet.
        """
        blocks = self._roster.blocks
        if sequence.loads >= LOADS_MAX:
            return False
        count = blocks.below(sequence.names, matched)
        names = sequence.names[matched : matched + count]
        if not count or not self._is_quicker(names):
            self._recomputes += bool(count) and not ahead
            return False
        begun = self._begin(sequence.table, names, tokens[4 * blocks.page_size * matched :])
        sequence.loads += begun > 0
        return begun > 0

    def begin_draft_load(
        self, table: PageTable, names: Sequence[PageName], tokens: bytes, *, wished: bool = False
    ) -> int:
        """Bring up what is below of the pages that follow those of a draft's table, as for a
        sequence; the load's number, 0 where there is none. names, tokens: from the first that the
        table does not have, as many as there may be. wished: however quick computing would be."""
        count = self._roster.blocks.below(names, 0)
        if not count or not (wished or self._is_quicker(names[:count])):
            self._recomputes += bool(count)
            return 0
        return self._begin(table, names[:count], tokens, drafting=True)

    def _begin(
        self, table: PageTable, names: Sequence[PageName], tokens: bytes, *, drafting: bool = False
    ) -> int:
        """Order a load of these pages; its number, 0 where there is no room for them."""
        holder = self._roster.new_id()
        load = self._roster.blocks.begin_load(holder, table, names, tokens, drafting=drafting)
        if load is None:
            return 0
        self._loads += 1
        self.loading_pages += len(names)
        if self._host is None:
            self._orders.append(load)
        else:
            self._host.load(load)
        return holder

    def _is_quicker(self, names: Sequence[PageName]) -> bool:
        """Whether these come up sooner than they are computed. Each way by its own rate; what is
        not known is tried, unless the rest alone takes too long."""
        lower = raised = 0
        if self._host is None:
            lower = len(names)
        else:
            raised = len(names)
            lower = raised - sum(map(self._host.pages.holds, names))
        load = 0.0
        for rate, pages in ((self._load_rate, lower), (self._move_rate, raised)):
            seconds = rate.estimate(pages, behind=self.loading_pages) if pages else None
            load += seconds or 0.0
        compute = self._compute_rate.seconds
        wanted = len(names) * self._roster.blocks.page_size
        return compute is None or load < compute * wanted

    # Down ----------------------------------------------------------------------------------

    def retire(self) -> None:
        """Let go of what nobody has used for long, now and then."""
        limit, now = self._limits.idle_seconds, self._clock()
        if limit is None or now < self._retire_due:
            return
        count = self._roster.blocks.retire(limit, RETIRE_PAGES)
        if self._host is not None:
            count = max(count, self._host.pages.retire(limit, RETIRE_PAGES))
        if count < RETIRE_PAGES:
            self._retire_due = now + RETIRE_SECONDS

    def order_keeps(self, *, idle: bool) -> None:
        """Have some pages copied down, if there are any and it is their time."""
        lowest = self._lowest
        if self._keeping or not lowest.transit.unkept:
            return
        # Of what can be had, at least as much has a copy as has none: the old ones go first.
        pressed = lowest.available < 2 * lowest.transit.unkept
        if not (idle or pressed or self._clock() >= self._keep_due):
            return
        most = min(self._limits.keep_pages, self._allowed())
        keeps = lowest.take_unkept(most) if most else None
        if keeps is not None:
            self._keeping = True
            self._allowance -= len(keeps.pages)
            self._orders.append(keeps)

    def _allowed(self) -> int:
        """Pages that the write budget has room for now."""
        rate = self._limits.write_pages_a_second
        if rate is None:
            return self._limits.keep_pages
        now = self._clock()
        more = (now - self._allowed_at) * rate
        self._allowance = min(self._allowance_most, self._allowance + more)
        self._allowed_at = now
        return int(self._allowance)

    # Back ----------------------------------------------------------------------------------

    def finish(self, delivery: Delivery) -> None:
        """The threads are done with a job."""
        job = delivery.job
        if isinstance(job, Keeps):
            self._keeping = False
            self._lowest.end_keep(job, delivery.done)
            if any(delivery.done):
                self._keep_rate.observe(len(job.pages), delivery.seconds)
            rest = delivery.seconds * (1 / self._limits.busy_share - 1)
            self._keep_due = self._clock() + rest
            return
        arrived = sum(delivery.done)
        if arrived:
            self._load_rate.observe(arrived, delivery.seconds)
        self._end([delivery] if self._host is None else self._host.finish(delivery))

    def _end(self, deliveries: Sequence[Delivery]) -> None:
        """Pages of the device have arrived there, or were copied from there."""
        blocks = self._roster.blocks
        for delivery in deliveries:
            job = delivery.job
            if isinstance(job, Keeps):
                blocks.end_keep(job, delivery.done)
                continue
            self.loading_pages -= len(job.names)
            good, woken = blocks.end_load(job, delivery.done)
            for sequence in self._roster.wake(woken):
                for index in range(good):
                    sequence.loaded[job.above + index] = index in delivery.hosted
                sequence.loading_seconds += delivery.seconds

    def observe_step(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens. Those of prompts come by the page: the others' rate
        says nothing about what a prompt costs."""
        if tokens >= COMPUTE_PAGES_MIN * self._roster.blocks.page_size:
            self._compute_rate.observe(tokens, seconds)

    def account(self, sequence: Row, matched: int) -> None:
        """Write the receipt of a sequence that has just started with so many pages of its prefix.

        Only once: what it finds again after a preemption is its own.
        """
        if sequence.receipt is not None:
            return
        blocks = self._roster.blocks
        prompt = len(sequence.request.tokens)
        hit = min(sequence.computed, prompt)
        hosted = [way for index, way in sequence.loaded.items() if index < matched]
        host = min(hit, blocks.page_size * sum(hosted))
        disk = min(hit - host, blocks.page_size * (len(hosted) - sum(hosted)))
        # A trial tells an asker enough, but says too little to decide by it.
        rate = self._compute_rate.seconds
        rate = self._limits.trial_token_seconds if rate is None else rate
        saved = None if rate is None else max(0.0, rate * hit - sequence.loading_seconds)
        miss = None
        if matched < len(sequence.names) and blocks.caching:
            size = blocks.page_size
            page = token_bytes(sequence.request.tokens[size * matched : size * (matched + 1)])
            below = blocks.below(sequence.names[: matched + 1], matched) > 0
            miss = blocks.misses.explain(
                sequence.table,
                sequence.names,
                page,
                is_below=below,
                is_others=lambda position: self._others(sequence.request, position),
            )
        sequence.receipt = Receipt(
            device=hit - host - disk,
            host=host,
            disk=disk,
            computed=prompt - hit,
            saved=saved,
            miss=miss,
        )
        blocks.account(sequence.names[:matched], prompt_tokens=prompt, hit_tokens=hit)

    def flush(self) -> int:
        """Forget the idle pages of host memory; how many. What waits for its copy on the disk stays
        until it has one."""
        return 0 if self._host is None else self._host.pages.flush()

    def lease(self, names: Collection[PageName], seconds: float) -> int:
        """Others leave host memory before these, for so long from now; 0 ends leases. How many are
        there."""
        return 0 if self._host is None else self._host.pages.lease(names, seconds)

    def evict(self, names: Collection[PageName]) -> Evicted:
        """The idle ones of these leave host memory."""
        return Evicted() if self._host is None else self._host.pages.evict(names)

    def forget(self, names: Collection[PageName]) -> None:
        """Nobody finds these in host memory any more."""
        if self._host is not None:
            self._host.forget(names)

    def restart(self) -> None:
        """The cache was begun anew, and no thread has a page: what was under way is void."""
        if self._host is not None:
            self._host.restart()
        self._orders.clear()
        self.loading_pages = 0
        self._keeping = False

    def overview(self) -> Overview | None:
        """Host memory as an admin looks at it, now; None where there is none."""
        return None if self._host is None else self._host.pages.overview()

    def statistics(self) -> TierStatistics:
        """A frozen picture."""
        return TierStatistics(
            loads_total=self._loads,
            recomputes_total=self._recomputes,
            load_page_seconds=self._load_rate.seconds,
            move_page_seconds=self._move_rate.seconds,
            keep_page_seconds=self._keep_rate.seconds,
            compute_token_seconds=self._compute_rate.seconds,
            host=None if self._host is None else self._host.pages.statistics(),
        )

    def check(self) -> None:
        """Every invariant. For tests."""
        if self._host is not None:
            self._host.check()


def _nobody(request: Request, position: int) -> bool:
    del request, position
    return False

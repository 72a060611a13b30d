"""An auditor of step plans: what a plan may and may not do to pages, seen from outside.

It trusts nothing of the scheduler but who owns which table. For each plan:

    a written page has one owner: the slice's sequence (and samples forked from it in this plan)
    no page is written by two slices, and none that has a name is written
    a page copy goes to a fresh page, and no page is a target twice or both source and target
    nobody writes a page that a step still in flight uses for another request
    slices name whole tables that cover what they read, and go on where the last one ended
    a draft's page is computed alone, is one page, and no sequence holds anything meanwhile
    penalties count every known token, and as generated those after the prompt
    nobody is robbed for pages that are free or cached once the steps in flight have committed
"""

from array import array
from collections import Counter

from chatserve.cache.page_pool import PageState
from chatserve.engine.drafts import NO_SEQUENCE
from chatserve.engine.plan import SampleOrder, Slice, StepPlan
from chatserve.engine.scheduler import Scheduler
from chatserve.engine.sequence import Sequence


class Auditor:
    """Sees plans when they are made and when they commit. Keeps the first fault that it finds."""

    def __init__(self, scheduler: Scheduler, page_size: int) -> None:
        self._scheduler = scheduler
        self._page_size = page_size
        self._in_flight: dict[int, dict[int, set[int]]] = {}  # step → page → groups that use it
        self._groups: dict[int, int] = {}
        self._planned: dict[tuple[int, int], int] = {}
        self.faults: list[AssertionError] = []
        self.plans = 0

    def planned(self, plan: StepPlan) -> None:
        """A plan was made just now, and nothing happened since."""
        self.plans += 1
        try:
            self._audit(plan)
        except AssertionError as error:
            self.faults.append(error)
            raise

    def robbing(self, sequence: Sequence, start: int, end: int) -> None:
        """Somebody is about to be preempted, so that `sequence` has pages for these positions."""
        try:
            self._audit_robbery(sequence, start, end)
        except AssertionError as error:
            self.faults.append(error)
            raise

    def committed(self, step: int) -> None:
        """A step is over."""
        del self._in_flight[step]

    def forget(self) -> None:
        """The scheduler begins again."""
        self._in_flight.clear()
        self._planned.clear()

    def forget_groups(self) -> None:
        """Between turns of a long run: what has ended need not be remembered."""
        self._groups.clear()
        self._planned.clear()

    def raise_first(self) -> None:
        """Fail if any plan was faulty."""
        if self.faults:
            raise self.faults[0]

    def _audit(self, plan: StepPlan) -> None:
        pool = self._scheduler.blocks.pool
        owners = self._owners()
        self._audit_drafts(plan)
        written: dict[int, int] = {}
        for item in plan.slices:
            self._audit_slice(item)
            table = array("i", item.pages)
            family = {item.sequence, *(order.sequence for order in item.orders)}
            for page in table[: -(-item.end // self._page_size)]:
                assert pool.references(page) > 0, f"page {page} is read without an owner"
            for page in self._written(item, table):
                assert page not in written, f"page {page} is written by two slices"
                written[page] = item.sequence
                strangers = owners.get(page, set()) - family
                assert not strangers, f"page {page} is written, and owned by {strangers} too"
                assert pool.state(page) is PageState.OPEN, f"page {page} is sealed and written"
        sources = [copy.source for copy in plan.copies]
        targets = [copy.target for copy in plan.copies]
        assert len(set(targets)) == len(targets), "two copies to one page"
        assert not set(sources) & set(targets), "a page is copied from and to"
        assert all(pool.references(page) > 0 for page in sources), "a copy of nobody's page"
        self._audit_flight(plan, written, targets)

    def _audit_drafts(self, plan: StepPlan) -> None:
        pages = [item for item in plan.slices if item.sequence == NO_SEQUENCE]
        tables = self._scheduler._drafts.tables
        if not pages:
            assert not tables, "a draft holds pages beside a request"
            return
        assert plan.slices == tuple(pages), "a draft's page beside a request"
        assert not self._in_flight, "a draft's page while a step is in flight"
        assert not self._scheduler.roster.sequences(), "a draft's page while a request waits"
        (page,), (table,) = pages, tables
        assert page.end - page.start == self._page_size == plan.token_count
        assert table.snapshot() == page.pages
        assert not page.orders
        assert not plan.copies

    def _audit_robbery(self, sequence: Sequence, start: int, end: int) -> None:
        pool, size = self._scheduler.blocks.pool, self._page_size
        kept = [page for item in self._scheduler.roster.running for page in item.table.pages]
        later = pool.total - len(set(kept))  # when the steps in flight have committed
        table = sequence.table.pages
        pages = -(-end // size)
        copied = sum(1 for page in table[start // size : pages] if kept.count(page) > 1)
        wanted = max(0, pages - len(table)) + copied
        assert wanted > later, f"robbed for {wanted} pages, though {later} are on their way"

    def _audit_slice(self, item: Slice) -> None:
        life = (item.sequence, item.incarnation)
        assert item.end > item.start, "an empty slice"
        assert len(item.pages) * self._page_size >= 4 * item.end, "a table that is too short"
        before = self._planned.get(life)
        assert before is None or before == item.start, "positions were left out, or come twice"
        self._planned[life] = item.end
        for order in item.orders:
            assert order.position == item.end, "a token is sampled where it is not"
            self._audit_counts(order)
            self._planned[order.sequence, order.incarnation] = item.end

    def _audit_counts(self, order: SampleOrder) -> None:
        sequence = self._scheduler.roster.alive(order.sequence, order.incarnation)
        assert sequence is not None, "a token for nobody"
        line = sequence.tokens if order.sampling.counts_tokens else array("i")
        generated = Counter(line[sequence.request.prompt_length :])
        counts = order.counts
        assert counts.ids.tolist() == sorted(set(line)), "penalties of other tokens"
        wanted = [generated[token] for token in counts.ids.tolist()]
        assert counts.generated.tolist() == wanted, "tokens are counted wrongly"

    def _audit_flight(self, plan: StepPlan, written: dict[int, int], targets: list[int]) -> None:
        self._groups[NO_SEQUENCE] = NO_SEQUENCE
        for sequence in self._scheduler.roster.sequences():
            self._groups[sequence.id] = sequence.group
        writers = {page: self._groups[sequence] for page, sequence in written.items()}
        for page, group in writers.items():
            for users in self._in_flight.values():
                assert users.get(page, set()) <= {group}, f"page {page} is in a step in flight"
        for page in targets:
            for users in self._in_flight.values():
                assert page not in users, f"page {page}, copied to, is in a step in flight"
        uses: dict[int, set[int]] = {}
        for item in plan.slices:
            for page in array("i", item.pages)[: -(-item.end // self._page_size)]:
                uses.setdefault(page, set()).add(self._groups[item.sequence])
        for copy in plan.copies:
            uses.setdefault(copy.source, set())
        self._in_flight[plan.number] = uses

    def _written(self, item: Slice, table: "array[int]") -> set[int]:
        if not item.write:
            return set()
        size = self._page_size
        return {table[position // size] for position in range(item.start, item.end)}

    def _owners(self) -> dict[int, set[int]]:
        owners: dict[int, set[int]] = {}
        for sequence in self._scheduler.roster.sequences():
            for page in sequence.table.pages:
                owners.setdefault(page, set()).add(sequence.id)
        for table in self._scheduler._drafts.tables:
            for page in table.pages:
                owners.setdefault(page, set()).add(NO_SEQUENCE)
        return owners

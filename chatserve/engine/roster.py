"""Roster: every living sequence, in exactly one place, and its ways from place to place.

            submit                 start
    ──────────────────▶ QUEUED ──────────────▶ RUNNING ──end──▶ ENDED
                        ▲  │ ▲                  │ │ │ fork        ▲
                 woken  │  │ └──── preempt ─────┘ │ └──▶ RUNNING  │
                        │  ▼ follow               ▼ retire        │ end
                      FOLLOWING                RETIRED ───────────┘

Whoever stops running gives up its claims and its pages in the same call, and those who followed
it are ordinary queued requests again. The roster decides nothing: the scheduler does.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.page_table import PageTable
from chatserve.engine.sequence import Life, PreparedRequest, Sequence
from chatserve.engine.waiting import WaitingQueue


class Roster:
    """Sequences by id, by group and by life. `running` is in (priority, admission) order."""

    def __init__(
        self, blocks: BlockManager, *, aging_seconds: float, clock: Callable[[], float]
    ) -> None:
        self.blocks = blocks
        self.waiting = WaitingQueue(aging_seconds=aging_seconds)
        self.running: list[Sequence] = []
        self.held: dict[int, Sequence] = {}  # queued, but out of the waiting queue: suspects
        self.retired: dict[int, Sequence] = {}  # until the steps in flight have committed
        self._aging_seconds = aging_seconds
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._groups: dict[int, dict[int, Sequence]] = {}
        self._next_id = 0
        self._admissions = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def seats_taken(self) -> int:
        """Sequences that run, or will when running prompts have forked their samples."""
        return sum(len(sequence.unforked) + 1 for sequence in self.running)

    @property
    def waiting_length(self) -> int:
        """Sequences that wait: queued, held, or following."""
        return len(self.waiting) + len(self.held) + self.blocks.claims.waiting

    def waiting_of(self, tenant: str) -> int:
        """How many of those are a tenant's. In time linear in all sequences."""
        return sum(
            sequence.life in (Life.QUEUED, Life.FOLLOWING) and sequence.request.tenant == tenant
            for sequence in self._sequences.values()
        )

    def seated(self, seats: int) -> tuple[int, int]:
        """How many of those who wait find a seat for each sample among so many free ones, in the
        order in which they came, and how many seats are left. Nobody overtakes for a seat."""
        seated = 0
        for sequence in self._sequences.values():
            if sequence.life in (Life.QUEUED, Life.FOLLOWING):
                seats -= len(sequence.unforked) + 1
                if seats < 0:
                    return seated, 0
                seated += 1
        return seated, seats

    @property
    def coming(self) -> int:
        """Pages that will be available when the steps in flight have committed and the I/O threads
        have reported: those that are leaving already, and those that nobody owns but the retired
        and what is in transit."""
        owners = Counter(page for item in self.retired.values() for page in item.table.pages)
        owners.update(self.blocks.transit.owners())
        references = self.blocks.pool.references
        coming = sum(1 for page, count in owners.items() if references(page) == count)
        return self.blocks.coming + coming

    def group(self, group: int) -> dict[int, Sequence]:
        """Living sequences of a request by sample; before the fork all samples name one."""
        return self._groups.get(group, {})

    def sequences(self) -> tuple[Sequence, ...]:
        """All living ones."""
        return tuple(self._sequences.values())

    def alive(self, sequence: int, incarnation: int) -> Sequence | None:
        """The running sequence of that life, or None."""
        found = self._sequences.get(sequence)
        return found if found is not None and found.incarnation == incarnation else None

    def new_id(self) -> int:
        """A number that no sequence has, and nobody else who claims names."""
        self._next_id += 1
        return self._next_id

    def submit(self, prepared: PreparedRequest) -> Sequence:
        """Queue a new request; its id is also its group's."""
        request = prepared.request
        number = self.new_id()
        sequence = Sequence(
            id=number,
            group=number,
            prepared=prepared,
            sample=0,
            arrival=number,
            arrived_at=self._clock(),
            tokens=array("i", request.tokens),
            names=list(prepared.names),
            table=PageTable(space=prepared.space),
            unforked=tuple(range(1, request.samples)),
            priority=request.priority,
        )
        self._sequences[sequence.id] = sequence
        self._groups[sequence.group] = dict.fromkeys(range(request.samples), sequence)
        self.waiting.enter(request.tenant)
        self.waiting.push(sequence)
        return sequence

    def start(self, sequence: Sequence, matched: int) -> None:
        """A queued sequence runs, with the first `matched` pages of its prefix adopted.

        A full hit leaves one position to compute, whose KV is not written again. What is
        missing is claimed.
        """
        if self.held.pop(sequence.id, None) is None:
            self.waiting.pop(sequence)
        hit = matched * self.blocks.page_size
        if hit == len(sequence.tokens):
            sequence.suppress_write = True
            hit -= 1
        sequence.planned = sequence.computed = hit
        sequence.life = Life.RUNNING
        self._admissions += 1
        sequence.admission = self._admissions
        self.blocks.claim(sequence.id, sequence.names[matched:])
        self.running.append(sequence)
        self._sort()

    def follow(self, sequence: Sequence, matched: int) -> bool:
        """Let a queued sequence wait for the leader of its next page, if it has one: a running
        sequence, which inherits the follower's priority, or a load.
        """
        leader = self.blocks.claims.follow(sequence.id, sequence.names[matched:])
        if leader is None:
            return False
        self.waiting.pop(sequence)
        sequence.life = Life.FOLLOWING
        ahead = self._sequences.get(leader)
        if ahead is not None and sequence.priority < ahead.priority:
            ahead.priority = sequence.priority
            self._sort()
        return True

    def wake(self, followers: Iterable[int]) -> list[Sequence]:
        """What these waited for is resident, or will not come. Returns them."""
        woken = [self._sequences[follower] for follower in followers]
        for sequence in woken:
            assert sequence.life is Life.FOLLOWING, "only a follower is woken"
            sequence.life = Life.QUEUED
            self.waiting.push(sequence)
        return woken

    def fork(self, parent: Sequence) -> list[Sequence]:
        """One child for each sample that has no sequence of its own yet; they share all pages."""
        children: list[Sequence] = []
        while parent.unforked:
            sample = parent.unforked[0]
            table = self.blocks.fork(parent.table)
            child = Sequence(
                id=self.new_id(),
                group=parent.group,
                prepared=parent.prepared,
                sample=sample,
                arrival=parent.arrival,
                arrived_at=parent.arrived_at,
                tokens=parent.tokens[:],
                names=parent.names[:],
                table=table,
                life=Life.RUNNING,
                planned=parent.planned,
                computed=parent.computed,
                last_step=parent.last_step,
                admission=parent.admission,
                priority=parent.priority,
                probation_until=parent.probation_until,
                receipt=parent.receipt,
                counts=parent.counts,
            )
            self._sequences[child.id] = child
            self._groups[child.group][sample] = child
            parent.unforked = parent.unforked[1:]
            self.waiting.enter(child.request.tenant)
            self.running.append(child)
            children.append(child)
        if children:
            self._sort()
        return children

    def preempt(self, sequence: Sequence, *, hold: bool = False) -> None:
        """A running sequence gives everything back and queues in its old place, or is held."""
        self.running.remove(sequence)
        self._let_go(sequence)
        self._rest(sequence)
        if hold:
            self.held[sequence.id] = sequence
        else:
            self.waiting.push(sequence)

    def retire(self, sequence: Sequence) -> None:
        """A running sequence that nobody wants, and that a step in flight computes: it keeps its
        pages and claims until that commits, so that others need not compute the same again."""
        assert sequence.life is Life.RUNNING, "only a running sequence retires"
        sequence.life = Life.RETIRED
        self.running.remove(sequence)
        self.retired[sequence.id] = sequence
        self._leave_group(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence is over, wherever it was. Its pages are free or cached when the last step
        that touches them commits."""
        life, sequence.life = sequence.life, Life.ENDED
        if life is Life.RETIRED:
            del self.retired[sequence.id]
            self._let_go(sequence)
        else:
            if life is Life.RUNNING:
                self.running.remove(sequence)
                self._let_go(sequence)
            elif life is Life.FOLLOWING:
                self.blocks.claims.forget(sequence.id)
            elif self.held.pop(sequence.id, None) is None:
                self.waiting.remove(sequence)
            self._leave_group(sequence)
        del self._sequences[sequence.id]
        self.waiting.leave(sequence.request.tenant)

    def end_retired(self, committed: int | None = None) -> None:
        """End the retired whose last step is not after `committed`; all of them without one."""
        for sequence in tuple(self.retired.values()):
            if committed is None or sequence.last_step <= committed:
                self.end(sequence)

    def restart(self, blocks: BlockManager) -> None:
        """Begin again on an empty cache, trusting nothing but what was emitted: all are queued."""
        self.blocks = blocks
        self.waiting = WaitingQueue(aging_seconds=self._aging_seconds)
        self.running.clear()
        self.held.clear()
        self.retired.clear()
        for sequence in tuple(self._sequences.values()):
            if self.group(sequence.group).get(sequence.sample) is not sequence:
                sequence.life = Life.ENDED  # retired, or just on its way out: nobody wants it
                del self._sequences[sequence.id]
                continue
            sequence.incarnation += 1
            sequence.table = PageTable(space=sequence.prepared.space)
            del sequence.tokens[len(sequence.request.tokens) + sequence.emitted :]
            sequence.names = list(sequence.prepared.names)
            self._rest(sequence)
            self.waiting.enter(sequence.request.tenant)
            self.waiting.push(sequence)

    def check(self, *, drafted: int = 0) -> None:
        """Every invariant. drafted: pages in drafts' tables. For tests."""
        self.waiting.check()
        running = {item.id for item in self.running}
        queued = {item.id for item in self.waiting.sequences()}
        assert len(running) == len(self.running), "a sequence runs twice"
        assert self.running == sorted(self.running, key=_place)
        for sequence in self._sequences.values():
            assert (sequence.id in running) == (sequence.life is Life.RUNNING)
            places = (sequence.id in queued) + (sequence.id in self.held)
            assert places == (sequence.life is Life.QUEUED), sequence.life
            assert (sequence.id in self.retired) == (sequence.life is Life.RETIRED)
            if sequence.life not in (Life.RUNNING, Life.RETIRED):
                assert not sequence.table.pages, "only running sequences hold pages"
                assert sequence.pending is None
        owners = sum(len(item.table) for item in (*self.running, *self.retired.values()))
        owners += sum(self.blocks.transit.owners().values())
        assert owners + drafted == self.blocks.pool.statistics().references, (
            "pages without an owner"
        )

    def _let_go(self, sequence: Sequence) -> None:
        sequence.incarnation += 1
        self.wake(self.blocks.claims.drop(sequence.id))
        self.blocks.release(sequence.table, step=sequence.last_step)

    def _leave_group(self, sequence: Sequence) -> None:
        samples = self._groups[sequence.group]
        for sample in (sequence.sample, *sequence.unforked):
            del samples[sample]
        if not samples:
            del self._groups[sequence.group]

    def _rest(self, sequence: Sequence) -> None:
        sequence.planned = sequence.computed = 0
        sequence.pending = None
        sequence.suppress_write = False
        sequence.priority = sequence.request.priority
        sequence.life = Life.QUEUED

    def _sort(self) -> None:
        self.running.sort(key=_place)


def _place(sequence: Sequence) -> tuple[int, int, int]:
    return (sequence.priority, sequence.admission, sequence.sample)

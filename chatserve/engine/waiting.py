"""WaitingQueue: who is admitted next.

Within a priority the choice is fair by tenant, by the virtual token counter of VTC (Sheng et al.,
OSDI'24): the tenant that was served least goes first, and a tenant that comes back from idleness
starts at the least served active tenant's count, so that it can neither hoard nor owe. Only
computed tokens are charged, each to its own tenant, so the order says nothing about the cache hits
of others. Inside a tenant the order is that of arrival. Waiting ages priority: each
`aging_seconds` of waiting count as one step of priority, up to the most urgent priority that waits:
there it is an equal among equals, so that a long queue stays fair by tenant.
"""

from heapq import heapify, heappop, heappush, nsmallest
from itertools import zip_longest

from chatserve.engine.sequence import Life, Sequence

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2  # VTC's weights for a prompt's and a generated token


class WaitingQueue:
    """Queued sequences by tenant and priority. `peek` is O(tenants x priorities in the queue)."""

    def __init__(self, *, aging_seconds: float) -> None:
        self._aging_seconds = aging_seconds
        self._lines: dict[tuple[str, int], list[tuple[int, int, Sequence]]] = {}
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._length = 0
        self._dead = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence in its arrival's place: a preempted one goes before later ones."""
        line = self._lines.setdefault((sequence.request.tenant, sequence.priority), [])
        heappush(line, (sequence.arrival, sequence.id, sequence))
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """A queued sequence has ended. Its entry is skipped later, and swept before dead ones
        outnumber the living."""
        key = (sequence.request.tenant, sequence.priority)
        self._length -= 1
        self._dead += 1
        if self._dead > self._length + 64:
            self._sweep()
        else:
            self._skip_dead(key)

    def peek(self, now: float) -> Sequence | None:
        """The next one to admit, or None."""
        best: tuple[float, float, int] | None = None
        chosen: Sequence | None = None
        most_urgent = min((priority for _, priority in self._lines), default=0)
        for (tenant, priority), line in self._lines.items():
            head = line[0][2]
            age = int((now - head.arrived_at) / self._aging_seconds)
            urgency = max(most_urgent, priority - age)
            key = (urgency, self._served.get(tenant, 0.0), head.arrival)
            if best is None or key < best:
                best, chosen = key, head
        return chosen

    def ahead(self, most: int) -> list[Sequence]:
        """So many that are likely to be next, each tenant's and priority's first ones in turn. In
        time linear in what is queued."""
        lines = [nsmallest(most, line) for line in self._lines.values()]
        turns = zip_longest(*lines)
        found = [item[2] for turn in turns for item in turn if item is not None]
        return [each for each in found if each.life is Life.QUEUED][:most]

    def pop(self, sequence: Sequence) -> None:
        """Take out a queued one; of `peek`'s in O(log n), of another in O(n)."""
        key = (sequence.request.tenant, sequence.priority)
        line = self._lines[key]
        if line[0][2] is sequence:
            heappop(line)
        else:
            line.remove((sequence.arrival, sequence.id, sequence))
            heapify(line)
        self._length -= 1
        self._skip_dead(key)

    def enter(self, tenant: str) -> None:
        """A request of this tenant arrived. Lifts the counter of one that was idle."""
        count = self._active.get(tenant, 0)
        if count == 0:
            others = [self._served.get(name, 0.0) for name in self._active]
            if others:
                self._served[tenant] = max(self._served.get(tenant, 0.0), min(others))
        self._active[tenant] = count + 1

    def leave(self, tenant: str) -> None:
        """A request of this tenant ended. Counters of idle tenants are kept only while needed."""
        count = self._active[tenant] - 1
        if count:
            self._active[tenant] = count
            return
        del self._active[tenant]
        if not self._active:
            self._served.clear()

    def charge(self, tenant: str, *, computed: int, generated: int) -> None:
        """Book served tokens. A tenant that has just left is charged too, harmlessly."""
        cost = INPUT_WEIGHT * computed + OUTPUT_WEIGHT * generated
        self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def sequences(self) -> list[Sequence]:
        """All queued ones, in no order that matters."""
        return [
            item[2] for line in self._lines.values() for item in line if item[2].life is Life.QUEUED
        ]

    def check(self) -> None:
        """Every invariant. For tests."""
        assert self._length == len(self.sequences())
        assert self._length + self._dead == sum(map(len, self._lines.values()))
        for line in self._lines.values():
            assert line, "an empty line"
            assert line[0][2].life is Life.QUEUED, "a dead head"

    def _skip_dead(self, key: tuple[str, int]) -> None:
        """Every line's head is alive, and no line is empty."""
        line = self._lines[key]
        while line and line[0][2].life is not Life.QUEUED:
            heappop(line)
            self._dead -= 1
        if not line:
            del self._lines[key]

    def _sweep(self) -> None:
        for key, line in tuple(self._lines.items()):
            alive = [item for item in line if item[2].life is Life.QUEUED]
            heapify(alive)
            self._lines[key] = alive
            if not alive:
                del self._lines[key]
        self._dead = 0

"""EvictionOrder: evictable pages in the order in which they go, with shares and leases.

    offered page ─┬─ leased ─────────────▶ leased   by the end of its lease
                  ├─ computed ahead ─────▶ early    by place
                  └─ its tenant's heap, by place ─┬─ tenant above its share ─▶ above   ┐ by the
                                                  └─ within it ──────────────▶ within  ┘ first place

`first` looks at early, above, within, leased, in this order: pages that were computed ahead of any
request, then pages of tenants that hold more than their guaranteed share, then those of tenants
within theirs, and only when every offered page is leased the one whose lease ends first. A lease is
a wish and no pin: there is always a first page while any is offered. It ends by itself.

A tenant's share is a number of pages that others' pressure does not take while somebody is above
his own; without one it is 0. A tenant's count is of all its resident pages, owned or not.

`oldest` is another question: which offered page without a lease was used longest ago, whatever its
place. A policy may put a page far back that nobody comes for any more, so the one order says
nothing about the other; it has a heap of its own (`ages`).

Everything is O(log n) amortised. Nothing is searched: heaps keep stale entries, which are skipped
when they come up, told by the serial number of their offer, and swept when they outnumber the
rest. `above` and `within` hold tenants by a lower bound of their first place: it is put right when
it comes up, so a tenant that crosses its share costs one push and not all its pages.

It knows numbers for pages, places and tenants; what a place means is the policy's (`eviction.py`).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

Tenant = str
Entry = tuple[float, int, int, int]  # place, tick, serial, page

SLACK = 64  # stale entries that are not worth a sweep


@dataclass(slots=True)
class _Offer:
    place: float
    tick: int
    tenant: Tenant
    early: bool
    used_at: float
    serial: int = 0


@dataclass(slots=True)
class _Holding:
    """What a tenant has."""

    share: int
    pages: int = 0
    leaves: list[Entry] = field(default_factory=list[Entry])
    bound: Entry | None = None  # what it is known by on its side; other entries there are stale

    @property
    def above(self) -> bool:
        return self.pages > self.share


class EvictionOrder:
    """Pages are ints of the caller's. Raises nothing: a broken rule is an AssertionError."""

    def __init__(
        self,
        *,
        shares: Mapping[Tenant, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """shares: guaranteed pages by tenant. clock: seconds, for leases."""
        self._shares = dict(shares or {})
        self._clock = clock
        self._serial = 0
        self._offers: dict[int, _Offer] = {}
        self._leases: dict[int, float] = {}
        self._ends: list[tuple[float, int]] = []  # of leases, those that are over or replaced too
        self._holdings: dict[Tenant, _Holding] = {}
        self._early: list[Entry] = []
        self._ages: list[Entry] = []  # by the last use, in the place's place
        self._leased: list[tuple[float, Entry]] = []
        self._above: list[tuple[Entry, Tenant]] = []
        self._within: list[tuple[Entry, Tenant]] = []

    def __len__(self) -> int:
        """Offered pages."""
        return len(self._offers)

    def __contains__(self, page: int) -> bool:
        return page in self._offers

    @property
    def entries(self) -> int:
        """Entries of all heaps, the stale ones included: what the order costs in memory."""
        heaps = (self._early, self._ages, self._leased, self._above, self._within, self._ends)
        return sum(map(len, heaps)) + sum(len(item.leaves) for item in self._holdings.values())

    @property
    def leased(self) -> int:
        """Resident pages, offered or not, whose lease has not ended."""
        self._end_leases()
        return len(self._leases)

    def leased_pages(self) -> list[int]:
        """Which those are, each once. O(leased)."""
        self._end_leases()
        return list(self._leases)

    def lease_of(self, page: int) -> float:
        """When the page's lease ends (seconds of the clock); minus infinity without one."""
        return self._leases.get(page, -math.inf)

    def pages_of(self, tenant: Tenant) -> int:
        """How many resident pages a tenant has."""
        holding = self._holdings.get(tenant)
        return 0 if holding is None else holding.pages

    def enter(self, tenant: Tenant) -> None:
        """One more page of this tenant is resident."""
        holding = self._holdings.get(tenant)
        if holding is None:
            holding = self._holdings[tenant] = _Holding(self._shares.get(tenant, 0))
        holding.pages += 1
        if holding.pages == holding.share + 1:
            self._rank(tenant, holding)

    def leave(self, page: int, tenant: Tenant) -> None:
        """A page of this tenant goes, and with it its offer and its lease."""
        self._offers.pop(page, None)
        self._leases.pop(page, None)
        holding = self._holdings[tenant]
        holding.pages -= 1
        if not holding.pages:
            del self._holdings[tenant]
        elif holding.pages == holding.share:
            self._rank(tenant, holding)

    def offer(
        self,
        page: int,
        place: float,
        *,
        tick: int,
        tenant: Tenant,
        early: bool = False,
        used_at: float = 0.0,
    ) -> None:
        """The page may go now, or has another place from now on. tick: breaks ties, smaller first.

        early: computed ahead, and no request has had it. used_at: last, seconds, for `oldest`.
        """
        assert tenant in self._holdings, "a page of somebody who has none"
        offer = self._offers[page] = _Offer(place, tick, tenant, early, used_at)
        self._put(page, offer)

    def withdraw(self, page: int) -> None:
        """The page may not go any more; its lease stays."""
        del self._offers[page]

    def lease(self, page: int, until: float) -> None:
        """Others go before this page until then (seconds of the clock), in place of any lease that
        it has. A time that is over ends its lease."""
        if until > self._clock():
            self._leases[page] = until
            heappush(self._ends, (until, page))
            if len(self._ends) > 2 * len(self._leases) + SLACK:
                self._ends = [(end, leased) for leased, end in self._leases.items()]
                heapify(self._ends)
        elif self._leases.pop(page, None) is None:
            return
        if page in self._offers:
            self._put(page, self._offers[page])

    def first(self) -> int | None:
        """The page that goes first; None where none is offered."""
        self._end_leases()
        head = self._head(self._early) or self._lead(self._above) or self._lead(self._within)
        if head is not None:
            return head[3]
        while self._leased:
            until, entry = self._leased[0]
            if self._valid(entry) and self._leases.get(entry[3]) == until:
                return entry[3]
            heappop(self._leased)
        return None

    def oldest(self, before: float) -> int | None:
        """Of the offered pages without a lease the one used longest ago, if that was no later than
        `before` (seconds)."""
        self._end_leases()
        head = self._head(self._ages)
        return None if head is None or head[0] > before else head[3]

    def pass_over(self, page: int, used_at: float) -> None:
        """What `oldest` said is to count there, until it is offered anew, as used at this time."""
        head = self._ages[0]
        assert head[3] == page, "not the oldest"
        assert self._valid(head), "not the oldest any more"
        heapreplace(self._ages, (used_at, *head[1:]))

    def check(self) -> None:
        """Every invariant, in O(n). For tests."""
        early, leased = set(self._early), set(self._leased)
        ages = Counter(entry[3] for entry in self._ages if self._valid(entry))
        assert ages == Counter(self._offers.keys() - self._leases.keys()), "an age that nobody sees"
        ends = {(until, page) for page, until in self._leases.items()}
        assert ends <= set(self._ends), "a lease that never ends"
        for page, offer in self._offers.items():
            entry = (offer.place, offer.tick, offer.serial, page)
            holding = self._holdings[offer.tenant]
            until = self._leases.get(page)
            if until is not None:
                assert (until, entry) in leased, "a leased page that nobody would find"
            elif offer.early:
                assert entry in early, "an early page that nobody would find"
            else:
                assert entry in holding.leaves, "a page that nobody would find"
                side = self._above if holding.above else self._within
                bound = holding.bound
                assert bound is not None, "a tenant that nobody would find"
                assert bound <= entry, "a tenant behind its own page"
                assert any(key is bound and name == offer.tenant for key, name in side)
        assert all(holding.pages > 0 for holding in self._holdings.values())

    # Inside --------------------------------------------------------------------------------

    def _valid(self, entry: Entry) -> bool:
        offer = self._offers.get(entry[3])
        return offer is not None and offer.serial == entry[2]

    def _put(self, page: int, offer: _Offer) -> None:
        """Into the one heap where it belongs; whatever other entry it has is stale from now on."""
        self._serial += 1
        offer.serial = self._serial
        entry = (offer.place, offer.tick, offer.serial, page)
        until = self._leases.get(page)
        if until is not None:
            heappush(self._leased, (until, entry))
            if len(self._leased) > 2 * len(self._offers) + SLACK:
                self._leased = [item for item in self._leased if self._valid(item[1])]
                heapify(self._leased)
            return
        age = (offer.used_at, offer.tick, offer.serial, page)
        self._push(self._ages, age, len(self._offers))
        if offer.early:
            self._push(self._early, entry, len(self._offers))
        else:
            holding = self._holdings[offer.tenant]
            self._push(holding.leaves, entry, holding.pages)
            if holding.leaves[0] is entry:
                self._rank(offer.tenant, holding)

    def _push(self, heap: list[Entry], entry: Entry, live: int) -> None:
        """live: at least the number of valid entries."""
        heappush(heap, entry)
        if len(heap) > 2 * live + SLACK:
            heap[:] = [item for item in heap if self._valid(item)]
            heapify(heap)

    def _head(self, heap: list[Entry]) -> Entry | None:
        while heap and not self._valid(heap[0]):
            heappop(heap)
        return heap[0] if heap else None

    def _rank(self, tenant: Tenant, holding: _Holding) -> None:
        """The tenant has a smaller first place than it is known by, or has crossed its share."""
        holding.bound = holding.leaves[0] if holding.leaves else None
        if holding.bound is None:
            return
        side = self._above if holding.above else self._within
        heappush(side, (holding.bound, tenant))
        if len(side) > 2 * len(self._holdings) + SLACK:
            side[:] = [
                (other.bound, name)
                for name, other in self._holdings.items()
                if other.bound is not None and other.above == holding.above
            ]
            heapify(side)

    def _lead(self, side: list[tuple[Entry, Tenant]]) -> Entry | None:
        """The first page of the tenants on this side; what comes up and is stale is put right."""
        while side:
            bound, tenant = side[0]
            holding = self._holdings.get(tenant)
            on_this_side = holding is not None and holding.above == (side is self._above)
            if holding is None or not on_this_side or holding.bound is not bound:
                heappop(side)
                continue
            head = holding.bound = self._head(holding.leaves)
            if head is None:
                heappop(side)
            elif head is bound:
                return head
            else:
                heapreplace(side, (head, tenant))
        return None

    def _end_leases(self) -> None:
        now = self._clock() if self._ends else 0.0
        while self._ends and self._ends[0][0] <= now:
            until, page = heappop(self._ends)
            if self._leases.get(page) == until:
                del self._leases[page]
                if page in self._offers:
                    self._put(page, self._offers[page])

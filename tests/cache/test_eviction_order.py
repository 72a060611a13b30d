"""The order of eviction against a model that sorts everything, at every step."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from chatserve.cache.eviction import POLICIES, PageUse
from chatserve.cache.eviction_order import EvictionOrder
from chatserve.cache.prefix_index import Namespace, PrefixIndex

TENANTS = ("", "amber", "birch")
TEXT = b"\x01\x00\x00\x00" * 400


class Page:
    """What the model knows of a resident page."""

    def __init__(self, path: str, tenant: str, tick: int, run: int, uses: int, drafted: bool):
        self.path = path
        self.tenant = tenant
        self.sealed = tick
        self.run = run
        self.uses = uses
        self.drafted = drafted
        self.used = 0
        self.seconds = 0.0
        self.idle = False
        self.lease = 0.0


class IndexMachine(RuleBasedStateMachine):
    """Paths are strings, a page for each prefix: 'a', 'ab', 'abb'. The model keeps a dict of them
    and sorts it anew whenever it is asked."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        shares=st.dictionaries(st.sampled_from(TENANTS), st.integers(0, 4)),
    )
    def begin(self, policy: str, shares: dict[str, int]) -> None:
        self.now = 1.0
        self.policy = POLICIES[policy]
        self.shares = shares
        self.index = PrefixIndex(
            eviction=self.policy, shares=shares, clock=lambda: self.now, remembered=1 << 20
        )
        self.numbers: dict[str, int] = {}
        self.pages: dict[str, Page] = {}
        self.gone: dict[str, int] = {}
        self.tick = 0

    def number(self, path: str) -> int:
        return self.numbers.setdefault(path, len(self.numbers))

    def name(self, path: str) -> bytes:
        number = self.number(path)
        return number.to_bytes(5, "little") + (number + 1).to_bytes(3, "little") + bytes(24)

    def leaves(self) -> list[Page]:
        above = {path[:-1] for path in self.pages}
        return [p for p in self.pages.values() if p.idle and p.path not in above]

    def expected(self) -> int | None:
        counts = {
            tenant: sum(page.tenant == tenant for page in self.pages.values()) for tenant in TENANTS
        }

        def order(page: Page) -> tuple[float, ...]:
            place = self.policy.place(
                PageUse(page.sealed, page.used, page.seconds, page.uses, page.run)
            )
            if page.lease > self.now:
                return (3, page.lease, place, page.used)
            if page.drafted:
                return (0, place, page.used)
            within = counts[page.tenant] <= self.shares.get(page.tenant, 0)
            return (2 if within else 1, place, page.used)

        ordered = sorted(self.leaves(), key=order)
        return self.number(ordered[0].path) if ordered else None

    @rule(
        path=st.text("ab", min_size=1, max_size=4),
        tenant=st.sampled_from(TENANTS),
        drafting=st.booleans(),
    )
    def request(self, path: str, tenant: str, drafting: bool) -> None:
        """A request (or a draft) goes through a path and leaves it: found pages are adopted."""
        owned: list[str] = []
        for end in range(1, len(path) + 1):
            prefix = path[:end]
            page = self.pages.get(prefix)
            number = self.number(prefix)
            if page is None:
                drafted = drafting
                above = self.pages.get(prefix[:-1])
                fresh = len(TEXT) // 4
                run = fresh + above.run if above is not None and above.uses <= 1 else fresh
                self.tick += 1
                uses = self.gone.get(prefix, 0) + (not drafted)
                self.pages[prefix] = Page(prefix, tenant, self.tick, run, uses, drafted)
                parent = self.name(prefix[:-1]) if above is not None else None
                self.index.add(
                    number, self.name(prefix), parent, TEXT, Namespace(tenant), drafted=drafted
                )
            else:
                if page.idle:
                    self.index.set_owned(number)
                page.idle = False
                if not drafting:
                    assert self.index.keep(number) == page.drafted
                    page.drafted = False
                    page.uses += 1
            owned.append(prefix)
        for prefix in reversed(owned):
            self.tick += 1
            page = self.pages[prefix]
            page.idle, page.used, page.seconds = True, self.tick, self.now
            self.index.set_idle(self.number(prefix))

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def own(self, data: st.DataObject) -> None:
        """Somebody takes a whole path and has it still."""
        path = data.draw(st.sampled_from(sorted(self.pages)))
        for end in range(1, len(path) + 1):
            page = self.pages[path[:end]]
            if page.idle:
                self.index.set_owned(self.number(page.path))
            page.idle = False

    @rule()
    def give_all_back(self) -> None:
        for path in sorted(self.pages, key=len, reverse=True):
            page = self.pages[path]
            if not page.idle:
                self.tick += 1
                page.idle, page.used, page.seconds = True, self.tick, self.now
                self.index.set_idle(self.number(path))

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), seconds=st.integers(-1, 5))
    def lease(self, data: st.DataObject, seconds: int) -> None:
        path = data.draw(st.sampled_from(sorted(self.pages)))
        self.pages[path].lease = self.now + seconds
        self.index.lease(self.number(path), self.now + seconds)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(pages=st.integers(1, 4))
    def evict(self, pages: int) -> None:
        for _ in range(pages):
            victim = self.index.next_victim()
            assert victim == self.expected()
            if victim is None:
                return
            self.index.remove(victim)
            (path,) = (path for path, number in self.numbers.items() if number == victim)
            self.gone[path] = self.pages.pop(path).uses

    def oldest(self, seconds: float) -> int | None:
        """Whoever is idle for longest and for so long, whatever its place; leased pages stay."""
        idle = [
            page
            for page in self.leaves()
            if page.lease <= self.now and self.now - page.seconds >= seconds
        ]
        ordered = sorted(idle, key=lambda page: (page.seconds, page.used))
        return self.number(ordered[0].path) if ordered else None

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0]))
    def retire(self, seconds: float) -> None:
        page = self.index.stale(seconds)
        assert page == self.oldest(seconds)
        if page is not None:
            self.index.remove(page)
            (path,) = (path for path, number in self.numbers.items() if number == page)
            self.gone[path] = self.pages.pop(path).uses

    @invariant()
    def the_first_is_the_models_first(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.stale(2.0) == self.oldest(2.0)
        self.index.check()
        assert self.index.next_victim() == self.expected()
        assert self.index.next_victim() == self.expected(), "asking changed something"
        for tenant in TENANTS:
            held = sum(page.tenant == tenant for page in self.pages.values())
            assert self.index.pages_of(tenant) == held
        leased = sum(page.lease > self.now for page in self.pages.values())
        assert self.index.leased == leased


IndexMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, print_blob=True
)
TestIndexMachine = IndexMachine.TestCase


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def order_of(*pages: int, shares: dict[str, int] | None = None) -> tuple[EvictionOrder, Clock]:
    clock = Clock()
    order = EvictionOrder(shares=shares, clock=clock)
    for page in pages:
        order.enter("")
        order.offer(page, float(page), tick=page, tenant="")
    return order, clock


def test_a_leased_page_goes_after_all_others_until_its_lease_ends_by_itself() -> None:
    order, clock = order_of(1, 2, 3)
    order.lease(1, 10.0)
    assert order.first() == 2
    clock.now = 9.9
    assert order.first() == 2
    clock.now = 10.0
    assert order.first() == 1
    order.check()


def test_when_all_are_leased_the_one_whose_lease_ends_first_goes() -> None:
    order, _ = order_of(1, 2, 3)
    for page, until in ((1, 30.0), (2, 20.0), (3, 25.0)):
        order.lease(page, until)
    assert order.first() == 2
    order.lease(2, 40.0)
    assert order.first() == 3
    order.leave(3, "")
    assert order.first() == 1
    order.lease(2, 0.0)
    assert order.first() == 2, "a lease that was given up"
    order.check()


def test_a_tenant_within_its_share_loses_nothing_while_another_is_above() -> None:
    clock = Clock()
    order = EvictionOrder(shares={"small": 2}, clock=clock)
    for page, tenant in ((1, "small"), (2, "small"), (3, "large"), (4, "large")):
        order.enter(tenant)
        order.offer(page, float(page), tick=page, tenant=tenant)
    gone: list[int] = []
    for _ in range(4):
        page = order.first()
        assert page is not None
        gone.append(page)
        order.leave(page, "small" if page < 3 else "large")
    assert gone == [3, 4, 1, 2]
    assert order.first() is None


def test_a_tenant_above_its_share_loses_only_what_is_above_it() -> None:
    order = EvictionOrder(shares={"small": 2}, clock=Clock())
    for page, tenant in ((1, "small"), (2, "small"), (3, "small"), (4, "large")):
        order.enter(tenant)
        order.offer(page, float(page), tick=page, tenant=tenant)
    assert order.first() == 1
    order.leave(1, "small")
    assert order.first() == 4, "the rest of it is guaranteed"
    order.check()


@pytest.mark.parametrize("kind", ["offer", "lease", "early", "crossing"])
def test_stale_entries_are_swept_where_nobody_ever_asks_for_a_victim(kind: str) -> None:
    order, clock = order_of(*range(20))
    for turn in range(5000):
        page = turn % 20
        if kind == "lease":
            order.lease(page, clock.now + 1 + turn % 7)
            clock.now += 0.1
        elif kind == "crossing":
            order.enter("other")
            order.offer(100, float(-turn), tick=turn, tenant="other")
            order.leave(100, "other")
        else:
            order.withdraw(page)
            order.offer(page, float(-turn), tick=turn, tenant="", early=kind == "early")
    assert order.entries <= 4 * (2 * 20 + 64)
    order.check()

"""The page pool: its table of states, and a state machine against a dict."""

from itertools import product

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chatserve.cache.page_pool import (
    NAMED,
    OWNED,
    TRANSITIONS,
    PageEvent,
    PagePool,
    PageState,
)

PAGES = 5
FORBIDDEN = [pair for pair in product(PageState, PageEvent) if pair not in TRANSITIONS]


@pytest.mark.parametrize(("state", "event"), FORBIDDEN)
def test_an_event_outside_the_table_is_refused_and_changes_nothing(
    state: PageState, event: PageEvent
) -> None:
    pool = PagePool(1)
    pool._state[0] = state
    pool._counts = [int(one == state) for one in PageState]
    with pytest.raises(AssertionError, match=event.name):
        pool._move(0, event)
    assert pool.state(0) is state


def test_every_state_can_be_left_and_every_page_gets_home() -> None:
    home = {PageState.FREE}
    while True:
        more = {before for (before, _), after in TRANSITIONS.items() if after in home} - home
        if not more:
            break
        home |= more
    assert home == set(PageState)


def test_a_page_is_not_given_back_twice() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.release(page, 0)
    with pytest.raises(AssertionError):
        pool.release(page, 0)
    pool.check()


def test_a_load_that_fails_frees_the_page_and_one_that_comes_seals_it() -> None:
    pool = PagePool(2)
    good, bad = pool.load(), pool.load()
    assert pool.statistics().loading == 2
    with pytest.raises(AssertionError):
        pool.release(good, 0)  # the I/O thread has it
    pool.loaded(good)
    pool.load_failed(bad)
    assert pool.state(good) is PageState.SEALED
    assert pool.state(bad) is PageState.FREE
    pool.check()
    assert pool.release(good, 0) is PageState.CACHED
    pool.evict(good)
    assert pool.free == 2


def test_a_page_released_again_in_flight_leaves_at_the_later_step() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    pool.seal(page)
    pool.release(page, 1)
    pool.retain(page)
    pool.release(page, 2)
    assert pool.settle(1) == []
    assert pool.state(page) is PageState.NAMED_LEAVING
    assert pool.settle(2) == [page]
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """The model: a dict of page → (state, owners, last step that touches it)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.model: dict[int, tuple[PageState, int, int]] = dict.fromkeys(
            range(PAGES), (PageState.FREE, 0, 0)
        )
        self.settled = 0

    def pages(self, *states: PageState) -> list[int]:
        return [page for page, (state, _, _) in self.model.items() if state in states]

    @precondition(lambda self: self.pages(PageState.FREE))
    @rule(load=st.booleans())
    def take(self, load: bool) -> None:
        page = self.pool.load() if load else self.pool.allocate()
        assert self.model[page][0] is PageState.FREE, "a page that was not free was given out"
        self.model[page] = (PageState.LOADING if load else PageState.OPEN, 1, self.model[page][2])

    @precondition(lambda self: self.pages(PageState.LOADING))
    @rule(data=st.data(), good=st.booleans())
    def report(self, data: st.DataObject, good: bool) -> None:
        page = data.draw(st.sampled_from(self.pages(PageState.LOADING)))
        if good:
            self.pool.loaded(page)
            self.model[page] = (PageState.SEALED, 1, self.model[page][2])
        else:
            self.pool.load_failed(page)
            self.model[page] = (PageState.FREE, 0, self.model[page][2])

    @precondition(lambda self: self.pages(PageState.OPEN))
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(PageState.OPEN)))
        self.pool.seal(page)
        self.model[page] = (PageState.SEALED, *self.model[page][1:])

    @precondition(lambda self: self.pages(PageState.SEALED))
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(PageState.SEALED)))
        if self.model[page][1] > 1:
            with pytest.raises(AssertionError):
                self.pool.truncate(page)
            return
        self.pool.truncate(page)
        self.model[page] = (PageState.OPEN, *self.model[page][1:])

    @precondition(lambda self: self.pages(*(OWNED | NAMED) - {PageState.LOADING}))
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(*(OWNED | NAMED) - {PageState.LOADING})))
        state, owners, busy = self.model[page]
        self.pool.retain(page)
        self.model[page] = (state if owners else PageState.SEALED, owners + 1, busy)

    @precondition(lambda self: self.pages(PageState.OPEN, PageState.SEALED))
    @rule(data=st.data(), ahead=st.integers(0, 2))
    def release(self, data: st.DataObject, ahead: int) -> None:
        page = data.draw(st.sampled_from(self.pages(PageState.OPEN, PageState.SEALED)))
        state, owners, busy = self.model[page]
        step = self.settled + ahead if ahead else 0
        busy = max(busy, step)
        named = state is PageState.SEALED
        if owners == 1:
            if busy > self.settled:
                state = PageState.NAMED_LEAVING if named else PageState.LEAVING
            else:
                state = PageState.CACHED if named else PageState.FREE
        self.model[page] = (state, owners - 1, busy)
        assert self.pool.release(page, step) is state

    @precondition(lambda self: self.pages(PageState.CACHED))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.pages(PageState.CACHED)))
        self.pool.evict(page)
        self.model[page] = (PageState.FREE, 0, self.model[page][2])

    @rule(steps=st.integers(0, 3))
    def settle(self, steps: int) -> None:
        self.settled += steps
        cached = set(self.pool.settle(self.settled))
        for page, (state, owners, busy) in self.model.items():
            if busy <= self.settled and state is PageState.LEAVING:
                self.model[page] = (PageState.FREE, owners, busy)
            elif busy <= self.settled and state is PageState.NAMED_LEAVING:
                self.model[page] = (PageState.CACHED, owners, busy)
                cached.remove(page)
        assert not cached, "pages that became cached out of turn"

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.balanced()
        for page, (state, owners, _) in self.model.items():
            assert self.pool.state(page) is state
            assert self.pool.references(page) == owners
        counts = self.pool.statistics()
        summed = counts.free + counts.open + counts.loading
        assert summed + counts.sealed + counts.cached + counts.leaving == counts.total == PAGES


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, print_blob=True
)
TestPoolMachine = PoolMachine.TestCase

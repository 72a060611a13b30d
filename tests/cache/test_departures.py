"""Pages of one conversation that leave late, or now: leases, and evictions by name."""

from functools import partial

import pytest

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.departures import Evicted
from chatserve.cache.eviction import POLICIES
from chatserve.cache.host_pages import HostPages
from chatserve.cache.page_table import PageTable
from chatserve.cache.prefix_index import AGAIN, Namespace, PrefixIndex
from chatserve.cache.transit import Keep
from prefix_store.names import token_bytes
from tests.cache.test_block_manager import SIZE, filled, names_of, pages

OLD, NEW, LAST = list(range(12)), list(range(20, 32)), list(range(40, 52))  # three pages each


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Below:
    """A tier that has what a test says."""

    def __init__(self) -> None:
        self.names: set[bytes] = set()

    def find(self, names) -> int:
        return next((at for at, name in enumerate(names) if name not in self.names), len(names))

    def contains(self, name) -> bool:
        return name in self.names

    def touch(self, names) -> None:
        pass


def house(
    count: int, below: Below | None = None, policy: str = "patience"
) -> tuple[BlockManager, Clock]:
    clock = Clock()
    order = partial(PrefixIndex, clock=clock, eviction=POLICIES[policy])
    return BlockManager(pages=count, page_size=SIZE, order=order, below=below), clock


def told(blocks: BlockManager, tokens: list[int]) -> None:
    blocks.release(filled(blocks, tokens), step=0)


def test_leased_names_outlast_pages_that_were_used_since() -> None:
    blocks, _ = house(6)
    told(blocks, OLD)
    told(blocks, NEW)
    assert blocks.lease(names_of(OLD), 60.0) == 3
    assert blocks.statistics().leased_pages == 3
    told(blocks, LAST)
    assert (pages(blocks, OLD), pages(blocks, NEW), pages(blocks, LAST)) == (3, 0, 3)
    blocks.check()


def test_a_lease_ends_by_itself_and_with_0_seconds() -> None:
    for ending in ("by itself", "0 seconds"):
        blocks, clock = house(6)
        told(blocks, OLD)
        told(blocks, NEW)
        blocks.lease(names_of(OLD), 60.0)
        if ending == "by itself":
            clock.now += 60.0
        else:
            assert blocks.lease(names_of(OLD), 0.0) == 3
        assert blocks.statistics().leased_pages == 0, ending
        told(blocks, LAST)
        assert (pages(blocks, OLD), pages(blocks, NEW)) == (0, 3), ending
        blocks.check()


def test_a_lease_is_no_pin() -> None:
    blocks, _ = house(3)
    told(blocks, OLD)
    blocks.lease(names_of(OLD), 60.0)
    told(blocks, NEW)
    assert (pages(blocks, OLD), pages(blocks, NEW)) == (0, 3)
    assert blocks.statistics().leased_pages == 0, "a lease goes with its page"
    blocks.check()


def test_a_page_in_use_keeps_its_lease_until_it_is_idle_again() -> None:
    blocks, clock = house(6)
    table = filled(blocks, OLD)
    blocks.lease(names_of(OLD), 60.0)
    told(blocks, NEW)
    blocks.release(table, step=0)
    table = filled(blocks, NEW)  # was used last
    blocks.release(table, step=0)
    told(blocks, LAST)
    assert (pages(blocks, OLD), pages(blocks, NEW)) == (3, 0)
    clock.now += 61.0
    assert blocks.statistics().leased_pages == 0
    blocks.check()


def test_names_that_are_not_here_are_not_leased() -> None:
    blocks, _ = house(6)
    told(blocks, OLD)
    assert blocks.lease(names_of(NEW), 60.0) == 0
    assert blocks.lease([*names_of(OLD), *names_of(OLD)], 60.0) == 3
    assert blocks.statistics().leased_pages == 3


def test_a_hold_shortens_no_lease_and_is_bounded() -> None:
    blocks, clock = house(8)
    told(blocks, OLD)
    told(blocks, NEW)
    blocks.lease(names_of(OLD), 600.0)
    blocks.hold(names_of(OLD), 10.0, share=1.0)
    clock.now += 11.0
    assert blocks.statistics().leased_pages == 3
    blocks.hold(names_of(NEW), 10.0, share=0.5)
    assert blocks.statistics().leased_pages == 4, "half of the pool and no more"
    clock.now += 5.0
    blocks.hold(names_of(NEW), 10.0, share=0.5)
    clock.now += 6.0
    assert blocks.statistics().leased_pages == 4, "one that there is may be made longer"
    clock.now += 5.0
    assert blocks.statistics().leased_pages == 3


def test_a_hold_passes_over_drafted_pages() -> None:
    blocks, _ = house(8)
    table = filled(blocks, OLD[:4])
    blocks.extend(table, drafts_max=8)
    blocks.seal(table, names_of(OLD)[1], bytes(16), step=0, drafting=True)
    blocks.release(table, step=0)
    blocks.hold(names_of(OLD), 10.0, share=1.0)
    assert blocks.statistics().leased_pages == 1
    blocks.check()


def test_idle_pages_of_these_names_leave_and_no_others() -> None:
    blocks, _ = house(9)
    told(blocks, OLD)
    told(blocks, NEW)
    blocks.lease(names_of(OLD), 60.0)
    assert blocks.evict(names_of(OLD)) == Evicted(3, 0)
    assert (pages(blocks, OLD), pages(blocks, NEW)) == (0, 3)
    counts = blocks.statistics()
    assert (counts.evicted_by_name_total, counts.evicted_for_space_total) == (3, 0)
    assert blocks.evict(names_of(OLD)) == Evicted()
    blocks.check()


def test_pages_in_use_stay_with_those_before_them() -> None:
    blocks, _ = house(9)
    told(blocks, OLD)
    table = filled(blocks, OLD[:8])
    assert blocks.evict(names_of(OLD)) == Evicted(left=1, stayed=2)
    assert pages(blocks, OLD) == 2
    blocks.release(table, step=0)
    assert blocks.evict(names_of(OLD)) == Evicted(2, 0)
    blocks.check()


def test_what_another_conversation_continues_stays() -> None:
    blocks, _ = house(9)
    told(blocks, OLD)
    told(blocks, [*OLD[:4], *NEW])
    assert blocks.evict(names_of(OLD)) == Evicted(left=2, stayed=1)
    assert pages(blocks, [*OLD[:4], *NEW]) == 4
    blocks.check()


def test_a_page_that_a_step_may_touch_stays_until_it_has_committed() -> None:
    blocks, _ = house(9)
    blocks.release(filled(blocks, OLD, step=1), step=1)
    assert blocks.evict(names_of(OLD)) == Evicted(0, 3)
    blocks.settle(1)
    assert blocks.evict(names_of(OLD)) == Evicted(3, 0)
    blocks.check()


def test_a_page_whose_copy_is_gone_stays() -> None:
    below = Below()
    blocks, _ = house(9, below)
    told(blocks, OLD)
    keeps = blocks.take_unkept(9)
    assert keeps is not None
    blocks.end_keep(keeps, [True] * 3)
    below.names.update(names_of(OLD)[:2])  # the last one's copy had to go, or was damaged
    assert blocks.evict(names_of(OLD)) == Evicted(0, 3)
    assert pages(blocks, OLD) == 3
    below.names.update(names_of(OLD))
    assert blocks.evict(names_of(OLD)) == Evicted(3, 0)
    blocks.check()


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_leaves_for_want_of_room_without_a_copy_is_lost_and_counted(kept: int) -> None:
    below = Below()
    blocks, _ = house(3, below)
    told(blocks, OLD)
    keeps = blocks.take_unkept(9)
    assert keeps is not None
    blocks.end_keep(keeps, [True] * 3)
    below.names.update(names_of(OLD)[:kept])  # the others' copies had to go since
    told(blocks, NEW)
    assert blocks.statistics().transit.lost_total == 3 - kept
    assert blocks.statistics().evicted_for_space_total == 3
    blocks.check()


def test_nothing_is_lost_where_nothing_could_be_kept_or_nobody_asked() -> None:
    blocks, _ = house(3)
    told(blocks, OLD)
    told(blocks, NEW)
    assert blocks.statistics().transit.lost_total == 0, "there is no tier below"
    blocks, _ = house(3, Below())
    table = PageTable()
    assert blocks.reserve(table, 0, len(OLD), step=0) is not None
    for index, name in enumerate(names_of(OLD)):
        page = token_bytes(OLD[index * SIZE : (index + 1) * SIZE])
        blocks.seal(table, name, page, step=0, drafting=True)
    blocks.release(table, step=0)
    assert blocks.statistics().draft_pages == 3
    told(blocks, NEW)
    assert blocks.statistics().transit.lost_total == 0, "computed ahead, for nobody"
    blocks.check()


def test_a_page_that_waits_for_its_copy_stays_until_it_has_one() -> None:
    below = Below()
    blocks, _ = house(9, below)
    told(blocks, OLD)
    assert blocks.evict(names_of(OLD)) == Evicted(0, 3)
    keeps = blocks.take_unkept(9)
    assert keeps is not None
    assert blocks.evict(names_of(OLD)) == Evicted(0, 3), "being read"
    below.names.update(names_of(OLD))
    blocks.end_keep(keeps, [True] * 3)
    assert blocks.evict(names_of(OLD)) == Evicted(3, 0)
    assert blocks.statistics().transit.lost_total == 0
    blocks.check()


def test_leases_of_several_tenants_are_one_order() -> None:
    clock = Clock()
    index = PrefixIndex(shares={"small": 1}, clock=clock)
    for page, tenant in enumerate(("small", "large", "large")):
        index.add(page, bytes([page]) * 32, None, bytes(16), Namespace(tenant, bytes([page])))
        index.set_idle(page)
    assert index.lease_names([bytes([1]) * 32, bytes([2]) * 32], 9.0) == 2
    assert index.next_victim() == 0, "within its share, but the others are leased"
    assert index.leased == 2
    index.check()


def host_with(below: Below, clock: Clock, policy: str) -> HostPages:
    order = partial(PrefixIndex, clock=clock, eviction=POLICIES[policy])
    return HostPages(slots=40, below=below, order=order)


def saved(host: HostPages, tokens: list[int]) -> None:
    """What is used comes up from there; what is not there is saved there."""
    names, above = names_of(tokens), None
    for index, name in enumerate(names):
        page = token_bytes(tokens[index * SIZE : (index + 1) * SIZE])
        slot = host.take(name, page)
        if slot is None:
            slot = host.begin(name)
            assert slot is not None
            assert host.end(slot, Keep(0, name, above, index, page), arrived=True, checksum=index)
        host.release(slot)
        above = name


def test_slots_that_the_disk_has_leave_host_memory_and_those_before_others_stay() -> None:
    below = Below()
    host = host_with(below, Clock(), "patience")
    names = names_of(OLD)
    below.names.update(names)
    saved(host, OLD)
    below.names.remove(names[2])  # its copy had to go since
    assert host.evict(names) == Evicted(0, 3), "the others are before it"
    below.names.add(names[2])
    below.names.remove(names[0])
    assert host.evict(names) == Evicted(left=2, stayed=1)
    below.names.update(names)
    saved(host, OLD)
    assert host.evict(names[:2]) == Evicted(0, 2), "the last one is not of these names"
    assert host.evict(names) == Evicted(3, 0)
    host.check()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_chat_that_was_used_often_leaves_after_the_limit_while_others_come(policy: str) -> None:
    below = Below()
    blocks, clock = house(40, below, policy)
    host = host_with(below, clock, policy)
    below.names.update(names_of(OLD))
    for _ in range(5):
        told(blocks, OLD)
        saved(host, OLD)
        clock.now += 1
    last_use = clock.now - 1
    stayed: list[int] = []
    for number in range(10):
        clock.now += 9
        other = [1000 + 100 * number + token for token in range(12)]
        below.names.update(names_of(other))
        told(blocks, other)
        saved(host, other)
        blocks.retire(60.0, 256)
        host.retire(60.0, 256)
        is_due = clock.now - last_use >= 60.0
        assert (pages(blocks, OLD) == 0) == is_due, (policy, clock.now - last_use)
        assert any(map(host.holds, names_of(OLD))) != is_due, (policy, clock.now - last_use)
        stayed.append(pages(blocks, other))
        blocks.check()
        host.check()
    assert stayed == [3] * 10
    assert blocks.statistics().evicted_for_space_total == 0


def test_a_lease_holds_against_the_limit_of_idle_time_until_it_ends() -> None:
    below = Below()
    blocks, clock = house(20, below)
    host = host_with(below, clock, "patience")
    for tokens in (OLD, NEW):
        below.names.update(names_of(tokens))
        told(blocks, tokens)
        saved(host, tokens)
    assert blocks.lease(names_of(OLD), 600.0) == host.lease(names_of(OLD), 600.0) == 3
    clock.now += 599.0
    assert (blocks.retire(60.0, 100), host.retire(60.0, 100)) == (3, 3)
    assert (pages(blocks, OLD), pages(blocks, NEW)) == (3, 0)
    assert (host.holds(names_of(OLD)[2]), host.holds(names_of(NEW)[0])) == (True, False)
    clock.now += 1.0
    assert (blocks.retire(60.0, 100), host.retire(60.0, 100)) == (3, 3)
    assert pages(blocks, OLD) == 0
    assert not any(map(host.holds, names_of(OLD)))
    blocks.check()
    host.check()


def test_what_has_no_copy_is_in_nobodys_way_and_is_looked_at_again() -> None:
    below = Below()
    blocks, clock = house(20, below)
    host = host_with(below, clock, "patience")
    below.names.update(names_of(OLD))
    saved(host, OLD)  # has a copy, so that it does not wait for one here
    below.names.clear()
    told(blocks, OLD)
    clock.now += 1.0
    below.names.update(names_of(NEW))
    told(blocks, NEW)
    saved(host, NEW)
    clock.now += 60.0
    assert blocks.retire(60.0, 100) == 4, "the last page of one chat, and all of the other's"
    assert host.retire(60.0, 100) == 4
    assert (pages(blocks, OLD), pages(blocks, NEW)) == (3, 0)
    assert blocks.retire(60.0, 100) == host.retire(60.0, 100) == 0, "not at every look"
    below.names.update(names_of(OLD))
    clock.now += 60.0 * AGAIN
    assert blocks.retire(60.0, 2) == host.retire(60.0, 2) == 2
    assert pages(blocks, OLD) == 1, "no more than it was told"
    assert blocks.retire(60.0, 2) == host.retire(60.0, 2) == 1
    blocks.check()
    host.check()

"""Wishes: what an admin, or a user who is about to write, wants of one conversation's pages.

    lease   others leave before them for a while         hold   the same, as a courtesy
    warm    bring up what is below the device            evict  let those leave that nobody uses

It may not know whose names they are, nor why. A wish is no promise: a leased page goes when there
is no other, and what is warmed goes before all others until a request adopts it, as what is drafted
does (`prefix_index.py`), unless it is leased. Public pages are no conversation's: they are left as
they are.

Every wish is a short synchronous action between two events of the engine's loop, so none meets a
step or a load half-way. One that comes while the engine begins anew is done after that, and its
answer says that nothing was found.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from chatserve.cache.page_table import PageTable
from chatserve.engine.scheduler import Scheduler
from chatserve.engine.sequence import PreparedRequest
from prefix_store.names import PageName, token_bytes

HOLD_SECONDS = 120.0  # of a courtesy: a user who types says so more often
HOLD_SHARE = 0.25  # of all pages: no more are leased out of courtesy
LEASE_SECONDS_MAX = 86_400.0


class Leased(NamedTuple):
    """Pages that have the lease now: of the device, and of host memory."""

    device: int = 0
    host: int = 0


class Dismissed(NamedTuple):
    """Pages that left the device and host memory, and those that stay there: in use, without a copy
    below, or continued by a page that stays."""

    device: int = 0
    host: int = 0
    device_stayed: int = 0
    host_stayed: int = 0


class Warmth(NamedTuple):
    """Whole pages of a prompt, each counted once: on the device, on the way there (being loaded or
    computed), left below it for want of room, or nowhere."""

    device: int = 0
    coming: int = 0
    below: int = 0
    nowhere: int = 0


class Wishes:
    """See the module. One engine's. act: does something between two events of its loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        act: Callable[[Callable[[], None]], None],
        is_public: Callable[[PageName], bool],
    ) -> None:
        self._scheduler = scheduler
        self._act = act
        self._is_public = is_public

    def lease(self, names: Collection[PageName], seconds: float) -> Leased:
        """All others leave before the resident pages of these names, for so many seconds from now
        (no more than LEASE_SECONDS_MAX); 0 ends leases. On the event loop; never waits."""
        assert 0 <= seconds <= LEASE_SECONDS_MAX, "checked at the door"
        leased = Leased()
        own = self._own(names)

        def lease() -> None:
            nonlocal leased
            scheduler = self._scheduler
            device = scheduler.blocks.lease(own, seconds)
            leased = Leased(device, scheduler.tiers.lease(own, seconds))

        self._act(lease)
        return leased

    def hold(self, names: Collection[PageName]) -> None:
        """The same for HOLD_SECONDS, of what requests had on the device: it ends no lease, and does
        nothing where HOLD_SHARE of all pages are leased. On the event loop; never waits."""
        own = self._own(names)
        self._act(lambda: self._scheduler.blocks.hold(own, HOLD_SECONDS, share=HOLD_SHARE))

    def evict(self, names: Collection[PageName]) -> Dismissed:
        """The idle pages of these names leave the device and host memory, leased or not, that have
        a copy on disk; all idle ones where no tier is below. On the event loop; never waits."""
        gone = Dismissed()
        own = self._own(names)

        def evict() -> None:
            nonlocal gone
            device, host = self._scheduler.blocks.evict(own), self._scheduler.tiers.evict(own)
            gone = Dismissed(device.left, host.left, device.stayed, host.stayed)

        self._act(evict)
        return gone

    def warm(self, prepared: PreparedRequest) -> Warmth:
        """Begin to bring up what is below the device of a prompt's whole pages, as much as drafts
        may have; computes nothing. On the event loop; never waits."""
        warmth = Warmth()

        def warm() -> None:
            nonlocal warmth
            warmth = self._warm(prepared)

        self._act(warm)
        return warmth

    def _warm(self, prepared: PreparedRequest) -> Warmth:
        scheduler, names = self._scheduler, prepared.names
        blocks, size = scheduler.blocks, scheduler.blocks.page_size
        tokens = token_bytes(prepared.request.tokens)
        table = PageTable(space=prepared.space)
        here = blocks.adopt(table, names, tokens, drafting=True)
        coming = 0
        for name in names[here:]:
            if blocks.claims.leader(name) is None:
                break
            coming += 1
        if not coming and scheduler.broken is None:
            most = int(scheduler.limits.drafts.pool_share * blocks.pool.total)
            room = blocks.pool.free + max(0, most - blocks.statistics().draft_pages)
            wanted = names[here : here + room]
            count = blocks.below(wanted, 0)
            begun = scheduler.tiers.begin_draft_load(
                table, wanted, tokens[4 * size * here :], wished=True
            )
            coming = count if begun else 0
        below = blocks.below(names, here + coming)
        blocks.release(table, step=0)
        return Warmth(here, coming, below, len(names) - here - coming - below)

    def _own(self, names: Collection[PageName]) -> frozenset[PageName]:
        return frozenset(name for name in names if not self._is_public(name))

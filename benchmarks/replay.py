"""Replays of a trace: through the cache's own index and pool, and through plain lists.

`through_the_index` is what the server does, with a block for a page: look a prompt's blocks up
from the first, adopt what is there, evict for the rest, name it, give everything back. A hit is a
block that is found with all before it. `in_plain_lists` are textbook policies over single blocks,
which know nothing of prefixes and may evict a parent before its child; `bound` sees the future.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from benchmarks.traces import BLOCK_TOKENS, Arrival
from chatserve.cache.eviction import EvictionPolicy
from chatserve.cache.page_pool import PageId, PagePool
from chatserve.cache.prefix_index import REMEMBERED_SLOTS, PrefixIndex
from prefix_store.names import PageName

TOKENS = bytes(4 * BLOCK_TOKENS)  # the same for all: names alone tell blocks apart
NEVER = 1 << 60
PROTECTED_SHARE = 0.2  # of SLRU's places, for what was used twice


@dataclass(slots=True)
class Hits:
    """Blocks asked for and found, before and after the split."""

    split: float
    asked_before: int = 0
    found_before: int = 0
    asked_after: int = 0
    found_after: int = 0

    def count(self, arrival: Arrival, found: int) -> None:
        if arrival.seconds < self.split:
            self.asked_before += len(arrival.blocks)
            self.found_before += found
        else:
            self.asked_after += len(arrival.blocks)
            self.found_after += found

    @property
    def rate(self) -> float:
        """Over the whole trace."""
        return (self.found_before + self.found_after) / (self.asked_before + self.asked_after)

    @property
    def rate_before(self) -> float:
        """Up to the split; 0 where nothing was asked."""
        return self.found_before / max(1, self.asked_before)

    @property
    def rate_after(self) -> float:
        """From the split on; 0 where nothing was asked."""
        return self.found_after / max(1, self.asked_after)


def block_names(arrivals: Sequence[Arrival]) -> dict[int, PageName]:
    """A name for each block, as long and as random as a real one."""
    blocks = {block for arrival in arrivals for block in arrival.blocks}
    return {block: blake2b(b"%d" % block, digest_size=32).digest() for block in blocks}


def through_the_index(
    arrivals: Sequence[Arrival],
    names: dict[int, PageName],
    policy: EvictionPolicy,
    *,
    pages: int,
    split: float,
    seconds_per_token: float = 0.0,
    remembered: int = REMEMBERED_SLOTS,
) -> Hits:
    """Replay with the given policy. seconds_per_token: a request owns its pages for its reply's
    length times this; 0: for no time at all, as published tables count. remembered: slots for the
    uses of pages that are gone."""
    replay = _Replay(
        arrivals,
        names,
        policy,
        pages=pages,
        split=split,
        seconds_per_token=seconds_per_token,
        remembered=remembered,
    )
    return replay.run()


class _Replay:
    def __init__(
        self,
        arrivals: Sequence[Arrival],
        names: dict[int, PageName],
        policy: EvictionPolicy,
        *,
        pages: int,
        split: float,
        seconds_per_token: float,
        remembered: int,
    ) -> None:
        self._arrivals = arrivals
        self._names = names
        self._now = 0.0
        self._index = PrefixIndex(eviction=policy, clock=lambda: self._now, remembered=remembered)
        self._pool = PagePool(pages)
        self._hits = Hits(split)
        self._seconds_per_token = seconds_per_token
        self._running: list[tuple[float, int, list[PageId]]] = []

    def run(self) -> Hits:
        for number, arrival in enumerate(self._arrivals):
            while self._running and self._running[0][0] <= arrival.seconds:
                self._now, _, owned = heapq.heappop(self._running)
                self._give_back(owned)
            self._now = arrival.seconds
            owned = self._prompt(arrival)
            if self._seconds_per_token:
                end = arrival.seconds + self._seconds_per_token * arrival.reply_tokens
                heapq.heappush(self._running, (end, number, owned))
            else:
                self._give_back(owned)
        return self._hits

    def _prompt(self, arrival: Arrival) -> list[PageId]:
        index, pool, names = self._index, self._pool, self._names
        owned: list[PageId] = []
        for block in arrival.blocks:
            page = index.find(names[block], TOKENS)
            if page is None:
                break
            if pool.references(page) == 0:
                index.set_owned(page)
            pool.retain(page)
            index.keep(page)
            owned.append(page)
        self._hits.count(arrival, len(owned))
        parent = names[arrival.blocks[len(owned) - 1]] if owned else None
        for block in arrival.blocks[len(owned) :]:
            if not pool.free:
                victim = index.next_victim()
                if victim is None:
                    break  # all is in use: the rest is computed and not kept
                index.remove(victim)
                pool.evict(victim)
            page = pool.allocate()
            pool.seal(page)
            index.add(page, names[block], parent, TOKENS)
            parent = names[block]
            owned.append(page)
        return owned

    def _give_back(self, owned: list[PageId]) -> None:
        for page in reversed(owned):
            self._pool.release(page, 0)
            if self._pool.references(page) == 0:
                self._index.set_idle(page)


def in_plain_lists(arrivals: Sequence[Arrival], policy: str, *, pages: int, split: float) -> Hits:
    """'fifo', 'lru' or 'slru' over single blocks. A prompt's blocks are touched from the last to
    the first, so that ends go before beginnings; fifo, which knows no use, takes them in order."""
    kinds: dict[str, Callable[[int], _Fifo | _Slru]] = {"fifo": _Fifo, "lru": _Lru, "slru": _Slru}
    cache = kinds[policy](pages)
    hits = Hits(split)
    for arrival in arrivals:
        found = 0
        for block in arrival.blocks:
            if block not in cache:
                break
            found += 1
        hits.count(arrival, found)
        for block in arrival.blocks if policy == "fifo" else reversed(arrival.blocks):
            cache.touch(block)
    return hits


class _Fifo:
    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def touch(self, block: int) -> None:
        if block not in self._blocks:
            if len(self._blocks) >= self._pages:
                self._blocks.popitem(last=False)
            self._blocks[block] = None


class _Lru(_Fifo):
    def touch(self, block: int) -> None:
        _Fifo.touch(self, block)
        self._blocks.move_to_end(block)


class _Slru:
    """Used once: on probation. Used again: protected; what has no place there is on probation
    again, as the youngest."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._protected_max = int(PROTECTED_SHARE * pages)
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._probation or block in self._protected

    def touch(self, block: int) -> None:
        if block in self._protected:
            self._protected.move_to_end(block)
        elif block in self._probation:
            del self._probation[block]
            self._protected[block] = None
            if len(self._protected) > self._protected_max:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            if len(self._probation) + len(self._protected) >= self._pages:
                (self._probation or self._protected).popitem(last=False)
            self._probation[block] = None


def bound(arrivals: Sequence[Arrival], *, pages: int, split: float) -> Hits:
    """Belady: of all blocks the one whose next use is furthest goes, and what is never used again
    is not kept at all."""
    next_uses: list[list[int]] = []
    coming: dict[int, int] = {}
    for number in range(len(arrivals) - 1, -1, -1):
        blocks = arrivals[number].blocks
        next_uses.append([coming.get(block, NEVER) for block in blocks])
        coming.update(dict.fromkeys(blocks, number))
    next_uses.reverse()
    kept: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []
    hits = Hits(split)
    for arrival, following in zip(arrivals, next_uses, strict=True):
        found = 0
        for block in arrival.blocks:
            if block not in kept:
                break
            found += 1
        hits.count(arrival, found)
        for depth, (block, use) in enumerate(zip(arrival.blocks, following, strict=True)):
            if use == NEVER:
                kept.pop(block, None)
            else:
                kept[block] = use
                heapq.heappush(order, (-use, -depth, block))
        while len(kept) > pages:
            use, _, block = heapq.heappop(order)
            if kept.get(block) == -use:
                del kept[block]
    return hits

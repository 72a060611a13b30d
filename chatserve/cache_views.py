"""Wiring: what an admin sees of the cache, as the API floor shows it: plain values for JSON."""

import asyncio
import base64
import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice

from chatserve.cache.overview import NamedRun
from chatserve.cache.page_map import (
    LEASED_BIT,
    OWNERS_MOST,
    OWNERS_SHIFT,
    STATE_BITS,
    STATES,
    PageMap,
)
from chatserve.chat.conversations.residence import Residence
from chatserve.chat.store.session_store import Unreadable
from chatserve.engine.engine import Engine
from chatserve.engine.looks import Copies
from chatserve.engine.sequence import PreparedRequest
from prefix_store.names import PageName

LABEL_BYTES = 3  # enough to tell a hundred rows apart
NAMES_A_TURN = 1024  # to be looked for before something else has its turn: about a millisecond


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A run, or the public or the own part of one. above: the place of what it continues; page: its
    first one's number; owner: None for a public one. hits: of each page."""

    above: int | None
    page: int
    owner: str | None
    names: Sequence[PageName]
    hits: Sequence[int]
    owners: int
    hits_under: int
    branches: int


class CacheViews:
    """`api.view_routes.CacheViews` of one engine."""

    def __init__(
        self,
        engine: Engine,
        residence: Residence[PreparedRequest],
        prompts_of: Callable[[PageName], Sequence[str]],
    ) -> None:
        """prompts_of: the names of the public prompts that have this page."""
        self._engine = engine
        self._residence = residence
        self._prompts_of = prompts_of
        self._label_key = secrets.token_bytes(32)

    def pages(self) -> Mapping[str, object]:
        """The page maps, and how to read them. cells: base64 of one byte a page."""
        maps = self._engine.looks.page_maps()
        return {
            "page_tokens": self._engine.cache_statistics().page_size,
            "states": STATES,
            "state_bits": STATE_BITS,
            "leased_bit": LEASED_BIT,
            "owners_shift": OWNERS_SHIFT,
            "owners_most": OWNERS_MOST,
            "device": _shown(maps.device),
            "host": None if maps.host is None else _shown(maps.host),
        }

    async def conversations(
        self, owners: Sequence[str], *, limit: int, after: str | None
    ) -> Mapping[str, object]:
        """The latest conversations of these owners, and where their pages are: each page of all
        their branches once, by the fastest place that has it; null where the store's record of them
        is damaged. updated: seconds since 1970. Nothing of what is said in them."""
        found = await self._residence.latest(owners, limit=limit, after=after)
        shown: list[Mapping[str, object]] = []
        for each in found.conversations:
            pages = None
            with contextlib.suppress(Unreadable):  # one that is damaged hides no other
                names = await self._residence.names(each.owner, each.id)
                pages = self._engine.looks.whereabouts(names)._asdict()
            fields = {"id": each.id, "owner": each.owner, "updated": each.updated}
            shown.append({**fields, "pages": pages})
        size = self._engine.cache_statistics().page_size
        return {"page_tokens": size, "conversations": shown, "next": found.next}

    async def prefixes(self, *, limit: int) -> Mapping[str, object]:
        """The shared prefixes of the device that save most, and what. See the README's route."""
        found = await self._engine.looks.shared_prefixes(limit)
        prefixes = _prefixes(found.runs, self._engine.is_public)
        size = self._engine.cache_statistics().page_size
        shown = [
            {
                "above": each.above,
                "page": each.page,
                "label": self._label(each.names[0]),
                "prompts": () if each.owner is not None else self._prompts_of(each.names[-1]),
                "owner": each.owner,
                "public": each.owner is None,
                "pages": len(each.names),
                "tokens": size * len(each.names),
                "owners": each.owners,
                "hits": each.hits[0],
                "hits_least": each.hits[-1],
                "saved_tokens": size * sum(each.hits),
                "saved_tokens_under": size * each.hits_under,
                "branches": each.branches,
                "copies": (await self._copies(each.names))._asdict(),
            }
            for each in prefixes[:limit]
        ]
        return {
            "page_tokens": size,
            "shared_tokens": size * found.pages_total,
            "saved_tokens": size * found.hits_total,
            "more": found.more or len(prefixes) > limit,
            "prefixes": shown,
        }

    def _label(self, name: PageName) -> str:
        """Of a run, by its first page: the same while this process lives, and it tells neither the
        page's name nor what it says."""
        return blake2b(name, key=self._label_key, digest_size=LABEL_BYTES).hexdigest()

    async def _copies(self, names: Sequence[PageName]) -> Copies:
        counts = (0, 0, 0)
        rest = iter(names)
        while part := tuple(islice(rest, NAMES_A_TURN)):
            copies = self._engine.looks.copies(part)
            counts = tuple(map(sum, zip(counts, copies, strict=True)))
            await asyncio.sleep(0)
        return Copies(*counts)


def _prefixes(
    runs: Sequence[NamedRun | None], is_public: Callable[[PageName], bool]
) -> list[_Prefix]:
    """The runs, cut where the public part of one ends, with the most hits under them first."""
    parts = [() if run is None else tuple(_parts(run, is_public)) for run in runs]
    # By place of the run, and of its part. What is continued stays before what continues it, as
    # sorting changes nothing among those with as many hits under them.
    order = sorted(
        ((place, part) for place, each in enumerate(parts) for part in range(len(each))),
        key=lambda at: -parts[at[0]][at[1]].hits_under,
    )
    places = {at: number for number, at in enumerate(order)}
    found: list[_Prefix] = []
    for place, part in order:
        each = parts[place][part]
        above = (place, part - 1)
        if part == 0 and each.above is not None:
            above = (each.above, len(parts[each.above]) - 1)
        found.append(replace(each, above=places.get(above)))
    return found


def _parts(named: NamedRun, is_public: Callable[[PageName], bool]) -> Iterator[_Prefix]:
    """A run is public up to some page, if at all. Only the first part knows what it continues."""
    run, names = named.run, named.names
    public = sum(map(is_public, names))
    under = run.hits_under
    for start, end, owner in ((0, public, None), (public, len(names), named.tenant)):
        if start < end:
            yield _Prefix(
                above=run.above if start == 0 else None,
                page=run.pages[start],
                owner=owner,
                names=names[start:end],
                hits=run.hits[start:end],
                owners=run.owners[start],
                hits_under=under,
                # All that follow its pages, but for those that are its own.
                branches=sum(run.followers[start:end]) - (end - start - 1),
            )
            under -= sum(run.hits[start:end])


def _shown(pages: PageMap) -> Mapping[str, object]:
    return {"pages": len(pages.cells), "cells": base64.b64encode(pages.cells).decode("ascii")}

"""Wiring: what an admin sees of the cache, as the API floor shows it: plain values for JSON."""

import base64
import contextlib
from collections.abc import Mapping, Sequence

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
from chatserve.engine.sequence import PreparedRequest


class CacheViews:
    """`api.view_routes.CacheViews` of one engine."""

    def __init__(self, engine: Engine, residence: Residence[PreparedRequest]) -> None:
        self._engine = engine
        self._residence = residence

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


def _shown(pages: PageMap) -> Mapping[str, object]:
    return {"pages": len(pages.cells), "cells": base64.b64encode(pages.cells).decode("ascii")}

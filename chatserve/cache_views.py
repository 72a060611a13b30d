"""Wiring: what an admin sees of the cache, as the API floor shows it: plain values for JSON."""

import base64
from collections.abc import Mapping

from chatserve.cache.page_map import (
    LEASED_BIT,
    OWNERS_MOST,
    OWNERS_SHIFT,
    STATE_BITS,
    STATES,
    PageMap,
)
from chatserve.engine.engine import Engine


class CacheViews:
    """`api.view_routes.CacheViews` of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

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


def _shown(pages: PageMap) -> Mapping[str, object]:
    return {"pages": len(pages.cells), "cells": base64.b64encode(pages.cells).decode("ascii")}

"""What ended requests leave in cycles is collected, however much loading has made."""

import gc
import weakref

import pytest

from chatserve import lifespan


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_old_cycles_are_collected_although_loading_made_many_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thresholds = gc.get_threshold()
    loaded: list[list[int]] = [[] for _ in range(200_000)]
    monkeypatch.setattr(lifespan, "COLLECTIONS", (100, 1, 1))
    lifespan.settle_collector()
    try:
        ring = Ring()
        for generation in (0, 1):
            gc.collect(generation)  # alive: it becomes old
        ended = weakref.ref(ring)
        del ring
        living: list[list[int]] = []
        while ended() is not None and len(living) < 20_000:
            living.append([])
        assert ended() is None, "it waits until there are a quarter as many as were loaded"
        assert len(loaded) == 200_000
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()

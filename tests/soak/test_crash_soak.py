"""kill -9 of a server under load, more than a hundred times in one life of its data folder.

The figures are printed: where the kills fell, how long starts took, how much was looked at.
"""

from pathlib import Path

import pytest

from tests.seeds import drawn_seed
from tests.wiring.crash_drive import Place
from tests.wiring.test_crash import kill_and_check

# The shares of a run; a kill that was to fall while the server starts may find it ready.
KILLS = {
    Place.ACCEPT: 18,
    Place.STREAMING: 20,
    Place.ENDING: 18,
    Place.RESUMING: 14,
    Place.STARTING: 28,
    Place.MACHINE: 6,
}
CHATTERS = 20


@pytest.mark.soak
async def test_a_hundred_kills_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    places = [place for place, count in KILLS.items() for _ in range(count)]
    assert len(places) >= 100
    seed = drawn_seed()
    await kill_and_check(tmp_path, places, seed=seed, chatters=CHATTERS, fresh=True)

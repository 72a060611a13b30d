"""kill -9 of a server under load: nothing acknowledged is lost or doubled, every reply ends."""

import random
from pathlib import Path

from tests.seeds import drawn_seed
from tests.wiring.crash_drive import CrashDrive, Place
from tests.wiring.load import holdings
from tests.wiring.server import reviving

OPTIONS = ["--dtype", "float32", "--kv-memory", "64MiB", "--log-level", "info"]
CHATTERS = 12
SETTLING_RUNS = 4


async def kill_and_check(
    folder: Path, places: list[Place], *, seed: int, chatters: int, fresh: bool = False
) -> None:
    """Kill at each place, in an order that the seed says; print what came of it. fresh: kills
    that fall while a server starts fall among its imports too."""
    dice = random.Random(seed)
    dice.shuffle(places)
    with reviving(folder, OPTIONS, fresh=fresh) as revived:
        drive = CrashDrive(revived, dice, chatters=chatters)
        await drive.undisturbed()
        await drive.run(places)
        await drive.run([])  # threads and pools of the last process come into being
        # Nor is a connection more to Redis a leak, which a livelier moment has asked for.
        before = after = holdings(revived.server)
        for _ in range(SETTLING_RUNS):
            before = after
            await drive.run([])
            after = holdings(revived.server)
            if after == before:
                break
        print(drive.figures.told())
        assert after == before
        assert after.named_pages_without_owner
        figures = drive.figures
        assert sum(figures.kills.values()) == len(places)
        assert figures.checked > 0
        assert figures.taken_up > 0
        assert not +figures.closed, "a server that is killed says nothing, and one that loads 503"
        assert "Traceback" not in revived.logs()


async def test_kills_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    places = list(Place)
    seed = drawn_seed()
    await kill_and_check(tmp_path, places, seed=seed, chatters=CHATTERS)

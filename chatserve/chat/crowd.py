"""Who is accepted and has no place in the engine yet, through whatever door they came.

On the event loop alone.  The engine is asked for room for all of them (`check_room`), so that a
crowd is refused before it is tokenized, whether it comes as requests, as turns, or as both.
"""

import asyncio


class Crowd:
    """count: of those accepted.  places: for the ones on their trip to the executor."""

    def __init__(self, places: int) -> None:
        """places: as many as the executor has workers."""
        self.count = 0
        self.places = asyncio.Semaphore(places)

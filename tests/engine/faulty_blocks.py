"""A block manager that raises where a test's plot says: what a fault of our own would do."""

from collections.abc import Callable

from chatserve.cache.below import Below
from chatserve.cache.block_manager import BlockManager
from tests.engine.build import Setup
from tests.engine.stepper import InjectedFault

METHODS = ["match", "adopt", "reserve", "fork", "seal", "truncate", "release", "settle", "claim"]
METHODS += ["begin_load", "end_load", "take_unkept", "end_keep"]
Plot = Callable[[str], str | None]


class FaultyBlocks(BlockManager):
    """A block manager whose `plot` says, call by call, where it raises: before or after."""

    plot: Plot

    def __getattribute__(self, name: str):
        found = super().__getattribute__(name)
        if name not in METHODS:
            return found
        fate = super().__getattribute__("plot")(name)

        def faulty(*arguments, **options):
            if fate == "before":
                raise InjectedFault(f"before {name}")
            result = found(*arguments, **options)
            if fate == "after":
                raise InjectedFault(f"after {name}")
            return result

        return faulty if fate else found


def faulty_maker(plot: Plot) -> Callable[[Setup, Below | None], BlockManager]:
    """What makes the block managers of a setup."""

    def make(setup: Setup, below: Below | None) -> BlockManager:
        blocks = FaultyBlocks(
            pages=setup.pages,
            page_size=setup.page_size,
            caching=setup.caching,
            below=below,
        )
        blocks.plot = plot
        return blocks

    FaultyBlocks.plot = staticmethod(lambda _name: None)  # while one is being made
    return make


def once(method: str, call: int, when: str) -> Plot:
    """Raise at one call of one method."""
    seen = 0

    def plot(name: str) -> str | None:
        nonlocal seen
        seen += name == method
        return when if name == method and seen == call else None

    return plot


class Trap:
    """A plot that raises once each time it is set, at a coming call of a method.

    Recovery itself settles its fresh pool, and is the one place that must not fail: it is never
    set to that method.
    """

    def __init__(self) -> None:
        self._plot: Plot | None = None

    def set(self, method: str, call: int, when: str) -> None:
        """Raise at the `call`th call from now on, in place of what was set before."""
        assert method != "settle", "recovery settles"
        self._plot = once(method, call, when)

    def clear(self) -> None:
        """Raise no more."""
        self._plot = None

    def __call__(self, name: str) -> str | None:
        fate = self._plot and self._plot(name)
        if fate:
            self._plot = None
        return fate

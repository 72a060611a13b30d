"""A chatserve whose model is simulated: `python -m benchmarks.simulated_server --help`.

Everything else is real: tokenizer, template, connections, scheduler, pages, the server of
conversations.  A step takes a given time whatever is in it, so the rate of each reply is known,
and what is measured is all that stands around a model.  It says words at random, or the text of a
file, over and over (`--say`).
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from chatserve.assembly import Loaded
from chatserve.assembly import load as load_real
from chatserve.cli import serve
from chatserve.engine.plan import SampleOrder, StepPlan, StepResult
from chatserve.engine.simulated_runner import SimulatedRunner
from chatserve.settings import Settings, add_options, read_settings
from prefix_store import MasterSecret

PAGES = 60_000


class SpeakingRunner(SimulatedRunner):
    """A simulated runner whose replies are all the same tokens, over and over.

    says: those tokens, none of which may end a reply; empty = words at random, as ever.
    """

    says: tuple[int, ...] = ()

    def __init__(
        self, *, pages: int, page_size: int, vocabulary_size: int, step_seconds: float
    ) -> None:
        super().__init__(
            pages=pages,
            page_size=page_size,
            vocabulary_size=vocabulary_size,
            step_seconds=step_seconds,
        )
        self._began: dict[int, int] = {}  # sequence to the position of its reply's first token

    def start(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        """A step, whose tokens are the text's."""
        result = super().start(plan, computing)
        if not self.says:
            return result
        orders = [order for item in plan.slices for order in item.orders]
        return replace(result, tokens=tuple(map(self._next, orders)))

    def _next(self, order: SampleOrder) -> int:
        began = self._began.setdefault(order.sequence, order.position)
        return self.says[(order.position - began) % len(self.says)]


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated_server")
    parser.add_argument("--step-seconds", type=float, required=True, help="how long a step takes")
    parser.add_argument("--say", type=Path, metavar="FILE", help="the text that every reply is")
    add_options(parser)
    given = parser.parse_args()
    step_seconds: float = given.step_seconds
    say: Path | None = given.say

    def load(settings: Settings, folder: Path, secret: MasterSecret) -> Loaded:
        # Its pages have another size than the real model's, so none are kept on disk.
        loaded = load_real(replace(settings, disk_capacity=0), folder, secret)
        runner = SpeakingRunner(
            pages=PAGES,
            page_size=settings.page_size,
            vocabulary_size=loaded.model.vocabulary_size,
            step_seconds=step_seconds,
        )
        if say is not None:
            runner.says = loaded.text.tokenizer.encode_text(say.read_text())
        return replace(loaded, runner=runner, pages=PAGES)

    return serve(read_settings(given, os.environ), load)


if __name__ == "__main__":
    sys.exit(main())

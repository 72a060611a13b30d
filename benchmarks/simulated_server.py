"""A chatserve whose model is simulated: `python -m benchmarks.simulated_server --help`.

Everything else is real: tokenizer, template, connections, scheduler, pages, the server of
conversations.  A step takes a given time whatever is in it, so the rate of each reply is known,
and what is measured is all that stands around a model.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from chatserve.assembly import Loaded
from chatserve.assembly import load as load_real
from chatserve.cli import serve
from chatserve.engine.simulated_runner import SimulatedRunner
from chatserve.settings import Settings, add_options, read_settings
from prefix_store import MasterSecret

PAGES = 60_000


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated_server")
    parser.add_argument("--step-seconds", type=float, required=True, help="how long a step takes")
    add_options(parser)
    given = parser.parse_args()
    step_seconds: float = given.step_seconds

    def load(settings: Settings, folder: Path, secret: MasterSecret) -> Loaded:
        # Its pages have another size than the real model's, so none are kept on disk.
        loaded = load_real(replace(settings, disk_capacity=0), folder, secret)
        runner = SimulatedRunner(
            pages=PAGES,
            page_size=settings.page_size,
            vocabulary_size=loaded.model.vocabulary_size,
            step_seconds=step_seconds,
        )
        return replace(loaded, runner=runner, pages=PAGES)

    return serve(read_settings(given, os.environ), load)


if __name__ == "__main__":
    sys.exit(main())

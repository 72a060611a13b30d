"""Eviction policies on a trace of a real chat service: hit rates by capacity.

    python -m benchmarks.eviction --trace PATH [--fit] [--seconds-per-token S] [--json FILE]

Each block of the trace (512 tokens) is a page. Capacities are shares of the different blocks of the
whole trace. A hit is a block that is found with all blocks before it. Rates are given for the whole
trace and for what comes after `--split` seconds, by default the second half hour: the constants of
our policy were chosen on the first (`--fit` shows how), so only the second is its score. No policy
sees the future but the bound.

`fifo`, `lru`, `lfu` and `patience` run through the cache's own index, where parents outlive
children; `lfu` never forgets a use, ours as much as the server does. `plain ...` are textbook
policies over single blocks: there FIFO is worse, because it drops beginnings first.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import replay, traces
from benchmarks.replay import Hits
from benchmarks.traces import Arrival
from chatserve.cache.eviction import POLICIES, EvictionPolicy, PageUse, Patience
from chatserve.cache.prefix_index import REMEMBERED_SLOTS
from prefix_store.names import PageName

CAPACITIES = (0.01, 0.05, 0.10, 0.25)
SCORED = CAPACITIES[:3]
EVERYTHING = 1 << 22  # slots of a memory of uses in which nothing is ever lost
OURS = "patience"
BOUND = "bound"
FIT_USE_SECONDS = (0.0, 75.0, 150.0, 225.0, 300.0)
FIT_RUN_SECONDS = (0.0, 20.0, 40.0, 60.0, 80.0)


@dataclass(frozen=True, slots=True)
class LeastFrequentlyUsed:
    """The fewest uses first, for comparison: what was popular once stays for ever."""

    def place(self, use: PageUse, /) -> float:
        """Its uses."""
        return use.uses


@dataclass(frozen=True, slots=True)
class Course:
    """A trace, and what all replays of it share."""

    arrivals: Sequence[Arrival]
    names: dict[int, PageName]
    unique: int
    split: float
    seconds_per_token: float

    def index(self, policy: EvictionPolicy, capacity: float, *, remembered: int) -> Hits:
        """Through the cache's own index."""
        return replay.through_the_index(
            self.arrivals,
            self.names,
            policy,
            pages=self.pages(capacity),
            split=self.split,
            seconds_per_token=self.seconds_per_token,
            remembered=remembered,
        )

    def pages(self, capacity: float) -> int:
        """A share of the different blocks."""
        return max(1, int(capacity * self.unique))


def course(arrivals: Sequence[Arrival], *, split: float, seconds_per_token: float = 0.0) -> Course:
    """Whatever is computed once for a trace."""
    names = replay.block_names(arrivals)
    return Course(arrivals, names, len(names), split, seconds_per_token)


def measure(on: Course, show: Callable[[str, list[Hits]], None]) -> dict[str, list[Hits]]:
    """Hits of each policy at each capacity."""
    table: dict[str, list[Hits]] = {}
    through: dict[str, tuple[EvictionPolicy, int]] = {
        name: (policy, REMEMBERED_SLOTS) for name, policy in POLICIES.items()
    }
    through["lfu"] = LeastFrequentlyUsed(), EVERYTHING
    for name, (policy, slots) in through.items():
        table[name] = [on.index(policy, capacity, remembered=slots) for capacity in CAPACITIES]
        show(name, table[name])
    for name in ("fifo", "lru", "slru"):
        row = [
            replay.in_plain_lists(on.arrivals, name, pages=on.pages(capacity), split=on.split)
            for capacity in CAPACITIES
        ]
        table[f"plain {name}"] = row
        show(f"plain {name}", row)
    table[BOUND] = [
        replay.bound(on.arrivals, pages=on.pages(capacity), split=on.split)
        for capacity in CAPACITIES
    ]
    show(BOUND, table[BOUND])
    return table


def score(table: dict[str, list[Hits]]) -> dict[str, dict[str, object]]:
    """After the split: ours beside the best simple policy of the same run, by capacity."""
    simple = [name for name in table if name not in (OURS, BOUND)]
    result: dict[str, dict[str, object]] = {}
    for column, capacity in enumerate(CAPACITIES):
        best = max(simple, key=lambda name: table[name][column].rate_after)
        theirs, ours = table[best][column].rate_after, table[OURS][column].rate_after
        result[f"{capacity:.0%}"] = {
            "ours": round(ours, 4),
            "best simple": round(theirs, 4),
            "which": best,
            "ratio": round(ours / theirs, 3) if theirs else None,
        }
    return result


def fit(on: Course, show: Callable[[str], None]) -> Patience:
    """The constants with the best mean rate up to the split; what comes later is not replayed."""
    first = course(
        [arrival for arrival in on.arrivals if arrival.seconds < on.split], split=on.split
    )
    best, best_rate = Patience(), -1.0
    for use_seconds in FIT_USE_SECONDS:
        for run_seconds in FIT_RUN_SECONDS:
            policy = Patience(use_seconds=use_seconds, run_seconds=run_seconds)
            rates = [
                replay.through_the_index(
                    first.arrivals, first.names, policy, pages=on.pages(capacity), split=on.split
                ).rate_before
                for capacity in SCORED
            ]
            rate = sum(rates) / len(rates)
            figures = " ".join(f"{each:.4f}" for each in rates)
            show(
                f"  uses {use_seconds:5.0f} s, run {run_seconds:4.0f} s: {figures}  mean {rate:.4f}"
            )
            if rate > best_rate:
                best, best_rate = policy, rate
    return best


def _figures(table: dict[str, list[Hits]], part: Callable[[Hits], float]) -> dict[str, list[float]]:
    return {name: [round(part(hits), 4) for hits in row] for name, row in table.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, metavar="PATH", help="JSON lines")
    parser.add_argument("--split", type=float, default=1800.0, help="scored from this second on")
    parser.add_argument(
        "--seconds-per-token",
        type=float,
        default=0.0,
        help="a request owns its pages for its reply's tokens times this (default: no time)",
    )
    parser.add_argument("--fit", action="store_true", help="choose the constants, and stop there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    given = parser.parse_args()
    trace: Path = given.trace
    arrivals = traces.read(trace)
    on = course(arrivals, split=given.split, seconds_per_token=given.seconds_per_token)
    asked = sum(len(arrival.blocks) for arrival in arrivals)
    print(f"{len(arrivals)} requests, {asked} blocks, {on.unique} different ones", flush=True)
    if given.fit:
        print(f"up to {on.split:.0f} s, at {', '.join(f'{share:.0%}' for share in SCORED)}:")
        print(f"best: {fit(on, lambda line: print(line, flush=True))}")
        return

    def show(name: str, row: list[Hits]) -> None:
        whole = " ".join(f"{hits.rate:.4f}" for hits in row)
        after = " ".join(f"{hits.rate_after:.4f}" for hits in row)
        print(f"  {name:12} {whole}   {after}", flush=True)

    heads = " ".join(f"{share:>6.0%}" for share in CAPACITIES)
    print(f"  {'':12} {heads}   {heads}   (whole trace; after {on.split:.0f} s)")
    table = measure(on, show)
    scores = score(table)
    for capacity, values in scores.items():
        print(f"{capacity:>4}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    path: Path | None = given.json
    if path is not None:
        command = f"python -m benchmarks.eviction --trace {trace.name}"
        if on.split != 1800.0:
            command += f" --split {on.split}"
        if on.seconds_per_token:
            command += f" --seconds-per-token {on.seconds_per_token}"
        report = {
            "command": command,
            "capacities": CAPACITIES,
            "whole": _figures(table, lambda hits: hits.rate),
            "after the split": _figures(table, lambda hits: hits.rate_after),
            "score": scores,
        }
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

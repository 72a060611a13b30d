"""Host time of penalties in a step: counts that are kept, against counts made anew.

    python -m benchmarks.penalties [--rows 64] [--tokens 8192] [--steps 50]

Each step gives every line one token, as two steps in flight do: the event loop counts the last one
that is known, the runner's thread one more, which it has just heard of, and says what becomes of
single logits. Ids are drawn as words are (Zipf's law). Both ways must say the same.
"""

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chatserve.engine.token_counts import TokenCounts
from chatserve.model import SampleRow
from chatserve.model.sampling import adjustments_of
from chatserve_kernels.sampling import Adjustments

VOCABULARY = 151_936
EXPONENT = 1.2  # of how rare the next rarer id is
PENALTIES = {
    "repetition": {"repetition_penalty": 1.1},
    "all three": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
    },
}


@dataclass(slots=True)
class _Line:
    """tokens: all of them, the first `prompt` being the prompt. counts: of all but the last one."""

    tokens: "array[int]"
    prompt: int
    counts: TokenCounts

    def kept(self) -> TokenCounts:
        """Of all tokens, from those that were kept."""
        self.counts = self.counts.with_one(self.tokens[-2])
        return self.counts.with_one(self.tokens[-1])

    def anew(self) -> TokenCounts:
        """The same, from the beginning."""
        return TokenCounts.of(self.tokens, self.prompt)


def _adjustments(
    lines: list[_Line], count: Callable[[_Line], TokenCounts], penalties: dict[str, float]
) -> Adjustments:
    counted = map(count, lines)
    rows = [
        SampleRow(ids=each.ids, generated=each.generated, **penalties)  # pyright: ignore[reportArgumentType]
        for each in counted
    ]
    adjustments = adjustments_of(rows, VOCABULARY)
    assert adjustments is not None
    return adjustments


def measure(rows: int, tokens: int, steps: int, penalties: dict[str, float]) -> tuple[float, float]:
    """Milliseconds of a step, kept and anew: medians."""
    dice = np.random.default_rng(1)
    lines: list[_Line] = []
    for _ in range(rows):
        ids = array("i", (dice.zipf(EXPONENT, tokens) % VOCABULARY).tolist())
        lines.append(_Line(ids, tokens // 2, TokenCounts.of(ids[:-1], tokens // 2)))
    times: dict[str, list[float]] = {"kept": [], "anew": []}
    for _ in range(steps):
        for line in lines:
            line.tokens.append(int(dice.zipf(EXPONENT)) % VOCABULARY)
        given: list[Adjustments] = []
        for name, count in (("kept", _Line.kept), ("anew", _Line.anew)):
            started = time.perf_counter()
            given.append(_adjustments(lines, count, penalties))
            times[name].append(1000 * (time.perf_counter() - started))
        for name in ("rows", "ids", "bias", "repetition", "subtracted"):
            kept, anew = (getattr(each, name) for each in given)
            assert np.array_equal(kept, anew), f"{name} differ"
    distinct = statistics.fmean(len(line.counts.ids) for line in lines)
    print(f"{rows} lines of {tokens} tokens, {distinct:.0f} ids each")
    return statistics.median(times["kept"]), statistics.median(times["anew"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Host time of penalties, in milliseconds a step.")
    parser.add_argument("--rows", type=int, default=64, help="lines with penalties at once")
    parser.add_argument("--tokens", type=int, default=8192, help="of each line at the beginning")
    parser.add_argument("--steps", type=int, default=50, help="steps that are measured")
    options = parser.parse_args()
    for name, penalties in PENALTIES.items():
        kept, anew = measure(options.rows, options.tokens, options.steps, penalties)
        print(f"  {name:10}  kept {kept:6.2f} ms   anew {anew:6.2f} ms")


if __name__ == "__main__":
    main()

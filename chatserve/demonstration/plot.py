"""Draw the training log: `python -m chatserve.demonstration.plot [LOG] [PICTURE.svg]`.

Two panels share the axis of steps: the loss (a logarithmic scale, smoothed over ten lines of the
log) above, the share of held-out recall probes that were right below.  Written as SVG by hand, so
that no plotting library is needed.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.checkpoint import LOG

WIDTH, HEIGHT, LEFT, RIGHT = 720, 420, 60, 20
LOSS_TOP, LOSS_BOTTOM, SHARE_TOP, SHARE_BOTTOM = 40, 200, 250, 380
SMOOTHING = 10
LOSS_COLOUR = "#555555"
# The shares of the log by their names, with a colour each.
SHARES = {"near": "#1f77b4", "far": "#d62728", "corrected": "#2ca02c"}

Point = tuple[float, float]


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log, oldest first; a step written twice counts as written last."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it, over the smoothing length."""
    return [
        sum(values[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING)
        for i in range(len(values))
    ]


def line(points: Sequence[Point], colour: str) -> str:
    """A curve."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def label(x: float, y: float, text: str, *, anchor: str = "end", colour: str = "#333333") -> str:
    """A piece of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def grid(y: float, text: str) -> str:
    """A horizontal line and its value."""
    rule = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
    return rule + label(LEFT - 6, y + 4, text)


def loss_panel(rows: Sequence[dict[str, float]], across: Callable[[float], float]) -> list[str]:
    """The upper panel."""
    values = smoothed([row["loss"] for row in rows])
    low = math.floor(math.log10(min(values)))
    high = math.ceil(math.log10(max(values)))

    def down(value: float) -> float:
        share = (math.log10(value) - low) / max(1, high - low)
        return LOSS_BOTTOM - share * (LOSS_BOTTOM - LOSS_TOP)

    marks = [grid(down(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)]
    points = [(across(row["step"]), down(value)) for row, value in zip(rows, values, strict=True)]
    return [*marks, line(points, LOSS_COLOUR)]


def share_panel(rows: Sequence[dict[str, float]], across: Callable[[float], float]) -> list[str]:
    """The lower panel."""

    def down(share: float) -> float:
        return SHARE_BOTTOM - share * (SHARE_BOTTOM - SHARE_TOP)

    parts = [grid(down(share), f"{share:.0%}") for share in (0, 0.5, 1)]
    for index, (name, colour) in enumerate(SHARES.items()):
        points = [(across(row["step"]), down(row[name])) for row in rows if name in row]
        parts.append(line(points, colour))
        place = LEFT + 130 + 90 * index
        parts.append(label(place, SHARE_TOP - 10, name, anchor="start", colour=colour))
    return parts


def picture(rows: Sequence[dict[str, float]]) -> str:
    """The whole picture as SVG."""
    last = max(row["step"] for row in rows)

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    steps = [last * share / 4 for share in range(5)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        label(LEFT, LOSS_TOP - 12, "loss on the assistant's tokens", anchor="start"),
        label(LEFT, SHARE_TOP - 10, "held-out recall", anchor="start"),
        *loss_panel(rows, across),
        *share_panel(rows, across),
        *(label(across(step), HEIGHT - 20, f"{step:,.0f}", anchor="middle") for step in steps),
        label(WIDTH - RIGHT, HEIGHT - 5, "steps"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.demonstration.plot")
    parser.add_argument("log", nargs="?", type=Path, default=MODEL_FOLDER / LOG)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/training.svg"))
    options = parser.parse_args()
    rows = read_log(options.log)
    if not rows:
        parser.error(f"{options.log} holds no line yet")
    options.picture.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

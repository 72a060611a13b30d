"""What a comparison found: medians, ratios, a table, JSON, and a picture.

A ratio is how many times better chatserve is than a peer: its tokens a second through the peer's,
the peer's seconds or bytes through its own.  Above 1 it is ahead, below 1 behind, in every row.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.compare_scenarios import Kind, Samples

OURS = "chatserve"
ROW, BAR, LEFT, WIDTH, RIGHT = 16, 10, 230, 420, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
# Ratios farther from 1 are drawn at the edge; their numbers are beside their bars.
RATIO_SHOWN_MAX = 64.0


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: the servers' medians in the kind's unit, and the ratios by peer."""

    figure: str
    kind: Kind
    medians: Mapping[str, float]
    ratios: Mapping[str, float]


def ratio(kind: Kind, ours: float, theirs: float) -> float | None:
    """How many times better ours is; None where nothing is, or they are not ranked."""
    upper, lower = (ours, theirs) if kind.better == "more" else (theirs, ours)
    return upper / lower if kind.better and lower > 0 else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples and commands by server, chatserve first."""

    samples: Mapping[str, Samples]
    commands: Mapping[str, str]

    def rows(self) -> list[Row]:
        """Every figure that any server has."""
        kinds: dict[str, Kind] = {}
        for samples in self.samples.values():
            kinds |= samples.kinds
        return [self._row(figure, kind) for figure, kind in kinds.items()]

    def _row(self, figure: str, kind: Kind) -> Row:
        medians = {
            name: kind.factor * statistics.median(samples.values[figure])
            for name, samples in self.samples.items()
            if samples.values.get(figure)
        }
        ratios: dict[str, float] = {}
        for name, value in medians.items():
            if name != OURS and OURS in medians:
                found = ratio(kind, medians[OURS], value)
                if found is not None:
                    ratios[name] = found
        return Row(figure, kind, medians, ratios)

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        return [
            f"{name} does not count its tokens (usage): its deltas are counted"
            for name, samples in self.samples.items()
            if not samples.counted
        ]

    def table(self) -> str:
        """A line for each figure."""
        names = list(self.samples)
        heads = ["", "", OURS]
        for name in names[1:]:
            heads += [name, "better"]
        lines = [heads]
        for row in self.rows():
            line = [row.figure, row.kind.unit, told(row.medians.get(OURS))]
            for name in names[1:]:
                line += [told(row.medians.get(name)), told(row.ratios.get(name), " x")]
            lines.append(line)
        widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
        told_lines = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*told_lines, *self.notes()])

    def write_json(self, path: Path, command: str) -> None:
        """Everything, with no path in it that begins at a root."""
        figures = {
            row.figure: {
                "unit": row.kind.unit,
                "better": row.kind.better,
                "medians": {name: round(value, 4) for name, value in row.medians.items()},
                "ratios": {name: round(value, 4) for name, value in row.ratios.items()},
                "samples": {
                    name: len(samples.values.get(row.figure, ()))
                    for name, samples in self.samples.items()
                },
                "least and most": {
                    name: [round(row.kind.factor * end(values), 4) for end in (min, max)]
                    for name, samples in self.samples.items()
                    if (values := samples.values.get(row.figure))
                },
            }
            for row in self.rows()
        }
        report = {
            "command": command,
            "servers": dict(self.commands),
            "notes": self.notes(),
            "figures": figures,
        }
        path.write_text(json.dumps(report, indent=2) + "\n")

    def write_picture(self, path: Path) -> None:
        """The ratios as bars from a line at 1, in SVG."""
        path.write_text(picture([row for row in self.rows() if row.ratios], self._peers()))

    def _peers(self) -> list[str]:
        return [name for name in self.samples if name != OURS]


def told(value: float | None, unit: str = "") -> str:
    """Three digits or more; a line where there is nothing."""
    if value is None:
        return "–"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit}"


def picture(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """A bar for each figure and peer, its length the logarithm of the ratio."""
    middle = LEFT + WIDTH / 2
    top = 44
    parts: list[str] = [
        _text(middle, 14, "chatserve against its peers, times better", "middle", weight="bold")
    ]
    place = float(LEFT)
    for peer, colour in zip(peers, _colours(peers), strict=True):
        parts.append(f'<rect x="{place:.0f}" y="22" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(place + 14, 31, peer))
        place += 30 + 7 * len(peer)
    y = float(top)
    for row in rows:
        parts.append(_text(LEFT - 8, y + ROW * len(row.ratios) / 2 + 4, row.figure, "end"))
        for peer, colour in zip(peers, _colours(peers), strict=True):
            if peer not in row.ratios:
                continue
            parts += _bar(row.ratios[peer], middle, y + (ROW - BAR) / 2, colour)
            y += ROW
        y += 6
    parts.append(
        f'<line x1="{middle:.0f}" x2="{middle:.0f}" y1="{top - 4}" y2="{y:.0f}" stroke="#333333"/>'
    )
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{y + 10:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'{head} font-size="12">', background, *parts, "</svg>", ""])


def _bar(value: float, middle: float, y: float, colour: str) -> list[str]:
    edge = math.log(RATIO_SHOWN_MAX)
    length = max(-edge, min(edge, math.log(value))) / edge * WIDTH / 2
    left, right = min(middle, middle + length), max(middle, middle + length)
    bar = f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="{BAR}"'
    anchor, x = ("start", right + 4) if length >= 0 else ("end", left - 4)
    return [f'{bar} fill="{colour}"/>', _text(x, y + BAR - 1, told(value, " x"), anchor)]


def _colours(peers: Sequence[str]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(peers))]


def _text(x: float, y: float, text: str, anchor: str = "start", *, weight: str = "normal") -> str:
    where = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {where} fill="#333333">{escape(text)}</text>'

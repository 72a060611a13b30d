"""The picture of a training log."""

import json
import re
from pathlib import Path

import pytest

from chatserve.demonstration import plot

ROWS = [
    {"step": 25, "loss": 1.0},
    {"step": 50, "loss": 0.1, "near": 0.5, "far": 0.25, "corrected": 0.0},
    {"step": 100, "loss": 0.01, "near": 1.0, "far": 0.5, "corrected": 0.75},
]


def curves(text: str) -> dict[str, list[tuple[float, float]]]:
    """Points by colour."""
    found = re.findall(r'<polyline points="([^"]*)" fill="none" stroke="([^"]*)"', text)
    return {
        colour: [tuple(map(float, point.split(","))) for point in points.split()]  # pyright: ignore[reportReturnType]
        for points, colour in found
    }


def test_curves_stand_where_the_log_says() -> None:
    drawn = curves(plot.picture(ROWS))
    near = drawn[plot.SHARES["near"]]
    width = plot.WIDTH - plot.LEFT - plot.RIGHT
    assert near == [
        (plot.LEFT + width / 2, (plot.SHARE_TOP + plot.SHARE_BOTTOM) / 2),
        (plot.LEFT + width, plot.SHARE_TOP),
    ]
    assert drawn[plot.SHARES["corrected"]][0][1] == plot.SHARE_BOTTOM
    loss = drawn[plot.LOSS_COLOUR]
    assert [x for x, _ in loss] == [plot.LEFT + width * step / 100 for step in (25, 50, 100)]
    assert loss[0][1] == plot.LOSS_TOP, "the highest, 1, is the upper edge"
    assert loss[0][1] < loss[1][1] < loss[2][1] <= plot.LOSS_BOTTOM, "smaller is lower"


def test_losses_are_means_over_the_lines_before() -> None:
    many = [float(n) for n in range(1, 31)]
    assert plot.smoothed(many)[:3] == [1.0, 1.5, 2.0]
    assert plot.smoothed(many)[-1] == sum(many[-plot.SMOOTHING :]) / plot.SMOOTHING


def test_a_step_written_twice_counts_as_written_last(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [*ROWS, {"step": 50, "loss": 0.5}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = plot.read_log(log)
    assert [row["step"] for row in read] == [25, 50, 100]
    assert read[1] == {"step": 50, "loss": 0.5}


def test_the_command_draws_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, target = tmp_path / "log.jsonl", tmp_path / "picture.svg"
    log.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr("sys.argv", ["plot", str(log), str(target)])
    plot.main()
    assert target.read_text() == plot.picture(ROWS)
    log.write_text("")
    with pytest.raises(SystemExit):
        plot.main()

"""Prometheus' text format.

It may not know who counts. Owners offer frozen statistics; a table of `Metric` rows names the
fields and what they mean (`metric_tables.py`), and `families` picks them.
Names carry base units and counters end in `_total`, so that what reads vLLM's reads ours.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

Kind = Literal["counter", "gauge", "histogram"]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: the family's name, a suffix, labels, a value."""

    value: float
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name."""

    name: str
    kind: Kind
    meaning: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of a table: a field of a statistics dataclass as a metric.

    field: its name, or "" for the dataclass itself. label: what tells the samples apart when
    the value is a mapping (its keys do), or a dataclass, of which `parts` names the attributes
    to show and their label values.
    """

    field: str
    name: str
    kind: Kind
    meaning: str
    label: str = ""
    parts: tuple[tuple[str, str], ...] = ()


@runtime_checkable
class Distribution(Protocol):
    """A histogram's figures: counts has one more entry than bounds, for what is above them."""

    @property
    def bounds(self) -> Sequence[float]:
        """Upper bounds, growing."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """Observations per bucket, not cumulated."""
        ...

    @property
    def sum(self) -> float:
        """Of all observations."""
        ...


class Histogram:
    """Counts observations into fixed buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of the same value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count


def families(statistics: object, table: Iterable[Metric]) -> list[Family]:
    """The rows whose fields these statistics have, with their values."""
    found: list[Family] = []
    for metric in table:
        value = getattr(statistics, metric.field, None) if metric.field else statistics
        if value is not None:
            samples = _samples(metric, cast(object, value))
            found.append(Family(metric.name, metric.kind, metric.meaning, samples))
    return found


def histogram(name: str, meaning: str, distribution: Distribution) -> Family:
    """A histogram as a family."""
    return Family(name, "histogram", meaning, _buckets(distribution))


def render(all_families: Iterable[Family]) -> bytes:
    """The text that a scrape reads."""
    lines: list[str] = []
    for family in all_families:
        lines.append(f"# HELP {family.name} {_escaped(family.meaning)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines.extend(_line(family.name, sample) for sample in family.samples)
    return ("\n".join(lines) + "\n").encode()


def _samples(metric: Metric, value: object) -> tuple[Sample, ...]:
    if metric.parts:
        return tuple(
            Sample(float(getattr(value, attribute)), ((metric.label, shown),))
            for attribute, shown in metric.parts
        )
    if isinstance(value, int | float):
        return (Sample(float(value)),)
    if isinstance(value, Distribution):
        return _buckets(value)
    assert isinstance(value, Mapping), f"{metric.field} is neither a number nor a mapping"
    counts = cast(Mapping[object, float], value)
    return tuple(
        Sample(float(count), ((metric.label, str(getattr(key, "value", key))),))
        for key, count in counts.items()
    )


def _buckets(distribution: Distribution) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    below = 0
    for bound, count in zip(distribution.bounds, distribution.counts, strict=False):
        below += count
        samples.append(Sample(below, (("le", _number(bound)),), "_bucket"))
    everything = sum(distribution.counts)
    samples.append(Sample(everything, (("le", "+Inf"),), "_bucket"))
    samples.append(Sample(distribution.sum, (), "_sum"))
    samples.append(Sample(everything, (), "_count"))
    return tuple(samples)


def _line(name: str, sample: Sample) -> str:
    labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels)
    return f"{name}{sample.suffix}{'{' + labels + '}' if labels else ''} {_number(sample.value)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

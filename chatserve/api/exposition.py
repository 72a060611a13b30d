"""Prometheus' text format, and the tables that say which figure is which metric.

It may not know who counts. Owners offer frozen statistics; a table of `Metric` rows names the
fields and what they mean (vLLM's meanings where vLLM has the metric), and `families` picks them.
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

    label: for a field that is a mapping, what its keys are.
    """

    field: str
    name: str
    kind: Kind
    meaning: str
    label: str = ""


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
    def total(self) -> float:
        """The sum of all observations."""
        ...


class Histogram:
    """Counts observations into fixed buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of the same value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.total += value * count


ENGINE_METRICS = (
    Metric(
        "num_requests_running",
        "chatserve_num_requests_running",
        "gauge",
        "Requests in the engine's running batch.",
    ),
    Metric(
        "num_requests_waiting",
        "chatserve_num_requests_waiting",
        "gauge",
        "Requests waiting to be scheduled.",
    ),
    Metric("prompt_tokens", "chatserve_prompt_tokens_total", "counter", "Prompt tokens taken in."),
    Metric(
        "generation_tokens",
        "chatserve_generation_tokens_total",
        "counter",
        "Tokens generated.",
    ),
    Metric(
        "prefix_cache_queries",
        "chatserve_prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
    ),
    Metric(
        "prefix_cache_hits",
        "chatserve_prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
    ),
    Metric(
        "preemptions",
        "chatserve_num_preemptions_total",
        "counter",
        "Times a running sequence had to give its pages back.",
    ),
    Metric("steps", "chatserve_steps_total", "counter", "Steps of the engine."),
    Metric("step_seconds", "chatserve_step_seconds", "histogram", "Duration of a step."),
)

CACHE_METRICS = (
    Metric("pages", "chatserve_pages", "gauge", "Device pages by state.", label="state"),
    Metric(
        "kv_cache_usage",
        "chatserve_kv_cache_usage_perc",
        "gauge",
        "Share of the device pages in use by running requests; 1 is all of them.",
    ),
    Metric(
        "evictions",
        "chatserve_page_evictions_total",
        "counter",
        "Cached pages given up for new ones.",
    ),
    Metric(
        "claims_followed",
        "chatserve_claims_followed_total",
        "counter",
        "Requests that waited for another one to compute their common prefix.",
    ),
)


def families(statistics: object, table: Iterable[Metric]) -> list[Family]:
    """The rows whose fields these statistics have, with their values."""
    found: list[Family] = []
    for metric in table:
        value = getattr(statistics, metric.field, None)
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
    samples.append(Sample(distribution.total, (), "_sum"))
    samples.append(Sample(everything, (), "_count"))
    return tuple(samples)


def _line(name: str, sample: Sample) -> str:
    labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels)
    return f"{name}{sample.suffix}{'{' + labels + '}' if labels else ''} {_number(sample.value)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

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


ENGINE_METRICS = (
    Metric(
        "running", "chatserve_num_requests_running", "gauge", "Sequences that steps compute now."
    ),
    Metric("waiting", "chatserve_num_requests_waiting", "gauge", "Sequences that wait for a step."),
    Metric(
        "following",
        "chatserve_num_requests_following",
        "gauge",
        "Sequences that wait for another one to compute their common prefix.",
    ),
    Metric("in_flight", "chatserve_steps_in_flight", "gauge", "Steps ordered and not committed."),
    Metric("budget_tokens", "chatserve_step_budget_tokens", "gauge", "The next step's budget."),
    Metric("steps_total", "chatserve_steps_total", "counter", "Steps that gave a result."),
    Metric("step_tokens_total", "chatserve_step_tokens_total", "counter", "Tokens of all steps."),
    Metric("step_seconds", "chatserve_step_seconds", "histogram", "How long a step takes."),
    Metric(
        "prompt_tokens_total",
        "chatserve_prefill_tokens_total",
        "counter",
        "Prompt tokens computed; those found in the cache are not.",
    ),
    Metric(
        "generated_tokens_total",
        "chatserve_generation_tokens_total",
        "counter",
        "Tokens generated.",
    ),
    Metric(
        "preemptions_total",
        "chatserve_num_preemptions_total",
        "counter",
        "Times a running sequence had to give its pages back.",
    ),
    Metric("failed_steps_total", "chatserve_failed_steps_total", "counter", "Steps that raised."),
    Metric(
        "recoveries_total",
        "chatserve_recoveries_total",
        "counter",
        "Times the engine went on after a failed step.",
    ),
    Metric(
        "quarantined", "chatserve_quarantined", "gauge", "Inputs refused because they broke steps."
    ),
    Metric(
        "finished_total",
        "chatserve_sequences_finished_total",
        "counter",
        "Sequences by their end in the engine.",
        label="finished_reason",
    ),
)

PAGE_STATES = ("free", "open", "loading", "sealed", "cached", "leaving")

CACHE_METRICS = (
    Metric(
        "pages",
        "chatserve_pages",
        "gauge",
        "Device pages by state.",
        label="state",
        parts=tuple((state, state) for state in PAGE_STATES),
    ),
    Metric(
        "query_tokens",
        "chatserve_prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
    ),
    Metric(
        "hit_tokens",
        "chatserve_prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
    ),
    Metric("named_pages", "chatserve_named_pages", "gauge", "Pages that a prefix can be found in."),
    Metric("logical_pages", "chatserve_logical_pages", "gauge", "Owned pages, once per owner."),
    Metric("physical_pages", "chatserve_physical_pages", "gauge", "Owned pages, each once."),
    Metric("sealed_total", "chatserve_pages_sealed_total", "counter", "Pages filled and named."),
    Metric(
        "copies_total", "chatserve_page_copies_total", "counter", "Partial pages copied at a write."
    ),
    Metric(
        "",
        "chatserve_page_evictions_total",
        "counter",
        "Cached pages given up.",
        label="reason",
        parts=(("evicted_for_space_total", "space"), ("evicted_by_flush_total", "flush")),
    ),
    Metric(
        "claims",
        "chatserve_claims",
        "gauge",
        "Prefix names that are being computed, and sequences that wait for them.",
        label="kind",
        parts=(("claimed", "claimed"), ("waiting", "waiting")),
    ),
)


def cache_usage(statistics: object) -> list[Family]:
    """vLLM's share of pages in use: cached pages count as free, because they can be had."""
    pages: object = getattr(statistics, "pages", None)
    total = getattr(pages, "total", 0)
    if not total:
        return []
    available: int = getattr(pages, "free", 0) + getattr(pages, "cached", 0)
    meaning = "Share of the device pages in use; 1 is all of them."
    sample = Sample((total - available) / total)
    return [Family("chatserve_kv_cache_usage_perc", "gauge", meaning, (sample,))]


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

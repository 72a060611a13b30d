"""Samples: what moves in the server, as one row of plain values a second.

`COLUMNS` names a row's values; units are in the names: pages, tokens, bytes, seconds, and
`_a_second` for what two readings differ by, divided by the seconds between them. A value is null
where there is nothing to tell it from: no such tier, no step in that time, no reading shortly
before. Pages on the disk may have been counted by processes before this one.

Like `metric_tables.py` it names fields of frozen statistics and knows nothing else of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, cast

Value = float | int | str | None
Row = tuple[Value, ...]
Statistics = Mapping[str, object]

TEXT_LENGTH_MAX = 200  # of a sentence about what is wrong

# What there is now: the column, whose statistics, which field.
_NOW = (
    ("page_bytes", "engine", "page_bytes"),
    ("device_pages", "cache", "pages.total"),
    ("device_free_pages", "cache", "pages.free"),
    ("device_open_pages", "cache", "pages.open"),
    ("device_loading_pages", "cache", "pages.loading"),
    ("device_sealed_pages", "cache", "pages.sealed"),
    ("device_cached_pages", "cache", "pages.cached"),
    ("device_leaving_pages", "cache", "pages.leaving"),
    ("device_leased_pages", "cache", "leased_pages"),
    ("device_draft_pages", "cache", "draft_pages"),
    ("logical_pages", "cache", "logical_pages"),
    ("physical_pages", "cache", "physical_pages"),
    ("host_pages", "host", "total"),
    ("host_free_pages", "host", "free"),
    ("host_filling_pages", "host", "filling"),
    ("host_held_pages", "host", "held"),
    ("host_cached_pages", "host", "cached"),
    ("host_leased_pages", "host", "leased"),
    ("disk_pages", "slab", "pages"),
    ("disk_bytes", "disk", "bytes"),
    ("disk_capacity_bytes", "disk", "capacity_bytes"),
    ("disk_degraded", "disk", "degraded"),
    ("query_tokens", "cache", "query_tokens"),
    ("hit_tokens", "cache", "hit_tokens"),
    ("running", "engine", "running"),
    ("waiting", "engine", "waiting"),
    ("following", "engine", "following"),
    ("drafts", "engine", "drafts"),
    ("engine_broken", "engine", "broken"),
    ("replies_running", "conversations", "running"),
    ("accepted_waiting", "conversations", "waiting"),
    ("change_subscribers", "conversations", "subscribers"),
    ("store_kind", "store", "kind"),
    ("store_available", "store", "available"),
    ("store_durable", "store", "durable"),
    ("store_ours", "store", "ours"),
)

# What is counted since some start: a column of its growth in a second.
_GROWS = (
    ("query_tokens_a_second", "cache", "query_tokens"),
    ("hit_tokens_a_second", "cache", "hit_tokens"),
    ("device_named_pages_a_second", "cache", "sealed_total"),
    ("device_evicted_for_space_a_second", "cache", "evicted_for_space_total"),
    ("device_evicted_by_flush_a_second", "cache", "evicted_by_flush_total"),
    ("device_evicted_by_age_a_second", "cache", "evicted_by_age_total"),
    ("device_evicted_by_name_a_second", "cache", "evicted_by_name_total"),
    ("host_saved_pages_a_second", "host", "saved_total"),
    ("host_promoted_pages_a_second", "host", "promoted_total"),
    ("host_evicted_for_space_a_second", "host", "evicted_total"),
    ("host_evicted_by_flush_a_second", "host", "flushed_total"),
    ("disk_written_pages_a_second", "slab", "writes"),
    ("disk_read_pages_a_second", "slab", "hits"),
    ("disk_written_bytes_a_second", "slab", "write_bytes"),
    ("disk_read_bytes_a_second", "slab", "read_bytes"),
    ("disk_evicted_for_space_a_second", "slab", "evictions.space"),
    ("disk_evicted_by_age_a_second", "slab", "evictions.age"),
    ("disk_evicted_as_orphan_a_second", "slab", "evictions.orphan"),
    ("disk_evicted_by_name_a_second", "slab", "evictions.forgotten"),
    ("disk_evicted_as_bad_a_second", "slab", "evictions.bad"),
    ("disk_errors_a_second", "slab", "io_errors"),
    ("prompt_tokens_a_second", "engine", "prompt_tokens_total"),
    ("generated_tokens_a_second", "engine", "generated_tokens_total"),
    ("steps_a_second", "engine", "steps_total"),
    ("preemptions_a_second", "engine", "preemptions_total"),
    ("store_calls_a_second", "store", "calls"),
    ("store_failures_a_second", "store", "failures"),
)

# How long each of what was counted took: the column, whose, the sum of seconds, the count.
_MEANS = (
    ("step_mean_seconds", "engine", "step_seconds.sum", "steps_total"),
    ("store_call_mean_seconds", "store", "seconds_total", "calls"),
)

# Pages by their size: the column, and the one of pages.
_BYTES = (
    ("host_saved_bytes_a_second", "host_saved_pages_a_second"),
    ("host_promoted_bytes_a_second", "host_promoted_pages_a_second"),
)

COLUMNS = (
    "at",  # seconds since 1970
    "seconds",  # that the growths are of; null where there are none
    "streams_open",
    *(column for column, *_ in _NOW),
    *(column for column, *_ in _GROWS),
    *(column for column, *_ in _MEANS),
    *(column for column, _ in _BYTES),
    "step_99th_percentile_seconds",  # of the last minute, see `percentile`
)
_GETTERS = {
    path: attrgetter(path)
    for _, _, *paths in (*_NOW, *_GROWS, *_MEANS)
    for path in paths  # whose they are is found by name
}


class StepTimes(Protocol):
    """`engine.statistics.Histogram`: observations by upper bound in seconds; the last count is of
    those above all."""

    @property
    def bounds(self) -> tuple[float, ...]: ...
    @property
    def counts(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """All of it at one moment. clock: seconds of a monotonic clock. steps: None while loading."""

    clock: float
    now: Row
    counted: tuple[float | None, ...]
    means: tuple[tuple[float | None, float | None], ...]
    steps: StepTimes | None


def read(statistics: Statistics, clock: float) -> Reading:
    """A reading of frozen statistics. Who has none gives null."""
    whose = dict(statistics)
    whose["host"] = getattr(getattr(whose.get("engine"), "tiers", None), "host", None)
    slabs = cast("tuple[object, ...]", getattr(whose.get("disk"), "slabs", ()))
    whose["slab"] = slabs[0] if slabs else None

    def number(name: str, path: str) -> float | None:
        return cast("float | None", _field(whose.get(name), path))

    return Reading(
        clock=clock,
        now=tuple(_shown(_field(whose.get(name), path)) for _, name, path in _NOW),
        counted=tuple(number(name, path) for _, name, path in _GROWS),
        means=tuple((number(name, total), number(name, n)) for _, name, total, n in _MEANS),
        steps=cast("StepTimes | None", getattr(whose.get("engine"), "step_seconds", None)),
    )


def row(
    reading: Reading, before: Reading | None, minute: Reading | None, *, at: float, streams: int
) -> Row:
    """A sample. before: the reading a second ago; minute: the one a minute ago, or the oldest
    since. at: seconds since 1970. streams: answers that are open now."""
    seconds = None if before is None else reading.clock - before.clock
    grown: list[float | None] = [None] * len(_GROWS)
    means: list[float | None] = [None] * len(_MEANS)
    if before is not None and seconds:
        grown = [
            None if growth is None else round(growth / seconds, 3)
            for growth in map(_growth, reading.counted, before.counted)
        ]
        for index, (new, old) in enumerate(zip(reading.means, before.means, strict=True)):
            total, count = _growth(new[0], old[0]), _growth(new[1], old[1])
            means[index] = round(total / count, 6) if total is not None and count else None
    page_bytes = cast("int | None", reading.now[0])
    pages = dict(zip((column for column, *_ in _GROWS), grown, strict=True))
    sizes = [
        round(moved * page_bytes) if moved is not None and page_bytes else None
        for moved in (pages[column] for _, column in _BYTES)
    ]
    slow = None if minute is None else percentile(reading.steps, minute.steps, 0.99)
    rounded = None if seconds is None else round(seconds, 3)
    return (round(at, 3), rounded, streams, *reading.now, *grown, *means, *sizes, slow)


def percentile(now: StepTimes | None, before: StepTimes | None, share: float) -> float | None:
    """Seconds that this share of the steps between two readings did not exceed, found between the
    two bounds of its place as if the steps there lay evenly; the highest bound for what is above
    it. None where there were none."""
    if now is None or before is None:
        return None
    counts = [new - old for new, old in zip(now.counts, before.counts, strict=True)]
    wanted = share * sum(counts)
    if not wanted:
        return None
    low = 0.0
    for bound, count in zip(now.bounds, counts, strict=False):
        if count and wanted <= count:
            return round(low + (bound - low) * wanted / count, 6)
        wanted -= count
        low = bound
    return low


def _field(owner: object, path: str) -> object:
    return None if owner is None else _GETTERS[path](owner)


def _shown(value: object) -> Value:
    if isinstance(value, str):
        return value[:TEXT_LENGTH_MAX]
    return cast("Value", value)


def _growth(now: float | None, before: float | None) -> float | None:
    """What was counted is counted anew where a tier begins again: then it is all new."""
    if now is None or before is None:
        return None
    return now - before if now >= before else now

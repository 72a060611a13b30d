"""What the engine counts: frozen pictures for metrics, and the one mutable book behind them."""

from bisect import bisect_left
from dataclasses import dataclass, field

from chatserve.cache.host_pages import HostStatistics
from chatserve.engine.values import FinishReason

# Seconds. From a fast decode step on a GPU to a long slice on two cores.
STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by upper bound (the last count is for those above all bounds), and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatistics:
    """Decisions, in requests, and measured rates, in seconds each (None: not measured).

    load_page, keep_page: by the I/O threads. move_page: between device and host memory. host: None
    where there is no host tier.
    """

    loads_total: int = 0
    recomputes_total: int = 0
    load_page_seconds: float | None = None
    keep_page_seconds: float | None = None
    compute_token_seconds: float | None = None
    move_page_seconds: float | None = None
    host: HostStatistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """The engine at one moment. *_total count from the start of the process.

    running, waiting (queued or suspect) and following are sequences. budget_tokens: the next
    step's token budget. broken: why the device is given up, if it is. io_faults: jobs of the I/O
    threads, or parts of them, that ended with an exception. keep_processor_seconds: what they took
    of a processor to copy pages down. page_bytes: of a page's K and V;
    0: not known.
    """

    running: int
    waiting: int
    following: int
    in_flight: int
    budget_tokens: int
    steps_total: int
    step_tokens_total: int
    step_seconds: Histogram
    prompt_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    failed_steps_total: int
    recoveries_total: int
    quarantined: int
    finished_total: dict[str, int]
    broken: str | None
    drafts: int = 0
    draft_tokens_total: int = 0
    io_faults_total: int = 0
    keep_processor_seconds_total: float = 0.0
    page_bytes: int = 0
    tiers: TierStatistics = field(default_factory=TierStatistics)


@dataclass(slots=True)
class EngineCounts:
    """The running sums. Written by the scheduler alone."""

    steps: int = 0
    step_tokens: int = 0
    seconds_sum: float = 0.0
    seconds_counts: list[int] = field(default_factory=lambda: [0] * (len(STEP_SECONDS_BOUNDS) + 1))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    recoveries: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )

    def step(self, tokens: int, seconds: float) -> None:
        """Book a step that gave a result."""
        self.steps += 1
        self.step_tokens += tokens
        self.seconds_sum += seconds
        self.seconds_counts[bisect_left(STEP_SECONDS_BOUNDS, seconds)] += 1

    def histogram(self) -> Histogram:
        """Step times, frozen."""
        return Histogram(STEP_SECONDS_BOUNDS, tuple(self.seconds_counts), self.seconds_sum)

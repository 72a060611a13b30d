"""What the API floor itself counts: how long answers take, and how they end.

It may not know how figures are shown (`exposition.py`). A `Telemetry` lives as long as the app; a
`ReplyClock` watches one answer. Only monotonic clocks.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from chatserve.api.exposition import Family, Histogram, Sample, histogram
from chatserve.chat.values import Delta, Done, SampleEnd

# vLLM's buckets, so that dashboards compare.
_FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Telemetry:
    """Counters and histograms of the API floor."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first_token = Histogram(_FIRST_TOKEN_BOUNDS)
        self.inter_token = Histogram(_INTER_TOKEN_BOUNDS)
        self.request = Histogram(_REQUEST_BOUNDS)
        self.prompt_tokens = 0
        self.finishes: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()

    def answered(self, path: str, status: int) -> None:
        """One HTTP request is over."""
        del path  # a label per path would let clients invent metrics
        self.statuses[status] += 1

    def families(self, serving: int) -> list[Family]:
        """Everything, for a scrape."""
        finishes = tuple(
            Sample(count, (("finished_reason", reason),))
            for reason, count in sorted(self.finishes.items())
        )
        statuses = tuple(
            Sample(count, (("status", str(status)),))
            for status, count in sorted(self.statuses.items())
        )
        return [
            histogram(
                "chatserve_time_to_first_token_seconds",
                "From the whole request to its first text.",
                self.first_token,
            ),
            histogram(
                "chatserve_inter_token_latency_seconds",
                "Between two tokens of one choice; merged tokens share their interval.",
                self.inter_token,
            ),
            histogram(
                "chatserve_e2e_request_latency_seconds",
                "From the whole request to the end of its answer.",
                self.request,
            ),
            Family(
                "chatserve_prompt_tokens_total",
                "counter",
                "Prompt tokens of finished requests, cached ones included.",
                (Sample(self.prompt_tokens),),
            ),
            Family("chatserve_request_success_total", "counter", "Choices by their end.", finishes),
            Family(
                "chatserve_http_responses_total", "counter", "Answers by their status.", statuses
            ),
            Family(
                "chatserve_http_requests_serving",
                "gauge",
                "Requests for an answer that are open now.",
                (Sample(serving),),
            ),
        ]


class ReplyClock:
    """Times one answer: call it at each event, in order."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._began = telemetry.clock()
        self._first_seen = False
        self._last: dict[int, float] = {}

    def delta(self, choice: int, delta: Delta) -> None:
        """New text of a choice."""
        now = self._telemetry.clock()
        if not self._first_seen:
            self._first_seen = True
            self._telemetry.first_token.observe(now - self._began)
        last = self._last.get(choice)
        self._last[choice] = now
        if last is not None:
            tokens = max(1, len(delta.token_ids))
            self._telemetry.inter_token.observe((now - last) / tokens, tokens)

    def end(self, end: SampleEnd) -> None:
        """A choice is over."""
        self._telemetry.finishes[end.finish_reason] += 1

    def done(self, results: Sequence[Done]) -> None:
        """The whole answer is over."""
        self._telemetry.prompt_tokens += sum(result.usage.prompt_tokens for result in results)
        self._telemetry.request.observe(self._telemetry.clock() - self._began)

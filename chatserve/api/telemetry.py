"""What the API floor itself counts: how long answers take, and how they end.

It may not know how figures are shown (`exposition.py`). A `Telemetry` lives as long as the app; a
`ReplyClock` watches one answer; chats' replies are measured where they are made (`chat/meter.py`).
Only monotonic clocks.
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
    """Counters and histograms. The chat floor's ReplyMeter, for replies that no request owns."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._first_token = Histogram(_FIRST_TOKEN_BOUNDS)
        self._inter_token = Histogram(_INTER_TOKEN_BOUNDS)
        self._request = Histogram(_REQUEST_BOUNDS)
        self._prompt_tokens = 0
        self._finishes: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()

    def first_token(self, seconds: float) -> None:
        """From the whole request to the first token."""
        self._first_token.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` more tokens of one sample, so long after the ones before."""
        self._inter_token.observe(seconds / count, count)

    def sample_over(self, finish_reason: str) -> None:
        """A sample has ended."""
        self._finishes[finish_reason] += 1

    def reply_over(self, seconds: float, prompt_tokens: int) -> None:
        """All samples have, so long after the whole request."""
        self._prompt_tokens += prompt_tokens
        self._request.observe(seconds)

    def answered(self, path: str, status: int) -> None:
        """One HTTP request is over."""
        del path  # a label per path would let clients invent metrics
        self._statuses[status] += 1

    def families(self, serving: int) -> list[Family]:
        """Everything, for a scrape."""
        finishes = tuple(
            Sample(count, (("finished_reason", reason),))
            for reason, count in sorted(self._finishes.items())
        )
        statuses = tuple(
            Sample(count, (("status", str(status)),))
            for status, count in sorted(self._statuses.items())
        )
        return [
            histogram(
                "chatserve_time_to_first_token_seconds",
                "From the whole request to its first text.",
                self._first_token,
            ),
            histogram(
                "chatserve_inter_token_latency_seconds",
                "Between two tokens of one choice; merged tokens share their interval.",
                self._inter_token,
            ),
            histogram(
                "chatserve_e2e_request_latency_seconds",
                "From the whole request to the end of its answer.",
                self._request,
            ),
            Family(
                "chatserve_prompt_tokens_total",
                "counter",
                "Prompt tokens of finished requests, cached ones included.",
                (Sample(self._prompt_tokens),),
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
            self._telemetry.first_token(now - self._began)
        last = self._last.get(choice)
        self._last[choice] = now
        if last is not None:
            self._telemetry.next_tokens(now - last, max(1, len(delta.token_ids)))

    def end(self, end: SampleEnd) -> None:
        """A choice is over."""
        self._telemetry.sample_over(end.finish_reason)

    def done(self, results: Sequence[Done]) -> None:
        """The whole answer is over."""
        tokens = sum(result.usage.prompt_tokens for result in results)
        self._telemetry.reply_over(self._telemetry.clock() - self._began, tokens)

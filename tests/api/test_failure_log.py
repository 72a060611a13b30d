"""What the log says while the store is away: one line of a kind, then counts, no tracebacks."""

import logging
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from chatserve.api.failure_log import COUNT_SECONDS, ERROR_LOGGER, KINDS_MAX, FailureLog
from chatserve.errors import EngineError, Unavailable
from tests.api.harness import site

AWAY = "The store of conversations is away."


class Timers:
    """`call_later` under the test's control."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        assert seconds == COUNT_SECONDS
        self.due.append(callback)

    def ring(self) -> None:
        due, self.due = self.due, []
        for callback in due:
            callback()


def scope(path: str, **params: str) -> dict[str, Any]:
    state = {"request_id": "abc"}
    return {"type": "http", "method": "GET", "path": path, "path_params": params, "state": state}


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    ours = [record for record in caplog.records if record.name == ERROR_LOGGER]
    caplog.clear()
    return [(record.levelname, orjson.loads(record.getMessage())) for record in ours]


def test_a_storm_is_one_line_and_then_counts_until_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    timers = Timers()
    log = FailureLog(timers.later)
    route = {"event": "unavailable", "route": "GET /api/replies/{id}/events", "reason": AWAY}

    def storm(count: int) -> None:
        for number in range(count):
            log.note(scope(f"/api/replies/r{number}/events", id=f"r{number}"), Unavailable(AWAY))

    storm(1_000)
    assert lines(caplog) == [("WARNING", route | {"request": "abc"})]
    timers.ring()
    assert lines(caplog) == [("WARNING", route | {"times": 999, "seconds": COUNT_SECONDS})]
    storm(3)
    timers.ring()
    assert lines(caplog) == [("WARNING", route | {"times": 3, "seconds": COUNT_SECONDS})]
    timers.ring()
    assert lines(caplog) == []
    assert timers.due == []
    storm(1)
    assert lines(caplog) == [("WARNING", route | {"request": "abc"})]


def test_another_reason_is_another_line_but_not_without_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    timers = Timers()
    log = FailureLog(timers.later)
    for number in range(10 * KINDS_MAX):
        log.note(scope("/ready"), Unavailable(f"Reason {number}."))
    assert len(lines(caplog)) == KINDS_MAX + 1
    timers.ring()
    ((_, others),) = lines(caplog)
    assert (others["route"], others["times"]) == ("others", 9 * KINDS_MAX - 1)


def test_what_nobody_expects_keeps_its_traceback_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = FailureLog(Timers().later)
    for _ in range(2):
        try:
            raise EngineError("secret")
        except EngineError as error:
            log.note(scope("/v1/chat/completions"), error)
    for level, line in lines(caplog):
        assert level == "ERROR"
        assert line["error"] == "EngineError"
        assert line["traceback"]
        assert "secret" not in str(line)


async def test_an_outage_is_a_line_for_each_route(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "chatserve")
    async with site() as served, served.client() as client:
        served.conversations.refusal = Unavailable(AWAY, retry_after=2.0)
        for _ in range(20):
            answer = await client.post("/api/conversations", json={})
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == AWAY
            gone = await client.patch("/api/conversations/c1", json={"title": "x"})
            assert gone.status_code == 503
    found = [(level, line["route"], line["reason"]) for level, line in lines(caplog)]
    assert found == [
        ("WARNING", "POST /api/conversations", AWAY),
        ("WARNING", "PATCH /api/conversations/{id}", AWAY),
    ]

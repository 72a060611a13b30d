"""Health, readiness, metrics, the cache's statistics, errors and logs."""

import asyncio
import dataclasses
import logging
from dataclasses import dataclass

import orjson
import pytest

from chatserve.api.access_log import ACCESS_LOGGER
from chatserve.api.exposition import (
    Family,
    Histogram,
    Metric,
    Sample,
    families,
    histogram,
    render,
)
from chatserve.api.failure_log import ERROR_LOGGER
from chatserve.api.metric_tables import (
    CACHE_METRICS,
    CONVERSATION_METRICS,
    ENGINE_METRICS,
    KNOWN_METRICS,
    LOG_METRICS,
    STORE_METRICS,
)
from tests.api.harness import (
    CACHE_STATISTICS,
    CHAT,
    CONVERSATION_STATISTICS,
    ENGINE_STATISTICS,
    KNOWN_STATISTICS,
    STORE_STATISTICS,
    site,
)

ALL_TABLES = (
    ENGINE_METRICS,
    CACHE_METRICS,
    CONVERSATION_METRICS,
    LOG_METRICS,
    STORE_METRICS,
    KNOWN_METRICS,
)


async def test_health_and_readiness_follow_the_state() -> None:
    async with site() as running, running.client() as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        running.health.ready = False
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        assert answer.headers["retry-after"] == "2"
        assert (await client.get("/health")).status_code == 200
        running.health.ready, running.health.draining = True, True
        assert (await client.get("/ready")).json() == {"status": "draining"}
        running.health.healthy = False
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("fault", ["loading", "draining"])
async def test_asks_are_refused_while_loading_or_draining(fault: str) -> None:
    async with site() as running, running.client() as client:
        running.health.ready = fault != "loading"
        running.health.draining = fault == "draining"
        answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["type"] == "server_error"
        assert (await client.get("/v1/models")).status_code == 200
        assert not running.service.asks


async def test_metrics_show_every_floor() -> None:
    more = [Family("chatserve_more", "gauge", "More.", (Sample(1.5),))]
    async with site(more_families=lambda: more) as running, running.client() as client:
        await client.post("/v1/chat/completions", json=CHAT)
        await client.get("/nowhere")
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert "chatserve_num_requests_running 3" in lines
    assert "chatserve_prefix_cache_hits_total 64" in lines
    assert 'chatserve_pages{state="free"} 60' in lines
    assert 'chatserve_page_evictions_total{reason="flush"} 6' in lines
    assert 'chatserve_sequences_finished_total{finished_reason="length"} 1' in lines
    assert 'chatserve_step_seconds_bucket{le="1"} 7' in lines
    assert "chatserve_step_seconds_sum 1.5" in lines
    assert 'chatserve_claims{kind="waiting"} 2' in lines
    assert "chatserve_kv_cache_usage_perc 0.1" in lines
    assert "chatserve_prompt_tokens_total 10" in lines
    assert "chatserve_time_to_first_token_seconds_count 1" in lines
    assert "chatserve_inter_token_latency_seconds_count 2" in lines
    assert "chatserve_e2e_request_latency_seconds_count 1" in lines
    assert 'chatserve_request_success_total{finished_reason="stop"} 1' in lines
    assert 'chatserve_http_responses_total{status="404"} 1' in lines
    assert "chatserve_http_requests_serving 0" in lines
    assert "chatserve_known_links 3" in lines
    assert "chatserve_more 1.5" in lines
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert all(name.startswith("chatserve_") for name in names)


async def test_the_cache_page_shows_the_statistics_as_they_are() -> None:
    async with site() as running, running.client() as client:
        shown = (await client.get("/admin/cache")).json()
    assert shown["cache"] == dataclasses.asdict(CACHE_STATISTICS)
    assert shown["engine"]["steps_total"] == 7
    assert shown["engine"]["step_seconds"]["counts"] == [5, 2, 0]


def test_a_histogram_is_cumulative_and_ends_in_infinity() -> None:
    steps = Histogram((0.1, 1.0))
    steps.observe(0.1)
    steps.observe(0.5, 2)
    steps.observe(7.0)
    assert render([histogram("x_seconds", 'A "b"\nc.', steps)]).decode().splitlines() == [
        '# HELP x_seconds A \\"b\\"\\nc.',
        "# TYPE x_seconds histogram",
        'x_seconds_bucket{le="0.1"} 1',
        'x_seconds_bucket{le="1"} 3',
        'x_seconds_bucket{le="+Inf"} 4',
        "x_seconds_sum 8.1",
        "x_seconds_count 4",
    ]


def test_a_table_picks_the_fields_that_there_are() -> None:
    @dataclass(frozen=True)
    class Statistics:
        steps_total: int
        step_seconds: Histogram
        by_state: dict[str, int]

    found = families(
        Statistics(3, Histogram((1.0,)), {"free": 2}),
        [*ENGINE_METRICS, Metric("by_state", "chatserve_x", "gauge", "X.", label="state")],
    )
    assert [family.name for family in found] == [
        "chatserve_steps_total",
        "chatserve_step_seconds",
        "chatserve_x",
    ]
    assert found[2].samples == (Sample(2.0, (("state", "free"),)),)


def test_every_row_of_the_tables_finds_its_field() -> None:
    for statistics, table in (
        (ENGINE_STATISTICS, ENGINE_METRICS),
        (CACHE_STATISTICS, CACHE_METRICS),
        (CONVERSATION_STATISTICS, CONVERSATION_METRICS),
        (CONVERSATION_STATISTICS.log, LOG_METRICS),
        (STORE_STATISTICS, STORE_METRICS),
        (KNOWN_STATISTICS, KNOWN_METRICS),
    ):
        assert len(families(statistics, table)) == len(table)
        assert table in ALL_TABLES


def test_every_metric_is_named_in_base_units() -> None:
    metrics = [metric for table in ALL_TABLES for metric in table]
    for metric in metrics:
        assert metric.name.startswith("chatserve_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.meaning.endswith(".")
    names = [metric.name for metric in metrics]
    assert len(set(names)) == len(names)


async def test_metrics_before_the_model_is_loaded_are_the_apis_own() -> None:
    nothing = {"cache": None, "engine": None}
    async with site(statistics=lambda: nothing) as running, running.client() as client:
        assert "chatserve_http_requests_serving 0" in (await client.get("/metrics")).text
        assert (await client.get("/admin/cache")).json() == nothing


async def test_unknown_routes_and_methods_are_answered_in_openais_shape() -> None:
    async with site() as running, running.client() as client:
        missing = await client.get("/v1/nowhere")
        assert missing.status_code == 404
        assert missing.json()["error"] == {
            "message": "No such route.",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
        wrong = await client.put("/v1/chat/completions", json={})
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert wrong.json()["error"]["code"] == "method_not_allowed"
        assert (await client.head("/health")).status_code == 200


async def test_logs_tell_what_happened_and_never_what_was_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a-very-secret-word"
    body = CHAT | {"messages": [{"role": "user", "content": secret}], "stream": True}
    async with site() as running, running.client() as client:
        for path in ("/v1/chat/completions", f"/v1/completions?q={secret}"):
            await client.post(path, json=body, headers={"Authorization": f"Bearer {secret}"})
        running.service.refusal = RuntimeError(secret)
        await client.post("/v1/chat/completions", json=body)
        await client.get("/health")
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    assert secret not in "".join(record.getMessage() for record in ours)
    access = [orjson.loads(r.getMessage()) for r in ours if r.name == ACCESS_LOGGER]
    assert [(line["path"], line["status"], line["complete"]) for line in access] == [
        ("/v1/chat/completions", 200, True),
        ("/v1/completions", 400, True),
        ("/v1/chat/completions", 500, True),
    ]
    assert all(line["tenant"] == "local" and line["seconds"] > 0 for line in access)
    (failure,) = [orjson.loads(r.getMessage()) for r in ours if r.name == ERROR_LOGGER]
    assert failure["error"] == "RuntimeError"
    assert failure["request"] == access[2]["request"]
    assert any(" open" in frame for frame in failure["traceback"])


async def test_busy_is_answered_at_once() -> None:
    async with site() as running, running.client() as client:
        await client.get("/health")
        loop = asyncio.get_running_loop()
        running.health.draining = True
        began = loop.time()
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        assert loop.time() - began < 0.5

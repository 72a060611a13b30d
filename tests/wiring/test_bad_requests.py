"""Generated requests against the real server: no 5xx, and nothing is left of any of them.

What the API lets through reaches the real engine here, at values that only just pass.
"""

from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.harness import MODEL
from tests.api.test_bad_requests import BODIES, LONG, SHORT
from tests.wiring.server import Server, running

OPTIONS = ["--served-model-name", MODEL.name, "--context-length", "96", "--kv-memory", "4MiB"]
OPTIONS += ["--log-level", "warning"]
EDGES = {
    "temperature": [0, 1e-300, 1e-9, 2.0],
    "top_p": [1e-300, 1e-9, 1.0],
    "min_p": [0, 1e-300, 1.0],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "repetition_penalty": [0.01, 1e-300, 1e-45, 100.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "logit_bias": [{"5": -100}, {"5": 100, "6": 100}, {"2047": 100}, {"99999": 1}],
    "seed": [-(2**63), 2**63 - 1],
    "n": [1, 3, 128, 129],
    "max_tokens": [1, 95, 96, 10**9],
    "min_tokens": [0, 50, 95],
    "stop": ["", " ", "e", ["a", "b"]],
    "stop_token_ids": [[0], [2047], [2048], [-1]],
    "ignore_eos": [True, False],
    "priority": [-11, -10, 10, 2**31 - 1],
    "logprobs": [True, 0, 5, 20],
    "stream": [True, False],
}
EDGE_BODIES = st.fixed_dictionaries(
    {"model": st.just(MODEL.name)},
    optional={name: st.sampled_from(values) for name, values in EDGES.items()},
).flatmap(
    lambda fields: st.sampled_from(
        [
            fields | {"prompt": "Hello"},
            fields | {"prompt": ["a", "b", ""]},
            fields | {"prompt": [5, 6, 7]},
            fields | {"messages": [{"role": "user", "content": "Hello"}]},
        ]
    )
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("bad"), OPTIONS) as started:
        yield started
        state = started.wait_for("idle")
        assert state["engine"]["failed_steps_total"] == 0
        assert state["engine"]["recoveries_total"] == 0
        assert state["engine"]["finished_total"]["error"] == 0  # type: ignore[index]
        assert "Traceback" not in started.log.read_text()


def check(server: Server, body: Any) -> None:
    chat = not (isinstance(body, dict) and "prompt" in body)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    try:
        content = orjson.dumps(body)
    except TypeError:  # integers that JSON numbers of 64 bits do not hold
        content = repr(body).encode("utf-8", "surrogatepass")
    answer = httpx.post(
        server.url + path,
        content=content,
        headers={"Content-Type": "application/json"},
        timeout=120,
    )
    assert answer.status_code < 500, answer.text
    assert '"error"' not in answer.text or answer.status_code >= 400, answer.text


@given(body=EDGE_BODIES)
@SHORT
def test_values_at_the_edges(server: Server, body: Any) -> None:
    check(server, body)


@given(body=BODIES)
@SHORT
def test_generated_bodies(server: Server, body: Any) -> None:
    check(server, body)


@pytest.mark.soak
@given(body=st.one_of(EDGE_BODIES, BODIES))
@LONG
def test_generated_bodies_for_long(server: Server, body: Any) -> None:
    check(server, body)

"""Routes for whoever runs the server: health, readiness, metrics, the cache's statistics.

Statistics are frozen dataclasses of other floors; nothing here knows what their fields mean but
through `metric_tables.py`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.answer import Desk
from chatserve.api.collaborators import Health
from chatserve.api.exposition import CONTENT_TYPE, Family, render
from chatserve.api.metric_tables import all_families

Statistics = Callable[[], Mapping[str, object]]


def operator_routes(
    desk: Desk,
    *,
    statistics: Statistics,
    more_families: Callable[[], list[Family]],
) -> list[BaseRoute]:
    """`/health`, `/ready`, `/metrics` and `/admin/cache`."""

    async def health(request: Request) -> Response:
        good = desk.health.healthy
        return _state("ok" if good else "failed", desk.health, good=good)

    async def ready(request: Request) -> Response:
        state = desk.health
        if state.draining:
            return _state("draining", state, good=False)
        return _state("ready" if state.ready else "loading", state, good=state.ready)

    async def metrics(request: Request) -> Response:
        shown = [
            *all_families(statistics()),
            *desk.telemetry.families(desk.gate.serving),
            *more_families(),
        ]
        return Response(render(shown), media_type=CONTENT_TYPE)

    async def admin_cache(request: Request) -> Response:
        body = orjson.dumps(statistics(), option=orjson.OPT_NON_STR_KEYS, default=_plain)
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/admin/cache", admin_cache, methods=["GET"]),
    ]


def _state(word: str, health: Health, *, good: bool) -> Response:
    headers = {"Cache-Control": "no-store"}
    if not good:
        headers["Retry-After"] = str(max(1, math.ceil(health.retry_after)))
    return Response(
        orjson.dumps({"status": word}),
        status_code=200 if good else 503,
        headers=headers,
        media_type="application/json",
    )


def _plain(value: object) -> object:
    """What orjson cannot write by itself: sets, paths, digests, mappings that are not dicts."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, frozenset | set):
        return sorted(value, key=str)  # pyright: ignore[reportUnknownVariableType]
    if hasattr(value, "items"):
        return dict(value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    raise TypeError(f"{type(value).__name__} is not a plain value")

"""Puts the API floor together: one Starlette app from collaborators that arrive by name.

Theory of operation, from the outside in: `AccessLog` gives an id, answers errors, logs; `Door`
decides who may go on, `Uncoded` refuses bodies that are compressed, the router picks the route;
`RouteFirst` says that there is none before what is wrong with a body for it. The wiring floor
(`lifespan.py`) starts and ends what is behind the collaborators.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import Lifespan, Receive, Scope, Send

from chatserve.api.access_log import AccessLog
from chatserve.api.answer import Desk
from chatserve.api.body import BodyBudget
from chatserve.api.cache_routes import CacheActions, cache_routes
from chatserve.api.chat_collaborators import Conversations
from chatserve.api.chat_routes import chat_routes
from chatserve.api.collaborators import ChatService, Health, ModelInfo
from chatserve.api.exposition import Family
from chatserve.api.gate import RateLimit, RequestGate
from chatserve.api.keys import KeyRing
from chatserve.api.limits import Limits
from chatserve.api.media import RouteFirst, Uncoded
from chatserve.api.openai_routes import openai_routes
from chatserve.api.operator_routes import operator_routes
from chatserve.api.page_routes import STATIC_PATHS, page_routes
from chatserve.api.problems import from_http_exception, problem_response
from chatserve.api.prompt_routes import PublicPrompts, prompt_routes
from chatserve.api.sample_routes import sample_routes
from chatserve.api.sampler import Sampler
from chatserve.api.security import Door, Policy
from chatserve.api.session import Sessions
from chatserve.api.session_routes import session_routes
from chatserve.api.socket import socket_routes
from chatserve.api.telemetry import Telemetry
from chatserve.api.view_routes import view_routes
from chatserve.errors import NotFound


def build_app(
    *,
    service: ChatService,
    describe_model: Callable[[], ModelInfo],
    limits: Limits,
    health: Health,
    keys: KeyRing,
    cookie_key: bytes,
    statistics: Callable[[], Mapping[str, object]],
    conversations: Conversations | None = None,
    prompts: Callable[[], PublicPrompts] | None = None,
    cache: Callable[[], CacheActions] | None = None,
    more_families: Callable[[], list[Family]] = list,
    telemetry: Telemetry | None = None,
    sampler: Sampler | None = None,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """The app, ready for `server.py`. cookie_key: at least 32 bytes, the same after a restart.

    conversations: None = a server without them, whose routes are then not there. prompts: finds
    the public prompts, or raises Unavailable while loading; None as above. cache: the same for
    what an admin does to the cache. sampler: for a test, with a clock of its own.
    """
    # At its debug level the library logs every chunk, and those are what people say.
    logging.getLogger("sse_starlette").setLevel(logging.INFO)
    telemetry = telemetry or Telemetry()
    desk = Desk(
        service=service,
        describe_model=describe_model,
        limits=limits,
        health=health,
        gate=RequestGate(),
        budget=BodyBudget(limits.body_bytes_total_max),
        telemetry=telemetry,
    )
    sessions = Sessions(
        cookie_key, keys, seconds=limits.session_seconds, ended_max=limits.sessions_ended_max
    )
    attempts = RateLimit(
        limits.session_attempts_max, limits.session_attempts_seconds, limits.session_addresses_max
    )
    policy = Policy.of(
        keys,
        sessions,
        host=host,
        allowed_hosts=allowed_hosts,
        cors_origins=cors_origins,
        static_paths=STATIC_PATHS,
    )
    app = Starlette(
        routes=[
            *openai_routes(desk),
            *operator_routes(
                desk,
                statistics=statistics,
                more_families=more_families,
            ),
            *session_routes(keys, sessions, attempts, desk.budget),
            *page_routes(),
            *([] if conversations is None else chat_routes(desk, conversations)),
            *([] if conversations is None else socket_routes(desk, conversations)),
            *([] if prompts is None else prompt_routes(desk, prompts)),
            *([] if cache is None else cache_routes(desk, cache)),
            *([] if cache is None else view_routes(limits, keys, lambda: cache().views)),
            *sample_routes(desk, sampler or Sampler(statistics, lambda: desk.gate.serving)),
            WebSocketRoute("/{path:path}", _NoSuchSocket()),
        ],
        middleware=[
            Middleware(AccessLog, on_answer=telemetry.answered),
            Middleware(RouteFirst),
            Middleware(Door, policy=policy),
            Middleware(Uncoded),
        ],
        exception_handlers={HTTPException: _refused_by_router},
        lifespan=lifespan,
    )
    # A path means one thing: what the door has authorised is exactly what is routed.
    app.router.redirect_slashes = False
    return app


class _NoSuchSocket:
    """The router would refuse a handshake without a word."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotFound("No such route.")


async def _refused_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem_response(from_http_exception(error), dict(error.headers or {}))

"""Public prompts: system prompts that an admin shares with all tenants, under `/admin/prompts`.

    GET     all of them
    POST    {"name", "text"}: 201, or 200 where nothing is new; another text replaces the first
    DELETE  /admin/prompts/NAME: 204

It may not know what a page is: a prompt has so many, says who keeps them. The door lets admins
only come here (`security.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.answer import Desk
from chatserve.api.body import decode_object, read_body
from chatserve.api.schema import convert
from chatserve.api.wire import JsonObject

_PATH = "/admin/prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInfo:
    """A registered prompt. tokens: that every chat with it begins with; pages: whole ones of them,
    which tenants share. posted: it came by POST, not from a file, and is kept over restarts."""

    name: str
    pages: int
    tokens: int
    posted: bool


class PublicPrompts(Protocol):
    """Where they are kept."""

    def prompts(self) -> Sequence[PromptInfo]:
        """All of them, by name."""
        ...

    async def register(self, name: str, text: str) -> tuple[PromptInfo, bool]:
        """Share a prompt; returns whether anything is new. Raises a ChatserveError."""
        ...

    async def unregister(self, name: str) -> None:
        """Share it no more. Raises NotFound, or another ChatserveError."""
        ...


class PromptFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/prompts`."""

    name: str
    text: str


def prompt_routes(desk: Desk, find: Callable[[], PublicPrompts]) -> list[BaseRoute]:
    """find: raises Unavailable while the model is loading."""

    async def show(request: Request) -> Response:
        return _json({"prompts": [_shown(each) for each in find().prompts()]})

    async def register(request: Request) -> Response:
        prompts = find()
        with desk.budget.lease() as lease:
            limit = desk.limits.body_bytes_max
            body = await read_body(request.headers, request.receive, lease=lease, limit=limit)
            fields = convert(decode_object(body), PromptFields)
            del body
            made, new = await prompts.register(fields.name, fields.text)
        return _json(_shown(made), 201 if new else 200)

    async def unregister(request: Request) -> Response:
        await find().unregister(request.path_params["name"])
        return Response(status_code=204)

    return [
        Route(_PATH, show, methods=["GET"]),
        Route(_PATH, register, methods=["POST"]),
        Route(f"{_PATH}/{{name}}", unregister, methods=["DELETE"]),
    ]


def _shown(prompt: PromptInfo) -> JsonObject:
    return {
        "name": prompt.name,
        "pages": prompt.pages,
        "tokens": prompt.tokens,
        "source": "posted" if prompt.posted else "file",
    }


def _json(value: JsonObject, status: int = 200) -> Response:
    return Response(
        orjson.dumps(value),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

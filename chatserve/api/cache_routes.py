"""What an admin does to the cache, under `/admin/cache`. The door wants an admin's key.

    POST flush    {}                          all idle pages leave memory
    POST lease    {"conversation", "seconds"} others' pages leave before this one's; 0 ends it
    POST warm     {"conversation"}            its pages are brought to the device
    POST evict    {"conversation"}            its idle pages that are on the disk leave memory
    POST forget   {"conversation"}            it is deleted, as by its owner: kept nowhere
    POST verify   {"pages"}                   so many pages of the disk are read and checked

Each answers with numbers of pages, `forget` with that of conversations. Actions pass through the
engine's loop, as everything does that changes pages. It may not know what a page is, nor who owns a
conversation: an admin may name any.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Protocol, TypeVar

import orjson
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.answer import Desk
from chatserve.api.body import decode_object, read_body
from chatserve.api.schema import convert
from chatserve.api.view_routes import CacheViews
from chatserve.engine.verifier import VERIFY_PAGES_MAX
from chatserve.engine.wishes import LEASE_SECONDS_MAX

_PATH = "/admin/cache"
BODY_BYTES_MAX = 4096  # two short fields

Counts = Mapping[str, int]
ConversationId = Annotated[str, Meta(min_length=1, max_length=256)]


class CacheActions(Protocol):
    """What is done; each answers with numbers of pages by place. All may raise Unavailable, and
    NotFound for an unknown conversation."""

    @property
    def views(self) -> CacheViews:
        """What an admin sees."""
        ...

    def flush(self) -> Counts:
        """Empty memory of pages that nobody owns."""
        ...

    async def lease(self, conversation: str, seconds: float) -> Counts:
        """Others leave before the pages that this one has in memory, for so many seconds."""
        ...

    async def warm(self, conversation: str) -> Counts:
        """Bring its pages to the device, as far as they are kept."""
        ...

    async def evict(self, conversation: str) -> Counts:
        """Its idle pages leave memory."""
        ...

    async def forget(self, conversation: str) -> Counts:
        """Delete it, with all that was kept of it."""
        ...

    async def verify(self, pages: int) -> Counts:
        """Check so many pages of the disk, drawn at random. Raises Busy while others are."""
        ...


class ConversationFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/cache/warm`, `evict` and `forget`."""

    conversation: ConversationId


class LeaseFields(ConversationFields, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/cache/lease`."""

    seconds: Annotated[float, Meta(ge=0.0, le=LEASE_SECONDS_MAX)]


class VerifyFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /admin/cache/verify`."""

    pages: Annotated[int, Meta(ge=1, le=VERIFY_PAGES_MAX)]


FieldsT = TypeVar("FieldsT", bound=Struct)


def cache_routes(desk: Desk, find: Callable[[], CacheActions]) -> list[BaseRoute]:
    """find: raises Unavailable while the model is loading."""

    async def asked(request: Request, kind: type[FieldsT]) -> FieldsT:
        with desk.budget.lease() as lease:
            limit = min(BODY_BYTES_MAX, desk.limits.body_bytes_max)
            body = await read_body(request.headers, request.receive, lease=lease, limit=limit)
            return convert(decode_object(body), kind)

    async def flush(request: Request) -> Response:
        return _json(find().flush())

    async def lease(request: Request) -> Response:
        actions = find()
        fields = await asked(request, LeaseFields)
        return _json(await actions.lease(fields.conversation, fields.seconds))

    async def warm(request: Request) -> Response:
        actions = find()
        fields = await asked(request, ConversationFields)
        return _json(await actions.warm(fields.conversation))

    async def evict(request: Request) -> Response:
        actions = find()
        fields = await asked(request, ConversationFields)
        return _json(await actions.evict(fields.conversation))

    async def forget(request: Request) -> Response:
        actions = find()
        fields = await asked(request, ConversationFields)
        return _json(await actions.forget(fields.conversation))

    async def verify(request: Request) -> Response:
        actions = find()
        fields = await asked(request, VerifyFields)
        return _json(await actions.verify(fields.pages))

    actions = {
        "flush": flush,
        "lease": lease,
        "warm": warm,
        "evict": evict,
        "forget": forget,
        "verify": verify,
    }
    return [Route(f"{_PATH}/{name}", action, methods=["POST"]) for name, action in actions.items()]


def _json(counts: Counts) -> Response:
    return Response(
        orjson.dumps(dict(counts)),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

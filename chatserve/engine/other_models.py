"""OtherModels: whether what a request did not find lies on disk as another model's.

With other weights, another type or page size nothing of before is found, for good reason; who
wonders why his prompt is computed anew should be told. A page's name can be computed for any model
whose fingerprint is known, and the files of its pages state that. So the names that the asker's own
pages would have there are asked for, and nobody else's: with his tenant and his `cache_salt`. Of a
page that all tenants would share nothing is said.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

from chatserve.engine.values import Request
from prefix_store import OtherPages, PageName, PageNamer, PublicNames, RootFields


class OtherModels:
    """On the event loop; some 20 microseconds for each slab of another model, and 2 for each page
    where the beginning is found there."""

    def __init__(
        self,
        name_key: bytes,
        pages: Callable[[], Sequence[OtherPages]],
        layout: Callable[[int], str],
    ) -> None:
        """name_key: as the engine's namer has it. layout: `RootFields.layout` of a page size."""
        self._key = name_key
        self._pages = pages
        self._layout = layout

    def have(self, request: Request, position: int) -> bool:
        """Whether a model that is not served now has kept the page with the token at `position` of
        the request's prompt."""
        return any(self._has(pages, request, position) for pages in self._pages())

    def _has(self, pages: OtherPages, request: Request, position: int) -> bool:
        size = pages.shape.page_tokens
        end = (position // size + 1) * size
        if end > len(request.tokens):
            return False
        namer = PageNamer(self._key, page_size=size)
        fingerprint, layout = pages.shape.fingerprint, self._layout(size)
        root = namer.root(
            RootFields(
                tenant=request.tenant,
                cache_salt=request.cache_salt,
                fingerprint=fingerprint,
                layout=layout,
            )
        )
        above = namer.public_root(fingerprint=fingerprint, layout=layout)
        first, shared = request.tokens[:size], frozenset[PageName]()
        if not request.cache_salt and namer.public_names(above, first)[0] in pages:
            names = namer.public_names(above, request.tokens[:end])
            shared = frozenset(takewhile(pages.__contains__, names))
        elif namer.names(root, first)[0] not in pages:
            return False  # parents outlive their children, so there is none of them
        public = PublicNames(above, shared)
        last = namer.names(root, request.tokens[:end], public=public)[-1]
        return last not in shared and last in pages

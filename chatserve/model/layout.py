"""The shape of a page over all layers, and views of one layer in it.

May not know: transformers, page ids, who owns a page.

Theory: a page is one contiguous piece of memory over all layers, so that a copy, a swap or a save
moves one large piece. Layers may differ in shape; each has its own run of elements.

    page i   ┌ layer 0: K [page_size, kv_heads, head_dim] │ V [same] ┬ layer 1: K │ V ┬ ...
    page i+1 └ ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K (and V) of one position in one layer: [kv_heads, head_dim]."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVLayout:
    """Where each layer's K and V lie in a page. page_size is in token positions."""

    page_size: int
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First element of each layer in a page, and the page's end."""
        starts = [0]
        for shape in self.layers:
            starts.append(starts[-1] + 2 * self.page_size * shape.kv_heads * shape.head_dim)
        return tuple(starts)

    @property
    def page_elements(self) -> int:
        """Elements of one page over all layers."""
        return self._starts[-1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.page_elements * self.dtype.itemsize

    def allocate(
        self,
        pages: int,
        device: torch.device | str,
        fill: float | None = None,
        *,
        pinned: bool = False,
    ) -> Tensor:
        """A pool [pages, page_elements] in the layout's dtype; `fill` None leaves it as it is.

        pinned: page-locked memory of the host. Memory that nobody wrote may hold anything;
        attention never lets it through. Tests fill with NaN. Raises torch's own error when the
        memory cannot be had.
        """
        shape = (pages, self.page_elements)
        pool = torch.empty(shape, dtype=self.dtype, device=device, pin_memory=pinned)
        return pool if fill is None else pool.fill_(fill)

    def layer_view(self, pool: Tensor, layer: int) -> Tensor:
        """[pages, 2, page_size, kv_heads, head_dim] of one layer, K first; a view into `pool`.

        Pages are page_elements apart, which may be more than int32 can count over a whole pool.
        """
        shape = self.layers[layer]
        part = pool[:, self._starts[layer] : self._starts[layer + 1]]
        return part.view(-1, 2, self.page_size, shape.kv_heads, shape.head_dim)

    def digest_fields(self) -> Sequence[tuple[str, str | int]]:
        """What the layout contributes to a model's fingerprint: (field, value) pairs, in order."""
        fields: list[tuple[str, str | int]] = [
            ("layout", "page, layer, kv, position, head, element"),
            ("page_size", self.page_size),
            ("kv_dtype", str(self.dtype)),
            ("layers", len(self.layers)),
        ]
        for index, shape in enumerate(self.layers):
            fields.append((f"layer {index} kv_heads", shape.kv_heads))
            fields.append((f"layer {index} head_dim", shape.head_dim))
        return fields

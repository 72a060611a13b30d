"""The shape of a page over all layers, and views of one layer in it.

May not know: transformers, page ids, who owns a page.

Theory: a page is one contiguous piece of memory over all layers, so that a copy, a swap or a save
moves one large piece. Layers may differ in shape; each has its own run of elements.

    page i   ┌ layer 0: K [page_size, kv_heads, head_dim] │ V [same] ┬ layer 1: K │ V ┬ ...
    page i+1 └ ...

A page of fp8 (`chatserve_kernels/fp8.py`) holds two types, so it is bytes: behind each layer's K
and V, of one byte an element, are their scales, float32 [2, kv_heads, page_size]. A head's scales
lie side by side, since they are read head by head. Pages are of multiples of 8 positions, so
everything begins at a multiple of 16 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chatserve_kernels.fp8 import FP8


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K (and V) of one position in one layer: [kv_heads, head_dim]."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVLayout:
    """Where each layer's K and V lie in a page. page_size is in token positions. dtype: of K and
    V as they are stored."""

    page_size: int
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First element of each layer in a page, and the page's end."""
        starts = [0]
        for layer, shape in enumerate(self.layers):
            scales = 2 * self.page_size * shape.kv_heads * torch.float32.itemsize
            starts.append(starts[-1] + self._elements(layer) + (scales if self.scaled else 0))
        return tuple(starts)

    def _elements(self, layer: int) -> int:
        """Of K and V of one layer."""
        shape = self.layers[layer]
        return 2 * self.page_size * shape.kv_heads * shape.head_dim

    @property
    def scaled(self) -> bool:
        """Whether K and V have scales: pages are fp8, and a pool is bytes."""
        return self.dtype == FP8

    @property
    def page_elements(self) -> int:
        """Elements of a pool's page over all layers."""
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
    ) -> Tensor:
        """A pool [pages, page_elements] in the layout's dtype, of bytes where that is fp8; `fill`
        None leaves it as it is.

        Memory that nobody wrote may hold anything; attention never lets it through. Tests fill with
        NaN, and fp8 knows but that and 0. Raises torch's own error when the memory cannot be had.
        """
        shape = (pages, self.page_elements)
        dtype = torch.uint8 if self.scaled else self.dtype
        pool = torch.empty(shape, dtype=dtype, device=device)
        if fill is not None and self.scaled:
            assert fill == 0 or fill != fill, "of bytes that are elements, and scales"
            fill = 0 if fill == 0 else 0xFF  # NaN in both types
        return pool if fill is None else pool.fill_(fill)

    def layer_view(self, pool: Tensor, layer: int) -> Tensor:
        """[pages, 2, page_size, kv_heads, head_dim] of one layer, K first; a view into `pool`.

        Pages are page_elements apart, which may be more than int32 can count over a whole pool.
        """
        shape = self.layers[layer]
        start = self._starts[layer]
        part = pool[:, start : start + self._elements(layer)].view(self.dtype)
        return part.view(-1, 2, self.page_size, shape.kv_heads, shape.head_dim)

    def layer_scales(self, pool: Tensor, layer: int) -> Tensor | None:
        """float32 [pages, 2, kv_heads, page_size] of one layer, K's first, a view into `pool`; None
        where there are none."""
        if not self.scaled:
            return None
        start = self._starts[layer] + self._elements(layer)
        part = pool[:, start : self._starts[layer + 1]].view(torch.float32)
        return part.view(-1, 2, self.layers[layer].kv_heads, self.page_size)

    def digest_fields(self) -> Sequence[tuple[str, str | int]]:
        """What the layout contributes to a model's fingerprint: (field, value) pairs, in order."""
        fields: list[tuple[str, str | int]] = [
            ("layout", "page, layer, kv, position, head, element"),
            ("page_size", self.page_size),
            ("kv_dtype", str(self.dtype)),
            ("layers", len(self.layers)),
        ]
        if self.scaled:
            fields.append(("scales", "behind a layer's elements: kv, head, position"))
        for index, shape in enumerate(self.layers):
            fields.append((f"layer {index} kv_heads", shape.kv_heads))
            fields.append((f"layer {index} head_dim", shape.head_dim))
        return fields

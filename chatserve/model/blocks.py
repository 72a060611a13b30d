"""Linear layers of a model whose weights lie in blocks, as our machine code reads them.

May not know: attention, pages, single model families. `packed.py` and `quantized.py` make them.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from chatserve_kernels.cpu.native import Chain
from chatserve_kernels.linear import JoinedWeights, LinearProduct, LinearWeights


class BlockLinear(nn.Module):
    """`nn.Linear` for inference."""

    def __init__(self, weights: LinearWeights, product: LinearProduct) -> None:
        super().__init__()
        self.in_features, self.out_features = weights.in_features, weights.out_features
        self.weights, self.product = weights, product  # no parameters: laid out for one program
        self._joined = JoinedWeights([weights])

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [..., in_features] in the model's dtype → [..., out_features]."""
        result = self.product.run(rows.reshape(-1, self.in_features), self._joined)
        if result.shape[1] != self.out_features:
            result = result[:, : self.out_features]
        return result.view(*rows.shape[:-1], self.out_features)


class JoinedBlocks:
    """Layers of the same inputs, computed in one call."""

    def __init__(self, layers: Sequence[BlockLinear]) -> None:
        self._product = layers[0].product
        if any(layer.product is not self._product for layer in layers):
            raise ValueError("only layers of one type are joined")
        self._weights = JoinedWeights([layer.weights for layer in layers])
        self.in_features, self.width = self._weights.in_features, self._weights.width

    def add(
        self, chain: Chain, rows: Tensor, result: Tensor, *, added: bool = False
    ) -> list[Tensor]:
        """rows: [any, in_features]; result: [any, width], where it will be when the chain has run,
        added to what is there, if so wanted. Returns each layer's columns of it."""
        self._product.add(chain, rows, self._weights, result, added=added)
        return [result[:, columns] for columns in self._weights.columns]

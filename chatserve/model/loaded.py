"""A model that is ready: what it is, and one forward pass over pages.

May not know: requests, sequences, page ownership, text.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chatserve.errors import ModelRefused
from chatserve.model.attention import PagedStep, padded_rows, run_paged
from chatserve.model.blocks import BlockLinear
from chatserve.model.direct import DirectPass
from chatserve.model.layout import KVLayout
from chatserve.model.packed import PackedLinear
from chatserve.model.quantized import Quantization
from chatserve_kernels import AttentionBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's makers suggest in generation_config.json; neutral where they are silent.

    eos_ids: every id that ends a reply. As in vLLM the sampling fields count whether or not
    do_sample is set; do_sample is told as it stands.
    """

    eos_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class LoadedModel:
    """One model on one device, probed. `forward` is for one thread at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        way: PreTrainedModel | DirectPass,
        name: str,
        folder: Path,
        layout: KVLayout,
        dtype: torch.dtype,
        context_length: int,
        generation: GenerationDefaults,
        parameter_count: int,
        quantization: Quantization,
        fingerprint: Future[bytes],
    ) -> None:
        self.name = name
        self.folder = folder  # where the checkpoint and its tokenizer are
        self.layout = layout
        self.context_length = context_length
        self.generation = generation
        self.dtype = dtype  # of arithmetic; pages may have another one
        self.device: torch.device = model.device
        self.config: PreTrainedConfig = model.config
        embeddings = model.get_output_embeddings()
        self.vocabulary_size: int = (
            embeddings.out_features
            if isinstance(embeddings, torch.nn.Linear | PackedLinear | BlockLinear)
            else int(model.config.vocab_size)
        )
        self.parameter_count = parameter_count
        self.quantization = quantization
        # What oneDNN multiplies wants few numbers of rows (`padded_rows`); our own programs do not.
        self._pads = self.device.type == "cpu" and any(
            isinstance(each, torch.nn.Linear | PackedLinear) for each in model.modules()
        )
        self._model, self._way = model, way
        self._fingerprint = fingerprint

    def fingerprint(self) -> bytes:
        """32 bytes (see `fingerprint.py`). Waits until the weights are hashed.

        Raises ModelRefused when a weight file could not be read, or changed meanwhile.
        """
        try:
            return self._fingerprint.result()
        except OSError as error:
            raise ModelRefused(f"The model '{self.name}' could not be hashed: {error}") from error

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        *,
        pool: Tensor,
        logit_rows: Tensor,
        computing: Callable[[], None] | None = None,
    ) -> Tensor:
        """Logits [R, vocabulary_size] in float32 for the rows named by `logit_rows`.

        tokens, positions: int64 [T], T = attention.query_starts[-1], slices laid end to end;
        pool: [pages, layout.page_elements] as the layout allocates it, written in place;
        logit_rows: int64 [R]. All on `device`. computing: called when what takes long begins,
        perhaps more than once, and may be never. Raises ValueError for shapes that do not fit.
        """
        rows = attention.rows
        if tokens.shape != (rows,) or positions.shape != (rows,):
            raise ValueError(f"tokens and positions must both be [{rows}]")
        if pool.ndim != 2 or pool.shape[1] != self.layout.page_elements:
            raise ValueError(f"the pool must be [pages, {self.layout.page_elements}]")
        if attention.page_size != self.layout.page_size:
            raise ValueError(f"the model was loaded for pages of {self.layout.page_size}")
        paged = PagedStep(attention, pool, self.layout, computing)
        if self._pads:
            wanted = logit_rows.shape[0]
            tokens, positions = _pad(tokens), _pad(positions)
            logit_rows = _pad(logit_rows) if wanted else logit_rows
            logits = run_paged(self._way, tokens, positions, paged=paged, logit_rows=logit_rows)
            return logits[:wanted]
        return run_paged(self._way, tokens, positions, paged=paged, logit_rows=logit_rows)


def _pad(values: Tensor) -> Tensor:
    """Repeat the last of values, int64 [n], n >= 1: int64 [padded_rows(n)]."""
    rows = values.shape[0]
    more = padded_rows(rows) - rows
    return values if more == 0 else torch.cat((values, values[-1:].expand(more)))

"""A Llama of random weights, made on the device without any file, loaded as a checkpoint's is."""

import gc
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatserve.model import LoadedModel
from chatserve.model.fingerprint import config_text
from chatserve.model.loader import ready_model

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Of a Llama. context: positions that it is made ready for."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int

    @property
    def head_dim(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of the products that every token goes through, in all layers."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def read_bytes(self) -> int:
        """Of weights that a step reads: all but the embedding, of which it reads some rows."""
        return 2 * (self.layer_parameters + self.vocabulary * self.hidden)

    def prompt_operations(self, tokens: int) -> float:
        """Of computing a prompt: products of matrices, and attention to what is before."""
        pairs = tokens * (tokens + 1) / 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        last = 2 * self.vocabulary * self.hidden
        return 2 * self.layer_parameters * tokens + attention + last


LARGE = Size(32, 4096, 14_336, 32, 8, 128_256, 36_864)  # Llama 3's 8 B parameters
TINY = Size(2, 64, 128, 4, 2, 300, 256)


@dataclass(frozen=True, slots=True)
class Made:
    """A model that is ready, and its size."""

    model: LoadedModel
    size: Size


_made: dict[tuple[torch.device, bool, str], Made] = {}


def made(device: torch.device, quick: bool, kv_dtype: str = "auto") -> Made:
    """The one of this process; one whose pages are of another type goes first, since there may be
    no room for two."""
    wanted = device, quick, kv_dtype
    if wanted not in _made:
        _made.clear()
        gc.collect()
        _made[wanted] = _new(device, TINY if quick else LARGE, kv_dtype)
    return _made[wanted]


def _new(device: torch.device, size: Size, kv_dtype: str) -> Made:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    fields = config_text(config.to_dict())
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    weights: Future[bytes] = Future()
    weights.set_result(bytes(32))
    ready = ready_model(
        model.eval(),
        name="random",
        folder=Path(),
        dtype=torch.bfloat16,
        fields=fields,
        weights=weights,
        page_size=PAGE_SIZE,
        context_length=size.context,
        kv_dtype=kv_dtype,
    )
    return Made(ready, size)

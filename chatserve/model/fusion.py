"""Parts of a model in the place of transformers' own: what was replaced, and the trials before.

May not know: devices, pages. `fused.py` has the parts of a CPU, `on_device.py` those of a GPU. A
part is taken only where it gives what it gave before, for a few rows. Rows do not show what depends
on a position in another way than through the rotary embedding, so whole layers are taken of classes
that are known (`LAYERS`); what their attention asks for besides (scale, window, soft cap) is what
it asked for in the trial.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chatserve.errors import ModelRefused
from chatserve.model.attention import LayerCall

LAYERS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
# transformers' names of the activations that layers are taken with.
GELU = {"silu": False, "gelu_pytorch_tanh": True}
# Of a trial's rows: what a part does to large numbers only must show as well.
_SIZES = (1.0, 1.0, 30.0)
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}

_Made = TypeVar("_Made")

_log = logging.getLogger(__name__)


class ReplacedLayer(nn.Module):
    """A decoder layer through pages; without them the original's, while that is there."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.name = type(original).__name__
        self.original: nn.Module | None = original

    def without_pages(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """What the original gives."""
        assert self.original is not None, "a model that serves is called with pages alone"
        return self.original(hidden_states, **given)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was fused: where, and in place of what."""

    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def put(self, parent: nn.Module, name: str, part: nn.Module) -> None:
        """A part in place of the parent's of that name."""
        self.places.append((parent, name, getattr(parent, name)))
        setattr(parent, name, part)

    def undo(self) -> None:
        """Every part as it was."""
        for parent, name, part in self.places:
            setattr(parent, name, part)
        self.places.clear()

    def settle(self) -> None:
        """Let the originals go: nobody calls the model without pages any more."""
        for parent, name, _ in self.places:
            fused = getattr(parent, name)
            if isinstance(fused, ReplacedLayer):
                fused.original = None
        self.places.clear()


def tried(part: nn.Module, make: Callable[[nn.Module], _Made | None]) -> _Made | None:
    """What `make` makes of a part; None where it cannot, with a line in the log."""
    try:
        with torch.inference_mode():
            return make(part)
    except (RuntimeError, ValueError, TypeError, AttributeError, ModelRefused) as error:
        _log.info("%s is left as it is: %s", type(part).__name__, error)
        return None


def norm_weights(norm: nn.Module) -> list[tuple[Tensor, float, torch.dtype]]:
    """What an RMSNorm multiplies with, perhaps: float32 [columns], its epsilon, its type. As it is,
    or 1 above it, as some families have it."""
    parts: Any = norm
    given: Tensor = parts.weight
    epsilon = getattr(norm, "variance_epsilon", None)
    epsilon = float(parts.eps if epsilon is None else epsilon)
    weight = given.detach().float()
    return [(weight + more, epsilon, given.dtype) for more in (0.0, 1.0)]


def head_norms(attention: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """The weights of the norms of query and key, where there are any, and their epsilon. Raises
    ValueError."""
    parts: Any = attention
    if getattr(attention, "q_norm", None) is None:
        return None
    (query, epsilon, _), (key, other, _) = (
        norm_weights(each)[0] for each in (parts.q_norm, parts.k_norm)
    )
    if epsilon != other:
        raise ValueError("norms of query and key have different epsilons")
    return query, key, epsilon


def random_rows(columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The same ones each time: [trial rows, columns]."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(_SIZES), columns, generator=generator)
    return (rows * torch.tensor(_SIZES)[:, None]).to(device, dtype)


def random_positions(
    head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin [1, trial rows, head_dim] of some angles, as layers get them."""
    angles = random_rows(head_dim // 2, torch.float32, device).repeat(1, 2)
    return angles.cos().to(dtype)[None], angles.sin().to(dtype)[None]


class AttendsAtRandom:
    """Stands in for pages: attention is one set of random numbers."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []

    def attend(self, call: LayerCall) -> Tensor:
        """[rows, heads, head_dim]"""
        self.calls.append(call)
        _, heads, head_dim = call.query.shape
        query = call.query
        return random_rows(heads * head_dim, query.dtype, query.device).unflatten(1, (-1, head_dim))


def agree(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether each row of each tensor is as it should be."""
    for result, wanted in zip(results, expected, strict=True):
        mine, theirs = (each.float().reshape(len(_SIZES), -1) for each in (result, wanted))
        differences = (mine - theirs).norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-6)
        if not bool((differences <= _TOLERANCE[result.dtype]).all()):  # not: NaN must fail too
            return False
    return True

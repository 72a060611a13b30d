"""One token from each row of logits: what `choosing.py` needs, and what comes of it.

Theory: each thread has room for one row's weights, which is kept from call to call, as new memory
costs more than what is written in it.
"""

import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatserve_kernels.cpu import memory, native
from chatserve_kernels.sampling import Adjustments, Choices, Chosen

try:
    from chatserve_kernels.cpu import choosing, wide
except ImportError:  # LLVM's package is not for every machine
    choosing: Any = None
    wide: Any = None

# Logits that one thread reads before it costs more than waking another one.
_ONE_THREAD_LOGITS = 1 << 14
ASKED = ("temperature", "min_p", "top_k", "top_p", "noise", "logarithms")
NUMBERS = (*ASKED, "tokens", "finite", "bests", "totals", "own")
_kept = threading.local()


def choose_tokens(logits: Tensor, choices: Choices) -> Chosen | None:
    """As the door has them, of at least one row and token; None where there is no program."""
    function = _function() if choosing is not None and native.wanted() else None
    if function is None:
        return None
    rows, columns = logits.shape
    stride, step = logits.stride()
    if step != 1 and columns > 1:
        logits, stride = logits.contiguous(), columns
    tasks = 1 if rows * columns <= _ONE_THREAD_LOGITS else rows
    given = _given(columns)
    scratch = _scratch(given["scratch_bytes"] * min(tasks, torch.get_num_threads()))
    numbers = np.empty((len(NUMBERS), rows))
    for place, name in enumerate(ASKED):
        numbers[place] = getattr(choices, name)
    first = _address(numbers)
    values = given | {name: first + 8 * rows * place for place, name in enumerate(NUMBERS)}
    values["rows"], values["scratch"] = rows, scratch.data_ptr()
    values["logits"], values["logits_row"] = logits.data_ptr(), 4 * stride
    adjustments = _adjustments(choices.adjustments, rows)
    values |= {name: _address(array) for name, array in adjustments.items()}
    function.call(function.arguments(values), "next", tasks)
    tokens, finite, bests, totals, own = numbers[len(ASKED) :]
    logarithms = torch.from_numpy(bests + np.log(totals))
    return Chosen(
        torch.from_numpy(tokens.view(np.int64)),
        torch.from_numpy(finite != 0),
        (torch.from_numpy(own) - logarithms).float(),
        logarithms,
    )


def _address(array: NDArray[Any]) -> int:
    """A tensor of it tells that sooner than numpy does."""
    return torch.from_numpy(array).data_ptr()


def _adjustments(given: Adjustments | None, rows: int) -> dict[str, NDArray[Any]]:
    """In the order of rows, and where each one's start; one more says where they end."""
    if given is None:
        return {}
    names = ("rows", "ids", "bias", "repetition", "subtracted")
    arrays = {name: np.ascontiguousarray(getattr(given, name)) for name in names}
    if (arrays["rows"][1:] < arrays["rows"][:-1]).any():
        order = np.argsort(given.rows, kind="stable")
        arrays = {name: array[order] for name, array in arrays.items()}
    starts = arrays.pop("rows").searchsorted(np.arange(rows + 1))
    return arrays | {"starts": starts}


@cache
def _given(columns: int) -> dict[str, int]:
    """What is the same for all rows of a length: where a thread's arrays lie in its scratch, and
    how much that is, in bytes."""
    padded = -(-columns // choosing.BLOCK) * choosing.BLOCK
    given, place = {"columns": columns}, 8 * padded  # weights come first
    for name, size in (
        # The candidates are written one further than they count.
        ("candidates", 8 * (padded + wide.LANES)),
        ("blocks", 8 * (padded // choosing.BLOCK)),
        ("largest", 8 * wide.LANES * (padded // choosing.BLOCK)),
        ("counts", 8 * choosing.BUCKETS),
        ("sums", 8 * choosing.BUCKETS),
        ("adjusted", 4 * padded),
        ("tail", 4 * wide.LANES),
    ):
        given[name] = place
        place += size
    return given | {"scratch_bytes": -(-place // 64) * 64}


def _scratch(size: int) -> Tensor:
    """This thread's, of so many bytes at least."""
    kept: Tensor | None = getattr(_kept, "scratch", None)
    if kept is None or 8 * kept.shape[0] < size:
        kept = _kept.scratch = memory.empty((size // 8,), torch.float64)
    return kept


@cache
def _function() -> native.Function | None:
    functions = native.functions_of(choosing.choose_text(), choosing.FIELDS, ("choose",))
    return None if functions is None else functions[0]

"""TokenCounts: what penalties know of a line of tokens, kept and not counted anew for each token.

Theory: a value that nobody changes. One token more makes a new one, which copies some thousand
numbers in a few microseconds where sorting them takes hundreds, and shares what is the same. So it
crosses to the runner's thread as it is, samples of one prompt begin with the same, and a step that
failed leaves nothing behind.
"""

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TokenCounts:
    """Of the first `length` tokens of a line: the ids that are there, int64 [n], each once, in
    order, and how often each came after the prompt, int32 [n]. Read-only arrays."""

    ids: NDArray[np.int64]
    generated: NDArray[np.int32]
    length: int

    @classmethod
    def of(cls, tokens: "array[int]", prompt_tokens: int) -> "TokenCounts":
        """Counted from the beginning. prompt_tokens: how many of them are the prompt."""
        ids, places = np.unique(np.array(tokens, np.int64), return_inverse=True)
        generated = np.bincount(places[prompt_tokens:], minlength=len(ids)).astype(np.int32)
        return _read_only(ids, generated, len(tokens))

    def with_one(self, token: int) -> "TokenCounts":
        """One token later, which was generated."""
        at = int(self.ids.searchsorted(token))
        if at < len(self.ids) and self.ids[at] == token:
            ids, generated = self.ids, self.generated.copy()
            generated[at] += 1
        else:
            ids, generated = _inserted(self.ids, at, token), _inserted(self.generated, at, 1)
        return _read_only(ids, generated, self.length + 1)


def _read_only(ids: NDArray[Any], generated: NDArray[Any], length: int) -> TokenCounts:
    ids.flags.writeable = generated.flags.writeable = False
    return TokenCounts(ids, generated, length)


def _inserted(values: NDArray[Any], at: int, value: int) -> NDArray[Any]:
    """As `np.insert`, which takes ten times as long to find out what it is given."""
    result = np.empty(len(values) + 1, values.dtype)
    result[:at], result[at], result[at + 1 :] = values[:at], value, values[at:]
    return result


NOTHING_COUNTED = TokenCounts.of(array("i"), 0)

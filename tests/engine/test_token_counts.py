"""Kept counts are what counting from the beginning gives, and nobody can change them."""

import random
from array import array
from collections import Counter

import numpy as np
import pytest

from chatserve.engine.token_counts import NOTHING_COUNTED, TokenCounts
from tests.seeds import drawn_seed


def assert_counts(counts: TokenCounts, line: list[int], prompt: int) -> None:
    generated = Counter(line[prompt:])
    assert counts.length == len(line)
    assert counts.ids.tolist() == sorted(set(line))
    assert counts.generated.tolist() == [generated[token] for token in sorted(set(line))]
    assert (counts.ids.dtype, counts.generated.dtype) == (np.int64, np.int32)


@pytest.mark.parametrize("vocabulary", [3, 40, 1 << 20])
def test_one_token_after_the_other_is_counted_as_all_of_them(vocabulary: int) -> None:
    dice = random.Random(drawn_seed() + vocabulary)
    line = [dice.randrange(vocabulary) for _ in range(dice.randrange(1, 60))]
    prompt = dice.randrange(len(line) + 1)
    counts = TokenCounts.of(array("i", line), prompt)
    assert_counts(counts, line, prompt)
    before: list[tuple[TokenCounts, int]] = []
    for _ in range(80):
        before.append((counts, len(line)))
        line.append(dice.choice((0, vocabulary - 1, dice.choice(line), dice.randrange(vocabulary))))
        counts = counts.with_one(line[-1])
        assert_counts(counts, line, prompt)
    for old, length in before:
        assert_counts(old, line[:length], prompt)


def test_what_has_been_counted_cannot_be_written_to() -> None:
    counts = TokenCounts.of(array("i", [5, 5, 9]), 1)
    for each in (NOTHING_COUNTED, counts, counts.with_one(9), counts.with_one(7)):
        for numbers in (each.ids, each.generated):
            assert not numbers.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        counts.generated[0] = 3

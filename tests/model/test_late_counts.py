"""A token that only the device knows counts as if the host had known it."""

from collections.abc import Generator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from chatserve.model import SampleRow, sample
from chatserve.model.sampling import adjustments_of
from chatserve.model.step import LateTokens
from chatserve_kernels import reference
from chatserve_kernels import sampling as door
from chatserve_kernels.cpu import native
from chatserve_kernels.sampling import Adjustments, LateCounts, choose_tokens
from tests.kernels.choosing import choices
from tests.model.late import FEWEST, KINDS, VOCABULARY, counted, rows_with_late_tokens
from tests.seeds import drawn_seed


@pytest.fixture(params=["machine code", "torch"])
def both_ways(request: pytest.FixtureRequest) -> Generator[None]:
    """Also as where nothing is compiled."""
    if request.param == "torch":
        with native.left_to_torch():
            yield
    else:
        yield


def adjusted(logits: torch.Tensor, rows: list[SampleRow], late: LateTokens | None) -> torch.Tensor:
    given = adjustments_of(rows, logits.shape[1], late)
    assert given is not None
    return reference.adjusted_logits(logits, given)


def test_a_late_token_counts_to_the_bit_as_a_known_one() -> None:
    known = rows_with_late_tokens(drawn_seed())
    expected = adjusted(known.logits, known.rows, None)
    given = adjustments_of(known.without, VOCABULARY, known.late())
    assert given is not None
    assert given.late is not None
    assert torch.equal(reference.adjusted_logits(known.logits, given), expected)
    settled = door._settled(given, given.late, VOCABULARY)
    assert settled.late is None
    assert torch.equal(door._adjusted(known.logits, settled), expected)
    without = adjusted(known.logits, known.without, None)
    differ = (without != expected).any(dim=1)
    kinds = dict(zip(known.numbers, known.kinds, strict=True))
    changed = {kinds[row] for row in differ.nonzero()[:, 0].tolist()}
    assert changed == set(KINDS) - {"banned", "both"}, "a ban is a ban"


@pytest.mark.usefixtures("both_ways")
def test_rows_with_late_tokens_choose_as_if_these_were_known() -> None:
    known = rows_with_late_tokens(drawn_seed())
    before = known.logits.clone()
    expected = sample(known.logits, known.rows).tokens
    result = sample(known.logits, known.without, known.late())
    assert torch.equal(result.tokens, expected)
    assert torch.equal(known.logits, before)
    assert (sample(known.logits, known.without).tokens != expected).sum() >= FEWEST


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 40])
def test_a_late_token_outside_the_vocabulary_is_passed_over(token: int) -> None:
    known = rows_with_late_tokens(drawn_seed())
    outside = replace(known, chosen=torch.full_like(known.chosen, token))
    result = sample(known.logits, known.without, outside.late())
    assert torch.equal(result.tokens, sample(known.logits, known.without).tokens)
    given = adjustments_of(known.without, VOCABULARY, outside.late())
    assert given is not None
    plain = adjusted(known.logits, known.without, None)
    assert torch.equal(reference.adjusted_logits(known.logits, given), plain)


@pytest.mark.usefixtures("both_ways")
def test_a_late_token_is_all_that_there_is_to_count() -> None:
    """Nothing was generated before it, and no id is named."""
    row = SampleRow(temperature=0.0, presence_penalty=5.0, **counted((1, 2), 2))
    late = LateTokens(np.asarray([0]), np.asarray([0]), torch.tensor([3]))
    logits = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    assert sample(logits, [row], late).tokens.tolist() == [2]
    assert sample(logits, [row]).tokens.tolist() == [3]


def late_counts(**changes: Any) -> LateCounts:
    columns: dict[str, Any] = {"rows": np.asarray([0, 2]), "sources": np.asarray([1, 1])}
    columns |= {"chosen": torch.zeros(2, dtype=torch.int64), "counts": np.zeros(3, np.int32)}
    columns |= {name: np.zeros(2, np.float32) for name in ("repetition", "presence", "frequency")}
    return LateCounts(**(columns | changes))


def adjustments(late: LateCounts | None, **changes: Any) -> Adjustments:
    numbers = {name: np.ones(3, np.float32) for name in ("bias", "repetition", "subtracted")}
    columns = {"rows": np.asarray([0, 0, 1]), "ids": np.asarray([4, 2, 4])} | numbers
    return Adjustments(**(columns | changes), late=late)  # pyright: ignore[reportArgumentType]


REFUSED: list[dict[str, Any]] = [
    *({"rows": np.asarray([0, 3])}, {"rows": np.asarray([-1, 0])}, {"rows": np.asarray([1, 1])}),
    *({"sources": np.asarray([0, 2])}, {"sources": np.asarray([-1, 0])}),
    *({name: np.zeros(1, int)} for name in ("rows", "sources")),
    *({name: np.zeros(3, np.float32)} for name in ("repetition", "presence", "frequency")),
    *({"counts": np.zeros(2, np.int32)}, {"chosen": torch.zeros((2, 1), dtype=torch.int64)}),
    *({"chosen": torch.zeros(2)}, {"chosen": torch.zeros(2, dtype=torch.int64, device="meta")}),
    {each.name: np.zeros(0, int) for each in fields(LateCounts) if each.name not in ("chosen",)}
    | {"counts": np.zeros(3, np.int32)},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_the_door_refuses_late_counts_that_do_not_fit(changes: dict[str, Any]) -> None:
    logits = torch.zeros(3, 40)
    choose_tokens(logits, replace(choices(3), adjustments=adjustments(late_counts())))
    given = replace(choices(3), adjustments=adjustments(late_counts(**changes)))
    with pytest.raises(ValueError, match=r"late|counted"):
        choose_tokens(logits, given)


def test_the_door_refuses_rows_in_no_order_where_something_is_late() -> None:
    mixed = {"rows": np.asarray([1, 0, 1])}
    logits = torch.zeros(3, 40)
    choose_tokens(logits, replace(choices(3), adjustments=adjustments(None, **mixed)))
    given = replace(choices(3), adjustments=adjustments(late_counts(), **mixed))
    with pytest.raises(ValueError, match="in the order of rows"):
        choose_tokens(logits, given)

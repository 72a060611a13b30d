"""Pages of fp8 by torch: how rows are rounded, what is read, and what the doors refuse."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatserve_kernels import (
    AttentionBatch,
    append_kv,
    attention_in_chain,
    fp8,
    paged_attention,
    reference,
)
from tests.kernels.attended import in_fp8, rounding_rows, same_numbers
from tests.kernels.test_paged_operations import (
    MIXED,
    Shape,
    filled_pages,
    options_of,
    random_batch,
    small_batch,
)

NAN = float("nan")
# In torch K and V are rounded to the query's type when they are gathered.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {
    "pages of 8": Shape(8, 2, 2, MIXED),
    "heads of 128": Shape(16, 4, 2, MIXED, head_dim=128),
    "heads of 64, pages of 64": Shape(64, 6, 1, MIXED, head_dim=64),
    "whole pages": Shape(32, 2, 1, ((1, 33), (1, 32), (33, 33), (1, 64))),
    "window": Shape(8, 4, 2, MIXED, options=(("window", 6),)),
    "all of it": Shape(
        *(8, 4, 2, MIXED), head_dim=24, options=(("window", 11), ("soft_cap", 1.5), ("sinks", True))
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    shape, seed = SHAPES[name], 600 + list(SHAPES).index(name)
    print(f"seed {seed}, {shape}")
    torch.manual_seed(seed)
    batch, pages = random_batch(shape, random.Random(seed))
    kv, scales = in_fp8(filled_pages(shape, batch, pages, torch.float32))
    query = torch.randn(shape.heads, batch.rows, shape.head_dim).to(dtype).transpose(0, 1)
    options = options_of(shape, dtype) | {"scales": scales}
    expected = reference.paged_attention(query.double(), kv, batch, **options)
    result = paged_attention(query, kv, batch, **options)
    assert (result.shape, result.dtype) == (query.shape, dtype)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(result.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("rounded", [False, True], ids=["plain", "fp8"])
def test_weights_count_beside_a_large_sink(rounded: bool) -> None:
    """They are small then, all of them, and what they weigh is not: as float16 they were 0."""
    print("seed 606")
    torch.manual_seed(606)
    shape = Shape(8, 4, 2, MIXED, options=(("sinks", True),))
    batch, pages = random_batch(shape, random.Random(606))
    kv = filled_pages(shape, batch, pages, torch.float32)
    kv[:, 1] *= 1000
    options = options_of(shape, torch.float16)
    options["sinks"] += 16
    if rounded:
        kv, options["scales"] = in_fp8(kv)
    else:
        kv = kv.half()
    query = torch.randn(batch.rows, 4, 8).half()
    expected = reference.paged_attention(query.double(), kv, batch, **options)
    error = paged_attention(query, kv, batch, **options).double() - expected
    assert float(error.norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("part", [0, 1], ids=["K", "V"])
@pytest.mark.parametrize(
    "options", [{}, {"soft_cap": 1.5, "sinks": torch.full((4,), 8.0)}], ids=["plain", "all of it"]
)
def test_pages_may_hold_what_float16_does_not(options: dict[str, Any], part: int) -> None:
    """Results that it holds are right whatever goes into them."""
    print("seed 607")
    torch.manual_seed(607)
    shape = Shape(8, 4, 2, MIXED)
    batch, pages = random_batch(shape, random.Random(607))
    kv = filled_pages(shape, batch, pages, torch.float32)
    kv[:, part, ..., 3] *= 1e6
    query = torch.randn(batch.rows, 4, 8).half()
    query[..., 3] = 0.0
    kv, scales = in_fp8(kv)
    options = {"scale": 0.3, "scales": scales} | options
    expected = reference.paged_attention(query.double(), kv, batch, **options)
    result = paged_attention(query, kv, batch, **options)
    held = expected.abs() < torch.finfo(torch.float16).max
    error = (result.double() - expected)[held]
    assert float(error.norm() / expected[held].norm()) < 1e-3
    assert bool(result[~held].isinf().all())


def test_the_reference_reads_elements_times_their_own_scales() -> None:
    """In float64, one formula for a whole context."""
    torch.manual_seed(610)
    shape = Shape(8, 4, 2, ((1, 21),), head_dim=16)
    batch, pages = random_batch(shape, random.Random(610))
    kv, scales = in_fp8(filled_pages(shape, batch, pages, torch.float32))
    query = torch.randn(1, 4, 16).double()
    table = batch.page_tables[0].long()
    read = (kv.double() * scales.double().transpose(2, 3)[..., None])[table]
    key, value = read.transpose(0, 1).flatten(1, 2)[:, :21].repeat_interleave(2, dim=2).unbind()
    weights = torch.softmax(torch.einsum("hd,thd->ht", query[0], key) * 0.3, dim=1)
    expected = torch.einsum("ht,thd->hd", weights, value)
    result = reference.paged_attention(query, kv, batch, scale=0.3, scales=scales)
    torch.testing.assert_close(result[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_append_equals_the_reference_to_the_bit(dtype: torch.dtype, some: bool) -> None:
    print("seed 620")
    torch.manual_seed(620)
    shape = Shape(8, 6, 3, MIXED, head_dim=72)
    batch, pages = random_batch(shape, random.Random(620))
    if some:
        kept = torch.arange(0, batch.rows, 2)
        batch = replace(
            batch,
            write_rows=kept,
            write_pages=batch.write_pages[kept],
            write_offsets=batch.write_offsets[kept],
        )
    key, value = rounding_rows(batch.rows, 3, 72, dtype)
    nothing = torch.full((pages, 2, 8, 3, 72), NAN)
    given, expected = in_fp8(nothing), in_fp8(nothing)
    reference.append_kv(key.transpose(0, 1), value, expected[0], batch, expected[1])
    append_kv(key.transpose(0, 1), value, given[0], batch, given[1])
    assert same_numbers(given, expected)


def test_the_references_numbers_are_those_of_the_type() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(fp8.FP8).double()
    assert codes.tolist() == reference._E4M3  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("scale", [1.0, 448 * 2.0**-100, 3e38 / 448])
def test_what_is_read_is_each_element_times_its_scale(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    elements = codes[codes % 128 != 127].view(fp8.FP8).view(1, 1, 254)
    read = fp8.widened(elements, torch.tensor([[scale]]), torch.float32)
    assert torch.equal(read, elements.float() * scale)
    assert bool(fp8.widened(elements, torch.tensor([[NAN]]), torch.float32).isnan().all())


def test_what_is_stored_is_the_nearest_in_float64() -> None:
    """No other element would be nearer, and no element is beyond 448."""
    print("seed 630")
    torch.manual_seed(630)
    rows = torch.randn(40, 2, 64) * torch.exp2(torch.randint(-60, 60, (40, 2, 1)).float())
    elements, scales = fp8.rounded(rows)
    assert bool((elements.float().abs().amax(dim=2) == 448).all())
    read = elements.double() * scales.double()[..., None]
    error = (read - rows.double()).abs()
    codes = np.asarray(reference._E4M3)  # pyright: ignore[reportPrivateUsage]
    others = torch.from_numpy(codes) * scales.double()[..., None, None]
    least = (others - rows.double().abs()[..., None]).abs().amin(dim=3)
    # But for the rounding of the quotient.
    assert bool((error <= least + rows.double().abs() * 2**-23).all())
    assert float(error.norm() / rows.double().norm()) < 0.03


def test_zeros_and_what_is_no_number() -> None:
    rows = torch.tensor([[[0.0, -0.0]], [[1.0, NAN]], [[float("-inf"), 2.0]], [[1e-44, 3e38]]])
    elements, scales = fp8.rounded(rows)
    assert scales[0].item() == 2.0**-100 * np.float32(1 / 448)
    assert elements[0].float().tolist() == [[0.0, 0.0]]
    assert bool(scales[1:3].isnan().all())
    assert bool(elements[1:3].float().isnan().all())
    read = fp8.widened(elements, scales, torch.float32)
    torch.testing.assert_close(read[3], torch.tensor([[0.0, 3e38]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", [0, 1], ids=["K", "V"])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_no_number_stays_visible(part: int, bad: float) -> None:
    shape = Shape(8, 4, 2, ((1, 20), (3, 17)))
    torch.manual_seed(640)
    batch, pages = random_batch(shape, random.Random(640))
    rows = torch.randn(2, batch.rows, 2, 8)
    rows[part, 0, 1, 3] = bad
    kv, scales = in_fp8(filled_pages(shape, batch, pages, torch.float32))
    append_kv(rows[0], rows[1], kv, batch, scales)
    result = paged_attention(torch.randn(4, 4, 8), kv, batch, scale=1.0, scales=scales)
    # Of the row that wrote it, the query heads of its kv head.
    assert result.isfinite().all(dim=2).tolist() == [[True, True, False, False]] + [[True] * 4] * 3


def test_a_channel_that_is_larger_than_others_costs_others_little() -> None:
    """K as models with biases have it. With a scale of 1 it would be cut off at 448."""
    print("seed 650")
    torch.manual_seed(650)
    shape = Shape(16, 4, 2, ((1, 200), (5, 60)), head_dim=64)
    batch, pages = random_batch(shape, random.Random(650))
    kv = filled_pages(shape, batch, pages, torch.float32)
    kv[:, 0, ..., 9] *= 400
    query = torch.randn(batch.rows, 4, 64)
    query[..., 9] /= 50
    right = reference.paged_attention(query.double(), kv.double(), batch, scale=0.125)

    def error(kv: Tensor, scales: Tensor) -> float:
        result = paged_attention(query, kv, batch, scale=0.125, scales=scales)
        return float((result.double() - right).norm() / right.norm())

    elements, scales = in_fp8(kv)
    cut = kv.clamp(-448, 448).to(fp8.FP8)
    own, unit = error(elements, scales), error(cut, torch.ones_like(scales).contiguous())
    print(f"{own:.3f} with scales, {unit:.3f} with a scale of 1")
    assert own < 0.1
    assert unit > 4 * own


def plain_doors(**changes: Any) -> dict[str, Any]:
    kv, scales = in_fp8(torch.zeros(1, 2, 8, 2, 4))
    given: dict[str, Any] = {"kv": kv, "scales": scales, "rows": torch.zeros(2, 2, 4)}
    return given | changes


def overlapping(scales: Tensor) -> Tensor:
    """Of three pages: the second half of one is the first half of the next."""
    inner = scales[0].numel()
    strides = (inner // 2, *scales[0].contiguous().stride())
    return torch.zeros(2 * inner).as_strided((3, *scales.shape[1:]), strides)


KV, SCALES = plain_doors()["kv"], plain_doors()["scales"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": None}, "without scales"),
        ({"kv": torch.zeros(1, 2, 8, 2, 4)}, "have no scales"),
        ({"scales": SCALES.double()}, "scales are torch.float64"),
        ({"scales": SCALES[:, :, :1]}, "scales are"),
        ({"scales": SCALES.transpose(2, 3)}, "scales are"),
        ({"scales": torch.zeros(2, 2, 2, 8)}, "scales are"),
        ({"scales": torch.zeros(1, 2, 8, 2).transpose(2, 3)}, "contiguous"),
        ({"scales": SCALES.to("meta")}, "scales are on 'meta', their pages on 'cpu'"),
        ({"scales": torch.zeros(1).expand(1, 2, 2, 8)}, "contiguous"),
        ({"kv": torch.cat([KV] * 3), "scales": SCALES.expand(3, -1, -1, -1)}, "of its own"),
        ({"kv": torch.cat([KV] * 3), "scales": overlapping(SCALES)}, "of its own"),
        ({"kv": KV.expand(3, -1, -1, -1, -1), "scales": torch.cat([SCALES] * 3)}, "of its own"),
        ({"kv": KV.transpose(2, 3)}, "kv is"),
        ({"rows": torch.zeros(2, 2, 4).double()}, "key is|query is"),
        ({"rows": torch.zeros(2, 2, 4).to(fp8.FP8)}, "key is|query is"),
    ],
)
def test_the_doors_refuse_what_contradicts_itself(changes: dict[str, Any], words: str) -> None:
    batch, given = small_batch(), plain_doors(**changes)
    rows, kv, scales = given["rows"], given["kv"], given["scales"]
    with pytest.raises(ValueError, match=words):
        append_kv(rows, rows, kv, batch, scales)
    with pytest.raises(ValueError, match=words):
        paged_attention(rows, kv, batch, scale=1.0, scales=scales)
    with pytest.raises(ValueError, match=words):
        attention_in_chain(rows, rows, rows, kv, batch, window=None, soft_cap=None, scales=scales)


def test_key_and_value_are_of_one_type() -> None:
    given = plain_doors()
    with pytest.raises(ValueError, match=r"value torch\.bfloat16"):
        append_kv(given["rows"], given["rows"].bfloat16(), KV, small_batch(), SCALES)


def test_scales_of_one_page_or_head_lie_as_they_should_whatever_their_strides_are() -> None:
    """A stride of what there is one of means nothing, and torch leaves any there."""
    rows, kv = torch.randn(2, 1, 8), torch.zeros(1, 2, 8, 1, 8).to(fp8.FP8)
    scales = torch.zeros(16).as_strided((1, 2, 1, 8), (0, 8, 1, 1))
    append_kv(rows, rows, kv, small_batch(), scales)
    result = paged_attention(rows, kv, small_batch(), scale=1.0, scales=scales)
    assert float((result[0] - rows[0]).norm() / rows[0].norm()) < 0.1


def test_no_chain_has_fp8() -> None:
    given = plain_doors(rows=torch.zeros(2, 2, 8))
    kv, scales = in_fp8(torch.zeros(1, 2, 8, 2, 8))
    batch: AttentionBatch = small_batch()
    options: dict[str, Any] = {"window": None, "soft_cap": None, "scales": scales}
    assert attention_in_chain(*[given["rows"]] * 3, kv, batch, **options) is None

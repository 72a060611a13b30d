"""Slices of prompts, and rows that share pages, as products of matrices, with the registers of
several kinds of processors."""

import pytest
import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, ops, paged_attention
from chatserve_kernels.cpu import attention, native
from tests.kernels.attended import PARTS, SIZES, decoding, parted, trial
from tests.kernels.test_paged_operations import in_torch


@pytest.fixture(
    params=["fp32", "fp32-narrow", "bf16", "bf16-narrow", "bf16-dots"],
)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Products of matrices as processors with other registers have them; the type of the pages."""
    kind, _, registers = request.param.partition("-")
    if registers == "dots" and not native.has_pair_dots():
        pytest.skip("this processor multiplies no pairs of bfloat16")
    monkeypatch.setattr(native, "has_pair_dots", lambda: registers == "dots")
    monkeypatch.setattr(native, "wide_registers", lambda: registers != "narrow")
    return torch.float32 if kind == "fp32" else torch.bfloat16


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_what_the_doors_use(size: tuple[int, int, int, int], arithmetic: torch.dtype) -> None:
    """What fails its trial would be left to torch, and everything else here pass."""
    query, kv, _ = trial(size, arithmetic)
    found = attention.attention_for(query, kv, soft_cap=None, sinks=None)
    assert found is not None
    if found.sizes.matrices and size[0] % 32 == 0:
        pairs = arithmetic == torch.bfloat16 and native.has_pair_dots()
        assert found.sizes.dots == pairs, "where there are such, they are used"


def written(batch: AttentionBatch, pages: int, kv_heads: int, head_dim: int) -> Tensor:
    """Pages in float32 with what the batch's contexts hold, and NaN wherever nobody wrote."""
    page_size = batch.page_size
    kv = torch.full((pages, 2, page_size, kv_heads, head_dim), float("nan"))
    for sequence, length in enumerate(batch.context_lengths):
        for position in range(length):
            page = int(batch.page_tables[sequence, position // page_size])
            kv[page, :, position % page_size] = torch.randn(2, kv_heads, head_dim)
    return kv


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_slices_equal_torch(
    size: tuple[int, int, int, int], arithmetic: torch.dtype, threads: int
) -> None:
    """Nothing that nobody wrote is used either."""
    torch.manual_seed(19)
    head_dim, heads, kv_heads, page_size = size
    batch, pages = parted(page_size)
    kv = written(batch, pages, kv_heads, head_dim).to(arithmetic)
    query = torch.randn(heads, batch.rows, head_dim).to(arithmetic).transpose(0, 1)
    for options in ({}, {"window": 21}, {"soft_cap": 2.0, "sinks": torch.randn(heads)}):
        options = {"scale": head_dim**-0.5} | options
        expected = in_torch(paged_attention)(query.float(), kv.float(), batch, **options)
        result = paged_attention(query, kv, batch, **options)
        tolerance = 3e-6 if arithmetic == torch.float32 else 1.5e-2
        torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("step", [0.02, 0.3, -0.3])
def test_scores_may_rise_and_fall_along_a_context(arithmetic: torch.dtype, step: float) -> None:
    """By little at a time and by much, in slices and in decode rows: what was summed before a
    larger score came is made relative to it, or small enough beside it to stay as it is."""
    torch.manual_seed(24)
    batch, pages = parted(16)
    kv = written(batch, pages, 2, 64)
    kv[:, 0, :, :, 0] = 0
    for sequence, length in enumerate(batch.context_lengths):
        for position in range(length):
            page = int(batch.page_tables[sequence, position // 16])
            kv[page, 0, position % 16, :, 0] = step * position
    kv = kv.to(arithmetic)
    query = torch.randn(batch.rows, 6, 64).to(arithmetic)
    query[:, :, 0] = 1
    expected = in_torch(paged_attention)(query.double(), kv.double(), batch, scale=1.0)
    result = paged_attention(query, kv, batch, scale=1.0)
    tolerance = 1e-4 if arithmetic == torch.float32 else 2e-2  # of scores near 90
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


def test_common_sizes_leave_no_slice_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(20)
    batch, pages = parted(16)
    kv, query = torch.randn(pages, 2, 16, 2, 64), torch.randn(batch.rows, 4, 64)
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
    monkeypatch.setattr(ops, "_attend_slice", None)
    monkeypatch.setattr(ops, "_attend_decode", None)
    result = paged_attention(query, kv, batch, scale=0.1)
    torch.testing.assert_close(result, expected, atol=3e-6, rtol=3e-6)


def test_many_rows_that_share_pages_are_a_matrix() -> None:
    """And those that part from them are not disturbed by it."""
    torch.manual_seed(21)
    for rows in (4, 17, 33):
        batch, pages = decoding((300, *range(210, 210 + rows - 1)), 16, shared=12)
        kv, query = torch.randn(pages, 2, 16, 2, 64), torch.randn(rows, 6, 64)
        assert batch.runs(None, slices=True).matrices.any()
        expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
        result = paged_attention(query, kv, batch, scale=0.1)
        torch.testing.assert_close(result, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("window", [90, 100, 150, 250])
def test_rows_in_a_window_read_shared_pages_as_a_matrix(
    arithmetic: torch.dtype, window: int, threads: int
) -> None:
    """Each sees other positions of them, and some of the windows begin behind them."""
    torch.manual_seed(25)
    lengths = (300, *range(194, 194 + 14 * 9, 9))
    batch, pages = decoding(lengths, 16, shared=12)
    seen = batch.runs(window, slices=True)
    starts = {int(start) for start in seen.member_starts}
    assert len(starts) > 5
    assert seen.matrices.any()
    assert not batch.runs(window, slices=False).matrices.any(), "where none see apart"
    kv = written(batch, pages, 2, 64)
    kv[:, :, :, :, :8] *= 20
    kv, query = kv.to(arithmetic), torch.randn(len(lengths), 6, 64).to(arithmetic)
    for options in ({}, {"soft_cap": 2.0, "sinks": torch.randn(6)}):
        options = {"scale": 0.1, "window": window} | options
        expected = in_torch(paged_attention)(query.double(), kv.double(), batch, **options)
        result = paged_attention(query, kv, batch, **options)
        tolerance = 1e-4 if arithmetic == torch.float32 else 0.2  # of values near 40
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_a_query_does_not_see_weighs_nothing(dtype: torch.dtype) -> None:
    """Not even 1e-38: layers that make small things large would make something of it."""
    batch, pages = parted(16)
    kv = torch.full((pages, 2, 16, 1, 64), 1e30, dtype=dtype)
    kv[:, 0] = 0
    seen = [position % 7 == 6 for position in range(300)]
    for sequence, length in enumerate(batch.context_lengths):
        for position in range(length):
            page = int(batch.page_tables[sequence, position // 16])
            kv[page, 1, position % 16] = 1e30 if seen[position] else 0
    result = paged_attention(torch.zeros(batch.rows, 1, 64).to(dtype), kv, batch, scale=1.0)
    window = paged_attention(
        torch.zeros(batch.rows, 1, 64).to(dtype), kv, batch, scale=1.0, window=3
    )
    for sequence, (queries, context) in enumerate(PARTS):
        for index in range(queries):
            row, end = batch.query_starts[sequence] + index, context - queries + index + 1
            assert bool(result[row].any()) == any(seen[:end])
            assert bool(window[row].any()) == any(seen[max(0, end - 3) : end])


def test_weights_of_a_matrix_are_rounded_once() -> None:
    """Equal weights are exact in bfloat16, so the mean of values is too."""
    batch, pages = parted(16)
    kv = torch.zeros(pages, 2, 16, 1, 64, dtype=torch.bfloat16)
    kv[:, 1] = torch.arange(64).bfloat16()
    result = paged_attention(torch.randn(batch.rows, 1, 64).bfloat16(), kv, batch, scale=1.0)
    assert torch.equal(result, torch.arange(64).bfloat16().expand(batch.rows, 1, 64))


def test_weights_of_a_matrix_are_rounded_to_the_nearest() -> None:
    """Cut off, they would sum to less: a mean of ones would be less than one."""
    torch.manual_seed(23)
    batch, pages = parted(16)
    kv = torch.randn(pages, 2, 16, 1, 64).bfloat16()
    kv[:, 1] = 1.0
    result = paged_attention(torch.randn(batch.rows, 4, 64).bfloat16(), kv, batch, scale=0.3)
    assert (result == 1.0).float().mean() > 0.95

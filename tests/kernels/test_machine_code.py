"""Attention as machine code: at models' real sizes, on several threads, with what must not be
read, and where it has to be left to torch."""

import logging
import mmap
from collections.abc import Generator
from typing import Any

import pytest
import torch

from chatserve_kernels import AttentionBatch, append_kv, paged_attention, runs
from chatserve_kernels.cpu import attention, matrices, memory, native
from tests.kernels.attended import LENGTHS, SIZES, decoding, parted, trial
from tests.kernels.test_paged_operations import in_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_torch(
    size: tuple[int, int, int, int], shared: int, dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(3)
    query, kv, batch = trial(size, dtype, shared)
    scale = size[0] ** -0.5
    expected = in_torch(paged_attention)(query.float(), kv.float(), batch, scale=scale)
    result = paged_attention(query, kv, batch, scale=scale)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # half a unit of bfloat16 at 1 is 4e-3
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


def test_layers_of_one_step_may_differ_in_heads() -> None:
    torch.manual_seed(12)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    wider = torch.randn(kv.shape[0], 2, 16, 5, 64)
    more = torch.randn(batch.rows, 10, 64)
    for each, pages in ((query, kv), (more, wider), (query, kv)):
        expected = in_torch(paged_attention)(each, pages, batch, scale=0.1)
        result = paged_attention(each, pages, batch, scale=0.1)
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "options", [{"window": 50}, {"soft_cap": 3.0}, {"sinks": True}, {"window": 9, "sinks": True}]
)
def test_options_equal_torch(options: dict[str, Any], threads: int) -> None:
    torch.manual_seed(4)
    query, kv, batch = trial((64, 14, 2, 16), torch.float32, shared=8)
    if "sinks" in options:
        options = options | {"sinks": 3 * torch.randn(14)}
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.3, **options)
    result = paged_attention(query, kv, batch, scale=0.3, **options)
    torch.testing.assert_close(result, expected, atol=5e-6, rtol=5e-6)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    torch.manual_seed(5)
    query, kv, batch = trial((64, 4, 2, 16), torch.bfloat16)
    exact = paged_attention(query.float(), kv.float(), batch, scale=0.125)
    assert torch.equal(paged_attention(query, kv, batch, scale=0.125), exact.bfloat16())


@pytest.mark.parametrize(("first", "even"), [(1.0, 1.0), (1.0078125, 1.015625)])
def test_halves_are_rounded_to_even(first: float, even: float) -> None:
    """The mean of two neighbours lies half-way between them."""
    batch, pages = decoding((2,), 16)
    kv = torch.zeros(pages, 2, 16, 1, 16, dtype=torch.bfloat16)
    kv[int(batch.page_tables[0, 0]), 1, 0], kv[int(batch.page_tables[0, 0]), 1, 1] = (
        first,
        first + 0.0078125,
    )
    result = paged_attention(torch.zeros(1, 1, 16).bfloat16(), kv, batch, scale=1.0)
    assert (result == even).all()


def test_torchs_threads_run_it(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    paged_attention(query, kv, batch, scale=1.0)  # compiled before anything is counted
    parallel, calls = native._parallel(), []

    def counted(*arguments: Any) -> None:
        calls.append(arguments[2])
        parallel(*arguments)

    monkeypatch.setattr(native, "_parallel", lambda: counted)
    paged_attention(query, kv, batch, scale=1.0)
    assert calls == ([] if threads == 1 else [2, 2])


def test_a_query_of_other_strides() -> None:
    torch.manual_seed(13)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    other = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert other.stride(2) != 1
    expected = paged_attention(query, kv, batch, scale=0.1)
    result = paged_attention(other, kv, batch, scale=0.1)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=2e-6)


def test_parts_of_a_long_context_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    whole = paged_attention(query, kv, batch, scale=1.0)
    monkeypatch.setattr(runs, "RUN_TOKENS_MAX", 37)
    batch, _ = decoding(LENGTHS, 16)
    assert len(batch.runs(None, slices=False).sequences) > 20
    parted = paged_attention(query, kv, batch, scale=1.0)
    torch.testing.assert_close(parted, whole, atol=2e-6, rtol=2e-6)


def test_large_scores_of_either_sign_stay_exact() -> None:
    torch.manual_seed(7)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    for factor in (1e3, 1e-6):
        expected = in_torch(paged_attention)(query * factor, kv, batch, scale=1.0)
        result = paged_attention(query * factor, kv, batch, scale=1.0)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_what_is_not_finite_shows_in_its_row_alone(value: float, part: int) -> None:
    torch.manual_seed(8)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    before = paged_attention(query, kv, batch, scale=0.1)
    page = int(batch.page_tables[1, 3])
    kv[page, part, 5] = value
    result = paged_attention(query, kv, batch, scale=0.1)
    assert not result[1].isfinite().all(dim=-1).any(), "a wrong number would pass for a right one"
    others = [0, 2, 3, 4]
    assert torch.equal(result[others], before[others])


def test_nothing_outside_a_context_is_used() -> None:
    torch.manual_seed(9)
    query, kv, batch = trial((64, 4, 2, 16), torch.float32, shared=8)
    for window in (None, 20):
        expected = paged_attention(query, kv, batch, scale=0.1, window=window)
        spoiled = torch.full_like(kv, float("nan"))
        for row, length in enumerate(batch.context_lengths):
            for position in range(0 if window is None else max(0, length - window), length):
                page, offset = int(batch.page_tables[row, position // 16]), position % 16
                spoiled[page, :, offset] = kv[page, :, offset]
        result = paged_attention(query, spoiled, batch, scale=0.1, window=window)
        assert torch.equal(result, expected)


def test_append_from_any_strides(threads: int) -> None:
    torch.manual_seed(10)
    batch, pages = decoding(tuple(range(1, 150)), 16)
    kept = torch.randperm(batch.rows)[:140].sort().values
    batch = AttentionBatch(
        query_starts=batch.query_starts,
        context_lengths=batch.context_lengths,
        page_tables=batch.page_tables,
        write_pages=batch.write_pages[kept],
        write_offsets=batch.write_offsets[kept],
        write_rows=kept,
        page_size=16,
    )
    kv = torch.randn(pages, 2, 16, 3, 24).bfloat16()
    other = kv.clone()
    key = torch.randn(3, batch.rows, 24).bfloat16().transpose(0, 1)
    value = torch.randn(batch.rows, 5, 24).bfloat16()[:, 1:4]
    inside_out = torch.randn(batch.rows, 24, 3).bfloat16().transpose(1, 2)
    for mine, yours in ((key, value), (key, inside_out), (inside_out, value)):
        append_kv(mine, yours, kv, batch)
        in_torch(append_kv)(mine, yours, other, batch)
        assert torch.equal(kv, other)


@pytest.mark.parametrize(
    "fault",
    [
        *({"page_tables": 3}, {"page_tables": -1}, {"write_pages": 3}, {"write_pages": -1}),
        *({"write_offsets": 16}, {"write_offsets": -1}, {"write_rows": 2}, {"write_rows": -1}),
    ],
    ids=str,
)
def test_places_that_are_not_there_are_refused(fault: dict[str, int]) -> None:
    """Machine code would read and write there."""
    fields = {
        "page_tables": torch.tensor([[0], [1]]),
        "write_pages": torch.tensor([0, 1]),
        "write_offsets": torch.tensor([4, 5]),
        "write_rows": torch.tensor([0, 1]),
    }
    for name, wrong in fault.items():
        fields[name].view(-1)[1] = wrong
    batch = AttentionBatch(query_starts=(0, 1, 2), context_lengths=(5, 6), page_size=16, **fields)
    kv, rows = torch.zeros(3, 2, 16, 1, 16), torch.zeros(2, 1, 16)
    with pytest.raises(ValueError, match=r"out of range|not among|not in a page"):
        append_kv(rows, rows, kv, batch)
    with pytest.raises(ValueError, match=r"out of range|not among|not in a page"):
        paged_attention(rows, kv, batch, scale=1.0)


@pytest.fixture
def afresh() -> Generator[None]:
    """Nothing is known yet of what was compiled."""
    attention._attention.cache_clear()
    yield
    attention._attention.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_what_is_wrong_on_a_machine_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
    compiled = native.compiled
    # As if a processor took its tasks from the wrong place: nothing is joined.
    monkeypatch.setattr(native, "compiled", lambda text, names: compiled(text, names)[:1] * 2)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(paged_attention(query, kv, batch, scale=0.1), expected)
    assert "is wrong on this machine" in caplog.text


@pytest.mark.usefixtures("afresh")
def test_slices_that_are_wrong_on_a_machine_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Decode rows alone would not show it."""
    torch.manual_seed(22)
    batch, pages = parted(16)
    kv, query = torch.randn(pages, 2, 16, 2, 64), torch.randn(batch.rows, 4, 64)
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
    monkeypatch.setattr(matrices.Matrices, "mix", lambda _self, _records, _positions: None)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(paged_attention(query, kv, batch, scale=0.1), expected)
    assert "is wrong on this machine" in caplog.text


@pytest.mark.usefixtures("afresh")
def test_a_program_that_llvm_refuses_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
    monkeypatch.setattr(attention.programs, "attention_text", lambda _sizes: "no program")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(paged_attention(query, kv, batch, scale=0.1), expected)
    assert "left to torch" in caplog.text


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("absent", ["programs", "_parallel"])
def test_without_llvm_or_threads_torch_does_it(
    absent: str, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    query, kv, batch = trial((64, 4, 2, 16), torch.float32)
    expected = in_torch(paged_attention)(query, kv, batch, scale=0.1)
    module, instead = (attention, None) if absent == "programs" else (native, lambda: None)
    monkeypatch.setattr(module, absent, instead)
    monkeypatch.setattr(attention, "_append", lambda *_: None)
    served = attention.attention_for(query, kv, soft_cap=None, sinks=None)
    assert (served is not None) == (absent == "_parallel" and threads == 1)
    torch.testing.assert_close(paged_attention(query, kv, batch, scale=0.1), expected)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.float32, 20)])
def test_other_types_and_sizes_are_torchs(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(11)
    query, kv, batch = trial((head_dim, 4, 2, 16), dtype)
    assert attention.attention_for(query, kv, soft_cap=None, sinks=None) is None
    expected = in_torch(paged_attention)(query.float(), kv.float(), batch, scale=0.1)
    result = paged_attention(query, kv, batch, scale=0.1)
    torch.testing.assert_close(result.float(), expected, atol=4e-3, rtol=4e-3)


def test_large_memory_is_asked_for_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole ones inside of it, and nothing beside it."""
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *given: asked.append(given))
    huge = memory.HUGE_BYTES
    given = memory.empty((3, huge - 5), torch.int8)
    assert given.shape == (3, huge - 5)
    assert given.is_contiguous()
    assert asked == [(given.data_ptr(), 2 * huge, mmap.MADV_HUGEPAGE)]
    assert given.data_ptr() % huge == 0
    given.fill_(1)
    asked.clear()
    assert memory.empty((huge // 4 - 1,), torch.float32).dtype == torch.float32
    assert asked == []


def test_memory_where_the_system_has_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    given = memory.empty((2, memory.HUGE_BYTES), torch.bfloat16)
    assert given.shape == (2, memory.HUGE_BYTES)
    assert given.dtype == torch.bfloat16

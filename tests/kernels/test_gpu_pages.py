"""Append, copies and checksums by Triton: on a GPU, else in Triton's interpreter."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import (
    AttentionBatch,
    append_kv,
    copy_pages,
    gpu,
    ops,
    page_checksums,
    reference,
)
from chatserve_kernels.gpu import pages
from tests.kernels.attended import in_fp8, rounding_rows, same_numbers

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
NAN = float("nan")


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own way is not there to help."""

    def nobody(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("torch was asked")

    for name in ("index_copy_", "index_select"):
        monkeypatch.setattr(Tensor, name, nobody)


def writes(rows: int, kept: list[int] | None) -> AttentionBatch:
    """Rows of a slice that ends in its third page, or some of them, to places in turn."""
    count = rows if kept is None else len(kept)
    places = torch.randperm(5 * 8)[:count]
    return AttentionBatch(
        query_starts=(0, rows),
        context_lengths=(20,),
        page_tables=torch.tensor([[4, 0, 3]], device=DEVICE),
        write_pages=(places // 8).to(DEVICE),
        write_offsets=(places % 8).to(DEVICE),
        write_rows=None if kept is None else torch.tensor(kept, device=DEVICE).long(),
        page_size=8,
    )


@pytest.mark.parametrize("kept", [None, [0, 2, 3, 9], []], ids=["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 80), (12, 96)])
def test_append_equals_the_reference(
    kv_heads: int, head_dim: int, dtype: torch.dtype, kept: list[int] | None
) -> None:
    print(f"seed {head_dim}")
    torch.manual_seed(head_dim)
    inner = 2 * 8 * kv_heads * head_dim
    pool = torch.full((5, 8 + inner + 24), NAN, dtype=dtype, device=DEVICE)
    kv = pool[:, 8 : 8 + inner].view(5, 2, 8, kv_heads, head_dim)
    batch = writes(10, kept)
    # Heads before rows in memory, and every third, and every other, element.
    key = torch.randn(kv_heads, 10, head_dim, 3, device=DEVICE).to(dtype)[..., 1].transpose(0, 1)
    value = torch.randn(10, kv_heads, head_dim, 2, device=DEVICE).to(dtype)[..., 0]
    expected = pool.clone()
    there = expected[:, 8 : 8 + inner].view(kv.shape)
    reference.append_kv(key, value, there, batch)
    append_kv(key, value, kv, batch)
    torch.testing.assert_close(pool, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "dtype", "kept"),
    [
        (2, 72, torch.float32, None),
        (3, 128, torch.bfloat16, None),
        (1, 64, torch.float16, [0, 2, 3, 9]),
        (2, 8, torch.float32, []),
    ],
)
def test_append_to_fp8_equals_the_reference_to_the_bit(
    kv_heads: int, head_dim: int, dtype: torch.dtype, kept: list[int] | None
) -> None:
    print(f"seed {head_dim}")
    torch.manual_seed(head_dim)
    batch = writes(10, kept)
    key, value = rounding_rows(10, kv_heads, head_dim, dtype)
    key, value = key.to(DEVICE).transpose(0, 1), value.to(DEVICE)
    value = torch.stack((value, value * NAN), dim=-1)[..., 0]
    nothing = torch.full((5, 2, 8, kv_heads, head_dim), NAN)
    given, expected = in_fp8(nothing, DEVICE), in_fp8(nothing, DEVICE)
    reference.append_kv(key, value, expected[0], batch, expected[1])
    append_kv(key, value, given[0], batch, given[1])
    assert same_numbers(given, expected)


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize("elements", [4, 256, 1004])
def test_copies_read_before_they_write(elements: int) -> None:
    pool = torch.randn(9, elements, dtype=torch.float16, device=DEVICE)
    other = pool.clone()
    # A ring, a chain, one page to several, one to itself.
    pairs = torch.tensor([[0, 1, 4, 5, 6, 6, 3], [1, 4, 0, 6, 7, 8, 3]], device=DEVICE)
    reference.copy_pages(other, pairs[0], pairs[1])
    copy_pages(pool, pairs[0], pairs[1])
    assert torch.equal(pool, other)
    copy_pages(pool, pairs[0, :0], pairs[1, :0])
    assert torch.equal(pool, other)


@pytest.mark.parametrize(("pages_there", "elements", "before"), [(80, 8, 0), (6, 5, 0), (6, 8, 1)])
def test_copies_that_no_program_holds_are_torchs(
    pages_there: int, elements: int, before: int
) -> None:
    """Too many, of half a word, or from half a word on."""
    memory = torch.randn(before + pages_there * elements, device=DEVICE)
    pool = memory[before:].view(pages_there, elements)
    other = pool.clone()
    sources = torch.arange(pages_there, device=DEVICE)
    reference.copy_pages(other, sources, sources.flip(0))
    copy_pages(pool, sources, sources.flip(0))
    assert torch.equal(pool, other)


@pytest.mark.parametrize("elements", [4, 4096, 100_004])
def test_checksums_are_torchs(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {elements}")
    torch.manual_seed(elements)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (7, elements // 4), device=DEVICE)
    pool = bits.view(torch.bfloat16)
    weights = torch.randint(-(1 << 63), (1 << 63) - 1, (elements // 4,), device=DEVICE)
    asked = torch.tensor([6, 0, 0, 3], device=DEVICE)
    sums = page_checksums(pool, asked, weights)
    before = sums.clone()
    monkeypatch.setattr(gpu, "serves", lambda device_type: False)
    assert torch.equal(before, ops.page_checksums(pool, asked, weights))
    assert sums.dtype == torch.int64
    exact = sum(int(a) * int(b) for a, b in zip(bits[3].cpu(), weights.cpu(), strict=True))
    assert int(sums[3]) % (1 << 64) == exact % (1 << 64)
    assert page_checksums(pool, asked[:0], weights).shape == (0,)


def test_the_trials_agree() -> None:
    assert pages._agrees(DEVICE)
    assert pages._rounds_right(DEVICE)


@pytest.mark.parametrize("what", ["elements", "scales"])
def test_fp8_that_fails_its_trial_is_left_to_torch(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = pages.append_rounded

    def wrong(key: Any, value: Any, kv: Tensor, batch: Any, scales: Tensor) -> None:
        right(key, value, kv, batch, scales)
        if what == "elements":
            kv[2, 1, 7, 1, 3] = kv[2, 1, 7, 1, 3].float() * 1.2
        else:
            scales[2, 1, 1, 7] *= 1 + 1e-6

    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(pages, "append_rounded", wrong)
    pages.rounds.cache_clear()
    with caplog.at_level(logging.WARNING):
        served = pages.rounds(DEVICE)
    pages.rounds.cache_clear()
    assert not served
    (record,) = caplog.records
    assert "pages of fp8 are wrong" in record.getMessage()


@pytest.mark.parametrize("name", ["append_kv", "copy_pages", "page_checksums"])
def test_what_fails_its_trial_is_left_to_torch(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(pages, name)

    def wrong(*arguments: Tensor) -> Any:
        result = right(*arguments)
        changed = result if name == "page_checksums" else arguments[2 if name == "append_kv" else 0]
        changed.view(-1)[0] += 1
        return result

    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(pages, name, wrong)
    pages.served.cache_clear()
    with caplog.at_level(logging.WARNING):
        served = pages.served(DEVICE)
    pages.served.cache_clear()
    assert not served
    (record,) = caplog.records
    assert "are wrong" in record.getMessage()

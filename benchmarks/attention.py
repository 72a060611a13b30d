"""Attention of decode rows on a CPU: machine code against torch, and against reading memory.

    python -m benchmarks.attention [--json FILE]

One step's attention and KV append, all layers, both ways in turn on the same pages; the shortest of
several times. A step decodes for some chats, or computes a slice of a prompt. The read bandwidth is
that of summing the same memory. Shared: all rows begin with the same pages, which are read once for
all of them.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import run
from chatserve_kernels import AttentionBatch, append_kv, paged_attention
from chatserve_kernels.cpu import native

PAGE_SIZE = 16
TIMES = 5


@dataclass(frozen=True, slots=True)
class Case:
    """rows: chats; context: tokens of each; shared: how many of them are the same for all; queries:
    the last of a chat's tokens, which this step computes."""

    name: str
    rows: int
    context: int
    shared: int = 0
    layers: int = 28
    kv_heads: int = 8
    group: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1

    @property
    def token_bytes(self) -> int:
        """Of all layers."""
        element = torch.empty(0, dtype=self.dtype).element_size()
        return 2 * self.layers * self.kv_heads * self.head_dim * element


CASES = (
    Case("one chat", 1, 600),
    Case("16 chats", 16, 1000),
    Case("16 chats, 992 tokens shared", 16, 1000, shared=992),
    Case("demonstration model, one chat", 1, 300, 0, 5, 2, 2, 64),
    Case("demonstration model, 32 chats", 32, 300, 0, 5, 2, 2, 64),
    Case("a prompt of 512", 1, 512, queries=512),
    Case("the last 256 of 1,756", 1, 1756, queries=256),
    Case("demonstration model, 512", 1, 512, 0, 5, 2, 2, 64, queries=512),
)


async def measure() -> Mapping[str, object]:
    """Milliseconds of each case both ways, their ratio, and bytes read a second."""
    figures: dict[str, object] = {"threads": torch.get_num_threads()}
    with torch.inference_mode():
        for case in CASES:
            figures[case.name] = _measured(case)
    return figures


def _measured(case: Case) -> Mapping[str, float]:
    step, pool = _step(case)

    def by_torch() -> Tensor:
        with native.left_to_torch():
            return step()

    difference = float((step().float() - by_torch().float()).abs().max())
    seconds = {step: 9e9, by_torch: 9e9, pool.view(torch.int64).sum: 9e9}
    for _ in range(TIMES):
        for each in seconds:
            seconds[each] = min(seconds[each], _seconds(each))
    code, plain, reading = seconds.values()
    read = (case.shared + case.rows * (case.context - case.shared)) * case.token_bytes
    result = {
        "machine_code_ms": 1e3 * code,
        "torch_ms": 1e3 * plain,
        "ratio": plain / code,
        "read_gb_a_second": read / code / 1e9,
        "bandwidth_gb_a_second": pool.nbytes / reading / 1e9,
        "largest_difference": difference,
    }
    print(
        f"{case.name:32} {1e3 * code:8.2f} ms, torch {1e3 * plain:8.2f} ms, "
        f"{plain / code:5.2f} times; {result['read_gb_a_second']:5.1f} of "
        f"{result['bandwidth_gb_a_second']:.1f} GB/s; largest difference {difference:.4f}",
        flush=True,
    )
    return result


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _step(case: Case) -> tuple[Callable[[], Tensor], Tensor]:
    """A step's attention, and the pages."""
    torch.manual_seed(1)
    common, each = case.shared // PAGE_SIZE, -(-case.context // PAGE_SIZE)
    own = each - common
    order = torch.randperm(common + case.rows * own).int()
    tables = torch.stack(
        [
            torch.cat((order[:common], order[common + row * own : common + (row + 1) * own]))
            for row in range(case.rows)
        ]
    )
    inner = 2 * PAGE_SIZE * case.kv_heads * case.head_dim
    pool = torch.empty(len(order), case.layers * inner, dtype=case.dtype)
    pool[:] = torch.randn(pool.shape[1]).to(case.dtype)  # every page has memory of its own
    shape = (len(order), 2, PAGE_SIZE, case.kv_heads, case.head_dim)
    layers = [
        pool[:, layer * inner : (layer + 1) * inner].view(shape) for layer in range(case.layers)
    ]
    heads = case.kv_heads * case.group
    rows = case.rows * case.queries
    query = torch.randn(heads, rows, case.head_dim).to(case.dtype).transpose(0, 1)
    key = torch.randn(case.kv_heads, rows, case.head_dim).to(case.dtype).transpose(0, 1)
    positions = torch.arange(case.context - case.queries, case.context)

    def step() -> Tensor:
        batch = AttentionBatch(
            query_starts=tuple(range(0, rows + 1, case.queries)),
            context_lengths=(case.context,) * case.rows,
            page_tables=tables,
            write_pages=tables[:, positions // PAGE_SIZE].long().flatten(),
            write_offsets=(positions % PAGE_SIZE).repeat(case.rows),
            write_rows=None,
            page_size=PAGE_SIZE,
        )
        result = query
        for kv in layers:
            append_kv(key, key, kv, batch)
            result = paged_attention(query, kv, batch, scale=case.head_dim**-0.5)
        return result

    return step, pool


def main() -> int:
    """Print a line a case; with --json also write it."""
    return run("benchmarks.attention", __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())

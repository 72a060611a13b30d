"""Compile what the GPU's doors launch, for a processor that need not be there:
`python -m tests.kernels.compiling COMPUTE_CAPABILITY` prints a line for each program that differs
from those before it: its name, the bytes of shared memory and of spilled registers, its constants.

The doors get tensors of the host, and each launch becomes Triton's own compilation of what it was
given. Nothing runs.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from chatserve_kernels import fp8, gpu
from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.gpu import attention, pages, rotation, rows, sampling
from chatserve_kernels.rotation import HeadNorms, Rotary
from chatserve_kernels.sampling import Adjustments, Choices, LateCounts

THREADS_OF_A_WARP = 32
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PAGE_SIZE = 16
BRAIN, HALF = torch.bfloat16, torch.float16


class NoDevice:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, THREADS_OF_A_WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiler:
    """In the place of `gpu.launched`."""

    def __init__(self) -> None:
        self._known = set[str]()

    def __call__(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def compiled(*given: Any, **constants: Any) -> None:
            program = kernel.warmup(*given, grid=grid, **constants)
            if program.hash in self._known:
                return
            self._known.add(program.hash)
            told = ",".join(f"{key}={value}" for key, value in constants.items())
            name, shared = kernel.fn.__name__, program.metadata.shared
            print(name, shared, spilled(program.asm["cubin"]), told.replace(" ", ""), flush=True)

        return compiled


def spilled(binary: bytes) -> int:
    """Bytes of slow memory that each thread of a program has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bSTACK:(\d+)", told)
    assert found is not None, told
    return int(found[1])


def attend(
    queries: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
    *, plain: bool = True, fp8: bool = False,
) -> None:  # fmt: skip
    """One launch: slices and rows behind 400 positions. plain: without cap and sinks."""
    lengths = [400 + count for count in queries]
    each = -(-max(lengths) // PAGE_SIZE)
    tables = torch.arange(each * len(queries), dtype=torch.int32).view(len(queries), each)
    batch = AttentionBatch(
        query_starts=tuple(itertools.accumulate(queries, initial=0)),
        context_lengths=tuple(lengths),
        page_tables=tables,
        write_pages=torch.zeros(sum(queries), dtype=torch.int64),
        write_offsets=torch.zeros(sum(queries), dtype=torch.int64),
        write_rows=None,
        page_size=PAGE_SIZE,
        host_tables=tables.numpy(),
    )
    query = torch.zeros(sum(queries), heads, head_dim, dtype=dtype)
    shape = tables.numel(), 2, PAGE_SIZE, kv_heads, head_dim
    kv = torch.zeros(shape, dtype=torch.float8_e4m3fn if fp8 else dtype)
    attention.paged_attention(
        query,
        kv,
        batch,
        torch.empty_like(query),
        scale=1.0,
        window=None,
        soft_cap=None if plain else 5.0,
        sinks=None if plain else torch.zeros(heads, dtype=dtype),
        scales=torch.zeros(shape[0], 2, kv_heads, PAGE_SIZE) if fp8 else None,
    )


def attend_all() -> None:
    """Heads of three sizes, by programs of the least and the greatest height."""
    for sizes in ((4, 2, 64), (32, 8, 128), (8, 4, 256)):
        attend((1, 1), *sizes, BRAIN)
        attend((300,), *sizes, BRAIN)
    attend((12,), 32, 8, 128, BRAIN)
    attend((300, 1), 32, 8, 128, BRAIN, plain=False)
    attend((1, 1), 32, 8, 128, BRAIN, fp8=True)
    attend((300,), 32, 8, 128, BRAIN, fp8=True)
    attend((300,), 8, 4, 256, BRAIN, fp8=True)
    attend((300,), 32, 8, 128, HALF, fp8=True)
    attend((9, 1), 4, 2, 64, torch.float32)


def five_rows() -> AttentionBatch:
    """A slice, each of whose rows is kept."""
    places = torch.zeros(5, dtype=torch.int64)
    return AttentionBatch(
        query_starts=(0, 5),
        context_lengths=(5,),
        page_tables=torch.zeros(1, 1, dtype=torch.int32),
        write_pages=places,
        write_offsets=places,
        write_rows=None,
        page_size=PAGE_SIZE,
    )


def move_all() -> None:
    """Rows to their pages, copies of pages, sums of pages."""
    key = torch.zeros(5, 8, 128, dtype=BRAIN)
    batch = five_rows()
    kv = torch.zeros(4, 2, PAGE_SIZE, 8, 128, dtype=BRAIN)
    pages.append_kv(key, key, kv, batch)
    codes = kv.to(torch.float8_e4m3fn)
    pages.append_rounded(key, key, codes, batch, torch.zeros(4, 2, 8, PAGE_SIZE))
    pool = torch.zeros(16, 4096, dtype=torch.int64)
    for count in (1, 5):
        pages.copy_pages(pool, torch.arange(count), torch.arange(count) + 8)
    pages.page_checksums(pool, torch.arange(3), pool[0])


def rotate_all() -> None:
    """Rows of joined products, with and without norms of heads, to plain pages and fp8 ones."""
    batch = five_rows()
    for heads, kv_heads, head_dim in ((32, 8, 128), (14, 2, 64), (8, 4, 256)):
        counts = heads, kv_heads, kv_heads
        given = torch.zeros(5, sum(counts), head_dim, dtype=BRAIN).split(counts, dim=1)
        query, key, value = given
        angles = torch.zeros(5, head_dim, dtype=BRAIN)
        kv = torch.zeros(4, 2, PAGE_SIZE, kv_heads, head_dim, dtype=BRAIN)
        scales = torch.zeros(4, 2, kv_heads, PAGE_SIZE)
        for norms in (None, HeadNorms(torch.ones(head_dim), torch.ones(head_dim), 1e-6)):
            rotary = Rotary(angles, angles, norms)
            rotation.rotate_append(query, key, value, kv, batch, rotary, None)
            codes = kv.to(torch.float8_e4m3fn)
            rotation.rotate_append(query, key, value, codes, batch, rotary, scales)
            rotation.rotate(query, key, rotary)


def choose_all() -> None:
    """Tokens of a large vocabulary, with and without filters and adjustments."""
    ones = np.ones(4)
    numbers = np.ones((3, 2), np.float32)
    each = ("rows", "sources", "counts", "repetition", "presence", "frequency")
    late = LateCounts(
        chosen=torch.zeros(2, dtype=torch.int64),
        **dict(
            zip(each, (np.arange(2), np.arange(2), np.ones(2, np.int32), *numbers), strict=True)
        ),
    )
    adjustments = Adjustments(np.arange(2), np.arange(2), *numbers, late)
    for kept, given in ((0, None), (50, adjustments)):
        choices = Choices(
            temperature=ones,
            min_p=ones * 0,
            top_k=ones * kept,
            top_p=ones,
            noise=ones / 2,
            logarithms=ones,
            adjustments=given,
        )
        sampling.choose_tokens(torch.zeros(4, 151936), choices)


def norm_and_gate() -> None:
    """Rows of a large model."""
    given = torch.zeros(5, 4096, dtype=BRAIN)
    rows.rms_norm(given, torch.ones(4096), 1e-6)
    for gelu in (False, True):
        rows.gated(given, given, gelu=gelu)


def main() -> None:
    """Compile all of them."""
    capability = int(sys.argv[1])
    driver.set_active(NoDevice(capability))
    gpu.launched = Compiler()
    attention.multiprocessors = lambda device: 132
    attention.knows_fp8 = lambda device: divmod(capability, 10) >= fp8.NATIVE_CAPABILITY
    attend_all()
    move_all()
    rotate_all()
    choose_all()
    norm_and_gate()


if __name__ == "__main__":
    main()

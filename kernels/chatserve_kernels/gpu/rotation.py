"""Rotary embedding of rows on a GPU: tensors to the kernel of `rotation_programs.py`.

May not know: layers. The door in `../rotation.py` has checked what comes in.
"""

from functools import cache

import torch
from torch import Tensor

from chatserve_kernels import fp8, gpu
from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.gpu import rotation_programs
from chatserve_kernels.gpu.tiles import power_of_two
from chatserve_kernels.rotation import HeadNorms, Rotary, rotated
from chatserve_kernels.trial import TOLERANCE

HALVES_MAX = 1 << 13  # elements of half of a program's query heads
WARP_ELEMENTS = 256  # the same, for each warp
WARPS_MAX = 8
PAGE_SIZE = 8  # of trials
FP8_TOLERANCE = 0.04  # what three bits of a fraction come to, over a head's elements


def serves(query: Tensor, key: Tensor, value: Tensor, kv: Tensor, rotary: Rotary) -> bool:
    """Whether the kernel takes tensors like these, and has passed its trial."""
    if not gpu.serves(query.device.type) or query.dtype not in TOLERANCE:
        return False
    head_dim, group = query.shape[2], query.shape[1] // key.shape[1]
    if power_of_two(head_dim // 2) * power_of_two(group) > HALVES_MAX:
        return False
    if any(each.stride(-1) != 1 for each in (query, key, value, rotary.cos, rotary.sin)):
        return False
    if gpu.interpreted():
        return True
    sizes = head_dim, group, rotary.norms is not None, kv.dtype == fp8.FP8
    return _trusted(*sizes, query.dtype, query.device)


def rotate_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    batch: AttentionBatch,
    rotary: Rotary,
    scales: Tensor | None,
) -> None:
    """As the door has them, for a batch that writes every row."""
    page_size = kv.shape[2]
    places = batch.write_pages.contiguous(), batch.write_offsets.contiguous()
    held = kv if scales is None else kv.view(torch.uint8)
    _launch(query, key, value, held, scales, places, rotary, page_size)


def rotate(query: Tensor, key: Tensor, rotary: Rotary) -> None:
    """Query and key in place."""
    _launch(query, key, None, None, None, None, rotary, 1)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    kv: Tensor | None,
    scales: Tensor | None,
    places: tuple[Tensor, Tensor] | None,
    rotary: Rotary,
    page_size: int,
) -> None:
    """What is None is not looked at."""
    rows, kv_heads, head_dim = key.shape
    if rows == 0:
        return
    group, half = query.shape[1] // kv_heads, head_dim // 2
    norms, room = rotary.norms, power_of_two(group) * power_of_two(half)
    pages, offsets = places or (key, key)
    given = key if value is None else value
    held = key if kv is None else kv
    gpu.launched(rotation_programs.rotate, (rows, kv_heads))(
        query,
        key,
        given,
        rotary.cos,
        rotary.sin,
        rotary.cos if norms is None else norms.query.contiguous(),
        rotary.cos if norms is None else norms.key.contiguous(),
        held,
        held if scales is None else scales,
        pages,
        offsets,
        *query.stride()[:2],
        *key.stride()[:2],
        *given.stride()[:2],
        rotary.cos.stride(0),
        rotary.sin.stride(0),
        held.stride(0),
        0 if scales is None else scales.stride(0),
        0.0 if norms is None else norms.epsilon,
        NORMED=norms is not None,
        WRITTEN=kv is not None,
        ROUNDED=scales is not None,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_ROOM=power_of_two(group),
        HALF=half,
        HALF_ROOM=power_of_two(half),
        PAGE_SIZE=page_size,
        LARGEST_INVERSE=fp8.LARGEST_INVERSE,
        MOST_MIN=fp8.MOST_MIN,
        num_warps=min(WARPS_MAX, max(1, room // WARP_ELEMENTS)),
    )


@cache
def _trusted(
    head_dim: int, group: int, normed: bool, rounded: bool, dtype: torch.dtype, device: torch.device
) -> bool:
    return gpu.passes(
        "rotary embeddings",
        device,
        lambda: _agrees(head_dim, group, dtype, device, normed=normed, rounded=rounded),
    )


def _agrees(
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    normed: bool,
    rounded: bool,
) -> bool:
    """Whether three rows, the last of which goes to no page, come out as torch has them: values to
    the bit, query and key but for their rounding, which one compiled program need not do as another
    does. In fp8 a value that is infinite tells of itself, and nothing of its neighbours."""
    numbers = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers)

    shape = 3, 2 * group + 4, head_dim
    given = normal(*shape).to(device, dtype)
    if rounded:
        given[1, -1, -1] = float("inf")
    angles = normal(3, head_dim // 2).repeat(1, 2).to(device)
    weights = normal(2, head_dim).to(device)
    norms = HeadNorms(weights[0], weights[1], 1e-5) if normed else None
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), norms)
    counts = 2 * group, 2, 2
    wanted_query, wanted_key, value = (each.clone() for each in given.split(counts, dim=1))
    wanted_query = rotated(wanted_query, rotary, None if norms is None else norms.query)
    wanted_key = rotated(wanted_key, rotary, None if norms is None else norms.key)
    pages, offsets = torch.tensor([[2, 0, -1], [7, 3, 0]], device=device)
    batch = AttentionBatch(
        query_starts=(0, 3),
        context_lengths=(3,),
        page_tables=torch.tensor([[2]], device=device),
        write_pages=pages,
        write_offsets=offsets,
        write_rows=None,
        page_size=PAGE_SIZE,
    )
    nothing = torch.zeros((3, 2, PAGE_SIZE, 2, head_dim), device=device)
    kv = nothing.to(fp8.FP8) if rounded else nothing.to(dtype)
    scales = torch.zeros((3, 2, 2, PAGE_SIZE), device=device) if rounded else None
    twice = given.clone()
    query, key, _ = given.split(counts, dim=1)
    rotate_append(query, key, value, kv, batch, rotary, scales)
    again, in_place, _ = twice.split(counts, dim=1)
    rotate(again, in_place, rotary)
    if not (_near(query, wanted_query) and _near(again, wanted_query)):
        return False
    if not _near(in_place, wanted_key):
        return False
    places = pages[:2], offsets[:2]
    elsewhere = torch.ones((3, PAGE_SIZE), dtype=torch.bool, device=device)
    elsewhere[places] = False
    if bool(kv.float().transpose(1, 2)[elsewhere].any()):
        return False
    right, kept = torch.zeros_like(nothing), kv.float()
    right[:, 0][places], right[:, 1][places] = wanted_key[:2].float(), value[:2].float()
    if scales is not None:
        wanted = torch.zeros_like(scales)
        codes = torch.zeros_like(kv)
        fp8.write(value[:2], codes[:, 1], wanted[:, 1], *places)
        if not torch.equal(scales[:, 1].nan_to_num(-1.0), wanted[:, 1].nan_to_num(-1.0)):
            return False
        kept = fp8.widened(kv, scales.transpose(2, 3), torch.float32)
        right[:, 1] = fp8.widened(codes[:, 1], wanted[:, 1].transpose(1, 2), torch.float32)
    if not torch.equal(kept[:, 1].nan_to_num(-1.0), right[:, 1].nan_to_num(-1.0)):
        return False
    tolerance = TOLERANCE[dtype] + (FP8_TOLERANCE if rounded else 0.0)
    return _near(kept[:, 0][places], right[:, 0][places], tolerance)


def _near(result: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Each head of each row. tolerance: that of its type, if none is given."""
    bound = TOLERANCE[result.dtype] if tolerance is None else tolerance
    difference = (result.double() - expected.double()).norm(dim=-1)
    return bool((difference <= bound * expected.double().norm(dim=-1)).all())

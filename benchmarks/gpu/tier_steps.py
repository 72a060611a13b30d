"""Pages on their way: out to page-locked memory of the host and in again, beside plain copies of
as many bytes; and a long history that comes back from the disk after a restart, beside computing
it."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.bench import GIGA, Bench, NotMeasured, Row, Step, joined
from benchmarks.gpu.house import House, build, first_token, running
from benchmarks.gpu.limits import random_bytes
from benchmarks.gpu.random_llama import LARGE, PAGE_SIZE, TINY, Made, made
from chatserve.engine.page_mover import HostMemory, PageMover
from chatserve.engine.plan import Moves, PageMove
from chatserve.model import KVLayout, LayerShape
from prefix_store import MasterSecret, PageShape, PageStore, Slab

# Pages of one step's moves: what the server moves, and as many as say what is possible.
MOVED, MOVED_QUICK = (32, 512), (2, 8)
TURNS, TURNS_QUICK = 12, 2
HISTORY, HISTORY_QUICK = 32_768, 128
WARM_SHARE = 8  # of the history, for what the first steps pay for
NEW = 32  # tokens of the turn after the restart
KEPT_SECONDS = 45.0  # until all of the history is on the disk
LOOK_SECONDS = 0.05
MEMORY_FOLDER = Path("/dev/shm")


def steps(quick: bool) -> Sequence[Step]:
    """Swaps, then the restart."""
    return [
        *(Step(f"moves of {each} pages", partial(_moves, each)) for each in
          (MOVED_QUICK if quick else MOVED)),
        Step("a turn after a restart", _restart, 80.0),
    ]  # fmt: skip


def _moves(count: int, bench: Bench) -> Iterable[Row]:
    """As the engine's runner moves them beside a step: with each page's checksum."""
    size = TINY if bench.quick else LARGE
    shapes = (LayerShape(size.kv_heads, size.head_dim),) * size.layers
    layout = KVLayout(PAGE_SIZE, torch.bfloat16, shapes)
    pool = random_bytes(2 * count * layout.page_bytes, bench.device).view(layout.dtype)
    pool = pool.view(2 * count, layout.page_elements)
    mover = PageMover(pool, HostMemory(layout, slots=2 * count, device=bench.device))
    taken: dict[str, list[float]] = {"out": [], "in": [], "both": []}
    for turn in range(TURNS_QUICK if bench.quick else TURNS):
        first = turn % 2 * count
        same = tuple(PageMove(page, page) for page in range(first, first + count))
        saved, _, seconds = _moved(mover, Moves(saves=same))
        taken["out"].append(seconds)
        pool[first : first + count].fill_(float("nan"))
        _, promoted, seconds = _moved(mover, Moves(promotions=same))
        taken["in"].append(seconds)
        if promoted != saved:
            yield Row(name=f"moves of {count} pages", note="other bytes came back", failed=True)
            return
        if turn:
            other = count - first
            away = tuple(PageMove(page, page) for page in range(other, other + count))
            taken["both"].append(_moved(mover, Moves(away, same))[2])
    moved = count * layout.page_bytes
    plain = _plain(bench, moved)
    for word, seconds in taken.items():
        rate = moved * (2 if word == "both" else 1) / min(seconds)
        limit = plain["up" if word == "in" else "down"]
        name = f"{count} pages {'out and in' if word == 'both' else word}, with checksums"
        yield Row(
            name=name,
            value=rate / GIGA,
            unit="GB/s",
            share=rate / limit,
            beside="plain pinned",
            note=joined(f"plain {limit / GIGA:.1f} GB/s", f"{1e3 * min(seconds):.2f} ms"),
        )


def _moved(mover: PageMover, moves: Moves) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    with torch.inference_mode():
        return mover.begin(moves).finish()


def _plain(bench: Bench, count: int) -> dict[str, float]:
    """Bytes a second of one plain copy of so many."""
    host, there = random_bytes(count, "cpu"), random_bytes(count, bench.device)
    host = host.pin_memory() if bench.on_gpu else host
    pairs = {"up": (there, host), "down": (host, there)}
    return {
        name: count / bench.time(partial(target.copy_, source, non_blocking=True)).device
        for name, (target, source) in pairs.items()
    }


def _restart(bench: Bench) -> Iterable[Row]:
    """Engine, pages and store are opened anew, in this process."""
    if find_spec("cryptography") is None:
        raise NotMeasured("the store needs the package cryptography, which is not here")
    ready = made(bench.device, bench.quick)
    layout = ready.model.layout
    tokens = HISTORY_QUICK if bench.quick else HISTORY
    pages = tokens // layout.page_size
    with _folder(2 * pages * layout.page_bytes) as (folder, words):
        secret = MasterSecret.ephemeral()
        history = asyncio.run(_keep(bench, ready, folder, secret, tokens))
        found, computed, receipt = asyncio.run(_return(bench, ready, folder, secret, history))
    name = f"a turn on {tokens} tokens after a restart"
    if receipt < tokens - layout.page_size:
        words = f"only {receipt} tokens came from the disk"
        yield Row(name=name, value=1e3 * found, unit="ms", note=words, failed=True)
        return
    rate = receipt // layout.page_size * layout.page_bytes / found / GIGA
    note = joined(words, f"{rate:.1f} GB/s of pages", "engine and store anew, same process")
    yield Row(name=name, value=1e3 * found, unit="ms", note=note)
    yield Row(name=f"the same, computed: {tokens} tokens", value=1e3 * computed, unit="ms")
    yield Row(name="times as soon as computing it", value=computed / found, unit="times")


async def _keep(
    bench: Bench, ready: Made, folder: Path, secret: MasterSecret, tokens: int
) -> tuple[int, ...]:
    """Compute a history, and wait until all of its pages are on the disk."""
    with _slab(ready, folder, secret, tokens) as slab:
        house = _house(bench, ready, slab, tokens)
        history = house.tokens(tokens)
        async with running(house) as engine:
            await first_token(engine, house.request(history, 1))
            await _kept(slab, tokens // ready.model.layout.page_size)
    return history


async def _kept(slab: Slab, pages: int) -> None:
    """Wait until so many are on the disk."""
    until = time.monotonic() + KEPT_SECONDS
    while (had := slab.statistics().pages) < pages:
        if time.monotonic() > until:
            raise NotMeasured(f"after {KEPT_SECONDS:.0f} s only {had} pages were on the disk")
        await asyncio.sleep(LOOK_SECONDS)


async def _return(
    bench: Bench, ready: Made, folder: Path, secret: MasterSecret, history: tuple[int, ...]
) -> tuple[float, float, int]:
    """Seconds to the first token: found on the disk, and computed; tokens that were found."""
    with _slab(ready, folder, secret, len(history)) as slab:
        house = _house(bench, ready, slab, len(history))
        async with running(house) as engine:
            # What the first step of any server pays for, and how long its steps take.
            warm, had = len(history) // WARM_SHARE, slab.statistics().pages
            for _ in range(2):
                await first_token(engine, house.request(house.tokens(warm), 1))
            # Copies of those to the disk are none of what is measured.
            await _kept(slab, had + 2 * (warm // ready.model.layout.page_size))
            asked = (*history, *house.tokens(NEW))
            found, receipt = await first_token(engine, house.request(asked, 1))
            computed, _ = await first_token(engine, house.request(asked, 1, salt="another"))
    return found, computed, 0 if receipt is None else receipt.disk


def _house(bench: Bench, ready: Made, slab: Slab, tokens: int) -> House:
    size = ready.model.layout.page_size
    positions, slots = 3 * tokens + 4 * size, tokens // size + 64
    return build(bench, ready, positions=positions, slots=slots, depot=slab)


@contextmanager
def _slab(ready: Made, folder: Path, secret: MasterSecret, tokens: int) -> Generator[Slab]:
    layout = ready.model.layout
    shape = PageShape(
        fingerprint=ready.model.fingerprint(),
        page_bytes=layout.page_bytes,
        page_tokens=layout.page_size,
    )
    capacity = 2 * (tokens // layout.page_size) * (layout.page_bytes + 4096) + (64 << 20)
    store = PageStore.open(folder, secret, capacity_bytes=capacity)
    try:
        yield store.slab(shape)
    finally:
        store.close()


@contextmanager
def _folder(bytes_: int) -> Generator[tuple[Path, str]]:
    """Where the store lies, in memory where there is room, and a word for it."""
    memory = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > 2 * bytes_
    parent = MEMORY_FOLDER if memory else Path(tempfile.gettempdir())
    if shutil.disk_usage(parent).free < bytes_:
        raise NotMeasured(f"{bytes_ / GIGA:.0f} GB of disk are needed")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder) / "pages", "tmpfs" if memory else "a file in the page cache"

"""The bytes of a step's moves: what is saved comes back, bit by bit, with its checksum."""

import numpy as np
import pytest
import torch

from chatserve.engine import page_mover
from chatserve.engine.checksums import checksum, checksum_weights
from chatserve.engine.page_mover import HostMemory, Moving, PageMover
from chatserve.engine.plan import Moves, PageMove
from chatserve.engine.runner import OutOfMemory
from chatserve.model.layout import KVLayout, LayerShape
from chatserve_kernels import page_checksums
from chatserve_kernels.packing import fetched
from tests.seeds import drawn_seed

CPU = torch.device("cpu")
LAYOUT = KVLayout(page_size=8, dtype=torch.bfloat16, layers=(LayerShape(2, 6), LayerShape(1, 4)))


def _filled(pages: int) -> torch.Tensor:
    seed = drawn_seed()
    pool = LAYOUT.allocate(pages, device="cpu")
    torch.manual_seed(seed)
    return pool.view(torch.int64).random_().view(torch.bfloat16)


def test_what_is_saved_is_what_comes_back() -> None:
    pool = _filled(6)
    before = pool.clone()
    host = HostMemory(LAYOUT, slots=4, device="cpu", fill=float("nan"))
    mover = PageMover(pool, host)
    saved, promoted, seconds = mover.begin(Moves(saves=(PageMove(5, 0), PageMove(2, 3)))).finish()
    assert (len(saved), promoted) == (2, ())
    assert seconds >= 0
    assert bytes(host.page_view(3)) == before[2].view(torch.uint8).numpy().tobytes()
    assert [checksum(host.page_view(slot)) for slot in (0, 3)] == list(saved)
    again, promoted, _ = mover.begin(
        Moves(saves=(PageMove(4, 1),), promotions=(PageMove(3, 0), PageMove(0, 1)))
    ).finish()
    assert torch.equal(pool.view(torch.int64)[0], before.view(torch.int64)[2])
    assert torch.equal(pool.view(torch.int64)[1], before.view(torch.int64)[5])
    assert torch.equal(pool.view(torch.int64)[2:], before.view(torch.int64)[2:]), "and no others"
    assert promoted == (saved[1], saved[0])
    assert again == (checksum(host.page_view(1)),)


def test_any_bit_and_any_two_words_change_the_sum() -> None:
    pool = _filled(1)
    weights = torch.from_numpy(checksum_weights(LAYOUT.page_bytes).view(np.int64))
    words = pool.view(torch.int64)
    page = torch.zeros(1, dtype=torch.int64)

    def total() -> int:
        (number,) = page_checksums(pool, page, weights).tolist()
        assert number == checksum(memoryview(pool[0].view(torch.uint8).numpy()))
        return number

    right = total()
    for word in range(words.shape[1]):
        for bit in (0, 1, 31, 62, 63):
            flip = -(1 << 63) if bit == 63 else 1 << bit
            words[0, word] ^= flip
            assert total() != right
            words[0, word] ^= flip
    for word in range(words.shape[1] - 1):
        words[0, [word, word + 1]] = words[0, [word + 1, word]]
        assert total() != right
        words[0, [word, word + 1]] = words[0, [word + 1, word]]
    assert total() == right


def test_checksums_come_in_the_order_asked_for_and_in_parts(monkeypatch) -> None:
    pool = _filled(7)
    weights = torch.from_numpy(checksum_weights(LAYOUT.page_bytes).view(np.int64))
    wanted = torch.tensor([6, 0, 3, 3, 1])
    whole = page_checksums(pool, wanted, weights).tolist()
    assert whole == [checksum(memoryview(pool[p].view(torch.uint8).numpy())) for p in wanted]
    monkeypatch.setattr("chatserve_kernels.ops.CHECKSUM_BYTES_MAX", 2 * LAYOUT.page_bytes)
    assert page_checksums(pool, wanted, weights).tolist() == whole
    assert page_checksums(pool, wanted[:0], weights).tolist() == []


def test_wrong_shapes_are_refused() -> None:
    pool = _filled(2)
    weights = torch.from_numpy(checksum_weights(LAYOUT.page_bytes).view(np.int64))
    with pytest.raises(ValueError, match="words"):
        page_checksums(pool, torch.zeros(1, dtype=torch.int64), weights[1:])
    with pytest.raises(ValueError, match="contiguous"):
        page_checksums(pool[:, ::2], torch.zeros(1, dtype=torch.int64), weights)
    with pytest.raises(ValueError, match="whole words"):
        checksum_weights(12)


def test_memory_for_a_gpu_is_locked_where_it_lies_until_nobody_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not a byte more than was asked for: torch's own is rounded up to a power of two."""
    done: list[tuple[str, int, int]] = []
    for name in ("lock_pages", "unlock_pages"):
        monkeypatch.setattr(
            page_mover,
            name,
            lambda memory, name=name: done.append((name, memory.data_ptr(), memory.nbytes)),
        )
    host = HostMemory(LAYOUT, slots=5, device="cuda")
    place = host.pool.data_ptr(), 5 * LAYOUT.page_bytes
    assert done == [("lock_pages", *place)]
    for _ in range(2):
        host.close()
    assert done[1:] == [("unlock_pages", *place)]
    HostMemory(LAYOUT, slots=5, device="cpu").close()
    assert len(done) == 2

    def refuse(memory: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(page_mover, "unlock_pages", refuse)
    HostMemory(LAYOUT, slots=5, device="cuda").close()  # or the runner's thread would die of it
    monkeypatch.setattr(page_mover, "lock_pages", refuse)
    with pytest.raises(OutOfMemory):
        HostMemory(LAYOUT, slots=5, device="cuda")


def test_a_step_that_fails_is_told_of_only_when_its_moves_are_over() -> None:
    """What a copy still writes to must not be another's yet."""
    waits: list[str] = []

    class Event:
        def synchronize(self) -> None:
            waits.append("waited")

    Moving(fetched((), CPU), 0, 0.0, (Event(), Event())).let_go()  # type: ignore[arg-type]
    assert waits == ["waited"]

    class Lost(Event):
        def synchronize(self) -> None:
            raise torch.AcceleratorError("gone")

    Moving(fetched((), CPU), 0, 0.0, (Lost(), Lost())).let_go()  # type: ignore[arg-type]

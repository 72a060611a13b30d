"""Programs in a chain: each sees all that the one before it wrote, on any number of threads, and
nobody waits for a thread that has nothing in hand."""

import ctypes
import dataclasses
import logging
import random
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from chatserve_kernels import AttentionBatch, append_kv, attention_in_chain, paged_attention
from chatserve_kernels.cpu import native
from chatserve_kernels.linear import JoinedWeights, LinearProduct, in_blocks, product_for
from chatserve_kernels.rows import norm_for
from tests.kernels.chains import new_chain
from tests.kernels.test_paged_operations import MIXED, Shape, filled_pages, random_batch

SEED = 37
SECONDS_MAX = 60.0  # for what comes at once, or never


def normal(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product() -> LinearProduct:
    compiled = product_for(torch.float32)
    assert compiled is not None
    return compiled


def joined(outputs: int, inputs: int, seed: int = SEED) -> JoinedWeights:
    """Results are about as large as rows."""
    weight = normal(outputs, inputs, seed=seed) * inputs**-0.5
    return JoinedWeights([in_blocks(weight, normal(outputs, seed=seed))])


# Programs that depend on one another


@contextmanager
def other_work() -> Generator[None]:
    """Another thread's, meanwhile: it takes processors away in the middle of tasks."""
    over = threading.Event()

    def work() -> None:
        matrix = torch.ones(192, 192)
        while not over.is_set():
            torch.mm(matrix, matrix)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_each_program_reads_what_the_one_before_wrote(threads: int) -> None:
    """Two hundred, of as many blocks as threads and more, forwards and backwards."""
    compiled = product()
    forth, back = joined(192, 320, seed=1), joined(320, 192, seed=2)
    start = normal(2, 320)
    rows = start
    for _ in range(100):
        rows = compiled.run(compiled.run(rows, forth), back)
    assert rows.isfinite().all()
    here, there, chain = start.clone(), torch.empty(2, forth.width), new_chain()
    with other_work():
        for _ in range(50):
            here.copy_(start)
            for _ in range(100):
                compiled.add(chain, here, forth, there)
                compiled.add(chain, there, back, here)
            chain.run()
            assert torch.equal(here, rows)


def test_more_threads_than_tasks() -> None:
    compiled, weights = product(), joined(64, 64)
    rows, first, chain = normal(1, 64), torch.empty(1, 64), new_chain()
    expected = compiled.run(compiled.run(rows, weights), weights)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for _ in range(20):
            second = torch.empty(1, 64)
            compiled.add(chain, rows, weights, first)
            compiled.add(chain, first, weights, second)
            chain.run()
            assert torch.equal(second, expected)
    finally:
        torch.set_num_threads(before)


def test_programs_of_no_tasks_are_passed_by(threads: int) -> None:
    compiled, weights, chain = product(), joined(64, 64), new_chain()
    norm = norm_for(torch.ones(64), 1e-6, torch.float32)
    assert norm is not None
    rows, result = normal(3, 64), torch.empty(3, 64)
    norm.add(chain, rows[:0], result[:0])
    compiled.add(chain, rows, weights, result)
    norm.add(chain, rows[:0], result[:0])
    chain.run()
    assert torch.equal(result, compiled.run(rows, weights))


def test_a_chain_is_empty_when_it_has_run(threads: int) -> None:
    """It holds on to what it needs until then, and can be filled again."""
    compiled, weights, chain = product(), joined(128, 64), new_chain()
    chain.run()
    for seed in (1, 2):
        rows, result = normal(3, 64, seed=seed), torch.zeros(3, 128)
        expected = compiled.run(rows, weights)
        compiled.add(chain, rows, weights, result, added=True)
        kept = weakref.ref(rows)
        del rows
        assert kept() is not None
        assert not result.any()
        chain.run()
        assert kept() is None
        assert torch.equal(result, expected)
        chain.run()
        assert torch.equal(result, expected)


# Who waits for whom: programs in Python, which threads run as they run machine code

TWO_FIELDS = ("next", "done")


class Watched:
    """A chain's programs that say when they are called, and do as they are told.

    within: what a task of a program does; left_over: a call that found no task.
    """

    def __init__(self, chain: native.Chain) -> None:
        self._chain, self._lock, self._kept = chain, threading.Lock(), list[Any]()
        self.faults: list[BaseException] = []

    def add(
        self,
        tasks: int,
        within: Callable[[], None],
        left_over: Callable[[], None] = lambda: None,
    ) -> None:
        def call(place: int) -> None:
            fields = (ctypes.c_int64 * len(TWO_FIELDS)).from_address(place)
            mine = 0
            try:
                while True:
                    with self._lock:
                        task, fields[0] = fields[0], fields[0] + 1
                    if task >= tasks:
                        break
                    within()
                    mine += 1
                if mine == 0:
                    left_over()
            except BaseException as fault:
                self.faults.append(fault)
            with self._lock:
                fields[1] += mine

        called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call)
        address = ctypes.cast(called, ctypes.c_void_p).value
        assert address is not None
        function = native.Function(address, TWO_FIELDS)
        self._kept.append(called)
        self._chain.add(function, function.arguments({}), "next", tasks)

    def run(self) -> None:
        self._chain.run()
        assert not self.faults, self.faults


def test_no_task_is_taken_before_all_before_it_are_done(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    """The thread without a task comes to lend its processor: it waits. Only then, or when it is
    found to go on, the task ends."""
    waited, order = threading.Event(), list[str]()

    def lend() -> int:
        waited.set()
        return 0

    lent = ctypes.CFUNCTYPE(ctypes.c_int)(lend)
    address = ctypes.cast(lent, ctypes.c_void_p).value
    monkeypatch.setattr(native, "_sched_yield", lambda: address)
    watched = Watched(new_chain())

    def first() -> None:
        assert waited.wait(SECONDS_MAX)
        order.append("first")

    def second() -> None:
        order.append("second")
        waited.set()

    watched.add(1, first)
    watched.add(1, second)
    watched.run()
    assert order == ["first", "second"]


def test_nobody_waits_for_a_thread_that_has_no_task(two_threads: None) -> None:
    """As if the system had put it aside: the other one goes through the rest of the chain."""
    came, over, seen = threading.Event(), threading.Event(), list[bool]()

    def put_aside() -> None:
        came.set()
        seen.append(over.wait(SECONDS_MAX))

    watched = Watched(new_chain())
    watched.add(1, lambda: seen.append(came.wait(SECONDS_MAX)), put_aside)
    watched.add(3, lambda: None)
    watched.add(1, over.set)
    watched.run()
    assert seen == [True, True]


def test_tasks_are_counted_when_they_are_done(threads: int) -> None:
    """Machine code keeps the count that others wait for."""
    norm = norm_for(torch.ones(64), 1e-6, torch.float32)
    assert norm is not None
    rows, result = normal(23, 64), torch.empty(23, 64)
    given = norm._arguments(rows, result)
    norm._function.call(given, "next", 23)
    taken, done = (given[norm._function.places[name]] for name in TWO_FIELDS)
    assert done == 23
    assert 23 < taken <= 23 + threads, "each thread looks for one more"


# Where there is none


@pytest.fixture
def afresh() -> Generator[None]:
    """Nothing is known yet of what was compiled."""
    native._chain.cache_clear()
    yield
    native._chain.cache_clear()


@pytest.mark.usefixtures("afresh", "two_threads")
@pytest.mark.parametrize("fault", ["refused", "no llvm", "no threads", "cannot yield"])
def test_where_there_are_no_chains(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "refused":
        monkeypatch.setattr(native.chain, "chain_text", lambda: "no program")
    elif fault == "no llvm":
        monkeypatch.setattr(native, "chain", None)
    elif fault == "no threads":
        monkeypatch.setattr(native, "_parallel", lambda: None)
    else:
        monkeypatch.setattr(native, "_sched_yield", lambda: 0)
    with caplog.at_level(logging.WARNING):
        assert native.new_chain() is None
    assert ("left to torch" in caplog.text) == (fault == "refused")


def test_nothing_is_remembered_of_a_comparison_with_torch() -> None:
    with native.left_to_torch():
        assert native.new_chain() is None
    assert native.new_chain() is not None


# Attention

# head_dim, heads, kv_heads, page_size
SHAPES = [(16, 4, 2, 16), (24, 6, 2, 8), (64, 4, 4, 32)]
DECODE_ROWS = tuple((1, context) for _, context in MIXED)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What attention takes; query, key and value are parts of `projected`."""

    projected: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    kv: Tensor


def layers(shape: Shape, dtype: torch.dtype, count: int = 2) -> tuple[AttentionBatch, list[Layer]]:
    """A batch, and so many layers that it goes through."""
    torch.manual_seed(SEED)
    batch, pages = random_batch(shape, random.Random(SEED))
    made: list[Layer] = []
    heads, kv_heads = shape.heads, shape.kv_heads
    for _ in range(count):
        projected = torch.randn(batch.rows, (heads + 2 * kv_heads) * shape.head_dim).to(dtype)
        parts = projected.unflatten(1, (-1, shape.head_dim)).split((heads, kv_heads, kv_heads), 1)
        made.append(Layer(projected, *parts, filled_pages(shape, batch, pages, dtype)))
    return batch, made


OPTIONS: list[dict[str, Any]] = [
    {"window": None, "soft_cap": None},
    {"window": 7, "soft_cap": None},
    {"window": None, "soft_cap": 2.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [MIXED, DECODE_ROWS], ids=["slices", "decode rows"])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_append_and_attention_in_a_chain(
    size: tuple[int, int, int, int],
    parts: tuple[tuple[int, int], ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    threads: int,
) -> None:
    """Layers of one step have the memory for their records in common, and what they append is
    only there when an earlier program has run."""
    head_dim, heads, kv_heads, page_size = size
    batch, made = layers(Shape(page_size, heads, kv_heads, parts, head_dim), dtype)
    chain, results = new_chain(), list[Tensor]()
    norm = norm_for(torch.ones(made[0].projected.shape[1]), 1e-6, dtype)
    assert norm is not None
    first = made[0].query, made[0].key, made[0].value, made[0].kv, batch
    attention = attention_in_chain(*first, **options)
    assert attention is not None
    for layer in made:
        before = layer.projected.clone()
        layer.projected.fill_(float("nan"))
        norm.add(chain, before, layer.projected)
        results.append(torch.full(layer.query.shape, float("nan"), dtype=dtype))
        given = layer.query, layer.key, layer.value, layer.kv, results[-1]
        attention.add(chain, *given, scale=0.3)
    expected_kv = [layer.kv.clone() for layer in made]
    chain.run()
    for layer, kv, result in zip(made, expected_kv, results, strict=True):
        append_kv(layer.key, layer.value, kv, batch)
        torch.testing.assert_close(layer.kv, kv, rtol=0, atol=0, equal_nan=True)
        expected = paged_attention(layer.query, kv, batch, scale=0.3, **options)
        assert expected.isfinite().all()
        assert torch.equal(result, expected)


PLAIN: dict[str, Any] = {"window": None, "soft_cap": None}


@pytest.mark.parametrize("reason", ["head_dim", "left to torch", "slices", "float16", "strides"])
def test_what_machine_code_does_not_serve_has_no_way_in_a_chain(reason: str) -> None:
    shape = Shape(16, 4, 2, DECODE_ROWS, 16)
    if reason == "head_dim":
        shape = dataclasses.replace(shape, head_dim=20)
    elif reason == "slices":  # of tiles that are not turned over in registers
        shape = Shape(8, 4, 2, MIXED, 64)
    dtype = torch.float16 if reason == "float16" else torch.float32
    batch, [layer] = layers(shape, dtype, 1)
    query, key, value, kv = layer.query, layer.key, layer.value, layer.kv
    if reason == "strides":
        value = value.transpose(1, 2).contiguous().transpose(1, 2)
    given = query, key, value, kv, batch
    if reason == "left to torch":
        with native.left_to_torch():
            assert attention_in_chain(*given, **PLAIN) is None
    else:
        assert attention_in_chain(*given, **PLAIN) is None


@pytest.mark.parametrize("wrong", ["shape", "type", "strides", "query", "key", "pages"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    batch, [layer] = layers(Shape(16, 4, 2, MIXED, 16), torch.float32, 1)
    query, key, value, kv = layer.query, layer.key, layer.value, layer.kv
    chain, result, before = new_chain(), torch.zeros(query.shape), kv.clone()
    if wrong == "shape":
        result = result[:-1]
    elif wrong == "type":
        result = result.bfloat16()
    elif wrong == "strides":
        result = torch.zeros(query.shape[::-1]).permute(2, 1, 0)
    elif wrong == "query":
        query = query[:, :3]
    elif wrong == "key":
        key = key[:-1]
    else:
        kv, before = kv[:-1], before[:-1]

    def add() -> None:
        attention = attention_in_chain(query, key, value, kv, batch, **PLAIN)
        assert attention is not None
        attention.add(chain, query, key, value, kv, result, scale=0.3)

    with pytest.raises(ValueError, match=r"result must|heads are|key \(|not among"):
        add()
    chain.run()
    assert not result.any()
    torch.testing.assert_close(kv, before, rtol=0, atol=0, equal_nan=True)

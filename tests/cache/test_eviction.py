"""Policies, what is remembered of pages that are gone, and who wins on a made-up hour of chats."""

import pytest

from benchmarks import replay, traces
from chatserve.cache.eviction import (
    DEFAULT_POLICY,
    POLICIES,
    FirstInFirstOut,
    LeastRecentlyUsed,
    PageUse,
    Patience,
    UseMemory,
)
from chatserve.cache.prefix_index import PrefixIndex

NAME = bytes(range(32))
SEEDS = (1, 2, 3)
SMALL = 2000  # pages: half a minute of such a service
LARGE = 8000
MARGIN = 0.015  # of all blocks; the least of seeds 1 to 10 was 0.020


def use(*, sealed: int = 1, used: int = 2, seconds: float = 0.0, uses: int = 1, run: int = 16):
    return PageUse(sealed=sealed, used=used, seconds=seconds, uses=uses, run=run)


def test_each_policy_looks_at_what_it_is_named_after() -> None:
    early, late = use(sealed=1, used=9), use(sealed=5, used=6)
    assert FirstInFirstOut().place(early) < FirstInFirstOut().place(late)
    assert LeastRecentlyUsed().place(late) < LeastRecentlyUsed().place(early)
    assert POLICIES["patience"] is DEFAULT_POLICY


def test_patience_waits_longer_for_each_doubling_of_uses_and_shorter_for_long_new_text() -> None:
    policy = Patience(use_seconds=100.0, run_seconds=10.0, run_tokens=512)
    assert policy.place(use(seconds=7.0, uses=0)) == 7.0
    assert policy.place(use(seconds=7.0, uses=1)) == 7.0
    assert policy.place(use(seconds=7.0, uses=2)) == 107.0
    assert policy.place(use(seconds=7.0, uses=8)) == 307.0
    assert policy.place(use(seconds=7.0, run=512)) == 7.0
    assert policy.place(use(seconds=7.0, run=2048)) == -13.0
    assert policy.place(use(seconds=7.0, uses=4, run=1024)) == 197.0


def name(number: int, tag: int = 0) -> bytes:
    return number.to_bytes(5, "little") + tag.to_bytes(3, "little") + bytes(24)


def test_the_memory_of_uses_is_bounded_and_a_newcomer_takes_the_slot() -> None:
    memory = UseMemory(4)
    memory.remember(name(1, tag=5), 3)
    assert memory.recall(name(1, tag=5)) == 3
    assert memory.recall(name(1, tag=6)) == 0, "another page's uses"
    assert memory.recall(name(2, tag=5)) == 0
    memory.remember(name(5, tag=6), 9)  # the same slot of four
    assert memory.recall(name(1, tag=5)) == 0
    assert memory.recall(name(5, tag=6)) == 9
    memory.remember(name(5, tag=6), 100_000)
    assert memory.recall(name(5, tag=6)) == 255
    nothing = UseMemory(0)
    nothing.remember(name(1), 3)
    assert nothing.recall(name(1)) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_generated_trace_ours_beats_lru_and_lru_beats_fifo(seed: int) -> None:
    """A quarter of an hour, scored on its last ten minutes: rates over blocks asked for."""
    print(f"seed {seed}")
    split = 300.0
    arrivals = traces.generate(seed=seed, seconds=900)
    names = replay.block_names(arrivals)
    ours, lru = (
        replay.through_the_index(
            arrivals, names, POLICIES[name], pages=SMALL, split=split
        ).rate_after
        for name in ("patience", "lru")
    )
    assert ours > lru + MARGIN
    bound = replay.bound(arrivals, pages=SMALL, split=split).rate_after
    assert bound > ours, "better than with the future in sight"
    first_in, last_used = (
        replay.in_plain_lists(arrivals, name, pages=LARGE, split=split).rate_after
        for name in ("fifo", "lru")
    )
    assert 0.1 < first_in < last_used


def test_a_generated_trace_has_one_parent_for_each_block_and_the_shape_of_the_real_one() -> None:
    arrivals = traces.generate(seed=4, seconds=1200)
    parents: dict[int, int] = {}
    for arrival in arrivals:
        assert len(set(arrival.blocks)) == len(arrival.blocks)
        for above, block in zip((-1, *arrival.blocks), arrival.blocks, strict=False):
            assert parents.setdefault(block, above) == above
    assert [a.seconds for a in arrivals] == sorted(a.seconds for a in arrivals)
    asked = sum(len(arrival.blocks) for arrival in arrivals)
    again = 1 - traces.unique_blocks(arrivals) / asked
    assert 2.0 < len(arrivals) / 1200 < 4.5
    assert 0.15 < again < 0.5
    assert traces.generate(seed=4, seconds=1200) == arrivals


def test_a_request_that_runs_keeps_its_pages_from_eviction() -> None:
    first = traces.Arrival(0.0, (0, 1, 2), 10)
    other = traces.Arrival(1.0, (5, 6, 7), 10)
    again = traces.Arrival(2.0, (0, 1, 2), 10)
    arrivals = [first, other, again]
    names = replay.block_names(arrivals)
    policy = LeastRecentlyUsed()
    at_once = replay.through_the_index(arrivals, names, policy, pages=4, split=0.0)
    held = replay.through_the_index(
        arrivals, names, policy, pages=4, split=0.0, seconds_per_token=1.0
    )
    assert at_once.found_after == 1, "two of three went for the other request"
    assert held.found_after == 3


def test_a_trace_with_a_block_of_two_parents_is_refused(tmp_path) -> None:
    row = '{{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": {}}}\n'
    path = tmp_path / "trace.jsonl"
    path.write_text(row.format([0, 1]) + row.format([0, 1, 2]))
    assert [arrival.blocks for arrival in traces.read(path)] == [(0, 1), (0, 1, 2)]
    path.write_text(row.format([0, 1]) + row.format([1]))
    with pytest.raises(ValueError, match="follows two"):
        traces.read(path)


def test_who_has_a_page_brought_up_counts_once() -> None:
    index = PrefixIndex()

    def uses_of_a_life(*, adopted: int, **how: bool) -> int:
        index.add(0, NAME, None, bytes(64), **how)
        for _ in range(adopted):
            index.keep(0)
        index.remove(0)
        return index._gone.recall(NAME)

    assert uses_of_a_life(adopted=0) == 1, "it was computed for somebody"
    assert uses_of_a_life(adopted=1, loaded=True) == 2
    assert uses_of_a_life(adopted=2, loaded=True) == 4, "two waited for it"
    assert uses_of_a_life(adopted=0, loaded=True) == 5, "he who waited has left"
    assert uses_of_a_life(adopted=0, loaded=True, drafted=True) == 5
    assert uses_of_a_life(adopted=1, loaded=True, drafted=True) == 6


def test_what_is_brought_up_after_a_restart_is_no_new_text() -> None:
    index = PrefixIndex()
    for page in range(4):
        above = bytes([page - 1]) * 32 if page else None
        index.add(page, bytes([page]) * 32, above, bytes(64), loaded=page < 2)
    assert [index._by_page[page].run for page in range(4)] == [16, 16, 16, 32]

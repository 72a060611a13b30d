"""Claims: who computes what, and who waits for whom."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from chatserve.cache.claims import Claims

NAMES = [bytes([index]) * 32 for index in range(8)]


def test_a_follower_waits_for_the_whole_run_it_shares_and_wakes_once() -> None:
    claims = Claims()
    claims.claim(1, NAMES[:4])
    assert claims.follow(2, NAMES[:3]) == 1
    assert claims.follow(3, [*NAMES[:2], NAMES[7]]) == 1
    assert claims.sealed(NAMES[0]) == []
    assert claims.sealed(NAMES[1]) == [3]
    assert claims.sealed(NAMES[2]) == [2]
    assert claims.drop(1) == []
    claims.check()
    assert claims.statistics().claimed == 0
    assert claims.statistics().waited == 2


def test_nobody_follows_where_the_next_page_has_no_leader() -> None:
    claims = Claims()
    claims.claim(1, NAMES[1:3])
    assert claims.follow(2, NAMES[:3]) is None
    assert claims.follow(2, []) is None
    assert claims.follow(1, NAMES[1:3]) is None, "a leader followed itself"
    claims.check()


@pytest.mark.parametrize("sealed", [0, 1, 2])
def test_when_the_leader_goes_all_its_followers_are_free_at_once(sealed: int) -> None:
    claims = Claims()
    claims.claim(1, NAMES[:3])
    for follower in range(10, 20):
        assert claims.follow(follower, NAMES[sealed:3]) == 1
    for name in NAMES[:sealed]:
        assert claims.sealed(name) == []
    assert sorted(claims.drop(1)) == list(range(10, 20))
    assert claims.leader(NAMES[2]) is None
    claims.check()


def test_a_name_keeps_its_first_leader() -> None:
    claims = Claims()
    claims.claim(1, NAMES[:2])
    claims.claim(2, NAMES[:4])
    assert [claims.leader(name) for name in NAMES[:4]] == [1, 1, 2, 2]
    claims.drop(1)
    assert claims.leader(NAMES[0]) is None
    assert claims.leader(NAMES[2]) == 2
    claims.check()


def test_a_page_sealed_by_somebody_else_fulfils_the_claim() -> None:
    claims = Claims()
    claims.claim(1, NAMES[:2])
    claims.follow(5, NAMES[:1])
    assert claims.sealed(NAMES[0]) == [5]
    claims.check()
    assert claims.sealed(NAMES[6]) == []


def test_a_follower_that_leaves_is_not_woken() -> None:
    claims = Claims()
    claims.claim(1, NAMES[:2])
    claims.follow(5, NAMES[:2])
    claims.forget(5)
    claims.forget(5)
    assert claims.drop(1) == []
    claims.check()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "follow", "forget", "sealed", "drop"]),
        st.integers(0, 5),
        st.integers(0, 7),
        st.integers(1, 4),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None, print_blob=True)
@given(ACTIONS)
def test_everyone_who_waits_is_woken_exactly_once(
    actions: list[tuple[str, int, int, int]],
) -> None:
    claims = Claims()
    waiting: set[int] = set()
    leading: set[int] = set()
    for action, who, first, count in actions:
        run = NAMES[first : first + count]
        woken: list[int] = []
        if action == "claim" and who not in waiting:
            claims.claim(who, run)
            leading.add(who)
        elif action == "follow" and who not in waiting | leading:
            if claims.follow(who, run) is not None:
                waiting.add(who)
        elif action == "forget":
            claims.forget(who)
            waiting.discard(who)
        elif action == "sealed":
            woken = claims.sealed(NAMES[first])
        elif action == "drop":
            woken = claims.drop(who)
            leading.discard(who)
        assert len(set(woken)) == len(woken)
        assert set(woken) <= waiting
        waiting -= set(woken)
        assert claims.waiting == len(waiting)
        claims.check()
    for leader in tuple(leading):
        waiting -= set(claims.drop(leader))
    assert not waiting, "somebody waits for nobody"

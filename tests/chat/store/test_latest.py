"""The latest conversations of several owners, against all of them sorted, in both stores."""

import random

import pytest

from chatserve.chat.conversations.latest import latest
from chatserve.chat.store.session_store import SessionStore
from chatserve.errors import RequestError
from tests.chat.store.turns import conversation


@pytest.mark.parametrize("seed", range(6))
async def test_the_pages_of_the_common_list_are_the_sorted_whole(
    store: SessionStore, seed: int
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    owners = [f"o{number}" for number in range(rng.randrange(1, 9))]
    kept: list[tuple[float, str, str]] = []
    for number in range(rng.randrange(40)):
        owner, updated = rng.choice(owners), float(rng.randrange(1, 20))
        name = f"c{rng.randrange(10**6)}-{number}"
        await store.create(conversation(name, owner=owner, updated=updated))
        kept.append((updated, name, owner))
    await store.create(conversation("nobodys", owner="gone", updated=10.0))
    limit = rng.randrange(1, 12)
    found: list[tuple[float, str, str]] = []
    after: str | None = None
    for _ in range(100):
        page = await latest(store, owners, limit=limit, after=after)
        found += [(each.updated, each.id, each.owner) for each in page.conversations]
        assert len(page.conversations) == limit or page.next is None
        after = page.next
        if after is None:
            break
    assert found == sorted(kept, reverse=True)


async def test_nobody_has_none_and_a_wrong_cursor_is_refused(store: SessionStore) -> None:
    page = await latest(store, [], limit=5)
    assert (page.conversations, page.next) == ((), None)
    with pytest.raises(RequestError) as refused:
        await latest(store, ["o"], limit=5, after="!")
    assert refused.value.param == "after"

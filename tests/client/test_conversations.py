"""Conversations by the client: what is asked and answered in one piece."""

from collections.abc import AsyncGenerator

import pytest

from chatserve.api.keys import key_ring
from chatserve.client import ChatClient, ClientLimits, Refused, Tree
from chatserve.client.errors import BrokenProtocol
from chatserve.client.wire import conversation_of, decoded, tree_of
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import Site, site


@pytest.fixture
async def served() -> AsyncGenerator[Site]:
    async with site() as running:
        running.conversations.on_send = answer(running)
        yield running


@pytest.fixture
async def client(served: Site) -> AsyncGenerator[ChatClient]:
    async with ChatClient(served.url, limits=ClientLimits(page_conversations=2)) as made:
        yield made


def answer(served: Site):
    def say(reply: FakeChatReply) -> None:
        reply.say("answer")
        reply.finish()
        served.conversations.keep(reply)

    return say


async def test_a_conversation_is_made_changed_and_deleted(client: ChatClient) -> None:
    made = await client.create(title="one", system="Be brief.", temperature=0.5)
    assert (made.title, made.system, made.settings) == ("one", "Be brief.", {"temperature": 0.5})
    changed = await client.update(made, title="two", settings={"top_k": 3})
    assert (changed.title, changed.settings, changed.id) == ("two", {"top_k": 3}, made.id)
    assert changed.revision > made.revision
    assert (await client.set_system(made, None)).system is None
    await client.delete(made)
    with pytest.raises(Refused) as caught:
        await client.open(made)
    assert (caught.value.status, caught.value.code) == (404, "not_found")


async def test_all_pages_of_the_list_are_given_and_searched(client: ChatClient) -> None:
    for number in range(5):
        await client.create(title=f"talk {number}")
    titles = [each.title async for each in client.conversations()]
    assert titles == [f"talk {number}" for number in (4, 3, 2, 1, 0)]
    assert [each.title async for each in client.conversations(search="K 3")] == ["talk 3"]
    assert [each async for each in client.conversations(search="nothing")] == []


async def grown(client: ChatClient) -> Tree:
    """Two first messages; the second has two answers, and a message after the first of those."""
    made = await client.create()
    await client.send(made, "first").wait()
    second = client.send(made, "first, edited", parent=None)
    await second.wait()
    await client.send(made, "next", parent=second.id).wait()
    await client.regenerate(made, second.turn or "").wait()
    return await client.open(made)


async def test_a_tree_knows_its_branches(client: ChatClient) -> None:
    tree = await grown(client)
    branch = tree.branch()
    assert [turn.text for turn in branch] == ["first, edited", "answer"]
    assert len(tree.siblings(branch[0])) == 2
    older, newer = tree.siblings(branch[1])
    assert newer is branch[1]
    assert [turn.text for turn in tree.branch(tree.leaf_below(older).id)] == [
        "first, edited",
        "answer",
        "next",
        "answer",
    ]
    assert newer.final is not None
    assert newer.final.receipt.cached == 4
    assert tree.branch("nobody") == ()


async def test_what_is_exported_can_be_imported(served: Site, client: ChatClient) -> None:
    tree = await grown(client)
    copy = await client.import_file(await client.export_file(tree.conversation))
    assert copy.id != tree.conversation.id
    again = await client.open(copy)
    assert [turn.text for turn in again.turns] == [turn.text for turn in tree.turns]
    assert again.conversation.leaf == tree.conversation.leaf


async def test_a_key_is_given_and_a_wrong_one_refused() -> None:
    keys = key_ring(api_key="secret-key", key_file=None)
    async with site(keys=keys) as served:
        async with ChatClient(served.url, key="secret-key") as client:
            conversation = await client.create()
            served.conversations.on_send = lambda reply: reply.finish()
            await client.send(conversation, "hello").wait()
        for key in (None, "another-key"):
            async with ChatClient(served.url, key=key) as client:
                with pytest.raises(Refused) as caught:
                    await client.create()
                assert caught.value.status == 401
                with pytest.raises(Refused) as caught:
                    await client.send(conversation, "hello").accepted()
                assert caught.value.status == 401


async def test_an_answer_has_a_largest_size(served: Site, client: ChatClient) -> None:
    made = await client.create(system="x" * 10_000)
    limits = ClientLimits(answer_bytes_max=5_000)
    async with ChatClient(served.url, limits=limits) as small:
        with pytest.raises(BrokenProtocol, match="too large"):
            await small.open(made)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        ChatClient(url)


@pytest.mark.parametrize("key", ["", "two words", "line\r\nInjected: x", "ключ"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        ChatClient(key=key)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"id": 3}', '{"id": "x"}'])
def test_an_answer_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BrokenProtocol):
        conversation_of(decoded(text))


def test_a_newer_servers_fields_are_left_alone() -> None:
    shown = conversation_of(
        {"id": "c", "title": "", "created": 1, "updated": 2, "revision": 1, "new": {"x": 1}}
    )
    assert (shown.leaf, shown.system, shown.settings) == (None, None, {})
    with pytest.raises(BrokenProtocol):
        tree_of({**{"id": "c", "title": "", "created": 1, "updated": 2}, "revision": True})

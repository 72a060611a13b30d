"""Public prompts in the engine: which pages a second tenant finds, and which it never does."""

import random

import pytest

from chatserve.engine.sequence import Life
from chatserve.engine.values import Receipt
from prefix_store.names import PageName, PublicNames
from tests.engine.build import Setup, ask, build, quiet, random_tokens, running
from tests.engine.fake_depot import FakeDepot
from tests.engine.oracle import assert_right, listen
from tests.engine.stepper import Asked, Stepper

SIZE = 4
PROMPT = tuple(range(50, 50 + 3 * SIZE + 2))  # three whole pages and a half
SHARED = 3 * SIZE
SETUP = Setup(page_size=SIZE)


class _Tenants(Stepper):
    """A stepper that knows which public names there ever were."""

    def __init__(self, setup: Setup = SETUP) -> None:
        super().__init__(setup)
        self.public: list[PublicNames | None] = [None]

    def publish(self, *prompts: tuple[int, ...]) -> set[PageName]:
        engine = self.house.engine
        chains = list(map(engine.public_names, prompts))
        engine.publish(chains)
        self.public.append(self.house.prepare(ask((1,), 1)).public)
        return set[PageName]().union(*chains)

    def assert_named(self) -> None:
        """Every page has the name that the whole line up to its end has, for somebody who asked,
        by some set that was public."""
        entries = self.house.blocks._index._by_name
        namer = self.house.namer
        for name, entry in entries.items():
            line, above = entry.tokens, entry.parent
            while above is not None:
                line, above = entries[above].tokens + line, entries[above].parent
            tokens = memoryview(line).cast("i").tolist()
            pairs = [(root, public) for root in self.roots for public in self.public]
            assert any(
                namer.names(root, tokens, None, public)[-1] == name for root, public in pairs
            )


def _house(*prompts: tuple[int, ...], setup: Setup = SETUP) -> _Tenants:
    stepper = _Tenants(setup)
    stepper.publish(*prompts)
    return stepper


def _receipt(asked: Asked) -> Receipt:
    (receipt,) = asked.heard[0].receipts
    return receipt


def _done(stepper: _Tenants, tokens: tuple[int, ...], tenant: str, **more: object) -> Receipt:
    asked = stepper.ask(ask(tokens, 6, tenant=tenant, **more))  # type: ignore[arg-type]
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.assert_named()
    return _receipt(asked)


def test_a_second_tenant_finds_exactly_the_registered_pages() -> None:
    stepper = _house(PROMPT)
    tokens = (*PROMPT, 1, 2, 3, 4, 5, 6, 7)
    assert _done(stepper, tokens, "ann").cached == 0
    found = _done(stepper, tokens, "bob")
    assert (found.device, found.disk, found.computed) == (SHARED, 0, len(tokens) - SHARED)
    assert _done(stepper, tokens, "ann").cached > SHARED, "her own pages are found as well"


def test_without_registration_a_second_tenant_finds_nothing() -> None:
    stepper = _house()
    for tenant in ("ann", "bob"):
        assert _done(stepper, (*PROMPT, 1, 2, 3), tenant).cached == 0


def test_a_salt_has_no_public_part() -> None:
    stepper = _house(PROMPT)
    tokens = (*PROMPT, 1, 2, 3)
    _done(stepper, tokens, "ann")
    assert _done(stepper, tokens, "ann", salt="s").cached == 0
    assert _done(stepper, tokens, "bob", salt="s").cached == 0
    other = _house(PROMPT)
    _done(other, tokens, "ann", salt="s")
    assert _done(other, tokens, "bob").cached == 0, "and leaves none"


def test_what_is_not_registered_any_more_is_not_found() -> None:
    stepper = _house(PROMPT)
    tokens = (*PROMPT, 1, 2, 3)
    _done(stepper, tokens, "ann")
    stepper.publish()
    assert _done(stepper, tokens, "bob").cached == 0
    assert _done(stepper, tokens, "ann").cached == 0
    stepper.publish(PROMPT)
    assert _done(stepper, tokens, "cat").cached == SHARED, "registered again, found again"


def test_a_prompt_that_goes_leaves_the_pages_of_one_that_begins_alike() -> None:
    longer = (*PROMPT[: 2 * SIZE], *range(20, 20 + 2 * SIZE))
    stepper = _house(PROMPT, longer)
    tokens = (*PROMPT, 1, 2, 3)
    _done(stepper, tokens, "ann")
    stepper.publish(longer)
    assert _done(stepper, tokens, "bob").cached == 2 * SIZE


def test_a_registered_page_that_is_missing_is_computed_under_its_public_name() -> None:
    """What is registered decides, not what is resident."""
    stepper = _house(PROMPT)
    tokens = (*PROMPT, 1, 2, 3)
    _done(stepper, PROMPT[: SIZE + 1], "ann")  # the first page alone is there
    assert _done(stepper, tokens, "bob").device == SIZE
    assert _done(stepper, tokens, "cat").device == SHARED


@pytest.mark.parametrize("given", [SHARED - SIZE, SHARED - 1, SHARED, SHARED + 1, 2, SIZE])
def test_a_reply_goes_on_in_its_tenants_own_pages(given: int) -> None:
    """A prompt that ends inside the public part, at its end, or after it."""
    tokens = PROMPT[:given]
    stepper = _house(PROMPT)
    heard = stepper.ask(ask(tokens, 4 * SIZE, tenant="ann"))
    stepper.run_all()
    stepper.assert_right(heard)
    stepper.assert_named()
    line = (*tokens, *heard.heard[0].tokens)
    pairs = enumerate(zip(line, PROMPT, strict=False))
    alike = next((at for at, (said, public) in pairs if said != public), len(PROMPT))
    shared = alike // SIZE * SIZE
    # What the model said is the same for both; nothing of it may be shared.
    again = stepper.ask(ask((*line, 9), 1, tenant="bob"))
    stepper.run_all()
    assert _receipt(again).cached == shared
    own = stepper.ask(ask((*line, 9), 1, tenant="ann"))
    stepper.run_all()
    assert _receipt(own).cached == (len(line) - 1) // SIZE * SIZE


def test_a_reply_that_says_the_rest_of_a_public_prompt_names_it_so() -> None:
    """A name is a matter of tokens, so the next turn finds what this reply computed."""
    start = PROMPT[:SIZE]
    first = _house()
    said = first.ask(ask(start, 3 * SIZE, tenant="ann"))
    first.run_all()
    line = (*start, *said.heard[0].tokens)
    assert first.house.prepare(ask(line, 1)).public_pages == 0
    stepper = _house(line)
    stepper.ask(ask(start, 3 * SIZE, tenant="ann"))
    stepper.run_all()
    stepper.assert_named()
    again = stepper.ask(ask((*line, 9), 1, tenant="bob"))
    assert stepper.house.prepare(again.request).public_pages == len(line) // SIZE
    stepper.run_all()
    # The last token that was said is in no computed position yet.
    assert _receipt(again).cached == (len(line) - 1) // SIZE * SIZE


def test_forks_share_the_public_part_and_leave_it_each_for_itself() -> None:
    stepper = _house(PROMPT)
    asked = stepper.ask(ask(PROMPT, 3 * SIZE, tenant="ann", samples=3, temperature=1.0, seed=5))
    stepper.run_all()
    stepper.assert_right(asked)
    stepper.assert_named()
    for heard in asked.heard:
        line = (*PROMPT, *heard.tokens)
        own = stepper.ask(ask((*line, 9), 1, tenant="ann"))
        other = stepper.ask(ask((*line, 9), 1, tenant="bob"))
        stepper.run_all()
        assert _receipt(own).cached == (len(line) - 1) // SIZE * SIZE
        assert _receipt(other).cached == SHARED


def test_preempted_and_unregistered_in_the_middle_all_keep_their_names() -> None:
    """Whoever is prepared goes on by the set it was named by."""
    stepper = _house(PROMPT, setup=Setup(page_size=SIZE, pages=16, budget_max=8))
    asked = [
        stepper.ask(ask((*PROMPT, number), 5 * SIZE, tenant=tenant))
        for number, tenant in enumerate(("ann", "bob", "cat", "dan"))
    ]
    stepper.until(lambda: any(one.heard[0].tokens for one in asked))
    stepper.publish()
    stepper.run_all()
    stepper.assert_right(*asked)
    assert stepper.scheduler.counts.preemptions > 0, "the pool is too large for this test"
    for one, name in zip(asked, ("bob", "ann", "dan", "cat"), strict=True):
        line = (*one.request.tokens, *one.heard[0].tokens)
        again = stepper.ask(ask((*line, 9), 1, tenant=name))
        stepper.run_all()
        assert _receipt(again).cached == 0, "another tenant found pages that are not public"


def test_tenants_that_come_at_once_compute_the_public_part_once() -> None:
    stepper = _house(PROMPT, setup=Setup(page_size=SIZE, budget_max=8))
    first = stepper.ask(ask((*PROMPT, 1, 1), 3, tenant="ann"))
    stepper.plan()
    second = stepper.ask(ask((*PROMPT, 1, 1), 3, tenant="bob"))
    stepper.plan()
    assert stepper.lives(second) == {Life.FOLLOWING}
    stepper.run_all()
    stepper.assert_right(first, second)
    assert _receipt(second).cached == SHARED


def test_drafts_name_publicly_what_is_public() -> None:
    stepper = _house(PROMPT)
    tokens = (*PROMPT, *range(2 * SIZE))
    assert stepper.draft("a socket", tokens, tenant="ann")
    stepper.run_all()
    assert _done(stepper, tokens, "bob").cached == SHARED
    assert _done(stepper, tokens, "ann").cached == len(tokens) // SIZE * SIZE


def test_the_tier_below_shares_the_same_pages_and_no_others() -> None:
    depot = FakeDepot()
    stepper = _house(PROMPT, setup=Setup(page_size=SIZE, depot=depot))
    tokens = (*PROMPT, 1, 2, 3, 4, 5, 6, 7)
    _done(stepper, tokens, "ann")
    stepper.house.blocks.flush()
    found = _done(stepper, tokens, "bob")
    assert (found.disk, found.device) == (SHARED, 0)
    stepper.house.blocks.flush()
    assert _done(stepper, tokens, "ann").disk > SHARED, "hers are below as well"
    stepper.house.blocks.flush()
    stepper.publish()
    assert _done(stepper, tokens, "cat").cached == 0


def test_the_chain_below_leads_from_the_public_part_into_the_tenants_own() -> None:
    depot = FakeDepot()
    stepper = _house(PROMPT, setup=Setup(page_size=SIZE, depot=depot))
    tokens = (*PROMPT, *range(2 * SIZE))
    _done(stepper, tokens, "ann")
    prepared = stepper.house.prepare(ask(tokens, 1, tenant="ann"))
    assert prepared.public_pages == 3
    kept = [depot.kept[name] for name in prepared.names]
    assert [each.parent for each in kept] == [None, *prepared.names[:-1]]
    assert [each.position for each in kept] == list(range(len(kept)))


def test_random_lines_of_three_tenants_are_right_and_private() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    heads = [random_tokens(source, SIZE * source.randrange(1, 4)) for _ in range(3)]
    stepper = _Tenants(Setup(page_size=SIZE, pages=40, budget_max=16, depot=FakeDepot()))
    ever: dict[str, set[PageName]] = {tenant: set() for tenant in ("ann", "bob", "cat")}
    public: set[PageName] = set()
    for _ in range(60):
        if source.random() < 0.3:
            public |= stepper.publish(*source.sample(heads, source.randrange(len(heads) + 1)))
        tenant = source.choice(list(ever))
        line = source.choice(heads) + random_tokens(source, source.randrange(1, 2 * SIZE))
        asked = stepper.ask(ask(line, source.randrange(1, 10), tenant=tenant))
        (sequence,) = stepper.sequences(asked)
        for _ in range(source.randrange(6)):
            stepper.step()
        if source.random() < 0.2:
            stepper.abort(asked)
        stepper.run_all()
        ever[tenant].update(sequence.names)
    stepper.assert_right()
    stepper.assert_named()
    own = [names - public for names in ever.values()]
    assert all(own), "the test named nothing"
    assert sum(map(len, own)) == len(set[PageName]().union(*own)), "a name of two tenants"
    stepper.house.assert_baseline()


def test_all_own_names_of_a_line_are_those_of_every_set_there_ever_was() -> None:
    """Who forgets a conversation finds its pages whatever was registered when they were named."""
    stepper = _house()
    tokens = (*PROMPT, *range(3 * SIZE))
    longer = (*PROMPT[: 2 * SIZE], *range(20, 20 + 3 * SIZE))
    own: set[PageName] = set()
    for prompts in ((), (PROMPT[: SIZE + 1],), (PROMPT,), (longer,), ()):
        public = stepper.publish(*prompts)
        asked = stepper.ask(ask(tokens, 3 * SIZE, tenant="ann"))
        (sequence,) = stepper.sequences(asked)
        stepper.run_all()
        own.update(set(sequence.names) - public)
    line = (*tokens, *asked.heard[0].tokens)
    pages = len(line) // SIZE
    engine = stepper.house.engine
    found = engine.own_names(engine.prepare(ask(PROMPT, 1, tenant="ann")), line)
    assert own <= found
    assert len(found) == sum(pages - first for first in range(5 + 1)), "up to five public pages"
    assert not found & engine.own_names(engine.prepare(ask(PROMPT, 1, tenant="bob")), line)
    assert not found & set(engine.public_names(line))
    salted = engine.prepare(ask(line, 1, tenant="ann", salt="s"))
    assert engine.own_names(salted, line) == set(salted.names)


def test_own_names_go_as_deep_as_processes_before_went() -> None:
    engine = build(SETUP).engine
    line = tuple(range(5 * SIZE))
    request = ask(line, 1, tenant="ann")
    prepared = engine.prepare(request)
    assert engine.own_names(prepared, line) == set(prepared.names)
    engine.publish([], tokens_max=2 * SIZE + 1)
    found = engine.own_names(prepared, line)
    assert len(found) == 5 + 4 + 3
    engine.publish([engine.public_names(line[: 2 * SIZE])])
    assert set(engine.prepare(request).names[2:]) <= found


async def test_the_engine_swaps_the_set_between_two_requests() -> None:
    house = build(SETUP)
    tokens = (*PROMPT, 1, 2, 3)
    async with running(house) as engine:
        for registered, tenant, shared in (
            (False, "ann", 0),
            (True, "ann", 0),
            (True, "bob", SHARED),
            (False, "cat", 0),
            (True, "dan", SHARED),
        ):
            engine.publish([engine.public_names(PROMPT)] if registered else [])
            request = ask(tokens, 3, tenant=tenant)
            heard = await listen(engine.open(engine.prepare(request)))
            assert_right(request, heard, house.setup.vocabulary)
            (receipt,) = heard[0].receipts
            assert receipt.cached == shared
        await quiet(house)
    house.assert_baseline()

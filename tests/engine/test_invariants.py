"""What must stay true of pages and requests while steps run: one test for each promise."""

import random

import pytest

from chatserve.engine.sequence import Life
from chatserve.engine.values import FinishReason
from chatserve.errors import ContextLengthExceeded, RequestError
from tests.engine.build import VOCABULARY, Setup, ask, random_tokens
from tests.engine.oracle import expected
from tests.engine.stepper import Stepper

SIZE = 4
PLAIN = Setup(pages=64, page_size=SIZE, budget_min=1000, budget_max=1000)


def prompt(count: int, seed: int = 1) -> tuple[int, ...]:
    return random_tokens(random.Random(seed), count)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("pages", [1, 2, 5])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_full_hit_computes_one_token_and_writes_nothing(
    pages: int, extra: int, samples: int
) -> None:
    stepper = Stepper(PLAIN)
    tokens = prompt(pages * SIZE + extra)
    first = stepper.ask(ask(tokens, 6, samples=samples))
    stepper.run_all()
    again = stepper.ask(ask(tokens, 6, samples=samples))
    plan = stepper.plan()
    assert plan is not None
    (item,) = plan.slices
    hit = len(tokens) // SIZE * SIZE
    full = hit == len(tokens)
    assert item.start == (hit - 1 if full else hit)
    assert item.end == len(tokens)
    assert item.write is not full
    assert plan.token_count == (1 if full else len(tokens) - hit)
    stepper.run_all()
    stepper.assert_right(first, again)
    stepper.assert_pages_hold_what_their_names_say()
    (receipt,) = again.heard[0].receipts
    assert receipt.device + receipt.computed == len(tokens)
    assert receipt.computed == plan.token_count


@pytest.mark.parametrize("length", range(4, 9))
def test_samples_that_fork_inside_a_page_and_run_out_of_step_say_what_the_model_says(
    length: int,
) -> None:
    stepper = Stepper(Setup(pages=14, page_size=SIZE, preemptions_max=1))
    request = ask(prompt(length), 20, samples=4, temperature=1.0, seed=9)
    asked = stepper.ask(request)
    stepper.run_all()
    stepper.assert_right(asked)
    assert stepper.house.blocks.statistics().copies_total >= (3 if length % SIZE else 0)
    assert stepper.scheduler.counts.preemptions > 0
    stepper.house.assert_baseline()


def test_a_full_hit_whose_last_page_was_sealed_in_flight_is_right() -> None:
    stepper = Stepper(PLAIN)
    tokens = prompt(2 * SIZE)
    asked = [stepper.ask(ask(tokens, 5, seed=index, temperature=1.0)) for index in range(6)]
    stepper.run_all()
    stepper.assert_right(*asked)


def test_only_final_tokens_are_named_and_counted() -> None:
    stepper = Stepper(PLAIN)
    tokens = prompt(6)
    whole = expected(ask(tokens, 30), 0, VOCABULARY).tokens
    for stop in range(1, 12):
        if whole[stop] in whole[:stop]:
            continue
        before = stepper.scheduler.counts.generated_tokens
        asked = stepper.ask(ask(tokens, 30, stop_ids=frozenset({whole[stop]})))
        stepper.run_all()
        assert asked.heard[0].finish is FinishReason.STOP
        assert tuple(asked.heard[0].tokens) == whole[: stop + 1]
        assert stepper.scheduler.counts.generated_tokens - before == stop + 1
        names = stepper.house.namer.names(
            stepper.house.prepare(asked.request).root, (*tokens, *whole)
        )
        resident = sum(map(stepper.house.blocks._index.holds, names))
        assert resident <= (len(tokens) + stop + 1) // SIZE, "a surplus token is in a named page"


@pytest.mark.parametrize("kept", range(8))
def test_a_cut_answer_keeps_no_name_past_the_cut(kept: int) -> None:
    stepper = Stepper(PLAIN)
    tokens = prompt(5)
    asked = stepper.ask(ask(tokens, 40))
    stepper.until(lambda: len(asked.heard[0].tokens) >= 8)
    names = stepper.house.namer.names(
        stepper.house.prepare(asked.request).root, (*tokens, *asked.heard[0].tokens)
    )
    stepper.cut(asked, 0, kept)
    assert asked.heard[0].finish is FinishReason.STOP
    stepper.run_all()
    resident = [stepper.house.blocks._index.holds(name) for name in names]
    keep = (len(tokens) + kept) // SIZE
    assert resident == [index < keep for index in range(len(names))]
    stepper.house.assert_baseline()


def test_a_request_that_can_never_fit_is_refused_at_once_and_changes_nothing() -> None:
    stepper = Stepper(Setup(pages=4, page_size=SIZE, sequences_max=4, context_length=16))
    before = (stepper.house.blocks.statistics(), stepper.scheduler.statistics())
    with pytest.raises(ContextLengthExceeded, match="context is 16 tokens"):
        stepper.ask(ask(prompt(10), 7))
    with pytest.raises(RequestError, match="n=5"):
        stepper.ask(ask(prompt(3), 2, samples=5))
    with pytest.raises(RequestError, match="n=4"):
        stepper.ask(ask(prompt(8), 2, samples=4))
    assert (stepper.house.blocks.statistics(), stepper.scheduler.statistics()) == before
    asked = stepper.ask(ask(prompt(10), 6))
    stepper.run_all()
    stepper.assert_right(asked)


def test_admission_weighs_whole_prompts_also_of_those_who_have_only_begun() -> None:
    stepper = Stepper(Setup(pages=20, page_size=SIZE, budget_min=8, budget_max=8))
    for seed in range(4):  # each needs 13 pages: two at once would take pages from each other
        stepper.ask(ask(prompt(48, seed), 2))
    for _ in range(200):
        if not stepper.step():
            break
        assert len(stepper.scheduler.roster.running) <= 1
    stepper.assert_right()
    assert stepper.scheduler.counts.preemptions == 0


def test_a_short_prompt_does_not_wait_for_the_whole_of_somebodys_long_one() -> None:
    setup = Setup(pages=300, page_size=SIZE, budget_min=32, budget_max=32)
    stepper = Stepper(setup)
    long = stepper.ask(ask(prompt(1000), 2, tenant="a"))
    stepper.step()
    short = stepper.ask(ask(prompt(12, 2), 2, tenant="b"))
    urgent = stepper.ask(ask(prompt(12, 3), 2, tenant="b", priority=-1))
    later = stepper.ask(ask(prompt(12, 4), 2, tenant="b", priority=1))
    for _ in range(8):
        stepper.step()
    assert short.over
    assert urgent.over
    assert not later.over, "a lower priority went before"
    assert not long.over
    stepper.run_all()
    stepper.assert_right()


def test_seats_are_kept_for_samples_that_have_yet_to_fork() -> None:
    setup = Setup(pages=200, page_size=SIZE, sequences_max=6, budget_min=4, budget_max=4)
    stepper = Stepper(setup)
    for seed in range(5):
        stepper.ask(ask(prompt(12, seed), 6, samples=3, temperature=1.0, seed=seed))
    most = 0
    while stepper.step():
        most = max(most, len(stepper.scheduler.roster.running))
    assert most == 6
    stepper.assert_right()


def test_a_plan_that_only_made_room_is_followed_by_one_that_uses_it() -> None:
    # A long line comes back among many short ones, and one preemption a step is not enough.
    for seed in range(30):
        stepper = Stepper(Setup(pages=12, page_size=1, preemptions_max=1, budget_max=12))
        source = random.Random(seed)
        for index in range(8):
            tokens = random_tokens(source, source.randrange(1, 6))
            stepper.ask(ask(tokens, source.randrange(1, 7), priority=-(index % 3), samples=2))
        stepper.run_all()
        stepper.assert_right()


def test_the_first_in_order_is_never_robbed() -> None:
    stepper = Stepper(Setup(pages=10, page_size=2, context_length=20))
    first = stepper.ask(ask(prompt(4), 16, priority=-1))
    others = [stepper.ask(ask(prompt(3, seed), 12)) for seed in range(2, 6)]
    while not first.over:
        assert stepper.step()
        if not first.over and first.heard[0].tokens:
            assert stepper.lives(first) == {Life.RUNNING}
    stepper.run_all()
    stepper.assert_right(first, *others)
    assert stepper.scheduler.counts.preemptions > 0


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_every_preemption_is_within_the_bound_of_its_step(bound: int) -> None:
    # One step at a time: the pages of who is preempted are there at once, for the next in order.
    setup = Setup(pages=60, page_size=1, preemptions_max=bound, sequences_max=20, steps_in_flight=1)
    stepper = Stepper(setup)
    for seed in range(20):
        stepper.ask(ask(prompt(2, seed), 18))
    in_a_step: list[int] = []
    while stepper.scheduler.busy:
        before = stepper.scheduler.counts.preemptions
        stepper.plan()
        in_a_step.append(stepper.scheduler.counts.preemptions - before)
        stepper.commit()
    assert max(in_a_step) == bound
    stepper.assert_right()


def test_page_counts_and_books_are_flat_over_thousands_of_turns() -> None:
    many_turns(2500)


def many_turns(turns: int) -> Stepper:
    """One chat after another, each turn the old one and a little more; nothing may grow."""
    stepper = Stepper(Setup(pages=48, page_size=SIZE, context_length=100))
    source = random.Random(5)
    history: tuple[int, ...] = ()
    for turn in range(turns):
        if len(history) > 60:
            history = ()
        history = (*history, *random_tokens(source, 5))
        asked = stepper.ask(ask(history, 4, tenant=f"t{turn % 3}"))
        stepper.run_all(check=turn % 100 == 0)
        history = (*history, *asked.heard[0].tokens)
        del stepper.asked[asked.group]
        stepper.house.auditor.forget_groups()
    stepper.house.assert_baseline()
    scheduler, blocks = stepper.scheduler, stepper.house.blocks
    assert blocks._index._order.entries <= 4 * (2 * 48 + 64)
    assert not blocks.pool._leaving
    assert not scheduler.roster._sequences
    assert not scheduler.roster._groups
    assert not scheduler.roster.waiting._lines
    assert not scheduler.roster.waiting._active
    assert len(scheduler.roster.waiting._served) <= 3
    return stepper

"""What a receipt says of the part of a prompt that was not found: from where, and why."""

import pytest

from chatserve.cache.misses import Miss, MissReason
from chatserve.engine.values import Receipt
from tests.engine.build import Setup, ask
from tests.engine.fake_depot import FakeDepot
from tests.engine.stepper import Stepper

SIZE = 4
TOLD = tuple(range(1, 25))  # six pages
NEW, EVICTED, QUICKER = MissReason.NEW, MissReason.EVICTED, MissReason.QUICKER


def _house(**fields: object) -> Stepper:
    return Stepper(Setup(page_size=SIZE, **fields))  # type: ignore[arg-type]


def _receipt(stepper: Stepper, tokens=TOLD, **fields) -> Receipt:
    asked = stepper.ask(ask(tokens, 1, **fields))
    stepper.run_all()
    (receipt,) = asked.heard[0].receipts
    return receipt


@pytest.mark.parametrize("edited", [0, 1, 3, 4, 9, 15, 20, 23])
def test_the_first_token_that_differs_is_named(edited: int) -> None:
    stepper = _house()
    assert _receipt(stepper).miss == Miss(0, NEW)
    changed = (*TOLD[:edited], 90, *TOLD[edited + 1 :])
    assert _receipt(stepper, changed).miss == Miss(edited, NEW)


def test_of_several_beginnings_the_likest_counts() -> None:
    stepper = _house()
    for at in (5, 7, 6):
        _receipt(stepper, (*TOLD[:at], 90, *TOLD[at + 1 :]))
    assert _receipt(stepper).miss == Miss(7, NEW)


def test_nothing_was_missed_where_all_whole_pages_were_found() -> None:
    stepper = _house()
    _receipt(stepper)
    assert _receipt(stepper).miss is None
    assert _receipt(stepper, TOLD[:22]).miss is None, "its last page is no whole one"
    receipt = _receipt(stepper, (*TOLD, 7, 8, 9, 10))
    assert (receipt.device, receipt.miss) == (24, Miss(24, NEW))


def test_what_went_is_told_from_what_never_was() -> None:
    stepper = _house()
    _receipt(stepper)
    stepper.house.blocks.flush()
    assert _receipt(stepper).miss == Miss(0, EVICTED)
    assert _receipt(stepper, (*TOLD, 1, 2, 3, 4)).miss == Miss(24, NEW)


def test_what_is_below_and_was_quicker_to_compute_is_told() -> None:
    stepper = _house(depot=FakeDepot())
    stepper.job_seconds = 1e6
    _receipt(stepper)
    stepper.house.blocks.flush()
    assert _receipt(stepper).disk == 23, "nothing was measured: it is tried"
    stepper.house.blocks.flush()
    receipt = _receipt(stepper)
    assert (receipt.computed, receipt.miss) == (24, Miss(0, QUICKER))


def test_nothing_is_said_of_another_tenants_or_salts_pages() -> None:
    stepper = _house()
    _receipt(stepper, tenant="a")
    _receipt(stepper, tenant="a", salt="s")
    changed = (*TOLD[:10], 90, *TOLD[11:])
    assert _receipt(stepper, changed, tenant="b").miss == Miss(0, NEW)
    assert _receipt(stepper, changed, tenant="a", salt="t").miss == Miss(0, NEW)
    assert _receipt(stepper, changed, tenant="a", salt="s").miss == Miss(10, NEW)
    stepper.house.blocks.flush()
    assert _receipt(stepper, tenant="c").miss == Miss(0, NEW), "evicted, but not his"


def test_below_a_public_prompt_each_is_compared_with_his_own() -> None:
    stepper = _house()
    engine = stepper.house.engine
    engine.publish([engine.public_names(TOLD[:8])])
    _receipt(stepper, tenant="a")
    changed = (*TOLD[:10], 90, *TOLD[11:])
    receipt = _receipt(stepper, changed, tenant="b")
    assert (receipt.device, receipt.miss) == (8, Miss(8, NEW))
    assert _receipt(stepper, TOLD, tenant="b").miss == Miss(10, NEW)


def test_without_a_cache_nothing_is_missed() -> None:
    assert _receipt(_house(caching=False)).miss is None


def test_a_preempted_one_keeps_the_receipt_of_its_first_start() -> None:
    stepper = _house(pages=8, preemptions_max=1)
    first = [stepper.ask(ask((*TOLD[:8], number), 20, name=str(number))) for number in (50, 60)]
    stepper.run_all()
    stepper.assert_right(*first)
    assert stepper.scheduler.statistics().preemptions_total > 0
    assert [one.heard[0].receipts[0].miss for one in first] == [Miss(0, NEW), None]

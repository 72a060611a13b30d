"""A prompt that is computed because another model is served: its asker is told, and nobody else."""

import pytest

from chatserve.cache.misses import MissReason
from chatserve.engine.other_models import OtherModels
from prefix_store import OtherPages, PageNamer, PageShape, PublicNames, RootFields
from tests.engine.build import Setup, ask
from tests.engine.stepper import Stepper

KEY = b"k" * 32
FINGERPRINT = b"another model".ljust(32)
TOLD = tuple(range(1, 25))
PUBLIC = 8  # tokens of a prompt that all tenants shared


def layout(page_size: int) -> str:
    return f"in rows of {page_size}"


def kept(
    tokens: tuple[int, ...] = TOLD,
    *,
    size: int = 4,
    tenant: str = "ann",
    salt: str = "",
    public_tokens: int = 0,
    key: bytes = KEY,
    removed: bool = False,
) -> OtherPages:
    """What a model with pages of this size has of these tokens."""
    namer = PageNamer(key, page_size=size)
    above = namer.public_root(fingerprint=FINGERPRINT, layout=layout(size))
    public = PublicNames(above, frozenset(namer.public_names(above, tokens[:public_tokens])))
    fields = RootFields(
        tenant=tenant, cache_salt=salt, fingerprint=FINGERPRINT, layout=layout(size)
    )
    names = namer.names(namer.root(fields), tokens, public=public)
    shape = PageShape(fingerprint=FINGERPRINT, page_bytes=4096, page_tokens=size)
    return OtherPages(shape, names, lambda: not removed)


def have(
    *pages: OtherPages, tokens: tuple[int, ...] = TOLD, at: int = 0, tenant="ann", salt=""
) -> bool:
    others = OtherModels(KEY, lambda: pages, layout)
    return others.have(ask(tokens, 1, tenant=tenant, salt=salt), at)


@pytest.mark.parametrize("size", [4, 3, 8])
def test_what_one_had_kept_is_found_with_pages_of_any_size(size: int) -> None:
    pages = kept(size=size)
    assert all(have(pages, at=at) for at in range(len(TOLD)))
    longer = (*TOLD, *range(30, 60))
    assert have(pages, tokens=longer, at=len(TOLD) - 1)
    assert not have(pages, tokens=longer, at=len(TOLD)), "it has no more than that"


def test_a_page_that_is_not_whole_in_the_prompt_is_not_asked_for() -> None:
    pages = kept((*TOLD, 25), size=5)
    assert have(pages, at=19)
    assert not have(pages, at=20)


def test_a_page_in_the_middle_that_is_another_is_not_found() -> None:
    changed = (*TOLD[:9], 90, *TOLD[10:])
    pages = kept()
    assert have(pages, tokens=changed, at=4)
    assert not have(pages, tokens=changed, at=8)


def test_nobody_is_told_of_anothers() -> None:
    mine, salted = kept(), kept(salt="drawer")
    assert not have(mine, tenant="bob")
    assert not have(mine, salt="drawer")
    assert not have(salted)
    assert have(salted, salt="drawer")
    assert not have(salted, salt="drawer", tenant="bob")
    assert not have(kept(key=b"x" * 32)), "nor of names under another key"
    assert have(kept(tenant="bob"), salted, mine), "of several models one is enough"


def test_what_was_removed_is_not_found() -> None:
    assert not have(kept(removed=True))


def test_below_a_public_prompt_each_is_told_of_his_own() -> None:
    pages = kept(public_tokens=PUBLIC)
    assert have(pages, at=PUBLIC)
    assert have(pages, at=len(TOLD) - 1)
    assert not have(pages, at=PUBLIC, tenant="bob")
    assert not have(pages, at=PUBLIC, salt="drawer")
    for tenant in ("ann", "bob"):
        assert not have(pages, at=0, tenant=tenant), "of what all shared nothing is said"


def test_the_reason_is_told_after_those_that_are_nearer() -> None:
    """What this process had itself, or has below, is not called another model's."""

    stepper = Stepper(Setup(page_size=4))
    asked_for: list[int] = []

    def others(request, position: int) -> bool:
        asked_for.append(position)
        return True

    stepper.scheduler.tiers._others = others

    def reason() -> MissReason:
        asked = stepper.ask(ask(TOLD, 1))
        stepper.run_all()
        return asked.heard[0].receipts[0].miss.reason

    assert reason() is MissReason.OTHER_MODEL
    assert asked_for == [0]
    stepper.house.blocks.flush()
    assert reason() is MissReason.EVICTED
    assert asked_for == [0]

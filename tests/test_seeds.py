"""Seeds of tests: the same for the same tree, other ones on request, and one that is repeated."""

import pytest

from tests.seeds import VARIABLE, drawn_seed


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def _now(monkeypatch: pytest.MonkeyPatch, test: str) -> None:
    """pytest sets it at the begin of each phase, so not by a fixture."""
    monkeypatch.setenv("PYTEST_CURRENT_TEST", test)


def test_a_test_has_the_same_seed_in_each_run_and_phase_and_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _now(monkeypatch, "tests/test_x.py::test_y[a b] (call)")
    seed = drawn_seed()
    assert capsys.readouterr().out == f"seed {seed}\n"
    _now(monkeypatch, "tests/test_x.py::test_y[a b] (setup)")
    assert drawn_seed() == seed
    assert 0 <= seed < 1 << 32


def test_another_test_and_another_wish_have_others(monkeypatch: pytest.MonkeyPatch) -> None:
    _now(monkeypatch, "tests/test_x.py::test_y[a b] (call)")
    seeds = {drawn_seed()}
    monkeypatch.setenv(VARIABLE, "7")
    seeds.add(drawn_seed())
    _now(monkeypatch, "tests/test_x.py::test_y[a c] (call)")
    seeds.add(drawn_seed())
    assert len(seeds) == 3


def test_random_ones_differ_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "random")
    assert len({drawn_seed() for _ in range(8)}) > 1


def test_a_seed_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "exactly:3493884291")
    assert drawn_seed() == 3493884291
    monkeypatch.setenv(VARIABLE, "exactly:x")
    with pytest.raises(ValueError, match="'x'"):
        drawn_seed()

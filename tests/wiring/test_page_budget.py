"""How many pages a device's memory is measured to have room for."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from chatserve import page_budget
from chatserve.engine.runner import OutOfMemory
from chatserve.errors import SettingsError
from chatserve.model import LoadedModel, load_model
from chatserve.page_budget import Measured, bytes_for_pages, measure, page_count, run_largest
from chatserve.settings import Settings
from tests.model.families import build
from tests.wiring.test_settings import read

TOTAL, WEIGHTS, STEP, COMPILED = 1000 << 20, 300 << 20, 50 << 20, 20 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = build("llama", tmp_path_factory.mktemp("budget"), seed=3)
    yield load_model(folder, device="cpu", dtype="float32", page_size=16)
    torch.set_num_threads(before)


class FakeDevice:
    """A device that holds a model. What a run takes is torch's until it lets go; what was compiled
    for it stays."""

    def __init__(self, *, room: int = 1 << 30) -> None:
        self.room = room  # of tokens in a step
        self.reserved_bytes = WEIGHTS
        self.most = TOTAL  # what happened at a load counts for nothing
        self.compiled = 0
        self.ran: list[int] = []

    def run(self, tokens: int) -> int:
        """A page for each token, of 1 KiB."""
        self.ran.append(tokens)
        self.compiled = COMPILED
        self.reserved_bytes += (tokens << 10) + STEP
        self.most = max(self.most, self.reserved_bytes)
        if tokens > self.room:
            raise OutOfMemory(f"{tokens} tokens")
        return tokens << 10

    def total(self) -> int:
        return TOTAL

    def free(self) -> int:
        return TOTAL - self.reserved_bytes - self.compiled

    def reserved(self) -> int:
        return self.reserved_bytes

    def begin_peak(self) -> None:
        self.most = self.reserved_bytes

    def peak(self) -> int:
        return self.most

    def let_go(self) -> None:
        self.reserved_bytes = WEIGHTS


MEASURED = Measured(total=TOTAL, free=TOTAL - WEIGHTS - COMPILED, step=STEP)


def test_pages_get_what_the_largest_step_leaves() -> None:
    device = FakeDevice()
    assert measure(device, device.run, tokens=100, tokens_min=16) == MEASURED
    assert device.ran == [100]
    safety = int(TOTAL * page_budget.SAFETY_SHARE)
    assert bytes_for_pages(MEASURED) == TOTAL - WEIGHTS - COMPILED - STEP - safety
    assert bytes_for_pages(MEASURED, reserved=70) == bytes_for_pages(MEASURED) - 70
    assert bytes_for_pages(MEASURED, reserved=TOTAL) == 0
    assert bytes_for_pages(replace(MEASURED, free=STEP + safety - 1)) == 0


def test_a_step_that_does_not_fit_is_measured_smaller() -> None:
    device = FakeDevice(room=30)
    assert measure(device, device.run, tokens=100, tokens_min=16) == MEASURED
    assert device.ran == [100, 50, 25]
    device = FakeDevice(room=3)
    with pytest.raises(OutOfMemory, match="25 tokens"):
        measure(device, device.run, tokens=100, tokens_min=16)


def settings(*given: str) -> Settings:
    return read(["--max-batch-tokens", "64", "--max-sequences", "3", *given])


def test_a_device_is_measured_with_a_real_step(model: LoadedModel) -> None:
    """Of 64 tokens of three sequences: one page each, and four."""
    assert run_largest(model, 3, 64) == 6 * model.layout.page_bytes
    device, page = FakeDevice(), model.layout.page_bytes
    safety = int(TOTAL * page_budget.SAFETY_SHARE)
    device.reserved_bytes = TOTAL  # what it holds before the warm-up is let go
    assert page_count(settings(), model, device) == (TOTAL - WEIGHTS - safety) // page
    wanted = 100 * page
    reserved = TOTAL - WEIGHTS - safety - wanted
    assert page_count(settings(), model, device, reserved=reserved) == 100
    with pytest.raises(SettingsError, match="kv-memory: 0 bytes hold 0 pages"):
        page_count(settings(), model, device, reserved=TOTAL)


def test_who_says_how_much_pages_get_is_believed(model: LoadedModel) -> None:
    device = FakeDevice()
    device.most = -1
    told = settings("--kv-memory", "2MiB")
    assert page_count(told, model, device) == (2 << 20) // model.layout.page_bytes
    assert device.most == -1, "nobody asks the device"


def test_a_model_that_leaves_nothing_to_compute_in_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> int:
        raise OutOfMemory("too little")

    monkeypatch.setattr(page_budget, "run_largest", run)
    with pytest.raises(SettingsError, match="no memory to compute in"):
        page_count(settings(), model, FakeDevice())

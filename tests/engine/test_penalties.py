"""Penalties through planner, batch and sampling, against the plain model and a naive count.

What a penalty counts is the whole point: every token so far, the one that was sampled a moment ago
included (it is not known yet where a step is in flight), the prompt's for repetition, and not the
prompt's for presence and frequency. So the oracle also counts in wrong ways, and a run proves
something only where those would have said other tokens.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from chatserve.engine import model_runner
from chatserve.engine.plan import StepPlan, StepResult
from chatserve.engine.runner import StepUnderWay
from chatserve.engine.values import FinishReason, Request, Sampling
from chatserve.model import LoadedModel, SampleRow, load_model, sample
from chatserve.model.sampling import uniform
from chatserve.model.step import LateTokens
from chatserve_kernels.packing import Fetched
from tests.engine.build import VOCABULARY as VOCABULARY_SIMULATED
from tests.engine.build import Setup, ask, running
from tests.engine.build import build as build_house
from tests.engine.oracle import assert_right, listen
from tests.engine.parity_drive import BOUNDS, Drive, Sampled, plain_model
from tests.model.families import VOCABULARY, build
from tests.seeds import drawn_seed

PAGE_SIZE = 8
TOKENS = 40
SAMPLED = 10  # from these few tokens alone, so that they come again and again
BIAS = tuple((token, 40.0) for token in range(20, 20 + SAMPLED))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("penalties"), seed=11)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu", dtype="float32", page_size=PAGE_SIZE)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> PreTrainedModel:
    return plain_model(folder)


@dataclass(frozen=True)
class Counted:
    """What repetition looks at, and what presence and frequency look at."""

    repeated: Sequence[int]
    generated: Sequence[int]


Count = Callable[[list[int], list[int]], Counted]  # of a prompt and what was generated after it


def rightly(prompt: list[int], generated: list[int]) -> Counted:
    return Counted(prompt + generated, generated)


# Each of these is a fault that somebody could make.
WRONGLY: dict[str, Count] = {
    "the last token does not count yet": lambda prompt, generated: Counted(
        (prompt + generated)[:-1], generated[:-1]
    ),
    "repetition passes the prompt over": lambda prompt, generated: Counted(generated, generated),
    "presence and frequency count the prompt": lambda prompt, generated: Counted(
        prompt + generated, prompt + generated
    ),
}


def penalised(logits: Tensor, sampling: Sampling, counted: Counted) -> list[float]:
    """Slowly, on a plain list."""
    values: list[float] = logits.tolist()
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in set(counted.repeated):
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in Counter(counted.generated).items():
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    return values


def choose(values: list[float], sampling: Sampling, sample: int, position: int) -> int | None:
    """The token; None where rounding may decide between two."""
    if sampling.temperature == 0:
        best, second = sorted(values, reverse=True)[:2]
        return None if best - second <= BOUNDS["auto"].margin else values.index(best)
    weights = (torch.tensor(values, dtype=torch.float64) / sampling.temperature).softmax(dim=0)
    edges = weights.cumsum(dim=0)
    noise = uniform(sampling.seed, sample, position)
    if float((edges - noise).abs().min()) <= BOUNDS["auto"].margin:
        return None
    return int((edges <= noise).sum())


@torch.inference_mode()
def compare(
    oracle: PreTrainedModel, sampled: Sampled, sample: int, counters: dict[str, Count]
) -> Counter[str]:
    """How many tokens each way of counting agrees with, of those that rounding does not decide."""
    request = sampled.request
    prompt = list(request.tokens[: len(request.tokens) - request.answered])
    answered = list(request.tokens[len(prompt) :])
    assert sampled.finish is FinishReason.LENGTH
    assert len(sampled.tokens) == request.max_tokens
    line = [*request.tokens, *sampled.tokens]
    plain: Any = oracle(torch.tensor([line]))
    agrees: Counter[str] = Counter()
    for index, token in enumerate(sampled.tokens):
        at = len(request.tokens) + index
        logits = plain.logits[0, at - 1]
        generated = answered + sampled.tokens[:index]
        said = {
            name: choose(
                penalised(logits, request.sampling, count(prompt, generated)),
                request.sampling,
                sample,
                at,
            )
            for name, count in counters.items()
        }
        if said["rightly"] is None:
            continue
        agrees["compared"] += 1
        for name, wanted in said.items():
            agrees[name] += token == wanted
    return agrees


PENALTIES = {
    "repetition": Sampling(temperature=0.0, repetition_penalty=1.5),
    "presence": Sampling(temperature=0.0, presence_penalty=2.0, logit_bias=BIAS),
    "frequency": Sampling(temperature=0.0, frequency_penalty=1.0, logit_bias=BIAS),
    "rewards": Sampling(temperature=0.0, frequency_penalty=-0.4, presence_penalty=-1.5),
    "all": Sampling(
        temperature=0.0,
        repetition_penalty=1.2,
        presence_penalty=1.0,
        frequency_penalty=0.7,
        logit_bias=BIAS,
    ),
    "drawn": Sampling(
        temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.8, logit_bias=BIAS, seed=5
    ),
}


def prompt_for(dice: random.Random) -> tuple[int, ...]:
    """Ends in tokens that are about to be said, so that it matters whether they count."""
    start = [dice.randrange(4, VOCABULARY) for _ in range(dice.choice([3, 8, 11]))]
    return (*start, *(dice.choice(BIAS)[0] for _ in range(dice.choice([2, 5]))))


@pytest.mark.parametrize(("depth", "ahead"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("pages", [200, 14])
def test_penalties_count_every_token_so_far(
    model: LoadedModel, oracle: PreTrainedModel, pages: int, depth: int, ahead: bool
) -> None:
    seed = drawn_seed()
    dice = random.Random(seed)
    drive = Drive(model, pages=pages, seed=seed, depth=depth, ahead=ahead)
    for number, sampling in enumerate(PENALTIES.values()):
        for samples in (1, 2):
            drive.submit(
                Request(
                    request_id=str(number),
                    tokens=prompt_for(dice),
                    max_tokens=TOKENS,
                    samples=samples,
                    sampling=sampling,
                )
            )
    drive.run()
    if pages < 100:
        assert drive.scheduler.statistics().preemptions_total > 0, "the run was to preempt"
    counters = {"rightly": rightly} | WRONGLY
    agrees: Counter[str] = Counter()
    for (_, number), sampled in drive.results.items():
        one = compare(oracle, sampled, number, counters)
        assert one["rightly"] == one["compared"], (sampled.request.sampling, one)
        agrees += one
    assert len(drive.results) == 3 * len(PENALTIES)
    assert agrees["compared"] >= 0.8 * 3 * len(PENALTIES) * TOKENS
    for name in WRONGLY:
        differ = agrees["compared"] - agrees[name]
        assert differ >= 12, f"nothing was proved of '{name}': {agrees}"


@dataclass
class Waits:
    """launches: how many steps counted a token that nobody had fetched. waited: in a launch."""

    drive: Drive
    launches: int = 0
    waited: int = 0

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        start, wait = self.drive.runner.start, Fetched.wait
        launching: list[StepPlan] = []

        def started(plan: StepPlan) -> StepResult | StepUnderWay:
            launching.append(plan)
            result = start(plan)
            launching.clear()
            return result

        def waiting(it: Fetched) -> tuple[Tensor, ...]:
            self.waited += bool(launching)
            return wait(it)

        def sampling(logits: Tensor, rows: tuple[SampleRow, ...], late: LateTokens | None) -> Any:
            self.launches += late is not None
            return sample(logits, rows, late)

        patch.setattr(self.drive.runner, "start", started)
        patch.setattr(Fetched, "wait", waiting)
        patch.setattr(model_runner, "sample", sampling)


@pytest.mark.parametrize("pages", [200, 14])
def test_steps_launched_ahead_give_the_same_tokens_and_wait_for_none(
    model: LoadedModel, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = drawn_seed()
    said: list[dict[tuple[int, int], list[int]]] = []
    for ahead in (False, True):
        dice = random.Random(seed)
        drive = Drive(model, pages=pages, seed=seed, depth=2, ahead=ahead)
        for number, sampling in enumerate(PENALTIES.values()):
            drive.submit(
                Request(
                    request_id=str(number),
                    tokens=prompt_for(dice),
                    max_tokens=TOKENS,
                    samples=2,
                    sampling=sampling,
                )
            )
        waits = Waits(drive)
        if ahead:
            waits.watch(monkeypatch)
        drive.run()
        said.append({of: each.tokens for of, each in drive.results.items()})
        assert waits.waited == 0, "a launch has waited for the device"
        assert (waits.launches > TOKENS // 2) == ahead
    assert said[0] == said[1]
    assert len(said[0]) == 2 * len(PENALTIES)


def test_tokens_that_were_answered_before_count_as_generated(
    model: LoadedModel, oracle: PreTrainedModel
) -> None:
    """A reply that is taken up goes on as if it had never been cut."""
    drive = Drive(model, pages=200, seed=1, depth=2)
    prompt = prompt_for(random.Random(2))
    whole = Request(request_id="w", tokens=prompt, max_tokens=30, sampling=PENALTIES["all"])
    drive.submit(whole)
    drive.run()
    (said,) = drive.finished()
    cut = 13
    drive.submit(
        replace(whole, tokens=prompt + tuple(said.tokens[:cut]), answered=cut, max_tokens=30 - cut)
    )
    drive.run()
    resumed = drive.finished()[-1]
    assert resumed.tokens == said.tokens[cut:]
    agrees = compare(oracle, resumed, 0, {"rightly": rightly})
    assert agrees["rightly"] == agrees["compared"] >= 12


# Stop ids inside min_tokens --------------------------------------------------------------------

STOP = 150


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_id_that_presses_comes_right_after_min_tokens(
    model: LoadedModel, depth: int, temperature: float
) -> None:
    """At the first place where it may, and never before."""
    pressing = Sampling(temperature=temperature, logit_bias=((STOP, 100.0),), seed=3)
    wanted: list[int] = []
    drive = Drive(model, pages=40, seed=7, depth=depth)
    for min_tokens in (0, 1, 2, 5, PAGE_SIZE - 1, PAGE_SIZE, 17):
        wanted += [min_tokens] * 2
        drive.submit(
            Request(
                request_id=str(min_tokens),
                tokens=tuple(range(30, 41)),
                max_tokens=30,
                min_tokens=min_tokens,
                stop_ids=frozenset({STOP, 7}),
                samples=2,
                sampling=pressing,
            )
        )
    drive.run()
    found = drive.finished()
    assert [len(item.tokens) for item in found] == [count + 1 for count in wanted]
    for item in found:
        assert item.finish is FinishReason.STOP
        assert item.tokens[-1] == STOP
        assert not item.request.stop_ids & set(item.tokens[:-1])


def test_min_tokens_counts_what_was_answered_before(model: LoadedModel) -> None:
    for answered, more in ((2, 3), (4, 1), (5, 0), (6, 0)):
        drive = Drive(model, pages=40, seed=7, depth=2)
        drive.submit(
            Request(
                request_id="r",
                tokens=tuple(range(30, 41)),
                max_tokens=30,
                min_tokens=5,
                answered=answered,
                stop_ids=frozenset({STOP}),
                sampling=Sampling(temperature=0.0, logit_bias=((STOP, 100.0),)),
            )
        )
        drive.run()
        (item,) = drive.finished()
        assert (len(item.tokens), item.tokens[-1]) == (more + 1, STOP)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
async def test_the_engine_ends_a_sample_right_after_min_tokens(steps_in_flight: int) -> None:
    """Through its loop: here nearly every id is a stop id."""
    house = build_house(Setup(steps_in_flight=steps_in_flight))
    free = 11
    stops = frozenset(range(VOCABULARY_SIMULATED)) - {free}
    async with running(house) as engine:
        for min_tokens in (0, 1, 2, 4, 9):
            request = ask((5, 6, 7), 30, stop_ids=stops, min_tokens=min_tokens, samples=2)
            heard = await listen(engine.open(engine.prepare(request)))
            assert_right(request, heard, VOCABULARY_SIMULATED)
            for one in heard:
                assert one.finish is FinishReason.STOP
                assert one.tokens[:-1] == [free] * min_tokens
                assert one.tokens[-1] in stops

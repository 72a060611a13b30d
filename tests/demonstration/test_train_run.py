"""Whole runs of the training script, a few steps of a tiny model: stopped, resumed, carried over.

One thread learns, so two runs of the same steps hold the same weights to the last bit.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from chatserve.demonstration import MODEL_FOLDER, architecture, batches, checkpoint, plot, train
from chatserve.demonstration.batches import IGNORED, Encoder, Slice, joined, make_step
from chatserve.demonstration.corpus import Chat, Turn
from chatserve.demonstration.forward import EMBEDDING, cast, hidden_states
from chatserve.demonstration.tokenizer import save

STEPS = 6


class Interrupted(Exception):
    """A run that broke off without a word, as at a power cut."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One narrow layer, short chats, a few hundred tokens a step, and a log line for each."""
    shape = {"HIDDEN_SIZE": 32, "INTERMEDIATE_SIZE": 48, "LAYERS": 1, "HEAD_SIZE": 16, "HEADS": 2}
    for name, size in shape.items():
        monkeypatch.setattr(architecture, name, size)
    monkeypatch.setattr(batches, "CURRICULUM", (batches.Stage(0, 64, 1.0, 256),))
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plan(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> train.Plan:
    """A run whose folder holds the shipped tokenizer: to learn one takes far longer."""
    return plan_in(tmp_path / "run", tokenizer)


def plan_in(folder: Path, tokenizer: PreTrainedTokenizerFast) -> train.Plan:
    folder.mkdir()
    save(tokenizer, folder)
    return train.Plan(
        folder=folder,
        steps=STEPS,
        rate=3e-3,
        seed="1",
        checkpoint_seconds=1e9,
        probe_steps=10**9,
        threads=1,
        device="cpu",
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.CHECKPOINT)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def log(folder: Path) -> list[dict[str, float]]:
    lines = (folder / checkpoint.LOG).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lasting(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What of a log does not depend on the clock."""
    return [{key: row[key] for key in ("step", "tokens", "loss", "rate")} for row in rows]


def tokens_until(tokenizer: PreTrainedTokenizerFast, step: int, begin: int = 0) -> int:
    encoder = Encoder(tokenizer)
    steps = (make_step(encoder, "1", number) for number in range(begin, step))
    return sum(len(part.ids) for slices in steps for part in slices)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Something happens when the run is about to take this step."""

    def watched(encoder: Encoder, seed: str, step: int) -> list[Slice]:
        if step == number:
            act()
        return make_step(encoder, seed, step)

    monkeypatch.setattr(train, "make_step", watched)


def interrupt() -> None:
    raise Interrupted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_that_a_signal_stops_is_continued_as_if_unbroken(
    name: str,
    plan: train.Plan,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = plan_in(tmp_path / "unbroken", tokenizer)
    train.train(unbroken, from_weights=None)

    number = signal.Signals[name]
    uncaught: list[int] = []

    def note(number: int, _: object) -> None:
        uncaught.append(number)

    before = signal.signal(number, note)
    try:
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
        train.train(plan, from_weights=None)
        assert signal.getsignal(number) is note, "the handler of before is back"
    finally:
        signal.signal(number, before)
    assert not uncaught
    stopped = checkpoint.read_progress(plan.folder)
    assert stopped == checkpoint.Progress(3, tokens_until(tokenizer, 3)), "its step is finished"
    assert [row["step"] for row in log(plan.folder)] == [1, 2, 3]

    train.train(plan, from_weights=None)
    assert checkpoint.read_progress(plan.folder) == checkpoint.read_progress(unbroken.folder)
    assert lasting(log(plan.folder)) == lasting(log(unbroken.folder))
    assert same(tensors(plan.folder), tensors(unbroken.folder))


def test_a_run_that_breaks_off_is_continued_from_its_last_checkpoint(
    plan: train.Plan,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = plan_in(tmp_path / "unbroken", tokenizer)
    train.train(unbroken, from_weights=None)
    end = checkpoint.Progress(STEPS, tokens_until(tokenizer, STEPS))
    assert checkpoint.read_progress(unbroken.folder) == end

    at_step(monkeypatch, 4, interrupt)
    with pytest.raises(Interrupted):
        train.train(replace(plan, checkpoint_seconds=-1), from_weights=None)
    kept = checkpoint.Progress(4, tokens_until(tokenizer, 4))
    assert checkpoint.read_progress(plan.folder) == kept
    monkeypatch.setattr(train, "make_step", make_step)
    train.train(plan, from_weights=None)
    assert checkpoint.read_progress(plan.folder) == end
    assert same(tensors(plan.folder), tensors(unbroken.folder))


def test_a_run_learns_and_its_probes_are_in_the_log(
    plan: train.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "PROBE_COUNT", 1)
    train.train(replace(plan, steps=40, probe_steps=20, rate=1e-2), from_weights=None)
    rows = log(plan.folder)
    assert [row["step"] for row in rows if "far" in row] == [20, 40]
    assert all(0 <= row[name] <= 1 for row in rows if "far" in row for name, _, _ in train.PROBES)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def exported(plan: train.Plan, target: Path) -> Path:
    """A few steps of a run, as a folder that ships."""
    train.train(plan, from_weights=None)
    train.export(plan.folder, target)
    return target


def test_a_run_starts_from_given_weights(
    plan: train.Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At a rate of nothing a step changes nothing, so what was given is what is kept."""
    given = exported(plan, tmp_path / "given")
    other = replace(plan, folder=tmp_path / "other", steps=STEPS + 1, rate=0.0)
    train.train(other, from_weights=given)
    weights = load_file(given / checkpoint.WEIGHTS)
    kept = tensors(other.folder)
    for name, value in weights.items():
        assert torch.equal(kept[f"model.{name}"], value.float()), name
    tokens = tokens_until(tokenizer, STEPS + 1)
    assert checkpoint.read_progress(other.folder) == checkpoint.Progress(STEPS + 1, tokens, STEPS)
    rows = log(other.folder)
    assert lasting(rows[:-1]) == lasting(log(plan.folder)), "the log goes on"
    assert rows[-1]["step"] == STEPS + 1


def test_a_run_from_weights_warms_up_whether_or_not_it_is_stopped(
    plan: train.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = exported(plan, tmp_path / "given")
    unbroken = replace(plan, folder=tmp_path / "unbroken", steps=100)
    broken = replace(plan, folder=tmp_path / "broken", steps=100)
    at_step(monkeypatch, STEPS + 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train.train(unbroken, from_weights=given)
    at_step(monkeypatch, STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train.train(broken, from_weights=given)
    at_step(monkeypatch, STEPS + 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train.train(broken, from_weights=None)
    rates = [row["rate"] for row in log(broken.folder)[STEPS:]]
    assert rates == pytest.approx([plan.rate * n / train.WARMUP_STEPS for n in range(1, 6)])
    assert lasting(log(broken.folder)) == lasting(log(unbroken.folder))
    assert same(tensors(broken.folder), tensors(unbroken.folder))


def test_weights_are_not_given_to_a_run_that_has_some(plan: train.Plan, tmp_path: Path) -> None:
    given = exported(plan, tmp_path / "given")
    before = contents(plan.folder)
    with pytest.raises(train.UnfitRun, match="holds a checkpoint already"):
        train.train(replace(plan, steps=STEPS + 2), from_weights=given)
    assert contents(plan.folder) == before


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.TOKENIZER])
def test_a_folder_without_weights_or_tokenizer_is_refused_and_left_alone(
    name: str, plan: train.Plan, tmp_path: Path
) -> None:
    given = exported(plan, tmp_path / "given")
    (given / name).unlink()
    before = contents(given)
    other = replace(plan, folder=tmp_path / "other", steps=STEPS + 1)
    with pytest.raises(train.UnfitRun, match=name):
        train.train(other, from_weights=given)
    assert contents(given) == before
    assert not other.folder.exists()


def test_bare_weights_start_at_the_first_step_with_an_empty_log(
    plan: train.Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = exported(plan, tmp_path / "given")
    (given / checkpoint.LOG).unlink()
    (given / checkpoint.TRAINING).unlink()
    other = replace(plan, folder=tmp_path / "other", steps=1)
    train.train(other, from_weights=given)
    assert checkpoint.read_progress(other.folder) == checkpoint.Progress(
        1, tokens_until(tokenizer, 1)
    )
    assert [row["step"] for row in log(other.folder)] == [1]


def test_an_export_of_a_run_without_a_log_ships_an_empty_one(
    plan: train.Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train.train(plan, from_weights=None)
    (plan.folder / checkpoint.LOG).unlink()
    target = tmp_path / "given"
    target.mkdir()
    (target / checkpoint.LOG).write_text('{"step": 99}\n', encoding="utf-8")
    train.export(plan.folder, target)
    assert plot.read_log(target / checkpoint.LOG) == []
    assert checkpoint.exported_step(target) == (STEPS, tokens_until(tokenizer, STEPS))


def test_an_export_may_be_the_mean_of_weights(
    plan: train.Plan, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train.train(plan, from_weights=None)
    model, _ = train.export(plan.folder, tmp_path / "alone")
    others = [tmp_path / "zero", tmp_path / "threes"]
    for folder, value in zip(others, (0.0, 3.0), strict=True):
        other = architecture.make_model(tokenizer, seed=5)
        for weight in other.parameters():
            weight.data.fill_(value)
        checkpoint.export(folder, other, tokenizer, step=1, tokens=1)
    mean, _ = train.export(plan.folder, tmp_path / "mean", others)
    for mine, weight in zip(mean.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, (weight + 3) / 3)
    written = load_file(tmp_path / "mean" / checkpoint.WEIGHTS)
    for name, weight in mean.named_parameters():
        assert torch.equal(written[name], weight.bfloat16())
    assert checkpoint.exported_step(tmp_path / "mean") == (STEPS, tokens_until(tokenizer, STEPS))


@pytest.mark.parametrize("fault", [checkpoint.WEIGHTS, checkpoint.TOKENIZER, "another"])
def test_an_export_takes_no_other_models_weights(
    fault: str, plan: train.Plan, tmp_path: Path
) -> None:
    given = exported(plan, tmp_path / "given")
    if fault == "another":
        text = (given / checkpoint.TOKENIZER).read_text(encoding="utf-8")
        (given / checkpoint.TOKENIZER).write_text(text + "\n", encoding="utf-8")
    else:
        (given / fault).unlink()
    with pytest.raises(train.UnfitRun, match=fault):
        train.export(plan.folder, tmp_path / "target", [given])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("steps", [STEPS, STEPS - 1])
def test_a_run_at_or_beyond_its_last_step_is_left_as_it_is(
    steps: int, plan: train.Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(plan, from_weights=None)
    before = contents(plan.folder)
    capsys.readouterr()
    train.train(replace(plan, steps=steps), from_weights=None)
    assert f"at step {STEPS} of {steps}" in capsys.readouterr().out
    assert contents(plan.folder) == before


def test_the_seed_makes_the_first_weights(plan: train.Plan, tmp_path: Path, tokenizer: Any) -> None:
    """At a rate of nothing the weights stay the first ones."""
    found: dict[str, torch.Tensor] = {}
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "word"), ("e", "other")):
        one = replace(plan_in(tmp_path / folder, tokenizer), steps=1, rate=0.0, seed=seed)
        train.train(one, from_weights=None)
        found[folder] = tensors(one.folder)[f"model.{EMBEDDING}"]
    assert torch.equal(found["a"], found["b"])
    differing = [found[folder] for folder in "acde"]
    assert all(
        not torch.equal(left, right)
        for index, left in enumerate(differing)
        for right in differing[:index]
    )


def test_tokens_that_decide_count_three_times(tokenizer: PreTrainedTokenizerFast) -> None:
    model = architecture.make_model(tokenizer, seed=5)
    learner = train.Learner(model, 1e-3, threads=1)
    encoder = Encoder(tokenizer)
    chats = [
        Chat("Be brief.", (Turn("Yes?", "My dog said no.", "talk"),)),
        Chat(None, (Turn("Is it Rex?", "Yes no Rex, so yes. Bye", "yes or no"),) * 2),
    ]
    part = joined([encoder.chat(chat) for chat in chats])
    count = int((part.labels != IGNORED).sum())
    weights = cast(model, torch.float32)
    loss, found = learner.gradients(weights, count, part)

    hidden = hidden_states(model, weights, part.ids, part.lengths)
    logits = functional.linear(hidden, weights[EMBEDDING])
    each = functional.cross_entropy(logits, part.labels, reduction="none", ignore_index=IGNORED)
    before = torch.cat((torch.tensor([IGNORED]), part.labels[:-1]))
    decides = (part.labels != IGNORED) & (before == IGNORED)
    assert int(decides.sum()) == 3
    (yes,) = encoder.encode(" yes")
    verdicts = part.labels == yes
    assert int(verdicts.sum()) == 2
    decides |= verdicts
    weighted = each.sum() + 2 * each[decides].sum()
    wanted = torch.autograd.grad(weighted / count, list(weights.values()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert loss == pytest.approx(float(each.detach().sum()) / count), "what is told is not weighted"


@pytest.mark.parametrize("action", ["train", "export"])
def test_the_command_says_what_does_not_fit(
    action: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = tmp_path / "nowhere"
    given = ["--folder", str(nowhere), "--target", str(tmp_path / "target")]
    if action == "train":
        given += ["--from-weights", str(nowhere)]
    monkeypatch.setattr(sys, "argv", ["train", action, *given])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert f"{nowhere} holds no" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Training: a run that was stopped continues as if it had not been, from safetensors alone."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration import MODEL_FOLDER, architecture, checkpoint, train
from chatserve.demonstration.batches import (
    CURRICULUM,
    IGNORED,
    Encoder,
    Slice,
    draw_length,
    joined,
    make_step,
    share_out,
    stage_of,
)
from chatserve.demonstration.corpus import make_chat
from chatserve.demonstration.forward import Weights, blocks, cast, hidden_states
from chatserve.demonstration.train import Learner, make_optimizers, rate_share


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER)


def small_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = architecture.make_config(tokenizer)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    torch.manual_seed(3)
    return Qwen3ForCausalLM(config)


def steps(learner: Learner, encoder: Encoder, numbers: range) -> list[float]:
    return [learner.learn(make_step(encoder, "t", n), 1e-3) for n in numbers]


def test_a_resumed_run_repeats_the_unbroken_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """To the last bit, whatever the number of threads: a slice is one thread's alone."""
    encoder = Encoder(tokenizer)
    model = small_model(tokenizer)
    learner = Learner(model, 1e-3, threads=2)
    steps(learner, encoder, range(2))
    progress = checkpoint.Progress(2, 512, warm_from=1)
    checkpoint.save_checkpoint(tmp_path, model, learner.optimizers, progress)
    unbroken = steps(learner, encoder, range(2, 4))

    other = small_model(tokenizer)
    second = Learner(other, 1e-3, threads=1)
    assert checkpoint.load_checkpoint(tmp_path, other, second.optimizers) == progress
    assert steps(second, encoder, range(2, 4)) == unbroken
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_step_follows_the_gradient_of_all_its_slices_to_a_length_of_one(
    scale: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Plain descent at a rate of one shows what the optimizers are given."""
    encoder = Encoder(tokenizer)
    model = small_model(tokenizer)
    rows = [encoder.chat(make_chat(str(seed), 300)) for seed in range(4)]
    whole = joined(rows)
    logits = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids, *_ in rows])
    each = functional.cross_entropy(logits, whole.labels, reduction="none", ignore_index=IGNORED)
    count = int((whole.labels != IGNORED).sum())
    (scale * (each * whole.weights).sum() / count).backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    length = float(torch.nn.utils.get_total_norm(wanted))
    assert (length > 1) == (scale > 1)
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()

    learner = Learner(model, 1e-3, threads=2)
    learner.optimizers = [torch.optim.SGD(model.parameters())]
    slices = [joined(rows[:2]), joined(rows[2:])]
    scaled = [replace(part, weights=part.weights * scale) for part in slices]
    loss = learner.learn(scaled, 1.0)
    assert loss == pytest.approx(float(each.detach().sum()) / count, rel=1e-2)
    for old, new, gradient in zip(before, model.parameters(), wanted, strict=True):
        aim = gradient / max(1.0, length)
        assert float((old - new.detach() - aim).norm()) < 0.05 * float(aim.norm())


def test_a_matrix_of_the_layers_decays_once_a_step_and_nothing_else_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Without a gradient nothing else moves a weight."""
    model = small_model(tokenizer)
    optimizers = make_optimizers(model, 0.1)
    given = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, model.parameters())), "each has its one"
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for old, (name, new) in zip(before, model.named_parameters(), strict=True):
        decays = "layers" in name and new.ndim == 2
        torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.05) if decays else old)


@pytest.mark.parametrize(("wrong", "share"), [("before", 1.0), ("first", 0.0), ("end", 0.0)])
def test_the_logs_recall_judges_the_whole_last_reply_and_no_other(
    wrong: str,
    share: float,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One who knows the chat by heart, but for some tokens."""
    encoder = Encoder(tokenizer)

    def heart(
        _: Qwen3ForCausalLM, __: Weights, part: Slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, head = part.ids.tolist(), encoder.heads["assistant"]
        heads = [at for at in range(len(ids)) if ids[at : at + len(head)] == head]
        first = heads[-1] + len(head)
        chosen = {"before": slice(first), "first": first, "end": ids.index(*encoder.end, first)}
        said = part.ids.clone()
        said[chosen[wrong]] = encoder.pad
        spoken = (part.labels != IGNORED).nonzero().squeeze(1)
        logits = functional.one_hot(said[spoken + 1], len(tokenizer))
        return logits, part.labels[spoken], part.weights[spoken]

    monkeypatch.setattr(train, "predictions", heart)
    monkeypatch.setattr(train, "PROBE_COUNT", 3)
    found = train.probe(small_model(tokenizer), encoder)
    assert found == {name: share for name, _, _ in train.PROBES}


def test_each_step_has_chats_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    def openings(seed: str, step: int) -> list[list[int]]:
        slices = make_step(Encoder(tokenizer), seed, step)
        return [row[:24].tolist() for part in slices for row in part.ids.split(part.lengths)]

    first = openings("1", 1)
    assert openings("1", 1) == first
    for others in (openings("1", 2), openings("2", 1)):
        assert sum(opening in others for opening in first) <= 2


def test_the_training_pass_computes_what_transformers_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = Encoder(tokenizer)
    model = small_model(tokenizer)
    rows = [encoder.chat(make_chat(str(seed), size)) for seed, size in enumerate((200, 2300, 700))]
    part = joined(rows)
    weights = cast(model, torch.float32)
    ours = hidden_states(model, weights, part.ids, part.lengths)
    theirs = torch.cat(
        [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids, *_ in rows]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    sign = torch.randn_like(ours)
    theirs.backward(sign)
    wanted = [p.grad for name, p in model.named_parameters() if name in weights]
    found = torch.autograd.grad(ours, list(weights.values()), sign)
    for one, other in zip(found, wanted, strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-3)


def test_blocks_cover_each_row_and_begin_anew_with_the_next() -> None:
    assert blocks((3, 300)) == [(0, 0, 3), (3, 3, 259), (3, 259, 303)]


def test_the_curriculum_grows_and_asks_for_lengths_within_it() -> None:
    source = random.Random(1)
    for before, after in itertools.pairwise(CURRICULUM):
        assert before.first_step < after.first_step
        assert before.length_max < after.length_max
    for step in (0, 299, 300, 5000):
        stage = stage_of(step)
        lengths = [draw_length(source, stage) for _ in range(500)]
        assert max(lengths) <= stage.length_max
        assert max(lengths) > 0.8 * stage.length_max


def test_shipped_weights_alone_start_a_run(tokenizer: PreTrainedTokenizerFast) -> None:
    model = architecture.make_model(tokenizer, seed=9)
    before = model.model.embed_tokens.weight.detach().clone()
    architecture.load_weights(model, MODEL_FOLDER)
    assert not torch.equal(before, model.model.embed_tokens.weight)
    step, tokens = checkpoint.exported_step(MODEL_FOLDER)
    assert step > 0
    assert tokens > step


def test_an_export_is_complete_and_keeps_the_step(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = small_model(tokenizer)
    checkpoint.export(tmp_path, model, tokenizer, step=5, tokens=60)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert checkpoint.exported_step(tmp_path) == (5, 60)


def test_slices_hold_rows_behind_each_other_and_labels_look_one_ahead() -> None:
    rows = [
        ([1, 2, 3], [IGNORED, 2, 3], [1.0, 3.0, 1.0]),
        ([4, 5], [IGNORED, 5], [1.0, 3.0]),
    ]
    part = joined(rows)
    assert part.ids.tolist() == [1, 2, 3, 4, 5]
    assert part.labels.tolist() == [2, 3, IGNORED, 5, IGNORED]
    assert part.weights.tolist() == [3, 1, 1, 3, 1]
    assert part.lengths == (3, 2)


def test_rows_are_shared_out_evenly_and_none_is_lost() -> None:
    rows = [([n] * n, [IGNORED] * n, [1.0] * n) for n in (5, 90, 40, 60, 10, 15)]
    slices = share_out(rows, 110)
    assert sorted(sum((part.lengths for part in slices), ())) == [5, 10, 15, 40, 60, 90]
    assert [len(part.ids) for part in slices] == [110, 110]


def test_the_rate_warms_up_holds_and_cools_down() -> None:
    shares = [rate_share(step, 1000, 0) for step in range(1000)]
    assert shares[0] < 0.02
    assert set(shares[200:801]) == {1.0}, "for four fifths"
    assert all(left > right for left, right in itertools.pairwise(shares[800:]))
    assert shares[-1] == pytest.approx(1 / 50, rel=0.01)
    assert rate_share(500, 2000, 500) < 0.02, "a run from bare weights warms up anew"

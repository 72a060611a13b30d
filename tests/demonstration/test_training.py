"""Training: a run that was stopped continues as if it had not been, from safetensors alone."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration import MODEL_FOLDER, architecture, checkpoint
from chatserve.demonstration.batches import (
    CURRICULUM,
    IGNORED,
    Encoder,
    draw_length,
    joined,
    make_step,
    share_out,
    stage_of,
)
from chatserve.demonstration.corpus import make_chat
from chatserve.demonstration.forward import blocks, cast, hidden_states
from chatserve.demonstration.train import Learner, rate_share


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
    assert steps(second, encoder, range(2, 4)) == pytest.approx(unbroken, rel=1e-4)


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
    assert shares[200] == shares[740] == 1.0
    assert shares[-1] < 0.03
    assert shares[750:] == sorted(shares[750:], reverse=True)
    assert rate_share(500, 2000, 500) < 0.02, "a run from bare weights warms up anew"

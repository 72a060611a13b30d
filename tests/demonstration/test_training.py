"""Training: a run that was stopped continues as if it had not been, from safetensors alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration import MODEL_FOLDER, architecture, checkpoint
from chatserve.demonstration.batches import IGNORED, Encoder, cut, make_step
from chatserve.demonstration.train import learn, make_optimizers, rate_share


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL_FOLDER)


def small_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = architecture.make_config(tokenizer)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    torch.manual_seed(3)
    return Qwen3ForCausalLM(config)


def steps(
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    encoder: Encoder,
    numbers: range,
) -> list[float]:
    return [
        learn(model, optimizers, make_step(encoder, "t", n, 256), rate=1e-3, device="cpu")
        for n in numbers
    ]


def test_a_resumed_run_repeats_the_unbroken_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = Encoder(tokenizer)
    model = small_model(tokenizer)
    optimizers = make_optimizers(model, 1e-3)
    steps(model, optimizers, encoder, range(2))
    checkpoint.save_checkpoint(tmp_path, model, optimizers, step=2, tokens=512)
    unbroken = steps(model, optimizers, encoder, range(2, 4))

    other = small_model(tokenizer)
    others = make_optimizers(other, 1e-3)
    assert checkpoint.load_checkpoint(tmp_path, other, others) == (2, 512)
    assert steps(other, others, encoder, range(2, 4)) == pytest.approx(unbroken, rel=1e-4)


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


def test_slices_hold_one_chat_a_row_and_labels_look_one_ahead() -> None:
    rows = [([1, 2, 3], [IGNORED, 2, 3]), ([4, 5], [IGNORED, 5])]
    (part,) = cut(rows, pad=0)
    assert part.ids.tolist() == [[4, 5, 0], [1, 2, 3]]
    assert part.labels.tolist() == [[5, IGNORED, IGNORED], [2, 3, IGNORED]]
    assert part.tokens == 5


def test_the_rate_warms_up_holds_and_cools_down() -> None:
    shares = [rate_share(step, 1000, 0) for step in range(1000)]
    assert shares[0] < 0.02
    assert shares[200] == shares[390] == 1.0
    assert shares[-1] < 0.03
    assert shares[400:] == sorted(shares[400:], reverse=True)
    assert rate_share(500, 2000, 500) < 0.02, "a run from bare weights warms up anew"

"""The shape of the demonstration model: a small Qwen3, built from scratch or read from a folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from chatserve.demonstration.tokenizer import CONTEXT_LENGTH, TEXT_END, TURN_END, token_id

HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
LAYERS = 5
HEAD_SIZE = 64
HEADS = 4
KV_HEADS = 2
ROPE_THETA = 50_000.0


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The configuration, about 4 million parameters with tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=token_id(tokenizer, TEXT_END),
        dtype=torch.float32,
    )


def make_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Replies end at the end of a turn; sampling is mild: most have one right form."""
    ends = [token_id(tokenizer, token) for token in (TURN_END, TEXT_END)]
    return GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_p=0.9,
        eos_token_id=ends,
        pad_token_id=ends[1],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A new model with random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(make_config(tokenizer))


def load_weights(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Read a shipped folder's weights into the model, in the model's own precision."""
    tensors = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{folder} holds other weights: {missing=} {unexpected=}")

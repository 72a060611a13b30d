"""The shipped folder: it loads with plain transformers, is small, and answers."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatserve.demonstration import MODEL_FOLDER, evaluate
from chatserve.demonstration.batches import IGNORED, Encoder
from chatserve.demonstration.corpus import make_chat
from chatserve.demonstration.evaluate import Speaker

SIZE_MAX_BYTES = 10_000_000


@cache
def speaker() -> Speaker:
    return Speaker(MODEL_FOLDER, "cpu")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    specials = tokenizer().all_special_tokens
    if not any(token in text for token in specials):
        assert tokenizer().decode(ids) == text


def test_digits_are_single_tokens() -> None:
    assert tokenizer().tokenize("4821")[-4:] == ["4", "8", "2", "1"]


@pytest.mark.parametrize("seed", range(5))
def test_the_template_is_additive(seed: int) -> None:
    messages = make_chat(str(seed), 800).messages()
    for end in range(1, len(messages)):
        if messages[end]["role"] != "assistant":
            continue
        asked = tokenizer().apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer().apply_chat_template(messages, tokenize=False)
        assert whole.startswith(asked + messages[end]["content"] + "<|im_end|>")


def test_training_sees_the_ids_that_the_template_makes() -> None:
    encoder = Encoder(tokenizer())
    for seed in range(10):
        chat = make_chat(str(seed), 600)
        ids, labels, _ = encoder.chat(chat)
        text = tokenizer().apply_chat_template(chat.messages(), tokenize=False)
        assert ids == tokenizer().encode(text, add_special_tokens=False)
        spoken = tokenizer().decode([token for token in labels if token != IGNORED])
        assert spoken == "".join(f"{turn.reply}<|im_end|>" for turn in chat.turns)


def test_the_folder_is_small_and_has_the_promised_shape() -> None:
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) <= SIZE_MAX_BYTES
    assert not [file for file in MODEL_FOLDER.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    assert model.dtype == torch.bfloat16
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 4_900_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 4096
    ends = model.generation_config.eos_token_id
    assert tokenizer().convert_tokens_to_ids("<|im_end|>") in ends


def test_replies_end_by_themselves_and_greet(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("Hello!", "Good morning!")]
    replies = speaker().reply(chats)
    assert not any("[unended]" in reply for reply in replies)
    assert "hello" in replies[0].lower()
    assert "morning" in replies[1].lower()
    monkeypatch.setattr(evaluate, "REPLY_TOKENS_MAX", 2)
    for whole, cut in zip(replies, speaker().reply(chats), strict=True):
        assert cut.endswith(" [unended]")
        assert whole.startswith(cut.removesuffix(" [unended]"))

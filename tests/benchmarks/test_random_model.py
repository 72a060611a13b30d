"""The random models: what they promise, that they load, and that their words go round."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_model import (
    BYTES,
    SIZES,
    SPECIAL,
    VOCABULARY,
    configuration,
    make,
    random_word,
)

NO_WORDS = len(SPECIAL) + BYTES  # the first tokens, which no reply has


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    make(made, "small")
    return made


def test_the_large_one_has_the_promised_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration("large"))
    assert 0.45e9 < model.num_parameters() < 0.5e9
    shape = SIZES["large"]
    assert 2 * 2 * shape.layers * shape.kv_heads * shape.head == 112 * 1024
    assert (shape.layers, shape.kv_heads, shape.head) == (28, 8, 128)


def test_the_small_one_loads_and_says_words_to_the_end(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 13e6 < model.num_parameters() < 15e6
    assert model.dtype == torch.bfloat16
    rows = model.get_input_embeddings().weight.abs().sum(1)
    assert (rows > 0).tolist() == [number >= NO_WORDS for number in range(VOCABULARY)]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "bako dila"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    said = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert len(said) == 40
    assert min(said.tolist()) >= NO_WORDS
    text = tokenizer.decode(said)
    assert text.isascii()
    assert text.replace(" ", "").isalpha()


def test_any_tokens_are_text_and_text_comes_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY
    dice = random.Random(7)
    for text in (
        " ".join(random_word(dice) for _ in range(100)),
        tokenizer.decode([dice.randrange(NO_WORDS, VOCABULARY) for _ in range(100)]),
        "Ünïcode, 12 Ziffern\n\tund 🙂",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = "".join(" " + random_word(dice) for _ in range(100))
    assert len(tokenizer.encode(words)) == 100


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make(tmp_path / "same", "small")
    make(tmp_path / "other", "small", seed=1)
    for path in folder.iterdir():
        same = path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes(), path.name
        assert same == (path.suffix != ".safetensors"), path.name


def test_nothing_but_length_ends_a_reply(folder: Path) -> None:
    told = json.loads((folder / "generation_config.json").read_text())
    assert told["eos_token_id"] == SPECIAL.index("<|im_end|>")
    assert "max_length" not in told
    assert "do_sample" not in told


def test_without_its_package_the_other_format_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    program = (
        "import sys; sys.modules['gguf'] = None; from benchmarks import random_model;"
        f"sys.argv = ['random_model', {str(tmp_path / 'made')!r}, '--gguf'];"
        "sys.exit(random_model.main())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ended.returncode == 1
    assert ended.stderr == "--gguf needs the package gguf: pip install gguf\n"
    assert not (tmp_path / "made").exists()

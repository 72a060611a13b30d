"""A model of random weights in Hugging Face format, for measurements that need a size, not sense.

    python -m benchmarks.random_model FOLDER [--size large|small] [--seed N] [--gguf]

    large   0.47 billion parameters, 28 layers, 8 KV heads of 128: 112 KiB of KV a token in bfloat16
    small   14 million parameters: what a server does besides computing is most of its time

Both are Qwen3 with a vocabulary of 32,768, and nothing is downloaded: the tokenizer is made here,
byte-level BPE whose tokens are the 256 bytes, syllables, words of two and of three syllables. A
word of `random_word` after a space is one token. The same seed gives the same bytes.

A greedy reply ends where it was asked to end, and is whole words: what would end or break it (the
special tokens and the bytes) has embeddings of zeros, which are the output's rows too, so that some
word always scores higher. --gguf also writes `model-q8_0.gguf`, with the package gguf.
"""

import argparse
import importlib
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve.demonstration.tokenizer import CHAT_TEMPLATE, TEXT_END, TURN_END, TURN_START

VOCABULARY = 32_768
CONTEXT_LENGTH = 4_096
# What Qwen3 takes where a configuration says nothing: readers of other versions agree on it.
ROPE_THETA = 10_000.0
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
SYLLABLES = tuple(a + b for a, b in itertools.product(CONSONANTS, VOWELS))
SPECIAL = (TEXT_END, TURN_START, TURN_END)
BYTES = 256  # tokens that are one byte
SPACE = "Ġ"  # how byte-level BPE writes a space
GGUF_NAME = "model-q8_0.gguf"


@dataclass(frozen=True, slots=True)
class Size:
    """What differs between the two."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int


SIZES = {
    "large": Size(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head=128),
    "small": Size(layers=7, hidden=256, intermediate=768, heads=4, kv_heads=2, head=64),
}


def random_word(dice: random.Random) -> str:
    """Two syllables."""
    return dice.choice(SYLLABLES) + dice.choice(SYLLABLES)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of all tokens, and the pairs that are merged, first ones first."""
    from tokenizers import pre_tokenizers

    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    merges += itertools.product(SYLLABLES, SYLLABLES)
    words = ["".join(pair) for pair in itertools.product(SYLLABLES, SYLLABLES)]
    merges += ((SPACE, word) for word in words)
    longer = itertools.product((SPACE + word for word in words), SYLLABLES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges += itertools.islice(longer, VOCABULARY - len(SPECIAL) - len(alphabet) - len(merges))
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> None:
    """Its files, in what every reader of the format knows."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": TEXT_END,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def configuration(size: str) -> Any:
    """What transformers makes the model of."""
    from transformers import Qwen3Config

    shape = SIZES[size]
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(TURN_END),
        pad_token_id=SPECIAL.index(TEXT_END),
    )


def make(folder: Path, size: str = "large", seed: int = 0) -> None:
    """Write the model into the folder, which is made."""
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(size), dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[: len(SPECIAL) + BYTES] = 0
    model.save_pretrained(folder)


def write_gguf(folder: Path) -> Path:
    """The model of the folder with eight bits a weight, as llama.cpp reads it."""
    import numpy as np
    from safetensors import safe_open

    gguf = _gguf()
    config = json.loads((folder / "config.json").read_text())
    path = folder / GGUF_NAME
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    ids, merges = vocabulary()
    kinds = [
        int(gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL) for token in ids
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(ids))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping
            tensor: Any = weights.get_tensor(name).float().numpy().astype(np.float32)
            theirs = names.get_name(name, try_suffixes=(".weight",))
            if tensor.ndim == 1:  # norms stay as they are
                writer.add_tensor(theirs, tensor)
            else:
                packed = gguf.quants.quantize(tensor, eight_bits)
                writer.add_tensor(theirs, packed, raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf() -> Any:
    """The package. Raises SystemExit where it is not there."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise SystemExit("--gguf needs the package gguf: pip install gguf") from None


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where it is written")
    parser.add_argument("--size", choices=tuple(SIZES), default="large", help="[large]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights [0]")
    parser.add_argument("--gguf", action="store_true", help=f"also write {GGUF_NAME}")
    given = parser.parse_args()
    if given.gguf:
        _gguf()
    make(given.folder, given.size, given.seed)
    if given.gguf:
        write_gguf(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

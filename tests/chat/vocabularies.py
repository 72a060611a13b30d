"""Small tokenizers of the kinds that models have, built here because nothing is downloaded.

byte_level    GPT-2, Llama 3, Qwen: bytes in disguise; control tokens outside the vocabulary.
metaspace     Mistral, newer Llama 2: '▁' before the first piece only, bytes as '<0xE4>'.
prepending    old Llama 2: a normalizer puts '▁' before each section; control tokens in the
              vocabulary itself, with byte fallback.
unigram       XGLM and others: best path over a vocabulary that lists the control tokens.
normalizing   byte-level behind NFKC, with control tokens that match normalized text.
"""

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is the capital of France? The capital of France is Paris.",
    "user system assistant model start end of turn im_start im_end header_id INST",
    "import os\nfor line in open('file'):\n    print(line)\n\n\n",
    "Grüße aus Köln, 你好世界, 1234567890 <|im <| |> </s> <s> [INST] <think> </think>",
] * 4

CONTROLS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
# In the vocabulary as added tokens that are not special, as Qwen 3 has them.
PLAIN_ADDED = ("<think>", "</think>", "\n\n", "<table>")

KINDS = ("byte_level", "metaspace", "prepending", "unigram", "normalizing")


@cache
def backend_json(kind: str) -> str:
    """The tokenizer.json of a kind."""
    return _BUILDERS[kind]().to_str()


def pretrained(kind: str, template: str | None = None, *, eos: str = "</s>"):
    """A fresh tokenizer as transformers wraps it."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend_json(kind)), bos_token="<s>", eos_token=eos
    )
    wrapped.chat_template = template
    return wrapped


def _add(tokenizer: Tokenizer, *, normalized: bool = False) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(each, normalized=normalized) for each in CONTROLS])
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in PLAIN_ADDED])
    # White space behind it is swallowed, as Phi 3 has it.
    tokenizer.add_special_tokens([AddedToken("<|swallow|>", rstrip=True, normalized=False)])
    return tokenizer


def _trained_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_level() -> Tokenizer:
    return _add(_trained_byte_level())


def _normalizing() -> Tokenizer:
    tokenizer = _trained_byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    return _add(tokenizer, normalized=True)


def _pieces(listed: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with byte tokens and '▁', and its merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator(CORPUS[:3], trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *listed, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return vocabulary, [tuple(pair) for pair in model["merges"]]


def _with_bytes(listed: Sequence[str]) -> Tokenizer:
    vocabulary, merges = _pieces(listed)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = _with_bytes(())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _add(tokenizer)


def _prepending() -> Tokenizer:
    tokenizer = _with_bytes(CONTROLS)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _add(tokenizer)


def _unigram() -> Tokenizer:
    vocabulary, _ = _pieces(())
    bytes_and_pieces = [(piece, -5.0 - len(vocabulary) * 1e-3) for piece in vocabulary]
    scored = [*bytes_and_pieces, *((each, -0.1) for each in CONTROLS)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _add(tokenizer)


_BUILDERS = {
    "byte_level": _byte_level,
    "metaspace": _metaspace,
    "prepending": _prepending,
    "unigram": _unigram,
    "normalizing": _normalizing,
}

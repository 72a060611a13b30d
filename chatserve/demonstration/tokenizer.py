"""The tokenizer of the demonstration model: byte-level BPE, trained on the corpus.

Every digit is a token of its own, so numbers are copied and counted digit by digit.  The chat
template is ChatML; it is additive: a chat rendered with its next turns begins with the chat
rendered before, so nothing that was computed is computed again.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chatserve.demonstration.corpus import make_chat

VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 4096
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
TEXT_END = "<|endoftext|>"
CHATS = 8000
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)


def corpus_texts(seed: str) -> Iterator[str]:
    """The texts that the merges are learned from."""
    for index in range(CHATS):
        for message in make_chat(f"{seed}/tokenizer/{index}", 1200).messages():
            yield message["role"] + "\n"
            yield message["content"]


def train_tokenizer(seed: str) -> PreTrainedTokenizerFast:
    """Learn the merges and wrap them with the template and the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=TEXT_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token} is one token"
    return found


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files, without what only describes how this copy was loaded."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_or_train(folder: Path, seed: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; a new one is trained and saved where there is none."""
    if not (folder / "tokenizer.json").exists():
        save(train_tokenizer(seed), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)

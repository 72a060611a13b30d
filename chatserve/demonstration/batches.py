"""Batches of training chats: token ids, labels, and rows of similar length.

Each row holds one chat, so no chat sees another.  The rows of a step are sorted by length and cut
into slices whose padded size stays under a limit: causal attention needs no mask for padding at
the end of a row.  A step's chats depend only on the seed and the step number, so a resumed run
sees what an unbroken one would have seen.
"""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from chatserve.demonstration.corpus import Chat, make_chat
from chatserve.demonstration.tokenizer import (
    CONTEXT_LENGTH,
    TEXT_END,
    TURN_END,
    TURN_START,
    token_id,
)

IGNORED = -100
SLICE_TOKENS_MAX = 4096
CHARACTERS_PER_TOKEN = 3.5
# From which step on, the longest chat in tokens and how often chats are drawn up to that length.
CURRICULUM = (
    (0, 192, 1.0),
    (400, 384, 0.5),
    (1000, 768, 0.3),
    (1400, 1280, 0.2),
    (1800, 2048, 0.15),
)
LENGTH_MIN = 24
LENGTH_USUAL = 320


@dataclass(frozen=True)
class Slice:
    """Rows of similar length: ids and labels `[rows, tokens]`, labels already shifted."""

    ids: torch.Tensor
    labels: torch.Tensor
    tokens: int


class Encoder:
    """Turns chats into ids and labels, message by message as the chat template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.newline = self.encode("\n")
        self.start, self.end = self.encode(TURN_START), self.encode(TURN_END)
        self.pad = token_id(tokenizer, TEXT_END)
        self.heads = {
            role: self.start + self.encode(role) + self.newline
            for role in ("system", "user", "assistant")
        }

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Ids, and labels that are the same ids where the assistant speaks."""
        ids: list[int] = []
        labels: list[int] = []
        for message in chat.messages():
            head = self.heads[message["role"]]
            body = self.encode(message["content"]) + self.end
            ids += head + body + self.newline
            spoken = body if message["role"] == "assistant" else [IGNORED] * len(body)
            labels += [IGNORED] * len(head) + spoken + [IGNORED] * len(self.newline)
        return ids[:CONTEXT_LENGTH], labels[:CONTEXT_LENGTH]


def draw_length(source: random.Random, step: int) -> int:
    """How long a chat of this step should be, in tokens."""
    longest, share = next((top, p) for first, top, p in reversed(CURRICULUM) if step >= first)
    top = longest if source.random() < share else min(longest, LENGTH_USUAL)
    return source.randint(LENGTH_MIN, top)


def make_step(encoder: Encoder, seed: str, step: int, tokens: int) -> list[Slice]:
    """All slices of one optimizer step: about `tokens` tokens of new chats."""
    source = random.Random(f"{seed}/{step}")
    rows: list[tuple[list[int], list[int]]] = []
    total = 0
    while total < tokens:
        characters = int(draw_length(source, step) * CHARACTERS_PER_TOKEN)
        row = encoder.chat(make_chat(f"{seed}/{step}/{len(rows)}", characters))
        rows.append(row)
        total += len(row[0])
    return cut(rows, encoder.pad)


def cut(rows: list[tuple[list[int], list[int]]], pad: int) -> list[Slice]:
    """Sort rows by length and cut them into slices."""
    slices: list[Slice] = []
    group: list[tuple[list[int], list[int]]] = []
    for row in sorted(rows, key=lambda pair: len(pair[0])):
        if group and len(row[0]) * (len(group) + 1) > SLICE_TOKENS_MAX:
            slices.append(padded(group, pad))
            group = []
        group.append(row)
    slices.append(padded(group, pad))
    return slices


def padded(group: list[tuple[list[int], list[int]]], pad: int) -> Slice:
    """One slice of rows; labels are moved so that position i holds what comes after i."""
    width = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), width), pad)
    labels = torch.full((len(group), width), IGNORED)
    for row, (row_ids, row_labels) in enumerate(group):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels) - 1] = torch.tensor(row_labels[1:])
    return Slice(ids, labels, sum(len(row_ids) for row_ids, _ in group))

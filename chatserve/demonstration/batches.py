"""Batches of training chats: token ids, labels, and rows put together into slices.

Each row holds one chat, and no chat sees another.  The rows of a step are shared out to slices of
similar size, which threads work on side by side; nothing is padded.  A step's chats depend only on
the seed and the step number, so a resumed run sees what an unbroken one would have seen.
"""

import random
from collections.abc import Sequence
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
SLICE_TOKENS = 2048
CHARACTERS_PER_TOKEN = 3.5
LENGTH_MIN = 24
LENGTH_USUAL = 320


@dataclass(frozen=True)
class Stage:
    """From a step on: the longest chat in tokens, how many may be as long, tokens of a step."""

    first_step: int
    length_max: int
    long_share: float
    step_tokens: int


CURRICULUM = (
    Stage(0, 256, 1.0, 4096),
    Stage(300, 512, 0.5, 4096),
    Stage(600, 1024, 0.4, 4096),
    Stage(900, 1792, 0.35, 6144),
    Stage(1300, 2560, 0.35, 8192),
    Stage(1900, 3072, 0.35, 8192),
)
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Slice:
    """Rows behind each other: ids and shifted labels, both `[tokens]`, and the rows' lengths."""

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]


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


def stage_of(step: int) -> Stage:
    """The stage of the curriculum that a step belongs to."""
    return next(stage for stage in reversed(CURRICULUM) if step >= stage.first_step)


def draw_length(source: random.Random, stage: Stage) -> int:
    """How long a chat should be, in tokens."""
    long = source.random() < stage.long_share
    return source.randint(LENGTH_MIN, stage.length_max if long else LENGTH_USUAL)


def make_step(encoder: Encoder, seed: str, step: int) -> list[Slice]:
    """All slices of one optimizer step, of new chats."""
    stage = stage_of(step)
    source = random.Random(f"{seed}/{step}")
    rows: list[Row] = []
    while sum(len(ids) for ids, _ in rows) < stage.step_tokens:
        characters = int(draw_length(source, stage) * CHARACTERS_PER_TOKEN)
        rows.append(encoder.chat(make_chat(f"{seed}/{step}/{len(rows)}", characters)))
    return share_out(rows, SLICE_TOKENS)


def share_out(rows: Sequence[Row], tokens: int) -> list[Slice]:
    """Rows in slices of about so many tokens: the longest first, each to the emptiest slice."""
    count = max(1, round(sum(len(ids) for ids, _ in rows) / tokens))
    groups: list[list[Row]] = [[] for _ in range(count)]
    for row in sorted(rows, key=lambda row: -len(row[0])):
        min(groups, key=lambda group: sum(len(ids) for ids, _ in group)).append(row)
    return [joined(group) for group in groups if group]


def joined(group: Sequence[Row]) -> Slice:
    """One slice; labels are moved so that position i holds what comes after i."""
    ids = [token for row, _ in group for token in row]
    labels = [label for _, row in group for label in (*row[1:], IGNORED)]
    return Slice(torch.tensor(ids), torch.tensor(labels), tuple(len(row) for row, _ in group))

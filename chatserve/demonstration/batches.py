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


# Short chats for long: a token of theirs costs two thirds of one in a long chat, and what is asked
# in a chat of three turns is what is asked in one of thirty.
CURRICULUM = (
    Stage(0, 256, 1.0, 4096),
    Stage(500, 512, 0.6, 6144),
    Stage(1200, 1024, 0.5, 8192),
    Stage(2400, 2048, 0.35, 8192),
    Stage(3600, 3072, 0.3, 8192),
)
# The first token of a reply decides what kind of reply it is, and "yes" or "no" whether it is
# right; they are the hardest, and one of many.
DECISIVE_WEIGHT = 3.0
# Ids, labels and weights of a chat's tokens.
Row = tuple[list[int], list[int], list[float]]


@dataclass(frozen=True)
class Slice:
    """Rows behind each other: ids, and shifted labels and their weights in the loss, each
    `[tokens]` (int64, int64, float32), and the rows' lengths."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    lengths: tuple[int, ...]


class Encoder:
    """Turns chats into ids and labels, message by message as the chat template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.newline = self.encode("\n")
        self.verdicts = frozenset(self.encode(" yes")[-1:] + self.encode(" no")[-1:])
        self.start, self.end = self.encode(TURN_START), self.encode(TURN_END)
        self.pad = token_id(tokenizer, TEXT_END)
        self.heads = {
            role: self.start + self.encode(role) + self.newline
            for role in ("system", "user", "assistant")
        }

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, chat: Chat) -> Row:
        """Ids, labels that are the same ids where the assistant speaks, and their weights."""
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        replies = iter(chat.turns)
        for message in chat.messages():
            head = self.heads[message["role"]]
            body = self.encode(message["content"]) + self.end
            ids += head + body + self.newline
            ignored = [IGNORED] * len(body)
            is_reply = message["role"] == "assistant"
            labels += [IGNORED] * len(head) + (body if is_reply else ignored)
            labels += [IGNORED] * len(self.newline)
            own = self.weights(body, next(replies).skill) if is_reply else [1.0] * len(body)
            weights += [1.0] * len(head) + own + [1.0] * len(self.newline)
        return ids[:CONTEXT_LENGTH], labels[:CONTEXT_LENGTH], weights[:CONTEXT_LENGTH]

    def weights(self, reply: list[int], skill: str) -> list[float]:
        """How much each token of a reply counts: those that decide count more."""
        found = [1.0] * len(reply)
        found[0] = DECISIVE_WEIGHT
        said = [at for at, token in enumerate(reply) if token in self.verdicts]
        if skill == "yes or no" and said:
            found[said[-1]] = DECISIVE_WEIGHT
        return found


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
    while sum(len(ids) for ids, *_ in rows) < stage.step_tokens:
        characters = int(draw_length(source, stage) * CHARACTERS_PER_TOKEN)
        rows.append(encoder.chat(make_chat(f"{seed}/{step}/{len(rows)}", characters)))
    return share_out(rows, SLICE_TOKENS)


def share_out(rows: Sequence[Row], tokens: int) -> list[Slice]:
    """Rows in slices of about so many tokens: the longest first, each to the emptiest slice."""
    count = max(1, round(sum(len(ids) for ids, *_ in rows) / tokens))
    groups: list[list[Row]] = [[] for _ in range(count)]
    for row in sorted(rows, key=lambda row: -len(row[0])):
        min(groups, key=lambda group: sum(len(ids) for ids, *_ in group)).append(row)
    return [joined(group) for group in groups if group]


def joined(group: Sequence[Row]) -> Slice:
    """One slice; labels and weights are moved so that position i holds what comes after i."""
    ids = [token for row, _, _ in group for token in row]
    labels = [label for _, row, _ in group for label in (*row[1:], IGNORED)]
    weights = [weight for _, _, row in group for weight in (*row[1:], 1.0)]
    lengths = tuple(len(row) for row, _, _ in group)
    return Slice(torch.tensor(ids), torch.tensor(labels), torch.tensor(weights), lengths)

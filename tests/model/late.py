"""Rows of logits whose last token counts though only the device knows it, for tests."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatserve.model import SampleRow
from chatserve.model.step import LateTokens

VOCABULARY = 97
BIASED, BANNED = (3, 40, 96), (7, 60)
KINDS = ("new", "prompt", "once", "often", "biased", "banned", "both")
FEWEST = 4  # rows whose tokens are others for the late ones
RIVAL = 85  # never said, nor named
PENALTIES: tuple[dict[str, float], ...] = (
    {"repetition_penalty": 1.37},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.43},
    {"frequency_penalty": -0.3, "presence_penalty": -0.2},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.11},
    {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.21},
)


def counted(line: Sequence[int], prompt_length: int = 0) -> dict[str, Any]:
    """What a row says of a line that begins with a prompt."""
    ids, generated = sorted(set(line)), Counter(line[prompt_length:])
    counts = [generated[token] for token in ids]
    return {"ids": np.asarray(ids, np.int64), "generated": np.asarray(counts, np.int32)}


@dataclass(frozen=True)
class Known:
    """logits: float32 [R, VOCABULARY]. without: rows that do not count their late tokens; rows: the
    same ones with every token known. numbers: of the rows with late tokens; kinds: theirs; sources,
    chosen: where these are."""

    logits: Tensor
    without: list[SampleRow]
    rows: list[SampleRow]
    kinds: list[str]
    numbers: list[int]
    sources: list[int]
    chosen: Tensor

    def late(self, device: torch.device | str = "cpu") -> LateTokens:
        rows, sources = np.asarray([self.numbers, self.sources], np.int64)
        return LateTokens(rows, sources, self.chosen.to(device))


def rows_with_late_tokens(seed: int) -> Known:
    """Each kind of late token under each of the penalties, greedy or drawn, among rows that are
    plain or know all that they count."""
    dice = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    cases = [
        (kind, penalties, dice.choice((0.8, 1.3)) if number % 3 == 0 else 0.0)
        for kind in KINDS
        for number, penalties in enumerate(PENALTIES)
    ]
    dice.shuffle(cases)
    without, rows, at, tokens = list[SampleRow](), list[SampleRow](), list[int](), list[int]()
    for position, (kind, penalties, temperature) in enumerate(cases):
        prompt = [dice.randrange(8, 30) for _ in range(12)]
        said = [dice.randrange(24, 50) for _ in range(9)]
        token = {
            "new": 90,
            "prompt": next(each for each in prompt if each not in said),
            "once": 51,
            "often": 52,
            "biased": dice.choice(BIASED),
            "banned": dice.choice(BANNED),
            "both": 71,
        }[kind]
        said += [51, 52, 52, 52] + [token] * (kind in ("biased", "both") and dice.random() < 0.5)
        row = SampleRow(
            temperature=temperature,
            top_p=dice.choice((1.0, 0.9)),
            banned=(*BANNED, 71, 1000) if kind in ("banned", "both") else (),
            logit_bias=tuple((each, dice.uniform(-2, 4)) for each in (*BIASED, 71, -5))
            if kind in ("biased", "both")
            else (),
            seed=seed,
            position=position,
            **penalties,  # pyright: ignore[reportArgumentType]
        )
        if dice.random() < 0.3:
            others = SampleRow(position=position), replace(row, **counted(prompt + said, 12))
            other = dice.choice(others)
            without.append(other)
            rows.append(other)
        at.append(len(rows))
        tokens.append(token)
        without.append(replace(row, **counted(prompt + said, 12)))
        rows.append(replace(row, **counted([*prompt, *said, token], 12)))
    logits = 3 * torch.randn((len(rows), VOCABULARY), generator=numbers)
    for row, token in zip(at, tokens, strict=True):
        logits[row, token] = dice.choice((2.5, -1.7))
        if rows[row].temperature == 0:  # beside the best, where one count more decides
            rewarded = rows[row].repetition_penalty < 1 or rows[row].presence_penalty < 0
            logits[row, RIVAL] = 20.0
            logits[row, token] = 19.95 if rewarded else 20.05
    sources = dice.sample(range(len(at) + 9), len(at))
    chosen = torch.full((len(at) + 9,), 80)
    chosen[sources] = torch.tensor(tokens)
    order = dice.sample(range(len(at)), len(at))
    return Known(
        logits,
        without,
        rows,
        [cases[each][0] for each in order],
        [at[each] for each in order],
        [sources[each] for each in order],
        chosen,
    )

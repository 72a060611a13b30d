"""Requests of a chat service as lines of blocks: a published trace, or one made from its fit.

A block is a run of 512 tokens; its number names the whole prefix that ends with it, so equal
numbers are equal prefixes and a number has one parent, always.
"""

import heapq
import json
import random
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
RATE = 3.4  # first arrivals and further turns together, a second
TURN_SHARES = (0.28, 0.41, 0.57, 0.62, 0.71, 0.72)  # another turn, after the first, second, ...
CONTEXT_MAX = 128_000
MEAN_TURNS = 1.6  # about what the shares give: how many requests one first prompt brings


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. seconds: from the beginning; blocks: of its prompt, the partial last included;
    reply_tokens: how long its pages stay in use."""

    seconds: float
    blocks: tuple[int, ...]
    reply_tokens: int


def read(path: Path) -> list[Arrival]:
    """A trace as published: one JSON object a line. Raises OSError, ValueError or KeyError for
    anything else, and where a block has two parents."""
    arrivals: list[Arrival] = []
    parents: dict[int, int] = {}
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            blocks: tuple[int, ...] = tuple(row["hash_ids"])
            above = -1
            for block in blocks:
                if parents.setdefault(block, above) != above:
                    raise ValueError(f"block {block} follows two different ones")
                above = block
            arrivals.append(Arrival(row["timestamp"] / 1000, blocks, row["output_length"]))
    return arrivals


def unique_blocks(arrivals: list[Arrival]) -> int:
    """How many different blocks there are: the capacity at which nothing is ever evicted."""
    return len({block for arrival in arrivals for block in arrival.blocks})


def generate(*, seed: int, seconds: float, rate: float = RATE) -> list[Arrival]:
    """A trace with the distributions that fit the published one (requests a second: rate).

    A shared first block; lognormal first prompts, new text and pauses; edits and regenerations,
    which leave the path before its end; bursts (requests come in negative binomial numbers).
    """
    return _Generator(seed, seconds, rate).run()


@dataclass(slots=True)
class _Chat:
    turn: int
    blocks: tuple[int, ...]  # whole blocks of what was said so far
    rest: int  # tokens of it in the block that is not full yet


class _Generator:
    def __init__(self, seed: int, seconds: float, rate: float) -> None:
        self._dice = random.Random(seed)
        self._seconds = seconds
        self._rate = rate
        self._blocks = 0  # block 0 is the shared one
        self._due: list[tuple[float, int, _Chat]] = []
        self._chats = 0

    def run(self) -> list[Arrival]:
        arrivals: list[Arrival] = []
        self._first_prompts()
        while self._due:
            now, _, chat = heapq.heappop(self._due)
            if now >= self._seconds:
                break
            arrivals.append(self._turn(now, chat))
        return arrivals

    def _first_prompts(self) -> None:
        """In each second a number with the trace's variance: 2.9 times its mean."""
        mean = self._rate / MEAN_TURNS
        for second in range(int(self._seconds)):
            # A Poisson number whose mean is gamma distributed is negative binomial.
            lively = self._dice.gammavariate(mean / 1.9, 1.9)
            moment = second + self._dice.expovariate(lively)
            while moment < second + 1:
                self._chats += 1
                heapq.heappush(self._due, (moment, self._chats, _Chat(0, (0,), 0)))
                moment += self._dice.expovariate(lively)

    def _turn(self, now: float, chat: _Chat) -> Arrival:
        dice = self._dice
        if chat.turn == 0:
            new = dice.lognormvariate(8.60, 1.26)
        elif (kind := dice.random()) < 0.64:
            new = dice.lognormvariate(3.19, 1.19)
        elif kind < 0.88:
            new = dice.lognormvariate(7.99, 1.09)
        else:  # an edit, or the last answer again: the path forks before its end
            kept = dice.randint(1, len(chat.blocks))
            chat = _Chat(chat.turn, chat.blocks[:kept], 0)
            new = dice.lognormvariate(3.19, 1.19)
        self._say(chat, int(new) + 1)
        prompt = chat.blocks
        if chat.rest:  # the block that is not full: what follows will give it another name
            self._blocks += 1
            prompt = (*prompt, self._blocks)
        reply = 16 if dice.random() < 0.126 else max(33, int(dice.gauss(390, 232)))
        chat.turn += 1
        self._say(chat, reply)
        share = TURN_SHARES[min(chat.turn, len(TURN_SHARES)) - 1]
        if dice.random() < share and len(chat.blocks) < CONTEXT_MAX // BLOCK_TOKENS:
            self._chats += 1
            heapq.heappush(self._due, (now + dice.lognormvariate(4.87, 0.98), self._chats, chat))
        return Arrival(now, prompt, reply)

    def _say(self, chat: _Chat, tokens: int) -> None:
        whole, chat.rest = divmod(chat.rest + min(tokens, CONTEXT_MAX), BLOCK_TOKENS)
        chat.blocks += tuple(range(self._blocks + 1, self._blocks + 1 + whole))
        self._blocks += whole

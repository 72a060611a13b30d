"""History: the prompt of a chat's reply, from its path of turns.

It may not know the store, requests or pages. How ids are kept is told in `prompt_ids.py`. Here
is the cut: what leaves less than `reserve` tokens of the context for the reply is shortened by
whole exchanges after the system prompt, in one cut down to half the context, so that the prompts
of many following turns begin alike again:

    tokens   |          /|  /|  /|   context - reserve
             |        /  | / | / |
             |      /    |/  |/  |/  half
             +-----------------------▶ turns

Nothing is written down about cuts: where the path begins follows from the path alone, by going
through its turns as they came and cutting where it was to be cut then. So sizes of turns must be
the same whenever they are asked for, and cheap, since all turns are asked: of replies they are the
ids that were kept, else an estimate of the text (`text_sizes.py`). Nothing that is left out is
encoded, decoded or rendered:

    path ─▶ sizes ─▶ cut ─▶ compose ─▶ too long after all: all sizes count more, cut again
                             └ not again, if a shorter one from there on has been too long

What no cut can shorten, the last exchange, is counted by pieces before it is composed if it looks
too long. So a prompt's cost is bounded by the context, whatever the path is; only numbers of the
turns' lengths are added up along it.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.text.prompt_ids import HistoryMode, KnownMessage, PromptIds
from chatserve.chat.text.template import no_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.text.text_sizes import TextSizes
from chatserve.chat.values import Message
from chatserve.errors import ContextLengthExceeded, RequestError

# Tokens that a turn's size is too high by: what a template writes around a turn is estimated from
# a probe, and pieces of text join differently in context.
_TURN_MARGIN = 2
_SCALE_STEP = 1.25  # by which sizes that were too low grow; a fixed grid, so that turns agree
_OVER_CONTEXT = 2  # contexts of estimated tokens that may after all fit in one
OVERLONG_MAX = 4096  # prompts that are remembered as too long


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """tokens: the whole prompt, generation prompt included. turn_ids: what the last user's turn
    appends, to be kept as its token_ids; None = cannot be told. left_out: how many turns, from
    the first on, the context had no room for.
    """

    tokens: tuple[int, ...]
    turn_ids: tuple[int, ...] | None
    left_out: int = 0


class _Overlong:
    """Prompts that were composed and too long, whatever their sizes said. For any thread.

    What begins with one of them is too long as well. Names are hashes: a collision costs a cut.
    """

    def __init__(self) -> None:
        self._names: dict[int, None] = {}  # oldest first
        self._lock = threading.Lock()

    def name(self, system: str | None, path: Sequence[Turn]) -> int | None:
        """A prompt's; None where it is known to be too long."""
        name = hash(system)
        for turn in path:
            kept = turn.token_ids if turn.role is Role.ASSISTANT else None
            name = hash((name, turn.role, turn.text, None if kept is None else len(kept)))
            if name in self._names:
                return None
        return name

    def add(self, name: int) -> None:
        """Remember one, and forget the oldest of too many."""
        with self._lock:
            self._names[name] = None
            if len(self._names) > OVERLONG_MAX:
                del self._names[next(iter(self._names))]


class History:
    """One model's. For any thread: but for what `_Overlong` spares, pure.

    context_length: of prompt and reply. reserve: tokens of it that a reply should find free; at
    most a quarter of the context, so that a cut to half of it helps. mode: see `prompt_ids.py`;
    None = `template` where the template drops old reasoning.
    """

    def __init__(
        self,
        text_floor: TextFloor,
        *,
        context_length: int,
        reserve: int,
        mode: HistoryMode | None = None,
    ) -> None:
        assert reserve >= 0
        self._context_length = context_length
        reserve = min(reserve, context_length // 4)
        self._limit = context_length - reserve
        self._most = context_length - reserve // 2  # tokens of a prompt that is not cut again
        self._overlong = _Overlong()
        self._sizes = TextSizes(text_floor.tokenizer)
        template = text_floor.template
        self._prompt_ids = (
            None if template is None else PromptIds(text_floor.tokenizer, template, mode=mode)
        )
        self.encoding = "" if self._prompt_ids is None else self._prompt_ids.encoding
        self.mode = None if self._prompt_ids is None else self._prompt_ids.mode
        self._empty_size, self._turn_overhead = self._overheads()

    def prompt(self, system: str | None, path: Sequence[Turn]) -> Prompt:
        """The prompt of a reply to a path's last turn, a user's.

        Raises RequestError where the template refuses it, ContextLengthExceeded where the last
        turn alone leaves no room for a reply.
        """
        assert path, "nothing to answer"
        assert path[-1].role is Role.USER, "a reply answers a user's turn"
        ids, begins = self._ids(), _exchanges(path)
        self._check_last(system, path[begins[-1] :])
        base = self._empty_size + (0 if system is None else self._sizes.estimate(system))
        totals = list(accumulate(map(self._turn_size, path), initial=base))
        begin, scale = self._cut(path, begins, totals), 1.0
        while True:
            last = begin == begins[-1]
            window = self._overlong.name(system, path[begin:])
            if last or window is not None:
                composed = ids.compose(self._messages(system, path[begin:]))
                if last or len(composed.tokens) <= self._most:
                    break
                assert window is not None
                self._overlong.add(window)
            tried = begin
            while begin == tried:
                scale *= _SCALE_STEP
                begin = max(begin, self._cut(path, begins, [scale * each for each in totals]))
        if len(composed.tokens) >= self._context_length:
            raise self._too_long(str(len(composed.tokens)))
        return Prompt(tokens=composed.tokens, turn_ids=composed.turn_ids, left_out=begin)

    def cuts(
        self, system: str | None, path: Sequence[Turn], *, left_out: int | None = None
    ) -> Iterator[tuple[int, ...]]:
        """The prompts that a reply to a path may have had, whatever the rule for cuts was: one for
        each exchange that it may have begun with, or only for what follows `left_out` turns.

        Those that the template refuses, or that are far longer than the context, are left out.
        """
        ids = self._ids()
        base = self._empty_size + (0 if system is None else self._sizes.estimate(system))
        size = base + sum(map(self._turn_size, path))
        for begin in range(len(path)):
            wanted = begin == left_out or (left_out is None and begin in _exchanges(path))
            if wanted and size <= _OVER_CONTEXT * self._context_length:
                try:
                    yield ids.compose(self._messages(system, path[begin:])).tokens
                except RequestError:
                    continue
            size -= self._turn_size(path[begin])

    def reply_ids(
        self, told_ids: Sequence[int], text: str, *, ended_by_id: bool = False
    ) -> tuple[int, ...] | None:
        """The ids to be kept of a reply; None where no ids say its text.

        told_ids, ended_by_id: `SampleText`'s at its end, text: all that it showed.
        """
        return self._ids().reply_ids(told_ids, text, ended_by_id=ended_by_id)

    def _ids(self) -> PromptIds:
        if self._prompt_ids is None:
            raise no_template()
        return self._prompt_ids

    def _messages(self, system: str | None, path: Sequence[Turn]) -> list[KnownMessage]:
        head = [] if system is None else [KnownMessage(Message("system", system))]
        return head + [
            KnownMessage(
                Message(turn.role.value, turn.text),
                turn.token_ids if turn.encoding == self.encoding else None,
            )
            for turn in path
        ]

    # The cut --------------------------------------------------------------------------------

    def _check_last(self, system: str | None, exchange: Sequence[Turn]) -> None:
        """Refuse what no cut can shorten enough, without encoding much more than would fit."""
        texts = [*([] if system is None else [system]), *(turn.text for turn in exchange)]
        if sum(map(self._sizes.estimate, texts)) > self._limit:
            least = self._sizes.count_up_to(self._context_length, texts)
            if least > self._context_length:
                raise self._too_long(f"at least {least}")

    def _cut(self, path: Sequence[Turn], begins: Sequence[int], totals: Sequence[float]) -> int:
        """Where the path begins whose prompt is short enough.

        totals: sizes of the prompts of the first 0, 1, 2, … turns.
        """

        def size(begin: int, end: int) -> float:
            return totals[0] + totals[end] - totals[begin]

        first = 0
        for number, begin in enumerate(begins):
            following = begins[number + 1] if number + 1 < len(begins) else len(path)
            # An exchange's last user's turn was the end of a prompt.
            asked = max(
                at for at in range(begin, following) if path[at].role is Role.USER or at == begin
            )
            if size(begins[first], asked + 1) > self._limit:
                while first < number and size(begins[first], asked + 1) > self._context_length // 2:
                    first += 1
        return begins[first]

    def _turn_size(self, turn: Turn) -> int:
        """Tokens, with what the template writes around them. The same whenever it is asked."""
        overhead, ids = self._turn_overhead + _TURN_MARGIN, self._ids()
        text = turn.text if turn.role is Role.USER else ids.shown_part(turn.text)
        # A user's turn has no ids yet when it is asked, and those of a first one have all before.
        if turn.role is Role.ASSISTANT and turn.encoding == self.encoding:
            known = len(text) == len(turn.text) or self.mode == "as_computed"
            if known and turn.token_ids is not None:
                return overhead + len(turn.token_ids)
        return overhead + self._sizes.estimate(text)

    def _too_long(self, tokens: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._context_length} tokens. However, "
            f"your message resulted in {tokens} tokens. Please reduce its length.",
            param="content",
        )

    def _overheads(self) -> tuple[int, int]:
        """Tokens of a prompt without texts, and what the template writes around a turn."""
        if self._prompt_ids is None:
            return 0, 0
        one = self._prompt_ids.probe_size(1)
        return one, max(0, -(-(self._prompt_ids.probe_size(3) - one) // 2))


def _exchanges(path: Sequence[Turn]) -> list[int]:
    """Where exchanges begin: the first turn, and each user's turn behind an assistant's."""
    return [
        at
        for at, turn in enumerate(path)
        if at == 0 or (turn.role is Role.USER and path[at - 1].role is Role.ASSISTANT)
    ]

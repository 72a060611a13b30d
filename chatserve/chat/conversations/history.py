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
the same whenever they are asked for: they are estimates (a little too high) of the texts, and of
replies the ids that were kept. Only prompts near the limit are estimated at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.text.prompt_ids import HistoryMode, KnownMessage, PromptIds
from chatserve.chat.text.template import no_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import Message
from chatserve.errors import ContextLengthExceeded

# What estimates of a turn and of a prompt may be too high by, in tokens: what a template writes
# around a turn is estimated from a probe, and pieces of text join differently in context.
_TURN_MARGIN = 2
_PROMPT_MARGIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """tokens: the whole prompt, generation prompt included. turn_ids: what the last user's turn
    appends, to be kept as its token_ids; None = cannot be told. left_out: how many turns, from
    the first on, the context had no room for.
    """

    tokens: tuple[int, ...]
    turn_ids: tuple[int, ...] | None
    left_out: int = 0


class History:
    """One model's. Pure, for any thread.

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
        self._limit = context_length - min(reserve, context_length // 4)
        self._tokenizer = text_floor.tokenizer
        template = text_floor.template
        self._prompt_ids = (
            None if template is None else PromptIds(self._tokenizer, template, mode=mode)
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
        composed = self._ids().compose(self._messages(system, path))
        margin = _PROMPT_MARGIN + 2 * (self._turn_overhead + _TURN_MARGIN) * len(path)
        begin = 0
        if len(composed.tokens) + margin > self._limit:
            begins = _exchanges(path)
            begin = self._cut(system, path, begins)
            if begin:
                composed = self._ids().compose(self._messages(system, path[begin:]))
            # An estimate that was too low: rather one more exchange than no reply.
            for later in (each for each in begins if each > begin):
                if len(composed.tokens) < self._context_length:
                    break
                begin = later
                composed = self._ids().compose(self._messages(system, path[begin:]))
        if len(composed.tokens) >= self._context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self._context_length} tokens. However, "
                f"your message resulted in {len(composed.tokens)} tokens. "
                "Please reduce its length.",
                param="content",
            )
        return Prompt(tokens=composed.tokens, turn_ids=composed.turn_ids, left_out=begin)

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

    def _cut(self, system: str | None, path: Sequence[Turn], begins: Sequence[int]) -> int:
        """Where the path begins whose prompt is short enough."""
        base = self._empty_size + (0 if system is None else self._size_of(system))
        totals = [0, *accumulate(map(self._turn_size, path))]

        def size(begin: int, end: int) -> int:
            return base + totals[end] - totals[begin]

        current = 0
        for number, begin in enumerate(begins):
            following = begins[number + 1] if number + 1 < len(begins) else len(path)
            # An exchange's last user's turn was the end of a prompt.
            asked = max(
                at for at in range(begin, following) if path[at].role is Role.USER or at == begin
            )
            if size(current, asked + 1) <= self._limit:
                continue
            later = [each for each in begins[: number + 1] if each > current]
            half = self._context_length // 2
            current = next(
                (each for each in later if size(each, asked + 1) <= half), max(current, begin)
            )
        return current

    def _turn_size(self, turn: Turn) -> int:
        """Tokens, with what the template writes around them. The same whenever it is asked."""
        overhead = self._turn_overhead + _TURN_MARGIN
        if turn.role is Role.USER:
            return overhead + self._size_of(turn.text)
        text = self._ids().as_shown(turn.text)
        if text == turn.text and turn.token_ids is not None and turn.encoding == self.encoding:
            return overhead + len(turn.token_ids)
        return overhead + self._size_of(text)

    def _size_of(self, text: str) -> int:
        return len(self._tokenizer.encode_rendered(text, ()))

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

"""PromptIds: a chat's messages to the ids of a prompt, keeping the ids that were computed before.

It may not know turns' trees, tenants or requests. Theory of operation: a prompt's text is what the
template renders. Known ids of messages are tried where their text should stand (`placed_ids.py`)
and taken where they say that text; what nothing known says is encoded where it stands. So a wrong
prompt cannot come of any ids, however old; at worst more is encoded.

    as_computed    u1      r1        u2                    r2        u3
    text           ███████ sentinel  ▒▒▒████████▒▒▒▒▒▒▒▒▒  sentinel  ▒▒▒████████▒▒▒▒▒▒▒▒▒
    ids            stored  stored    stored                stored    encoded now = turn_ids

A reply whose ids say its text is rendered as a sentinel, and its ids go where that stands: what
the template would do to an old reply (trim it, drop its reasoning) does not happen. What a
template writes between messages (▒) goes with the user's turn behind it, up to the generation
prompt. A template may write another head before an old reply than the generation prompt (a space;
no '<think>'); a kept reply has the one that it was computed behind.

In mode `template` there are no sentinels: the text is what the template makes of all messages, so
that the ids of a reply that it changes are not taken, and the part that changed is encoded with the
user's turn behind it. That is the default where a probe shows that old reasoning is dropped.

Ids that end a turn (`<|im_end|>`) belong to a reply if the model emitted them, else to the turn
behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from chatserve.chat.text.placed_ids import PlacedIds
from chatserve.chat.text.template import ChatTemplate, Rendered
from chatserve.chat.text.tokenizer import Tokenizer
from chatserve.chat.values import ChatPrompt, Message
from chatserve.errors import RequestError

HistoryMode = Literal["template", "as_computed"]

# A reply's last told tokens that may say something else than its text does: bytes of a run that is
# no character, which a stop string cut off from the rest of their run.
_UNTOLD_MAX = 8
_RULES = b"1"  # the number of this module's rules; ids of another number are not taken
_MESSAGE_TOKENS = 8  # what a template writes around a message, where a probe is refused
_PROBE_USER = "qsentinelq"
_PROBE_THOUGHT = "tsentinelt"
_THOUGHT_END = "</think>"
_NOTHING = Rendered("", ())


@dataclass(frozen=True, slots=True)
class KnownMessage:
    """A message and the ids that it once appended to those before it, as far as they are known."""

    message: Message
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Composed:
    """The ids of a prompt. turn_ids: the last of them, which belong to the last message; None
    where its ids cannot be told from those before."""

    tokens: tuple[int, ...]
    turn_ids: tuple[int, ...] | None


class PromptIds:
    """One model's. Pure, for any thread."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, mode: HistoryMode | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._places = PlacedIds(tokenizer)
        self._turn_end = template.turn_end()
        self._drops = self._drops_reasoning()
        self.mode: HistoryMode = mode or ("template" if self._drops else "as_computed")
        # Before a reply: what only the generation prompt has, what only an old reply has.
        self._asked_head, self._told_head = self._heads()
        self._asked_ids = tokenizer.encode_rendered(self._asked_head.text, self._asked_head.spans)
        digest = blake2b(tokenizer.digest + template.digest + _RULES, digest_size=16)
        digest.update(self.mode.encode())
        self.encoding = digest.hexdigest()

    def compose(self, messages: Sequence[KnownMessage]) -> Composed:
        """The prompt of a reply to `messages`, the last of which is no assistant's.

        Raises RequestError where the template refuses them.
        """
        kept = self._kept(messages) if self.mode == "as_computed" else {}
        pieces = self._pieces([each.message for each in messages], kept)
        if pieces is None:
            kept = {}
            pieces = (self._render([each.message for each in messages]),)
        tokens: list[int] = []
        appended = 0
        ends = [*kept, len(messages)]
        for number, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
            begin = place = 0
            if number:
                reply = ends[number - 1]
                begin = reply + 1
                ids, place = self._reply_before(piece, messages[reply], ended=kept[reply])
                tokens += ids
            appended = len(tokens)
            adjoins = False  # the ids of a message that asks end at `place`
            for index in range(begin, end):
                each = messages[index]
                taken, place = self._take(each, piece, place, first=not number, adjoins=adjoins)
                adjoins = bool(taken) and each.message.role != "assistant"
                tokens += taken
                if index < len(messages) - 1 and taken:
                    appended = len(tokens)
            rest = self._places.encode_from(piece, place, first=not number)
            if rest is None:
                return Composed(self._encode_whole(messages, pieces, kept), None)
            tokens += rest
        return Composed(tuple(tokens), tuple(tokens[appended:]))

    def reply_ids(
        self, told_ids: Sequence[int], text: str, *, ended_by_id: bool = False
    ) -> tuple[int, ...] | None:
        """The ids that a reply appends: those told, as far as they say its text, and the rest of
        the text encoded. None where no ids say the text.

        told_ids: `SampleText.token_ids`, wholly before the end of the text. ended_by_id: the last
        of them is a stop id, which counts only where the template ends a turn with it.
        """
        decode = self._tokenizer.decode
        told = list(told_ids)
        if ended_by_id and told[-1] != self._turn_end:
            told.pop()
        for _ in range(_UNTOLD_MAX):
            said = decode(told)
            if said == text:
                return tuple(told)
            if text.startswith(said):
                rest = self._places.encode_on(Rendered(text[len(said) :], ()))
                if rest is not None and decode([*told, *rest]) == text:
                    return (*told, *rest)
            if not told:
                break
            told.pop()
        whole = self._tokenizer.encode_rendered(text, ())
        return whole if decode(whole) == text else None

    def shown_part(self, reply: str) -> str:
        """About what the template shows of an old reply: not its reasoning, where it drops that.

        Renders nothing, so that it can be asked of every turn of a long path.
        """
        return reply.rpartition(_THOUGHT_END)[2] if self._drops else reply

    def probe_size(self, count: int) -> int:
        """Tokens of a prompt with `count` messages, besides those of their texts."""
        roles = ("user", "assistant")
        messages = [Message(roles[at % 2], _PROBE_USER) for at in range(count)]
        encode = self._tokenizer.encode_rendered
        try:
            text = self._render(messages)
        except RequestError:
            return _MESSAGE_TOKENS * count
        return max(0, len(encode(text.text, text.spans)) - count * len(encode(_PROBE_USER, ())))

    # As a text ------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message]) -> Rendered:
        return self._template.render(ChatPrompt(messages=tuple(messages)))

    def _pieces(
        self, messages: Sequence[Message], kept: Mapping[int, bool]
    ) -> tuple[Rendered, ...] | None:
        """The texts around the kept replies, or None where the template has lost one."""
        if not kept:
            return (self._render(messages),)
        sentinel = _sentinel(messages)
        text = self._render(
            [
                Message(each.role, sentinel, each.name) if index in kept else each
                for index, each in enumerate(messages)
            ]
        )
        if text.text.count(sentinel) != len(kept):
            return None
        pieces: list[Rendered] = []
        begin = 0
        for _ in kept:
            end = text.text.index(sentinel, begin)
            piece = text.part(begin, end)
            if self._told_head != self._asked_head and piece.text.endswith(self._told_head.text):
                cut = len(piece.text) - len(self._told_head.text)
                piece = piece.part(0, cut) + self._asked_head
            pieces.append(piece)
            begin = end + len(sentinel)
        return (*pieces, text.part(begin))

    def _heads(self) -> tuple[Rendered, Rendered]:
        user, reply = Message("user", _PROBE_USER), Message("assistant", _PROBE_THOUGHT)
        try:
            asked = self._render([user])
            told = self._render([user, reply, user])
        except RequestError:
            return _NOTHING, _NOTHING
        told = told.part(0, max(told.text.find(_PROBE_THOUGHT), 0))
        same = _same(asked.text, told.text)
        cut = [span.start for text in (asked, told) for span in text.spans if span.end > same]
        same = min([same, *cut])
        if _PROBE_USER not in asked.text[:same]:
            return _NOTHING, _NOTHING
        return asked.part(same), told.part(same)

    def _drops_reasoning(self) -> bool:
        user = Message("user", _PROBE_USER)
        reply = Message("assistant", f"<think>\n{_PROBE_THOUGHT}\n{_THOUGHT_END}\n\nanswer")
        try:
            return _PROBE_THOUGHT not in self._render([user, reply, user]).text
        except RequestError:
            return False

    # As ids ---------------------------------------------------------------------------------

    def _kept(self, messages: Sequence[KnownMessage]) -> dict[int, bool]:
        """The replies whose ids say their text, and whether an end of turn is among the ids."""
        kept: dict[int, bool] = {}
        decode = self._tokenizer.decode
        for index, each in enumerate(messages):
            if each.message.role != "assistant" or each.ids is None:
                continue
            if each.ids[-1:] == (self._turn_end,) and decode(each.ids[:-1]) == each.message.content:
                kept[index] = True
            elif decode(each.ids) == each.message.content:
                kept[index] = False
        return kept

    def _reply_before(
        self, piece: Rendered, reply: KnownMessage, *, ended: bool
    ) -> tuple[tuple[int, ...], int]:
        """A kept reply's ids, and the place in the text behind it where the next ids begin."""
        assert reply.ids is not None
        if not ended:
            return reply.ids, 0
        span = piece.spans[0] if piece.spans else None
        if span is not None and not piece.text[: span.start].strip():
            name = piece.text[span.start : span.end]
            if self._tokenizer.control.ids[name] == self._turn_end:
                return reply.ids, span.end
        return reply.ids[:-1], 0

    def _take(
        self, known: KnownMessage, piece: Rendered, place: int, *, first: bool, adjoins: bool
    ) -> tuple[tuple[int, ...], int]:
        """A message's ids and the place behind them, if that is what the text says there."""
        if not known.ids:
            return (), place
        # Elsewhere than behind its prompt a reply that says a lone space would say nothing.
        sheds = adjoins and known.message.role == "assistant" and not self._tokenizer.byte_level
        found = self._places.match(known.ids, piece, place, first=first, sheds_space=sheds)
        if found is not None:
            return known.ids, found
        head = self._asked_ids
        if head and known.ids[-len(head) :] == head:
            ids = known.ids[: -len(head)]
            found = self._places.match(ids, piece, place, first=first)
            if found is not None:
                return ids, found
        return (), place

    def _encode_whole(
        self,
        messages: Sequence[KnownMessage],
        pieces: Sequence[Rendered],
        kept: Mapping[int, bool],
    ) -> tuple[int, ...]:
        text = pieces[0]
        for piece, reply in zip(pieces[1:], kept, strict=True):
            text = text + Rendered(messages[reply].message.content, ()) + piece
        return self._tokenizer.encode_rendered(text.text, text.spans)


def _same(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _sentinel(messages: Sequence[Message]) -> str:
    """A word that no message has."""
    number = 0
    while True:
        word = f"rsentinel{number}r"
        if not any(word in each.content or word in (each.name or "") for each in messages):
            return word
        number += 1

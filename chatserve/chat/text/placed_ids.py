"""PlacedIds: ids at their place in a rendered chat.

It may not know messages, turns or where ids come from. Theory of operation: `match` reads ids as
text, control tokens apart, and says whether that is what stands at a place; so ids from anywhere
may be tried, and what is taken is right. `encode_from` gives the rest of a text the ids that it
has *there*, which is not what it would have by itself:

    text      …<|im_end|>\\n<|im_start|>user\\nHello      [INST] Hello [/INST]| Paris.
    place                ^ behind a control token                          ^ inside plain text
    by itself  '▁\\n', …    a space that is not there         '▁▁Paris'
    therefore  with the control token before it, whose       behind an anchor: a character whose
               id is dropped again                           ids stay apart from what follows

How a tokenizer treats the beginning of a section (none, one or another space before it) and a '▁'
that a user writes is found out by trying; one that fits no rule matches nothing, so that texts are
encoded anew. So does one that rewrites what it reads (NFKC), wherever it did: its ids do not say
the text. Ids that say nothing (a lone space of a section's beginning) stand nowhere, but where a
reply to the ids before them would.
"""

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum

from chatserve.chat.text.control import Span
from chatserve.chat.text.template import Rendered
from chatserve.chat.text.tokenizer import Tokenizer

# The first of these that does not join with the text behind it is taken. The last one is a byte
# token in vocabularies that have such, and so joins with nothing.
_ANCHORS = ("\n", "x", "1", "|", "é", "\x01")
_PROBE = "x"
_UNDERLINE = "▁"  # many vocabularies' sign for a space, and so what a user's '▁' says to them


class _Edge(Enum):
    """What stands before a run of plain ids."""

    BEGIN = "nothing: a prompt begins"
    CONTROL = "a control token"
    ADDED = "an added token that is plain text"
    TEXT = "plain text"


class PlacedIds:
    """Pure, for any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        probe = _PROBE + _UNDERLINE + _PROBE
        said = tokenizer.spell(tokenizer.encode_rendered(probe, ()))
        self._spaces_underline = said.strip() == f"{_PROBE} {_PROBE}"
        # What ids say more than the text of their section does, by (first of all, with a space).
        self._leads = {
            (first, spaced): self._find_lead(first, " " * spaced + _PROBE)
            for first in (True, False)
            for spaced in (True, False)
        }

    def match(
        self,
        ids: Sequence[int],
        text: Rendered,
        place: int,
        *,
        first: bool,
        sheds_space: bool = False,
    ) -> int | None:
        """Where ids that stand at `place` end, or None if the text there is another one.

        first: the text is the beginning of a prompt, else it follows other ids. sheds_space: the
        ids are a reply's, whose text may lack the first space that they say.
        """
        spans, number = text.spans, bisect_left(text.spans, place, key=lambda span: span.start)
        plain = text.text.replace(_UNDERLINE, " ") if self._spaces_underline else text.text
        edge = _Edge.BEGIN if first and place == 0 else _Edge.TEXT
        if edge is _Edge.TEXT and number and spans[number - 1].end == place:
            edge = _Edge.CONTROL
        run: list[int] = []
        for index, token in enumerate(ids):
            control = token in self._control.id_set
            added = None if control else self._tokenizer.added_text(token)
            if not control and added is None:
                run.append(token)
                if index < len(ids) - 1:
                    continue
            end = spans[number].start if number < len(spans) else len(plain)
            if run:
                said = self._said(run, plain, place, edge=edge)
                if said is None and sheds_space:
                    shed = self._tokenizer.spell(run).removeprefix(" ")
                    said = shed if plain.startswith(shed, place) else None
                if said is None or place + len(said) > end:
                    return None
                place, run, edge = place + len(said), [], _Edge.TEXT
            if added is not None:
                if not text.text.startswith(added, place, end):
                    return None
                place, edge = place + len(added), _Edge.ADDED
            if control:
                if number == len(spans) or spans[number].start != place:
                    return None
                if self._control.ids[text.text[place : spans[number].end]] != token:
                    return None
                place, number, edge = spans[number].end, number + 1, _Edge.CONTROL
            sheds_space = False
        return place

    def encode_from(self, text: Rendered, place: int, *, first: bool) -> tuple[int, ...] | None:
        """Ids of the text from `place` on. None: no ids say it there, only the whole has some."""
        if place == len(text.text):
            return ()
        if first and place == 0:
            return self._tokenizer.encode_rendered(text.text, text.spans)
        before = next((span for span in text.spans if span.end == place), None)
        if before is None:
            return self.encode_on(text.part(place))
        part = text.part(before.start)
        ids = self._tokenizer.encode_rendered(part.text, part.spans)
        name = text.text[before.start : before.end]
        return ids[ids.index(self._control.ids[name]) + 1 :]

    def encode_on(self, text: Rendered) -> tuple[int, ...] | None:
        """Ids of a text that goes on where plain text ends."""
        encode = self._tokenizer.encode_rendered
        if text.spans and text.spans[0].start == 0:
            return encode(text.text, text.spans)
        if self._leads[True, text.text.startswith(" ")] == "":
            return encode(text.text, text.spans)
        for anchor in _ANCHORS:
            before = encode(anchor, ())
            both = Rendered(anchor, ()) + text
            ids = encode(both.text, both.spans)
            if self._tokenizer.spell(before).endswith(anchor) and (ids[: len(before)] == before):
                return ids[len(before) :]
        return None

    def _said(self, run: Sequence[int], text: str, place: int, *, edge: "_Edge") -> str | None:
        """What a run of plain ids says at a place, if the text says it too. A run that says
        nothing, or a lead alone, stands nowhere."""
        spelled = self._tokenizer.spell(run)
        lead = self._leads[edge is _Edge.BEGIN, text.startswith(" ", place)]
        # Behind an added token there is a lead where a tokenizer wrote, and none where a model did.
        leads = {_Edge.TEXT: ("",), _Edge.ADDED: ("", lead)}.get(edge, (lead,))
        for each in leads:
            if each is not None and spelled.startswith(each):
                said = spelled[len(each) :]
                if said and text.startswith(said, place):
                    return said
        return None

    def _find_lead(self, begins: bool, text: str) -> str | None:
        encode, control = self._tokenizer.encode_rendered, self._control
        if begins:
            ids = encode(text, ())
        elif not control.ids:
            return ""  # no section follows a control token
        else:
            name = min(control.ids)
            ids = encode(name + text, (Span(0, len(name)),))
            ids = ids[ids.index(control.ids[name]) + 1 :]
        said = self._tokenizer.spell(ids)
        return said.removesuffix(text) if said.endswith(text) else None

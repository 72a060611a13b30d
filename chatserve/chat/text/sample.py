"""SampleText: one sample's tokens turned into what viewers may see.

It may not know viewers, streams or clocks. Theory of operation: tokens go through the
detokenizer, its text through the stop search, and what both let go is appended to a log of texts
and token ids that only grows. A viewer is a pair of positions in that log, so that a late viewer
costs nothing until it looks, and any number of viewers share one copy.

    tokens ─▶ Detokenizer ─▶ (text, where tokens end) ─▶ StopSearch ─▶ texts, token_ids
                  holds back parts of characters         holds back parts of stop strings

A token is told when all of its text is shown, so at any time the told ids are the tokens wholly
before the end of the shown text, and at the end they are what counts as the completion.

All that is here follows from the tokens received: a sample that is fed the same ones anew, cut
into emissions in whatever way, shows and holds back the same. That is how a reply is taken up.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from chatserve.chat.text.detokenizer import Detokenizer, Piece
from chatserve.chat.text.stop_strings import StopStrings
from chatserve.chat.text.tokenizer import Tokenizer
from chatserve.chat.values import SampleEnd, TokenChance
from chatserve.engine.values import Emission, FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRule:
    """What a request says about the text of its samples.

    context: the prompt's last token, where the reply continues the prompt's text. silent_stop_ids:
    ids whose text is left out when they end a sample. named_stop_ids: those that the asker gave,
    told as stop_reason. searched_after: tokens in which stop strings do not count.
    """

    stops: StopStrings
    context: int | None = None
    silent_stop_ids: frozenset[int] = frozenset()
    named_stop_ids: frozenset[int] = frozenset()
    searched_after: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """A viewer's place in a sample's log."""

    texts: int = 0
    tokens: int = 0


class SampleText:
    """The text of one sample and its end."""

    def __init__(self, sample: int, tokenizer: Tokenizer, rule: TextRule) -> None:
        self.sample = sample
        self.end: SampleEnd | None = None
        self.length = 0  # code points in `texts`
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # as long as token_ids, or empty
        self.kept_tokens: int | None = None  # set when a stop string was found
        self.ended_by_id = False  # whether the last of token_ids is a stop id
        self._tokenizer = tokenizer
        self._rule = rule
        self._detokenizer = Detokenizer(tokenizer, context=rule.context)
        self._search = rule.stops.search()
        self._unsearched = 0  # code points of the tokens in which stop strings do not count
        self._received = 0
        self._held = ""  # final text that may be the beginning of a stop string
        self._untold: deque[int] = deque()
        self._untold_logprobs: deque[TokenLogprobs] = deque()
        self._ends: deque[int] = deque()  # where untold tokens end, as far as that is known

    def feed(self, emission: Emission) -> bool:
        """Take an emission. True if a stop string was just found: the engine should stop."""
        if self.end is not None:
            return False
        tokens = emission.tokens
        self._untold.extend(tokens)
        self._untold_logprobs.extend(emission.logprobs)
        ended_by_id = emission.finish is FinishReason.STOP and tokens[-1:]
        if ended_by_id and tokens[-1] in self._rule.silent_stop_ids:
            tokens = tokens[:-1]
        if self._take(tokens):
            return True
        if emission.finish is not None:
            if self._show(self._detokenizer.flush()):
                return True
            self._finish(emission, ended_by_id[-1] if ended_by_id else None)
        return False

    def break_off(self, reason: str) -> None:
        """The sample ends without a word from the engine; what is shown stays."""
        if self.end is None:
            self.end = SampleEnd(sample=self.sample, finish_reason=reason)

    @property
    def received(self) -> int:
        """Tokens taken so far, told or held back. Means nothing once the sample has ended."""
        return len(self.token_ids) + len(self._untold)

    def received_from(self, start: int) -> tuple[int, ...]:
        """The tokens taken from the `start`th on, told or held back."""
        told = len(self.token_ids)
        held = islice(self._untold, max(0, start - told), None)
        return (*self.token_ids[start:], *held)

    def recall(self, text: str) -> None:
        """Show a text that was shown before and whose tokens are lost: there is no going on."""
        assert not self.texts, "a text without tokens stands alone"
        self.texts.append(text)
        self.length = len(text)

    def chances_from(self, start: int) -> tuple[TokenChance, ...]:
        """Log probabilities of the told tokens from `start` on."""
        return tuple(
            self._chance(token, found.logprob, found.top)
            for token, found in zip(self.token_ids[start:], self.logprobs[start:], strict=False)
        )

    def _take(self, tokens: Sequence[int]) -> bool:
        """Tokens in which stop strings do not count go first, and by themselves."""
        unsearched = max(0, self._rule.searched_after - self._received)
        self._received += len(tokens)
        if unsearched:
            piece = self._detokenizer.add(tokens[:unsearched])
            self._unsearched += len(piece.text)
            self._append(piece)
            self._tell(self.length)
            tokens = tokens[unsearched:]
        return bool(tokens) and self._show(self._detokenizer.add(tokens))

    def _show(self, piece: Piece) -> bool:
        """Show what is certain, up to the first stop string if there is one."""
        base = self.length + len(self._held)
        self._ends.extend(base + end for end in piece.ends)
        text = self._held + piece.text
        found = self._search.add(piece.text)
        cleared = self._search.cleared if found is None else found.start
        visible = self._unsearched + cleared - self.length
        self._held = text[visible:]
        self._append(Piece(text[:visible], ()))
        self._tell(self.length)
        if found is None:
            return False
        self.kept_tokens = len(self.token_ids)
        self.end = SampleEnd(sample=self.sample, finish_reason="stop", stop_reason=found.stop)
        return True

    def _append(self, piece: Piece) -> None:
        self._ends.extend(self.length + end for end in piece.ends)
        if piece.text:
            self.texts.append(piece.text)
            self.length += len(piece.text)

    def _tell(self, shown: int) -> None:
        while self._ends and self._ends[0] <= shown:
            self._ends.popleft()
            self.token_ids.append(self._untold.popleft())
            if self._untold_logprobs:
                self.logprobs.append(self._untold_logprobs.popleft())

    def _finish(self, emission: Emission, stop_id: int | None) -> None:
        """No stop string came of what was held back."""
        self._append(Piece(self._held, ()))
        self._held = ""
        self._ends.extend([self.length] * (len(self._untold) - len(self._ends)))
        self._tell(self.length)
        self.ended_by_id = stop_id is not None
        assert emission.finish is not None
        self.end = SampleEnd(
            sample=self.sample,
            finish_reason=emission.finish.value,
            stop_reason=stop_id if stop_id in self._rule.named_stop_ids else None,
            error=emission.error,
        )

    def _chance(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]] = ()
    ) -> TokenChance:
        data = self._tokenizer.token_bytes(token)
        return TokenChance(
            token_id=token,
            text=data.decode(errors="replace"),
            token_bytes=data,
            logprob=logprob,
            top=tuple(self._chance(other, chance) for other, chance in top),
        )

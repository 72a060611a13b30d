"""Detokenizer: one sample's tokens to text, as they come, equal to decoding them all at once.

It may not know stop strings or viewers. Theory of operation: there are two families of decoders.

    bytes      Byte-level tokens are bytes in disguise, so a text is the UTF-8 reading of their
               sequence: an incremental decoder holds back the bytes of an unfinished character.
    windows    All others: a token's text may depend on its neighbour (a first token loses its
               space), so it is what decoding [neighbour, token] adds to decoding [neighbour].
               Tokens for single bytes ('<0xE4>') come in runs: the library reads a whole run as
               UTF-8, or as one U+FFFD per byte if any of it is broken, so that nothing of a run
               is final before its end.

Each token is looked at a fixed number of times, so the cost is linear. `tokenizers`' own
DecodeStream is not used: it has no flush, raises on a byte run that breaks late, and holds its
text back for ever behind a U+FFFD that the model meant.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.chat.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is final. ends: for each token completed by it, where in `text` that token ends.

    Tokens are completed in order, and one whose last character is unfinished is not complete.
    """

    text: str
    ends: tuple[int, ...]


class Detokenizer:
    """Text of one sample.

    context: a token of the prompt that the reply's text continues. Without one the reply is a
    text of its own, so that its first space may be dropped as the decoder's rules have it.
    """

    def __init__(self, tokenizer: Tokenizer, *, context: int | None = None) -> None:
        self._reader = (
            _ByteReader(tokenizer) if tokenizer.byte_level else _WindowReader(tokenizer, context)
        )

    def add(self, tokens: Sequence[int]) -> Piece:
        """Take new tokens; returns the text that is final now."""
        texts: list[str] = []
        ends: list[int] = []
        length = 0
        for token in tokens:
            for text, completed in self._reader.add(token):
                texts.append(text)
                length += len(text)
                ends.extend([length] * completed)
        return Piece("".join(texts), tuple(ends))

    def flush(self) -> Piece:
        """The sample has ended: what was held back, as it would be read at the end of a text."""
        text, completed = self._reader.flush()
        return Piece(text, (len(text),) * completed)


# Readers give text in steps: (text, how many waiting tokens end with it).
_Steps = tuple[tuple[str, int], ...]


class _ByteReader:
    """Bytes to text. A token ends with the character that its last byte belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._waiting = 0  # tokens with an unfinished character, and silent ones behind them

    def add(self, token: int) -> _Steps:
        tokenizer = self._tokenizer
        text = self._utf8.decode(
            b"" if tokenizer.is_silent(token) else tokenizer.token_bytes(token)
        )
        unfinished = bool(self._utf8.getstate()[0])
        if unfinished and not text:
            self._waiting += 1
            return ()
        # The first new character is the one that the waiting tokens were parts of.
        waited, self._waiting = self._waiting, int(unfinished)
        return (text[:1], waited), (text[1:], int(not unfinished))

    def flush(self) -> tuple[str, int]:
        completed, self._waiting = self._waiting, 0
        return self._utf8.decode(b"", final=True), completed


class _WindowReader:
    """Tokens behind their neighbours; runs of byte tokens at once."""

    def __init__(self, tokenizer: Tokenizer, context: int | None) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        if context is not None and not tokenizer.is_silent(context):
            self._before = [context]
        self._run: list[int] = []
        self._waiting = 0  # the run, and silent tokens in it: the library drops those first

    def add(self, token: int) -> _Steps:
        if self._tokenizer.is_silent(token):
            if not self._run:
                return (("", 1),)
            self._waiting += 1
            return ()
        if self._tokenizer.is_byte(token):
            self._run.append(token)
            self._waiting += 1
            return ()
        run = self.flush()
        return run, (self._text_of([token]), 1)

    def flush(self) -> tuple[str, int]:
        text = self._text_of(self._run) if self._run else ""
        completed, self._waiting = self._waiting, 0
        self._run = []
        return text, completed

    def _text_of(self, tokens: list[int]) -> str:
        decode = self._tokenizer.decode
        before = decode(self._before)
        whole = decode(self._before + tokens)
        self._before = tokens[-1:]
        return whole.removeprefix(before)

"""TextSizes: how many tokens texts have, about, without encoding them.

It may not know templates, turns or limits. Theory of operation: tokens grow with code points, and
in scripts of more than one byte with the bytes beyond those. The two rates are measured once, on
probes of prose, code and several scripts:

    estimate = rate · code points + more · (bytes - code points)

The same text has the same estimate for as long as the tokenizer is the same. It is a little too
high for prose like the probes', and may be several times too low for noise; who needs to be sure
counts (`count_up_to`, `count_written_up_to`), piece by piece, so that what is far too long costs
what the limit costs.
"""

from collections.abc import Iterable, Iterator, Sequence

from chatserve.chat.text.control import Span
from chatserve.chat.text.tokenizer import Tokenizer

_PROSE = (
    "The capital of France is Paris, and what you asked about its history is a longer story. "
    "Could you explain how 12 pages, each of 64 tokens, are found again?\n\n"
    "    for index, each in enumerate(values):\n        print(index, each)\n"
)
_SCRIPTS = "Grüße aus Köln. Привет, как дела? 你好，今天天气怎么样？ こんにちは。 한국어 العربية 🦊"
_HIGHER = 1.1  # than measured: rather a shorter history than no room for a reply
_PIECE = 4096  # code points that are encoded at once while counting
_PIECE_MARGIN = 4  # tokens that a cut between pieces may add


class TextSizes:
    """One tokenizer's. Pure, for any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rate = len(tokenizer.encode_rendered(_PROSE, ())) / len(_PROSE)
        beyond = len(tokenizer.encode_rendered(_SCRIPTS, ())) - self._rate * len(_SCRIPTS)
        self._more = max(0.0, beyond / (len(_SCRIPTS.encode()) - len(_SCRIPTS)))

    def estimate(self, text: str) -> int:
        """Tokens of a text. Encodes nothing."""
        size = self._rate * len(text)
        if not text.isascii():
            size += self._more * (len(text.encode(errors="surrogatepass")) - len(text))
        return int(_HIGHER * size) + 1

    def count_up_to(self, most: int, texts: Sequence[str]) -> int:
        """Tokens of texts, or a number above `most` as soon as it is certain that there are more.

        White space at the edges does not count: a template may trim it.
        """
        return self._count(most, map(str.strip, texts))

    def count_written_up_to(self, most: int, text: str, spans: Sequence[Span]) -> int:
        """The same of one text as it is, with control tokens at `spans`."""
        return self._count(most - len(spans), self._between(text, spans)) + len(spans)

    def _between(self, text: str, spans: Sequence[Span]) -> Iterator[str]:
        """What stands between control tokens, without what those swallow of it."""
        tokenizer, begin, before = self._tokenizer, 0, ""
        for span in (*spans, Span(len(text), len(text))):
            plain, behind = text[begin : span.start], text[span.start : span.end]
            if before in tokenizer.swallows_behind:
                plain = plain.lstrip()
            yield plain.rstrip() if behind in tokenizer.swallows_before else plain
            begin, before = span.end, behind

    def _count(self, most: int, texts: Iterable[str]) -> int:
        total = 0
        for text in texts:
            for begin in range(0, len(text), _PIECE):
                ids = self._tokenizer.encode_rendered(text[begin : begin + _PIECE], ())
                total += max(0, len(ids) - _PIECE_MARGIN)
                if total > most:
                    return total
        return total

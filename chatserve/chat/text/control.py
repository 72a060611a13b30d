"""Control tokens: which strings steer a model, and where they stand in a text.

It knows strings and ids only, no tokenizer at work and no template at work. A control token is an
added token that is special, or that the chat template writes. White space is never one: some
vocabularies (Gemma's) list line feeds as added tokens, and a template holds those as plain text.

    a prompt as rendered     <|im_start|>user\nWhat does <|im_end|> mean?<|im_end|>\n
    the template's own       ~~~~~~~~~~~~                               ~~~~~~~~~~
    a user's text                             ----------

Theory of operation: all control strings are one regular expression shaped as a prefix tree, so
that a text of a million '<' costs no more per character than another. It runs over windows of the
text: Python holds its lock inside one search, and the event loop must not wait for a long one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WINDOW_CHARACTERS = 1 << 16  # a search of this length takes about a millisecond

_Tree = dict[str, "_Tree"]


@dataclass(frozen=True, slots=True)
class Span:
    """A control token's place in a text, in code points."""

    start: int
    end: int


class ControlTokens:
    """The control strings of one model, with their ids."""

    def __init__(self, ids: Mapping[str, int], *, window: int = WINDOW_CHARACTERS) -> None:
        assert all(ids), "an empty control string is everywhere"
        self.ids = dict(ids)
        self._window = window
        self.id_set = frozenset(ids.values())
        self._longest = max((len(text) for text in ids), default=0)
        self._heads = frozenset(text[:end] for text in ids for end in range(1, len(text)))
        self._tails = frozenset(text[start:] for text in ids for start in range(1, len(text)))
        self._joined = "\0".join(ids)
        self._pattern = re.compile(_tree_pattern(_tree_of(ids)) if ids else r"(?!)")

    def find(self, text: str) -> Iterator[Span]:
        """Places of control strings, leftmost first, the longest at each place, none overlapping.

        That is how the tokenizers library matches added tokens.
        """
        position, window = 0, self._window
        reach = window + max(0, self._longest - 1)
        while position < len(text):
            found = self._pattern.search(text, position, position + reach)
            if found is not None and found.start() < position + window:
                yield Span(found.start(), found.end())
                position = found.end()
            else:
                position += window

    def may_begin_before(self, text: str) -> bool:
        """Whether what comes before `text` could complete a control token with its beginning."""
        return self._is_inner(text) or any(
            text[:length] in self._tails for length in range(1, min(len(text), self._longest) + 1)
        )

    def may_end_after(self, text: str) -> bool:
        """Whether what comes after `text` could complete a control token with its end."""
        return self._is_inner(text) or any(
            text[-length:] in self._heads for length in range(1, min(len(text), self._longest) + 1)
        )

    def _is_inner(self, text: str) -> bool:
        return bool(text) and len(text) < self._longest and text in self._joined


def _tree_of(strings: Mapping[str, int]) -> _Tree:
    tree: _Tree = {}
    for text in strings:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}  # a string ends here
    return tree


def _tree_pattern(tree: _Tree) -> str:
    """The tree as an expression that prefers longer strings. Single branches are not nested."""
    text = ""
    while len(tree) == 1:
        ((character, tree),) = tree.items()
        if not character:
            return text
        text += re.escape(character)
    branches = [
        re.escape(character) + _tree_pattern(node) for character, node in tree.items() if character
    ]
    # Greedy: the string that ends here is taken only where no longer one follows.
    return f"{text}(?:{'|'.join(branches)}){'?' if '' in tree else ''}"

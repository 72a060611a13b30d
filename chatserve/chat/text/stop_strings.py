"""StopStrings: find the first stop string in a text that arrives in pieces.

It may not know tokens. The first is the one that is complete first, wherever the pieces are cut;
of two that end together the longer counts. Theory of operation: an Aho–Corasick automaton. Its
state after any text is the longest end of that text which begins a stop string: exactly the
characters that have to be held back.

    stops  "END", "\\n\\n"
    text   "the E"      held back: "E"       (state E)
    text   "the Es"     nothing              (root: the E is let go)
    text   "the EsEND"  found, cut before "END"

One step per character, whatever the number of stop strings.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _State:
    depth: int
    next: dict[str, "_State"] = field(default_factory=dict[str, "_State"])
    fallback: "_State | None" = None
    found: str | None = None  # the longest stop string that ends here


@dataclass(frozen=True, slots=True)
class Found:
    """A stop string, and where in the text so far it begins."""

    stop: str
    start: int


class StopStrings:
    """The automaton of one request; its samples share it. Immutable."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._root = _State(0)
        for stop in stops:
            state = self._root
            for character in stop:
                state = state.next.setdefault(character, _State(state.depth + 1))
            state.found = stop or None
        waiting = deque((self._root,))
        while waiting:
            state = waiting.popleft()
            for character, child in state.next.items():
                child.fallback = self._step(state.fallback, character)
                child.found = child.found or child.fallback.found
                waiting.append(child)

    def search(self) -> "StopSearch":
        """A search through one text."""
        return StopSearch(self, self._root)

    def _step(self, state: _State | None, character: str) -> _State:
        while state is not None:
            following = state.next.get(character)
            if following is not None:
                return following
            state = state.fallback
        return self._root

    def advance(self, state: _State, text: str) -> tuple[_State, int | None]:
        """The state after `text`, and the length of it up to the end of the first stop string."""
        if not self._root.next:
            return state, None
        for index, character in enumerate(text):
            state = self._step(state, character)
            if state.found is not None:
                return state, index + 1
        return state, None


class StopSearch:
    """One text on its way. `cleared` code points of it are not part of any stop string."""

    def __init__(self, stops: StopStrings, state: _State) -> None:
        self._stops = stops
        self._state = state
        self._length = 0

    @property
    def cleared(self) -> int:
        """How much of the text may be shown."""
        return self._length - self._state.depth

    def add(self, text: str) -> Found | None:
        """Take more text. After something was found nothing more may be added."""
        state, end = self._stops.advance(self._state, text)
        self._state = state
        if end is None:
            self._length += len(text)
            return None
        assert state.found is not None
        self._length += end
        return Found(state.found, self._length - len(state.found))

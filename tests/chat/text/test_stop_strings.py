"""The stop search against one that looks at the whole text each time."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatserve.chat.text.stop_strings import StopStrings

_stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4).map(tuple)
_slices = st.lists(st.text("ab\nc", max_size=5), max_size=12)


def _truth(stops: tuple[str, ...], text: str) -> tuple[str, int] | None:
    """The stop string that is complete first; the longer one of two."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return stop, end - len(stop)
    return None


def _held(stops: tuple[str, ...], text: str) -> int:
    """The longest end of the text that begins a stop string."""
    lengths = [
        length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])
    ]
    return max(lengths, default=0)


@settings(max_examples=500, deadline=None, print_blob=True)
@given(stops=_stops, slices=_slices)
@example(stops=("abab", "ba"), slices=["aba"])
def test_against_the_whole_text(stops, slices):
    search = StopStrings(stops).search()
    text = ""
    for each in slices:
        found = search.add(each)
        text += each
        truth = _truth(stops, text)
        if truth is not None:
            assert found is not None
            assert (found.stop, found.start) == truth
            return
        assert found is None
        assert search.cleared == len(text) - _held(stops, text)


def test_without_stop_strings_nothing_is_held():
    search = StopStrings(()).search()
    assert search.add("anything") is None
    assert search.cleared == 8

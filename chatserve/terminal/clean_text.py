"""What may reach a terminal: text, and nothing that a terminal obeys.

A model says what it was made to say, so its output is somebody else's: escape sequences could
retitle the window, write the clipboard, or draw over what was there. Characters that steer a
terminal are shown as symbols, those that reorder text as U+FFFD; a carriage return is left out.
"""

import re

_LINE_BREAKS = re.compile(r"[\n\u2028\u2029\v\f]+")
_SYMBOLS_OF_C0 = 0x2400


def _table() -> dict[int, str]:
    table = {code: chr(_SYMBOLS_OF_C0 + code) for code in range(0x20)}
    del table[ord("\n")], table[ord("\t")]
    table[ord("\r")] = ""
    table[0x7F] = "\u2421"
    hidden = [
        *range(0x80, 0xA0),  # C1: one character of it is an escape sequence's beginning
        *range(0x202A, 0x202F),  # the order of writing, embedded and overridden
        *range(0x2066, 0x206A),  # the same, isolated
        0x061C, 0x200E, 0x200F,  # marks of direction
        *range(0xD800, 0xE000),  # halves of characters
        *range(0xE0000, 0xE0080),  # tags: text that nobody sees
    ]  # fmt: skip
    return table | dict.fromkeys(hidden, "\ufffd") | {0x2028: "\n", 0x2029: "\n"}


_TABLE = _table()


def clean(text: str) -> str:
    """Text of any number of lines. Piece by piece it gives the same as in one."""
    return text.translate(_TABLE)


def clean_line(text: str) -> str:
    """One line."""
    return clean(_LINE_BREAKS.sub(" ", text).replace("\t", " "))

"""Frames for server-sent events.

A frame is one `data:` line. JSON written by orjson has no CR and no LF in it; U+0085, U+2028 and
U+2029 are not line ends in the standard, but some clients cut lines there (Python's
`str.splitlines` does), so they are escaped: inside JSON they can only stand in strings.
"""

import orjson

DONE = b"data: [DONE]\n\n"


def frame(value: object) -> bytes:
    """One event that carries `value` as JSON."""
    text = orjson.dumps(value)
    if not text.isascii():
        text = (
            text.replace(b"\xe2\x80\xa8", b"\\u2028")
            .replace(b"\xe2\x80\xa9", b"\\u2029")
            .replace(b"\xc2\x85", b"\\u0085")
        )
    return b"data: " + text + b"\n\n"

"""Reads the head of a request strictly, before the HTTP library sees it.

It may not know sockets. h11 is lenient where the standard allows it (bare LF, folded lines, equal
Content-Lengths, Content-Length beside Transfer-Encoding), and what two parsers read differently
smuggles requests past proxies. So each head is collected here byte by byte, and only a strict one
goes on, together with how its body is framed.
"""

import re
from dataclasses import dataclass

from chatserve.api.limits import Limits

_END = b"\r\n\r\n"
_BARE_LF = re.compile(rb"(?<!\r)\n")
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_REQUEST_LINE_REST = 32  # the method, the version and two spaces


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection ends here."""

    status: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Head:
    """A strict head. body_bytes: by Content-Length; None: chunked. rest: what came after it."""

    raw: bytes
    body_bytes: int | None
    rest: bytes


_MALFORMED = Refusal(400, "bad_request", "The request is not valid HTTP/1.1.")


class HeadReader:
    """Collects the bytes of one head. A reader that gave an outcome is used up."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes = bytearray()

    @property
    def started(self) -> bool:
        """Whether anything has come."""
        return bool(self._bytes)

    def feed(self, data: bytes) -> Head | Refusal | None:
        """The outcome, or None while more is needed. Never holds more than the limit plus data."""
        searched = max(0, len(self._bytes) - len(_END) + 1)
        self._bytes += data
        end = self._bytes.find(_END, searched)
        head = self._bytes if end < 0 else self._bytes[: end + len(_END)]
        refusal = self._too_large(head)
        if refusal is not None:
            return refusal
        # Only in the new part, and with one byte of context for the CR.
        if _BARE_LF.search(head, searched):
            return _MALFORMED
        if end < 0:
            return None
        outcome = read_head(bytes(head), self._limits)
        if isinstance(outcome, Refusal):
            return outcome
        return Head(bytes(head), outcome.body_bytes, bytes(self._bytes[len(head) :]))

    def _too_large(self, head: bytearray) -> Refusal | None:
        limits = self._limits
        line_end = head.find(b"\r\n", 0, limits.target_bytes_max + _REQUEST_LINE_REST)
        if line_end < 0 and len(head) >= limits.target_bytes_max + _REQUEST_LINE_REST:
            return Refusal(
                414, "uri_too_long", f"The URL may have {limits.target_bytes_max} bytes."
            )
        if len(head) > limits.head_bytes_max:
            return Refusal(
                431, "head_too_large", f"The head may have {limits.head_bytes_max} bytes."
            )
        return None


@dataclass(frozen=True, slots=True)
class Framing:
    """How the body is framed."""

    body_bytes: int | None


def read_head(head: bytes, limits: Limits) -> Framing | Refusal:
    """Check a whole head, its final empty line included."""
    request_line, *lines = head[: -len(_END)].split(b"\r\n")
    matched = _REQUEST_LINE.fullmatch(request_line)
    if matched is None:
        return _MALFORMED
    if len(matched[2]) > limits.target_bytes_max:
        return Refusal(414, "uri_too_long", f"The URL may have {limits.target_bytes_max} bytes.")
    if len(lines) > limits.head_fields_max:
        return Refusal(
            431, "too_many_fields", f"The head may have {limits.head_fields_max} fields."
        )
    fields: dict[bytes, list[bytes]] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:  # folded, or a space before the colon, or a control character
            return _MALFORMED
        fields.setdefault(field[1].lower(), []).append(field[2].strip(b" \t"))
    return _framing(fields, old=matched[3] == b"0")


def _framing(fields: dict[bytes, list[bytes]], *, old: bool) -> Framing | Refusal:
    lengths = fields.get(b"content-length", [])
    codings = fields.get(b"transfer-encoding", [])
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or (not hosts and not old):
        return _MALFORMED
    if codings:
        # One framing or the other; and HTTP/1.0 knows no codings.
        if lengths or old:
            return _MALFORMED
        if [coding.lower() for coding in codings] != [b"chunked"]:
            return Refusal(501, "unknown_coding", "The only known transfer coding is chunked.")
        return Framing(None)
    if not lengths:
        return Framing(0)
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        return _MALFORMED
    return Framing(int(lengths[0]))

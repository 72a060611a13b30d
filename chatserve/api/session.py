"""The sign-in cookie: proof that its bearer once showed a key.

Theory of operation: the cookie is `name.id.expiry.tag`, the tag an HMAC over the three fields
and the key's digest, so a changed or withdrawn key ends its cookies. Nothing is stored for a
living session, but for what goes on under it now and is to be ended with it; ids of ended ones are
remembered until they would have expired, and at most `ended_max` of them. Expiry needs the wall
clock, because a cookie outlives the process.
"""

import base64
import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Generator

from chatserve.api.keys import Holder, KeyRing

COOKIE_NAME = "chatserve_session"


class Sessions:
    """Issues, checks and ends cookies."""

    def __init__(
        self,
        cookie_key: bytes,
        keys: KeyRing,
        *,
        seconds: int,
        ended_max: int,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        assert len(cookie_key) >= 32, "the cookie key comes from HKDF"
        self.seconds = seconds
        self._cookie_key = cookie_key
        self._keys = keys
        self._ended_max = ended_max
        self._wall_clock = wall_clock
        self._ended: dict[str, int] = {}  # id -> expiry, oldest first
        self._stays: dict[str, list[Callable[[], None]]] = {}  # by id, while there is any

    def issue(self, holder: Holder) -> str:
        """A cookie value for a holder who showed the key."""
        expiry = int(self._wall_clock()) + self.seconds
        fields = f"{_name(holder)}.{secrets.token_hex(16)}.{expiry}"
        return f"{fields}.{self._tag(fields, holder)}"

    def find(self, cookie: str) -> Holder | None:
        """The holder, or None for a cookie that is forged, expired, ended or outdated."""
        parts = cookie.split(".")
        if len(parts) != 4 or not parts[2].isdecimal() or len(parts[2]) > 12:
            return None
        name, session, expiry, tag = parts
        try:
            holder = self._keys.named(bytes.fromhex(name).decode("ascii"))
        except ValueError:
            return None
        if holder is None:
            return None
        expected = self._tag(f"{name}.{session}.{expiry}", holder)
        if not hmac.compare_digest(expected.encode(), tag.encode("utf-8", "surrogatepass")):
            return None
        if int(expiry) <= self._wall_clock() or session in self._ended:
            return None
        return holder

    def end(self, cookie: str) -> None:
        """End the session of a genuine cookie; anything else is ignored."""
        if self.find(cookie) is None:
            return
        _, session, expiry, _ = cookie.split(".")
        self._ended[session] = int(expiry)
        now = self._wall_clock()
        for known in [known for known, until in self._ended.items() if until <= now]:
            del self._ended[known]
        while len(self._ended) > self._ended_max:
            del self._ended[next(iter(self._ended))]
        for on_end in tuple(self._stays.get(session, ())):
            on_end()

    @contextlib.contextmanager
    def stay(self, cookie: str, on_end: Callable[[], None]) -> Generator[None]:
        """What goes on under the session of a genuine cookie. on_end: called if it is ended."""
        session = cookie.split(".")[1]
        stays = self._stays.setdefault(session, [])
        stays.append(on_end)
        try:
            yield
        finally:
            stays.remove(on_end)
            if not stays:
                del self._stays[session]

    def _tag(self, fields: str, holder: Holder) -> str:
        message = fields.encode() + b"\0" + holder.digest
        tag = hmac.digest(self._cookie_key, message, hashlib.sha256)
        return base64.urlsafe_b64encode(tag).decode().rstrip("=")


def _name(holder: Holder) -> str:
    # Names may hold dots, which separate the fields.
    return holder.name.encode("ascii").hex()

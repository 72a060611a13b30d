"""The client's limits and timeouts, as named values in one frozen place."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Seconds, unless a name says otherwise. The defaults fit a person at a terminal."""

    # An outage: a restart with a large model takes a minute or two.
    outage_seconds_max: float = 180.0
    # A turn that never went out is lost to nobody: its asker is told sooner.
    unsent_seconds_max: float = 5.0
    # Full jitter: before try n a random time up to first * 2**n, and never more than max. A
    # server's retry_after is heeded, up to its own bound.
    reconnect_seconds_first: float = 0.2
    reconnect_seconds_max: float = 10.0
    retry_after_seconds_max: float = 60.0

    connect_seconds: float = 10.0
    answer_seconds: float = 30.0  # between two pieces of an HTTP answer
    close_seconds: float = 1.0
    # A server that answers no ping is given up 30 s after its last word.
    ping_seconds: float = 10.0
    pong_seconds: float = 20.0

    # The server shows at most 32 replies on one socket.
    replies_max: int = 32
    # A server cuts its frames to less than 64 KiB; this leaves room for others.
    frame_bytes_max: int = MIB
    frames_waiting_max: int = 64
    reply_characters_max: int = 16 * MIB
    # A conversation of many turns, or its export.
    answer_bytes_max: int = 256 * MIB
    connections_max: int = 8  # of HTTP, at once
    page_conversations: int = 50
    # A draft is sent at most this often, whatever the typing.
    draft_seconds_min: float = 0.25
    draft_characters_max: int = 256 * KIB

"""Every limit of the API floor, as named values in one frozen place, each with its derivation.

Nothing here knows how a limit is kept: `head.py` and `connection.py` keep those of a connection,
`body.py` those of a body, `fields.py` those of a field, `gate.py` those of a key,
`socket_connection.py` and `socket.py` those of a WebSocket.
"""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

# Descriptors that are not client connections: weights, store slabs, logs, the session store's
# socket, listening sockets, the event loop's own.
_DESCRIPTORS_RESERVED = 256
_CONNECTIONS_MIN = 64
# At two buffered pieces of 96 KiB each this is the most that 3 GiB of socket memory can hold.
_CONNECTIONS_MAX = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one server. `derived` fills in what depends on the model and the machine."""

    context_length: int  # tokens; what one request may hold at all
    samples_max: int  # choices of one request, over its prompts: the engine's sequences at once
    connections_max: int = 768  # 1,024 descriptors, the usual soft limit, less the reserved ones

    # The head of a request: what h11 and every proxy before us accept without trouble.
    head_bytes_max: int = 16 * KIB
    head_fields_max: int = 100
    target_bytes_max: int = 8 * KIB

    # A peer that is slow on purpose is gone in 10 s at the latest; one second is kept for timers.
    head_seconds: float = 9.0
    body_seconds: float = 9.0
    idle_seconds: float = 9.0
    # A reader that takes nothing is gone in 30 s at the latest. It is looked at twice in that
    # time, and stays if it took all, or 16 KiB: about 1 KiB a second, less than any line gives.
    write_seconds: float = 28.0
    write_bytes_min: int = 16 * KIB
    # How long a refused peer is listened to, so that it reads the refusal and not a reset.
    linger_seconds: float = 1.0
    # Linux doubles what is asked for: 192 KiB in the kernel and one frame in the process, so a
    # stalled reader holds less than 256 KiB.
    send_buffer_bytes: int = 96 * KIB
    # Comment lines while nothing happens, so that proxies and we ourselves notice the dead.
    ping_seconds: float = 15.0
    # What a stream may still say after the drain is over.
    farewell_seconds: int = 3

    # Bodies being read or answered at once, in bodies of full size.
    bodies_max: int = 64

    stop_strings_max: int = 16
    stop_string_length_max: int = 1_024  # each is searched for in each delta
    stop_token_ids_max: int = 128
    logit_bias_max: int = 300
    top_logprobs_max: int = 20
    salt_length_max: int = 256

    # Conversations. An exported one holds many turns of a body's size each.
    title_length_max: int = 200
    search_length_max: int = 200
    page_conversations_max: int = 100
    page_conversations: int = 50
    import_turns_max: int = 10_000
    import_bodies_max: int = 16
    # One event of a reply carries at most this many code points, so one frame, with JSON's escapes
    # of six bytes, has less than the 64 KiB that a stalled reader may have waiting in the process.
    event_text_max: int = 8 * KIB

    # WebSockets. A peer that answers no ping is gone 20 s after the ping, 30 s after its last word.
    socket_ping_seconds: float = 10.0
    socket_pong_seconds: float = 20.0
    # What waits in the process for a peer: a frame of ours, and the pongs that it asks for.
    socket_waiting_bytes_max: int = 64 * KIB
    socket_viewings_max: int = 32  # of one socket: a page shows one, a terminal a few
    socket_requests_max: int = 32  # frames of one socket being acted on, viewings not counted
    socket_answers_max: int = 64  # answers that wait for their turn
    request_name_length_max: int = 64

    # Sign-in attempts of one address, and addresses remembered.
    session_attempts_max: int = 10
    session_attempts_seconds: float = 60.0
    session_addresses_max: int = 4_096
    session_seconds: int = 30 * 24 * 3_600
    sessions_ended_max: int = 4_096

    @property
    def body_bytes_max(self) -> int:
        """1 MiB, or 16 bytes a token: four times the usual text, room for JSON's escapes."""
        return max(MIB, 16 * self.context_length)

    @property
    def import_bytes_max(self) -> int:
        """A conversation to be imported."""
        return self.import_bodies_max * self.body_bytes_max

    @property
    def sockets_max(self) -> int:
        """WebSockets of one key: half of the connections, so that it can still ask by HTTP."""
        return self.connections_max // 2

    @property
    def messages_max(self) -> int:
        """Every message costs at least one token."""
        return self.context_length

    @property
    def body_bytes_total_max(self) -> int:
        """Bodies of all connections together."""
        return self.bodies_max * self.body_bytes_max

    @classmethod
    def derived(cls, *, context_length: int, samples_max: int, descriptors: int) -> "Limits":
        """The limits for a model and for the number of descriptors this process may open."""
        room = descriptors - _DESCRIPTORS_RESERVED
        return cls(
            context_length=context_length,
            samples_max=samples_max,
            connections_max=max(_CONNECTIONS_MIN, min(_CONNECTIONS_MAX, room)),
        )

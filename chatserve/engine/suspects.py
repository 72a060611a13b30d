"""Suspects: which request broke a step?

A failed step names nobody. All that took part are held back and run again alone, one after the
other, each until it is past the point where the failure was. One that fails alone is the cause: it
ends with an error, and its input is quarantined by digest, so that the same input is refused at
the door instead of breaking a step a third time. Several different inputs that fail alone in a
row, with no good step between, mean that the device is broken, not the inputs.
"""

from collections import OrderedDict, deque

from chatserve.engine.sequence import Life, Sequence

SOLO_FAILURES_MAX = 3
QUARANTINE_MAX = 1024  # digests of 16 bytes


class Suspects:
    """The line of suspects, the one on probation, and the quarantine."""

    def __init__(self) -> None:
        self._line: deque[Sequence] = deque()
        self._quarantine: OrderedDict[bytes, None] = OrderedDict()
        self._solo_failures = 0
        self.on_probation: Sequence | None = None

    @property
    def any(self) -> bool:
        """Whether steps must be solo for now."""
        self._sweep()
        return self.on_probation is not None or bool(self._line)

    @property
    def quarantined(self) -> int:
        """Digests in quarantine."""
        return len(self._quarantine)

    def add(self, sequence: Sequence) -> None:
        """It took part in a failed step, as far as `planned`."""
        sequence.probation_until = max(sequence.probation_until, sequence.planned)
        self._line.append(sequence)

    def next(self) -> Sequence:
        """Put the next suspect on probation."""
        self._sweep()
        self.on_probation = self._line.popleft()
        return self.on_probation

    def progressed(self, sequence: Sequence, end: int) -> None:
        """A good step took a sequence to `end`."""
        if sequence is self.on_probation and end >= sequence.probation_until:
            self.on_probation = None

    def good_step(self) -> None:
        """The device works."""
        self._solo_failures = 0

    def convict(self, digest: bytes) -> bool:
        """The one on probation failed alone. Returns whether the device must be broken."""
        self.on_probation = None
        self._solo_failures += 1
        self._quarantine[digest] = None
        while len(self._quarantine) > QUARANTINE_MAX:
            self._quarantine.popitem(last=False)
        return self._solo_failures >= SOLO_FAILURES_MAX

    def refuses(self, digest: bytes) -> bool:
        """Whether this input is quarantined."""
        return digest in self._quarantine

    def clear(self) -> None:
        """Nobody is suspected any more; the quarantine stays."""
        self._line.clear()
        self.on_probation = None

    def _sweep(self) -> None:
        if self.on_probation is not None and self.on_probation.life is not Life.RUNNING:
            self.on_probation = None
        while self._line and self._line[0].life is not Life.QUEUED:
            self._line.popleft()

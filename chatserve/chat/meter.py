"""What is measured of a reply, whoever shows the figures."""

from typing import Protocol


class ReplyMeter(Protocol):
    """Called on the event loop. All times are in seconds."""

    def first_token(self, seconds: float) -> None:
        """From the whole request to the first token."""
        ...

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` more tokens of one sample, so long after the ones before."""
        ...

    def sample_over(self, finish_reason: str) -> None:
        """A sample has ended."""
        ...

    def reply_over(self, seconds: float, prompt_tokens: int) -> None:
        """All samples have, so long after the whole request."""
        ...


class Unmetered:
    """Nobody looks."""

    def first_token(self, seconds: float) -> None:
        """See ReplyMeter, as for all that follows."""

    def next_tokens(self, seconds: float, count: int) -> None:
        pass

    def sample_over(self, finish_reason: str) -> None:
        pass

    def reply_over(self, seconds: float, prompt_tokens: int) -> None:
        pass

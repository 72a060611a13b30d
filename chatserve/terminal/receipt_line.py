"""One line about a reply that has ended, or about how far its prompt is. Pure."""

from chatserve.client import Final, ReplyProgress

_MILLISECONDS_BELOW = 1.0


def receipt_line(final: Final) -> str:
    """Where the prompt's tokens came from, how long the first token took, how fast it went."""
    receipt, usage, timings = final.receipt, final.usage, final.timings
    parts = [
        f"prompt {usage.prompt_tokens:,} tokens: "
        f"{receipt.cached:,} cached, {receipt.computed:,} computed"
    ]
    if receipt.left_out:
        parts.append(f"{receipt.left_out:,} old turns left out")
    first = timings.to_first_token
    if first is not None:
        parts.append(f"first token {_seconds(first)}")
    rate = tokens_per_second(final)
    parts.append(
        f"{usage.completion_tokens:,} tokens" + ("" if rate is None else f", {rate:,.0f}/s")
    )
    if final.finish_reason not in ("", "stop"):
        parts.append(final.finish_reason)
    return " · ".join(parts)


def tokens_per_second(final: Final) -> float | None:
    """After the first token; None where there is nothing to measure."""
    first, count = final.timings.to_first_token, final.usage.completion_tokens
    if first is None or count < 2 or final.timings.total <= first:
        return None
    return (count - 1) / (final.timings.total - first)


def progress_line(progress: ReplyProgress) -> str:
    """What goes on before the first token."""
    if progress.queued:
        return f"waiting: {progress.queued:,} before this one"
    return f"reading: {progress.computed:,} of {progress.prompt_tokens:,} tokens"


def _seconds(seconds: float) -> str:
    if seconds < _MILLISECONDS_BELOW:
        return f"{seconds * 1_000:,.0f} ms"
    return f"{seconds:,.2f} s"

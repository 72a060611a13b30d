"""Pace: the token budget of a step, from the measured time of the steps before.

A step that computes t tokens takes about  a + b t  seconds. Both are fitted by least squares over
recent steps with exponentially fading weights, and the budget is the t whose time is the target:
long prompts are cut into slices that leave room for other people's next tokens.
"""

_FADE = 0.9  # weight of the past at each new step: about the last ten steps count
_GROWTH = 2.0  # the most that a budget grows over the largest step seen recently


class Pace:
    """Suggests a budget in tokens, between `tokens_min` and `tokens_max`."""

    def __init__(self, *, target_seconds: float, tokens_min: int, tokens_max: int) -> None:
        assert 0 < tokens_min <= tokens_max
        self._target = target_seconds
        self._min = tokens_min
        self._max = tokens_max
        self._ceiling = tokens_max
        self._largest = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Book a step."""
        self._weight = self._weight * _FADE + 1.0
        self._x = self._x * _FADE + tokens
        self._y = self._y * _FADE + seconds
        self._xx = self._xx * _FADE + tokens * tokens
        self._xy = self._xy * _FADE + tokens * seconds
        self._largest = max(self._largest * _FADE, float(tokens))

    def budget(self) -> int:
        """Tokens for the next step."""
        if self._weight == 0.0:
            return min(self._ceiling, max(self._min, 256))
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        covariance = self._xy / self._weight - mean_x * mean_y
        if variance > 0.01 * mean_x * mean_x and covariance > 0.0:
            slope = covariance / variance
            fitted = (self._target - (mean_y - slope * mean_x)) / slope
        else:  # steps of one size tell only their own time per token
            fitted = self._target / max(mean_y / max(mean_x, 1.0), 1e-9)
        fitted = min(fitted, max(_GROWTH * self._largest, float(self._min)))
        return int(min(max(fitted, self._min), self._ceiling))

    def shrink(self) -> None:
        """The device ran out of memory: half as many tokens at the most, from now on."""
        self._ceiling = max(self._min, self._ceiling // 2)

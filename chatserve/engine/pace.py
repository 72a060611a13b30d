"""Pace: the token budget of a step, from the measured time of the steps before.

A step that computes t tokens takes about  a + b t  seconds. Both are fitted by least squares over
recent steps with exponentially fading weights, and the budget is the t whose time is the target:
long prompts are cut into slices that leave room for other people's next tokens.

Steps of one size (replies that only need their next tokens) say nothing about b; the last slope
that was seen stands meanwhile, so that a prompt that arrives then gets a whole slice at once.

A step's fixed part, a, is mostly reading the weights, and a slice of a few tokens pays it as well
as one of hundreds. So while nobody waits for a next token, a step may take PATIENCE times as long.
"""

PATIENCE = 4.0

_FADE = 0.9  # weight of the past at each new step: about the last ten steps count
_FIRST_BUDGET = 256  # before any slope is known
_SPREAD_MIN = 0.01  # of the squared mean size; steps more alike than that give no slope


class Pace:
    """Suggests a budget in tokens, between `tokens_min` and `tokens_max`."""

    def __init__(self, *, target_seconds: float, tokens_min: int, tokens_max: int) -> None:
        assert 0 < tokens_min <= tokens_max
        self._target = target_seconds
        self._min = tokens_min
        self._ceiling = tokens_max
        self._slope: float | None = None
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Book a step."""
        self._weight = self._weight * _FADE + 1.0
        self._x = self._x * _FADE + tokens
        self._y = self._y * _FADE + seconds
        self._xx = self._xx * _FADE + tokens * tokens
        self._xy = self._xy * _FADE + tokens * seconds
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        covariance = self._xy / self._weight - mean_x * mean_y
        if variance > _SPREAD_MIN * mean_x * mean_x and covariance > 0.0:
            self._slope = covariance / variance

    def budget(self, *, patient: bool = False) -> int:
        """Tokens for the next step. patient: nobody waits for a next token meanwhile."""
        target = self._target * (PATIENCE if patient else 1.0)
        mean_x = self._x / self._weight if self._weight else 0.0
        mean_y = self._y / self._weight if self._weight else 0.0
        if self._slope is not None:
            budget = mean_x + (target - mean_y) / self._slope
        elif mean_y > target:
            # One size so far, and too slow: as if all of its time were its tokens'.
            budget = mean_x * target / mean_y
        elif mean_y > 0.0:
            budget = max(float(_FIRST_BUDGET), mean_x * target / mean_y)
        else:
            budget = float(_FIRST_BUDGET)
        return int(min(max(budget, self._min), self._ceiling))

    def shrink(self, tokens: int) -> bool:
        """The device ran out of memory at a step of `tokens`: from now on half of them at the most.

        Returns whether a smaller step is possible at all.
        """
        self._ceiling = min(self._ceiling, max(self._min, tokens // 2))
        return tokens > self._min

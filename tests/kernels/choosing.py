"""How the tokens of some rows are chosen, for tests."""

from typing import Any

import numpy as np

from chatserve_kernels.sampling import Choices


def choices(count: int, **columns: Any) -> Choices:
    """Neutral but for these, each one number or as many."""
    neutral = {"temperature": 1.0, "min_p": 0.0, "top_k": 0.0, "top_p": 1.0, "noise": 0.0}
    neutral["logarithms"] = 0.0
    given = {name: columns.get(name, value) for name, value in neutral.items()}
    numbers = {name: np.broadcast_to(np.float64(value), count) for name, value in given.items()}
    return Choices(**numbers, adjustments=columns.get("adjustments"))

"""Seeds of the tests that draw their own events.

A run of the suite says the same about the same tree each time: every test has a seed of its own,
made from its name. `CHATSERVE_SEED=NUMBER make test` gives all of them others, and
`CHATSERVE_SEED=random`, which `make soak` sets, new ones each time. The seed is printed, and pytest
shows it when the test fails; the same number in CHATSERVE_SEED=exactly:NUMBER repeats that run.
"""

import hashlib
import os
import random

VARIABLE = "CHATSERVE_SEED"
EXACTLY = "exactly:"


def drawn_seed() -> int:
    """32 bits for the test that runs now, printed.

    Raises:
        ValueError: what follows `exactly:` in CHATSERVE_SEED is not a number.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish.startswith(EXACTLY):
        seed = int(wish.removeprefix(EXACTLY))
    elif wish == "random":
        seed = random.SystemRandom().randrange(1 << 32)
    else:
        # "tests/engine/test_x.py::test_y[a-b] (call)": the phase in round brackets is left out.
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        digest = hashlib.blake2b(f"{wish}\0{test}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest)
    print(f"seed {seed}")
    return seed

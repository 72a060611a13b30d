"""The client is light: it can be imported where torch and the server's needs are not."""

import json
import subprocess
import sys

_SCRIPT = """
import json, sys
import chatserve.client
print(json.dumps(sorted(sys.modules)))
"""
HEAVY = {"torch", "transformers", "numpy", "starlette", "uvicorn", "redis", "msgspec"}
OWN = {"chatserve", "chatserve.errors", "chatserve.client"}


def test_importing_the_client_loads_nothing_of_the_server() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    loaded: list[str] = json.loads(told.stdout)
    assert not HEAVY & set(loaded)
    ours = {name for name in loaded if name.startswith("chatserve")}
    assert {name for name in ours if not name.startswith("chatserve.client")} <= OWN

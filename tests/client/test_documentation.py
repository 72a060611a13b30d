"""The examples of docs/client.md run as they stand, but for the address."""

import asyncio
import re
import sys
from pathlib import Path

import chatserve.client
from tests.api.fake_conversations import FakeChatReply
from tests.api.harness import PATIENCE_SECONDS, site

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"
ADDRESS = "http://127.0.0.1:8000"
PRINTED = [
    "an answer\ncached: 4 computed: 1\n",
    "user (2/2): Good evening!\nassistant (2/2): an answer\n",
    "404 not_found There is no such conversation.\n",
]


async def test_every_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(examples) == len(PRINTED)
    async with site() as served:

        def answer(reply: FakeChatReply) -> None:
            reply.say("an answer")
            reply.finish()
            served.conversations.keep(reply)

        served.conversations.on_send = answer
        for example, printed in zip(examples, PRINTED, strict=True):
            assert ADDRESS in example
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-W", "error", "-c", example.replace(ADDRESS, served.url),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            async with asyncio.timeout(3 * PATIENCE_SECONDS):
                out, errors = await process.communicate()
            assert (out.decode(), errors.decode(), process.returncode) == (printed, "", 0)


def test_the_page_names_what_there_is() -> None:
    page = PAGE.read_text("utf-8")
    errors = re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)
    assert set(errors) <= set(chatserve.client.__all__)
    for name, value in vars(chatserve.client).items():
        if isinstance(value, type) and issubclass(value, chatserve.client.ChatError):
            assert name in page
    for method in vars(chatserve.client.ChatClient):
        assert method.startswith("_") or method in page, method

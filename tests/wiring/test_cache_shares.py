"""A guaranteed share: what a key keeps while others fill the cache, and without it does not."""

from pathlib import Path

import pytest

from tests.wiring.in_process import living
from tests.wiring.recall import Messages, ask, state_of

WORDS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "silver"]


def _prompt(number: int) -> Messages:
    """Some 300 tokens that no other number shares from its first page on."""
    text = " ".join(WORDS[(number * 7 + index * index) % 10] for index in range(200))
    return [
        {"role": "system", "content": f"{WORDS[number % 10]} {number} {text}"},
        {"role": "user", "content": "Hi"},
    ]


@pytest.mark.parametrize("share", [0.0, 0.5])
async def test_a_guaranteed_share_stays_while_others_fill_the_cache(
    tmp_path: Path, share: float
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[keys]]\nname = "ann"\nkey = "key-of-ann"\nrole = "admin"\ncache_share = {share}\n'
        '[[keys]]\nname = "bob"\nkey = "key-of-bob"\n'
    )
    options = ["--api-key-file", str(keys), "--kv-memory", "6MiB", "--disk-capacity", "0"]
    with living(tmp_path, *options, "--context-length", "512") as server:
        async with server.client("key-of-ann") as ann, server.client("key-of-bob") as bob:
            total = (await state_of(ann))["cache"]["pages"]["total"]
            own = await ask(ann, _prompt(0))
            pages = own.computed // 16
            assert pages < total * 0.5, "the share holds it"
            for number in range(1, 3 + 2 * total // pages):
                await ask(bob, _prompt(number))
            again = await ask(ann, _prompt(0))
            assert (again.cached > 0) == bool(share)
            if share:
                assert again.computed < 16, "all of it"

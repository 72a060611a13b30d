"""Isolation in pairs, at every tier and after a restart: who owns a page finds it, others do not.

    key        another tenant's cached tokens are 0, one's own are more than 0
    salt       another `cache_salt` of one's own is another's
    model      another field of the fingerprint (type, page size, weights, configuration): nothing
               is found, and who had kept pages is told why; with the old one back, all is found

What another asks for is computed and then its own, so each place asks as somebody new.
"""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from chatserve.demonstration import MODEL_FOLDER
from chatserve.engine import tiers
from tests.wiring.in_process import Living, living
from tests.wiring.recall import Answer, Messages, ask, flush, state_of, until
from tests.wiring.server import MODEL, events

PAGE_SIZE = 16
TENANTS = ("ann", "bob", "cat", "dan", "eve", "fay")
SYSTEM = "You are Ada, and you like short answers. " * 6
PROMPT: Messages = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "My cat is called Pixel. What is my cat called?"},
]
SALT = "drawer"
SMALL_POOL = "2MiB"  # 409 tokens


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _always_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is below is brought up, however long the last time took: no rate is ever fresh."""
    monkeypatch.setattr(tiers, "STALE_SECONDS", -1.0)


def with_keys(folder: Path) -> list[str]:
    """Options for keys; ann is the admin."""
    path = folder / "keys.toml"
    tables = [
        f'[[keys]]\nname = "{name}"\nkey = "{key_of(name)}"\n'
        + ('role = "admin"\n' if name == "ann" else "")
        for name in TENANTS
    ]
    path.write_text("".join(tables))
    return ["--api-key-file", str(path), "--dtype", "float32"]


def key_of(tenant: str) -> str:
    return f"{tenant}-has-a-key"


async def asked(server: Living, tenant: str, *, salt: str | None = None) -> Answer:
    async with server.client(key_of(tenant)) as client:
        return await ask(client, PROMPT, salt=salt)


async def flushed(server: Living) -> None:
    async with server.client(key_of("ann")) as client:
        assert await flush(client) > 0


async def in_a_conversation(server: Living, tenant: str) -> dict[str, int]:
    """The receipt of the same prompt as a conversation's first turn."""
    async with server.client(key_of(tenant)) as client:
        made = (await client.post("/api/conversations", json={"system": SYSTEM})).json()
        turn = {"id": "1", "content": PROMPT[-1]["content"], "max_tokens": 8}
        answer = await client.post(f"/api/conversations/{made['id']}/turns", json=turn)
    (done,) = [each for each in events(answer.text.splitlines()) if "usage" in each]
    return done["receipt"]  # type: ignore[return-value]


def is_found(answer: Answer, tier: str, *, page_size: int = PAGE_SIZE) -> bool:
    """Whether all whole pages came from this tier, and more than none."""
    return 0 < answer.whole(page_size) == answer.cached == getattr(answer, tier)


async def test_tenants_and_salts_find_their_own_pages_in_every_tier(tmp_path: Path) -> None:
    options = with_keys(tmp_path)
    with living(tmp_path, *options) as server:
        # At the same time: who follows another's computation would have its pages.
        first, other = await asyncio.gather(asked(server, "ann"), asked(server, "bob"))
        assert (first.cached, other.cached) == (0, 0)
        assert other.text == first.text
        assert (await asked(server, "ann", salt=SALT)).cached == 0, "without and with a salt"

        assert is_found(await asked(server, "ann"), "device")
        assert is_found(await asked(server, "ann", salt=SALT), "device")
        assert (await asked(server, "cat")).cached == 0
        assert (await asked(server, "cat", salt=SALT)).cached == 0
        assert (await asked(server, "ann", salt=SALT + "!")).cached == 0
        await found_on_disk(server, "dan", salt="second")
    with living(tmp_path, *options) as server:
        await found_on_disk(server, "eve", salt="third")
        await flushed(server)
        assert (await in_a_conversation(server, "fay"))["disk"] == 0
        assert (await in_a_conversation(server, "ann"))["disk"] > 0


async def test_tenants_and_salts_find_their_own_pages_in_host_memory(tmp_path: Path) -> None:
    options = [*with_keys(tmp_path), "--kv-memory", SMALL_POOL, "--host-memory", "64MiB"]
    with living(tmp_path, *options, "--disk-capacity", "0") as server:
        first = await asked(server, "ann")
        assert (await asked(server, "ann", salt=SALT)).cached == 0
        for stranger, salt in (("bob", None), ("cat", SALT), ("ann", SALT + "!")):
            await emptied_by_others(server)
            assert (await asked(server, stranger, salt=salt)).cached == 0
            await emptied_by_others(server)
            for mine in (None, SALT):
                found = await asked(server, "ann", salt=mine)
                assert found.text == first.text
                assert found.device + found.host == found.cached == found.whole(PAGE_SIZE)
                assert found.host > found.device, "in host memory, but for what others left over"
        await emptied_by_others(server)
        assert (await in_a_conversation(server, "dan"))["host"] == 0
        assert (await in_a_conversation(server, "ann"))["host"] > 0
        async with server.client(key_of("ann")) as client:
            flushed_pages = (await client.post("/admin/cache/flush", json={})).json()
        assert flushed_pages["host_pages"] > 0
        assert (await asked(server, "ann")).cached == 0, "there is nothing below host memory"


async def emptied_by_others(server: Living) -> None:
    """The device has eve's pages, and next to none of others."""
    words = " ".join(["Pixel is a cat, and a grey one."] * 30)
    async with server.client(key_of("eve")) as client:
        await ask(client, [{"role": "user", "content": words}], max_tokens=1)


async def found_on_disk(server: Living, stranger: str, *, salt: str) -> None:
    """ann finds hers on the disk alone, with and without her salt; nobody else does.

    stranger, salt: a tenant who has not asked, and a salt that was not used.
    """
    await flushed_if_any(server)
    assert (await asked(server, stranger)).cached == 0
    assert (await asked(server, stranger, salt=SALT)).cached == 0
    assert (await asked(server, "ann", salt=salt)).cached == 0
    mine = await asked(server, "ann")
    assert is_found(mine, "disk")
    assert is_found(await asked(server, "ann", salt=SALT), "disk")
    # And on the device, where they are now.
    assert is_found(await asked(server, "ann"), "device")
    assert (await asked(server, stranger)).text == mine.text


async def flushed_if_any(server: Living) -> None:
    async with server.client(key_of("ann")) as client:
        await flush(client)
        pages = (await state_of(client))["cache"]["pages"]
    assert pages["cached"] == 0, "the device is empty"


def other_weights(folder: Path) -> None:
    """One bit, the least of one weight."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1  # bfloat16, little-endian
    path.write_bytes(raw)


def other_rotary(folder: Path) -> None:
    _edit(folder, lambda config: config["rope_parameters"].update(rope_theta=50_001.0))


def other_norm(folder: Path) -> None:
    _edit(folder, lambda config: config.update(rms_norm_eps=2e-6))


def _edit(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def a_copy(folder: Path, name: str, change: Callable[[Path], None] | None = None) -> list[str]:
    """The options for a copy of the demonstration model, changed or not."""
    copied = folder / name
    shutil.copytree(MODEL_FOLDER, copied)
    if change is not None:
        change(copied)
    return [str(copied), "--served-model-name", MODEL]


def others_are_known(server: Living) -> Callable[[], Awaitable[bool]]:
    async def known() -> bool:
        return server.others_known

    return known


async def others_find_nothing(folder: Path, others: dict[str, list[str]]) -> None:
    """A start for each of these options: none finds what the first model has kept, each keeps and
    finds its own; then the first one is back, and at last another secret."""

    @contextmanager
    def started(*more: str) -> Generator[Living]:
        with living(folder, "--dtype", "float32", *more) as server:
            yield server

    with started() as server:
        async with server.client() as client:
            first = await ask(client, PROMPT)
            assert first.cached == 0
    for name, more in others.items():
        size = int(more[-1]) if more[0] == "--page-size" else PAGE_SIZE
        with started(*more) as server:
            async with server.client() as client:
                await until("other models are not known", others_are_known(server))
                salted = await ask(client, PROMPT, salt=name)
                assert salted.missed == "new", "with this salt it was never asked"
                answer = await ask(client, PROMPT)
                assert answer.cached == 0, f"with another {name} a page was found"
                assert answer.missed == "other_model", name
                await flush(client)
                assert is_found(await ask(client, PROMPT), "disk", page_size=size), name
    # Where the model lies is no part of what it is.
    with started(*a_copy(folder, "unchanged")) as server:
        async with server.client() as client:
            answer = await ask(client, PROMPT)
            assert is_found(answer, "disk")
            assert answer.text == first.text
    # Names are keyed by the data folder's secret: with another one the pages are another's.
    (folder / "data" / "secret").unlink()
    with started() as server:
        async with server.client() as client:
            answer = await ask(client, PROMPT)
            assert answer.cached == 0, "with another secret a page was found"
            assert answer.missed == "new", "nor is it known that there is one"
            assert answer.text == first.text


async def test_another_type_other_weights_or_another_secret_find_nothing(tmp_path: Path) -> None:
    others = {
        "type": ["--dtype", "bfloat16"],
        "quantization": ["--quantize", "int8"],
        "weight": a_copy(tmp_path, "weights", other_weights),
    }
    await others_find_nothing(tmp_path, others)


@pytest.mark.soak
async def test_no_other_model_finds_anything(tmp_path: Path) -> None:
    others = {
        "type": ["--dtype", "bfloat16"],
        "quantization": ["--quantize", "int8"],
        "page size": ["--page-size", "32"],
        "smaller page size": ["--page-size", "8"],
        "weight": a_copy(tmp_path, "weights", other_weights),
        "rotary base": a_copy(tmp_path, "rotary", other_rotary),
        "constant of a norm": a_copy(tmp_path, "norm", other_norm),
    }
    await others_find_nothing(tmp_path, others)

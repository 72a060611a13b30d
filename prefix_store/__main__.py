"""The store's own commands, for a folder that no server has open.

python -m prefix_store check DIR       open every page; exit status 1 if anything but pages is
                                       found (after kill -9: what the next start takes in)
python -m prefix_store stats DIR       what is there as of the last checkpoint (also while a server
                                       runs)
python -m prefix_store gc DIR          remove old pages, keep within a capacity
python -m prefix_store witness DIR …   note what pages look like on the disk, before a drop (also
                                       while a server runs)
python -m prefix_store forgotten DIR   search for what was noted; exit status 1 if any is found
"""

import argparse
import json
import math
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from prefix_store.errors import StoreError
from prefix_store.files import LocalFiles
from prefix_store.inspection import SlabReport, inspect
from prefix_store.keys import SECRET_BYTES, MasterSecret
from prefix_store.layout import UNIT, shape_of
from prefix_store.names import NAME_BYTES
from prefix_store.proof import Witness, noted, search
from prefix_store.recovery import MINIMUM_BYTES
from prefix_store.slab import Slab
from prefix_store.store import PageStore, take_lock

_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_COLUMNS = ("slots", "pages", "free", "bad", "unlisted", "forgotten", "records", "tombstones")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 for something wrong, 2 for something refused."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.act(given))
    except (StoreError, OSError, ValueError) as error:
        print(f"prefix_store: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prefix_store", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", type=Path, metavar="DIR", help="the folder of the store")
    secret = argparse.ArgumentParser(add_help=False)
    secret.add_argument(
        "--secret", type=Path, metavar="FILE", help="the 32 bytes (default: DIR/../secret)"
    )
    report = argparse.ArgumentParser(add_help=False)
    report.add_argument("--json", action="store_true", help="print one JSON document")

    check = commands.add_parser("check", parents=[folder, secret, report], help="open every page")
    check.set_defaults(act=_check)
    stats = commands.add_parser("stats", parents=[folder, secret, report], help="what is there")
    stats.set_defaults(act=_stats)
    gc = commands.add_parser("gc", parents=[folder, secret], help="remove old pages")
    gc.add_argument("--max-age", type=_age, metavar="SECONDS", help="unused for longer: removed")
    gc.add_argument(
        "--capacity", type=_capacity, metavar="BYTES", help="all files together, at most"
    )
    gc.set_defaults(act=_gc)
    witness = commands.add_parser("witness", parents=[folder], help="note pages for a proof")
    witness.add_argument("names", nargs="+", metavar="NAME", help="64 hexadecimal digits")
    witness.set_defaults(act=_witness)
    forgotten = commands.add_parser("forgotten", parents=[folder], help="search for noted pages")
    forgotten.add_argument("--proof", type=Path, required=True, metavar="FILE")
    forgotten.set_defaults(act=_forgotten)
    return parser


def _age(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more; got {text!r}")
    return seconds


def _capacity(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})([KMGT]iB)?", text)
    value = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not MINIMUM_BYTES <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected bytes, such as 4GiB, {MINIMUM_BYTES} or more; got {text!r}"
        )
    return value


def _secret(given: argparse.Namespace) -> MasterSecret:
    path: Path = given.secret or given.folder.absolute().parent / "secret"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise StoreError(
            f"there is no secret {path}: DIR is the folder 'pages' of a data folder, "
            "and --secret names a secret that lies elsewhere"
        ) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise ValueError(f"{path} must be a file of mode 0600")
        raw = file.read(SECRET_BYTES + 1)
    if len(raw) != SECRET_BYTES:
        raise ValueError(f"{path} does not hold a secret of {SECRET_BYTES} bytes")
    return MasterSecret(raw)


def _check(given: argparse.Namespace) -> int:
    files = LocalFiles()
    _folder(given)
    lock = take_lock(files, given.folder)
    try:
        reports = inspect(given.folder, _secret(given), files, verify=True)
    finally:
        files.close(lock)
    _print(given, reports, verified=True)
    return 0 if all(report.is_well for report in reports) else 1


def _stats(given: argparse.Namespace) -> int:
    _folder(given)
    reports = inspect(given.folder, _secret(given), LocalFiles(), verify=False)
    _print(given, reports, verified=False)
    return 0


def _print(given: argparse.Namespace, reports: list[SlabReport], *, verified: bool) -> None:
    if given.json:
        print(json.dumps([report.as_mapping() for report in reports], indent=2))
        return
    columns = _COLUMNS if verified else ("slots", "pages", "free", "tombstones")
    print("  ".join(["slab".ljust(32), "MiB".rjust(9), *columns]))
    for report in reports:
        if report.trouble is not None:
            print(f"{report.slab:32}  {report.trouble}")
            continue
        fields = report.as_mapping()
        cells = [str(fields[column]).rjust(len(column)) for column in columns]
        print("  ".join([report.slab.ljust(32), f"{report.bytes / 2**20:9.1f}", *cells]))
        if not verified:
            counts = ", ".join(f"{name} {value:g}" for name, value in report.counters.items())
            print(f"  counted: {counts or 'nothing yet'}")


def _gc(given: argparse.Namespace) -> int:
    store = _open(given, capacity_bytes=given.capacity, max_age_seconds=given.max_age)
    try:
        _open_slabs(given, store)
        removed = store.gc()
        figures = store.statistics()
    finally:
        store.close()
    whole = f" and {figures.reclaimed} whole slabs" if figures.reclaimed else ""
    print(f"{removed} pages{whole} removed; {figures.bytes / 2**20:.1f} MiB are left")
    return 1 if figures.degraded else 0


def _witness(given: argparse.Namespace) -> int:
    names = [bytes.fromhex(name) for name in given.names]
    if any(len(name) != NAME_BYTES for name in names):
        raise ValueError(f"a page name has {NAME_BYTES} bytes")
    _folder(given)
    witnesses = noted(given.folder, names)
    for witness in witnesses:
        print(witness.to_json())
    return 0 if {witness.name for witness in witnesses} >= set(names) else 1


def _open(
    given: argparse.Namespace, *, capacity_bytes: int | None, max_age_seconds: float | None
) -> PageStore:
    """The store of the folder; without a capacity, one that fits what is there."""
    _folder(given)
    there = sum(path.stat().st_size for path in given.folder.iterdir() if path.is_file())
    return PageStore.open(
        given.folder,
        _secret(given),
        capacity_bytes=there + MINIMUM_BYTES if capacity_bytes is None else capacity_bytes,
        max_age_seconds=max_age_seconds,
    )


def _open_slabs(given: argparse.Namespace, store: PageStore) -> list[Slab]:
    """The slabs that can be opened as they are: a command with another secret than the server's
    must not begin any anew."""
    slabs: list[Slab] = []
    reports = inspect(given.folder, _secret(given), LocalFiles(), verify=False)
    # Where they do not fit together, the first to be opened stays: the one used last.
    for report in sorted(reports, key=lambda report: report.saved_at, reverse=True):
        if report.trouble is not None:
            print(f"prefix_store: {report.slab} is left alone: {report.trouble}", file=sys.stderr)
            continue
        try:
            with (given.folder / f"{report.slab}.slab").open("rb") as file:
                shape = shape_of(file.read(UNIT))
        except FileNotFoundError:
            print(f"prefix_store: {report.slab} went whole, to make room", file=sys.stderr)
            continue
        slabs.append(store.slab(shape))
    return slabs


def _forgotten(given: argparse.Namespace) -> int:
    _folder(given)
    lines = given.proof.read_text().splitlines()
    witnesses = [Witness.from_json(line) for line in lines if line.strip()]
    if not witnesses:
        raise ValueError(f"{given.proof} holds no witness: nothing can be proved with it")
    traces = 0
    for trace in search([given.folder], witnesses):
        traces += 1
        print(f"{trace.path}: {trace.what} of {trace.name.hex()} at byte {trace.offset}")
    pieces = sum(len(witness.pieces) for witness in witnesses)
    print(f"{len(witnesses)} pages ({pieces} pieces): {traces} traces found")
    return 1 if traces else 0


def _folder(given: argparse.Namespace) -> None:
    if not given.folder.is_dir():
        raise StoreError(f"{given.folder} is not a folder")


if __name__ == "__main__":
    sys.exit(main())

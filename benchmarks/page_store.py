"""Throughput of the page store beside the raw disk and AES-256-GCM alone, in one run.

    python -m benchmarks.page_store [--json FILE]

Pages of 64 KiB and 1.75 MiB, one and two threads, the page cache warm: what is measured is what the
store adds. `disk` writes and reads random bytes of a slot's size at a slot's offset in the same
folder, with a sync after as many bytes as between two of the store's checkpoints; `aes` encrypts
and decrypts pages with one key from one buffer into another. They take turns, round by round, and
each figure is that of its fastest round: the one in which nobody else took the cores.
The aim: put and get at 60 % of the slower of the two, or more.
"""

import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.report import run
from prefix_store import MasterSecret, PageRead, PageShape, PageStore, PageWrite, Slab
from prefix_store.layout import SlotLayout
from prefix_store.slots import WINDOW_BYTES

ROUNDS = 12
ROUND_BYTES = 192 << 20  # of each kind in a round; the store's files hold the pages of one round
BATCH = 8  # pages of one call
TARGET = 0.6
SIZES = {"64 KiB": 64 << 10, "1.75 MiB": 1792 << 10}
Work = Callable[[int], None]  # what a thread of this number does


def timed(threads: int, work: Work) -> float:
    """Seconds until all threads are done; they begin together."""
    barrier = threading.Barrier(threads + 1)

    def act(number: int) -> None:
        barrier.wait()
        work(number)

    workers = [threading.Thread(target=act, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


class Bench:
    """All kinds of work on one size of pages in one folder."""

    def __init__(self, folder: Path, page_bytes: int, threads: int) -> None:
        self.shape = PageShape(fingerprint=bytes(32), page_bytes=page_bytes, page_tokens=16)
        self.threads = threads
        self.pages = ROUND_BYTES // page_bytes // threads // BATCH * BATCH
        self.slot_bytes = SlotLayout(self.shape).slot_bytes
        self._folder = folder
        self._tokens = bytes(self.shape.token_bytes)
        self._sources = [bytearray(os.urandom(page_bytes)) for _ in range(threads)]
        self._targets = [[bytearray(page_bytes) for _ in range(BATCH)] for _ in range(threads)]
        self._raw = [bytearray(os.urandom(self.slot_bytes)) for _ in range(threads)]
        self._sealed = [bytearray(page_bytes + 16) for _ in range(threads)]
        self._cipher = AESGCM(bytes(32))
        self._round = 0

    @property
    def work_bytes(self) -> int:
        """Page bytes of one kind of work."""
        return self.threads * self.pages * self.shape.page_bytes

    def name(self, thread: int, page: int) -> bytes:
        return hashlib.sha256(b"%d %d %d" % (self._round, thread, page)).digest()

    def figures(self) -> dict[str, float]:
        """Bytes a second of each kind."""
        seconds: dict[str, list[float]] = {}
        capacity = 2 * ROUND_BYTES + (64 << 20)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            store = PageStore.open(
                Path(folder) / "pages", MasterSecret.ephemeral(), capacity_bytes=capacity
            )
            slab = store.slab(self.shape)
            raw = os.open(Path(folder) / "raw", os.O_RDWR | os.O_CREAT)
            kinds: dict[str, Work] = {
                "put": self._put(slab),
                "disk write": self._write(raw),
                "aes encrypt": self._encrypt,
                "get": self._get(slab),
                "disk read": self._read(raw),
                "aes decrypt": self._decrypt,
            }
            for self._round in range(-1, ROUNDS):  # one round to warm up
                for kind, work in kinds.items():
                    took = timed(self.threads, work)
                    if self._round >= 0:
                        seconds.setdefault(kind, []).append(took)
            os.close(raw)
            store.close()
        return {kind: self.work_bytes / min(all_) for kind, all_ in seconds.items()}

    def _batches(self) -> Sequence[range]:
        return [range(first, first + BATCH) for first in range(0, self.pages, BATCH)]

    def _put(self, slab: Slab) -> Work:
        def work(thread: int) -> None:
            source = self._sources[thread]
            for batch in self._batches():
                writes = [
                    PageWrite(self.name(thread, page), None, page, self._tokens, source)
                    for page in batch
                ]
                if not all(slab.put(writes)):
                    sys.exit("the store did not take a page")

        return work

    def _get(self, slab: Slab) -> Work:
        def work(thread: int) -> None:
            targets = self._targets[thread]
            for batch in self._batches():
                reads = [
                    PageRead(self.name(thread, page), self._tokens, target)
                    for page, target in zip(batch, targets, strict=True)
                ]
                if not all(slab.get(reads)):
                    sys.exit("a page was lost")

        return work

    def _write(self, raw: int) -> Work:
        def work(thread: int) -> None:
            data, unsynced = self._raw[thread], 0
            for page in range(self.pages):
                os.pwrite(raw, data, self._offset(thread, page))
                unsynced += self.threads * self.slot_bytes
                if thread == 0 and unsynced >= WINDOW_BYTES:
                    os.fdatasync(raw)
                    unsynced = 0

        return work

    def _read(self, raw: int) -> Work:
        def work(thread: int) -> None:
            buffer = self._raw[thread]
            for page in range(self.pages):
                os.preadv(raw, [buffer], self._offset(thread, page))

        return work

    def _offset(self, thread: int, page: int) -> int:
        # Rounds take turns in two places, as the store's slots do.
        place = (self._round % 2 * self.threads + thread) * self.pages + page
        return place * self.slot_bytes

    def _encrypt(self, thread: int) -> None:
        for page in range(self.pages):
            self._cipher.encrypt_into(
                page.to_bytes(12, "little"), self._sources[thread], None, self._sealed[thread]
            )

    def _decrypt(self, thread: int) -> None:
        into = self._targets[thread][0]
        last = (self.pages - 1).to_bytes(12, "little")
        for _ in range(self.pages):
            self._cipher.decrypt_into(last, self._sealed[thread], None, into)


async def measure() -> Mapping[str, object]:
    """GB/s of each kind, and the store's part of the slower of disk and AES."""
    figures: dict[str, object] = {}
    for words, page_bytes in SIZES.items():
        for threads in (1, 2):
            bench = Bench(Path.cwd(), page_bytes, threads)
            rates = bench.figures()
            put = rates["put"] / min(rates["disk write"], rates["aes encrypt"])
            get = rates["get"] / min(rates["disk read"], rates["aes decrypt"])
            print(f"pages of {words}, {threads} thread{'s'[: threads - 1]}")
            for kind, rate in rates.items():
                print(f"  {kind:12} {rate / 1e9:6.2f} GB/s")
            print(f"  put {put:.0%}, get {get:.0%} of the slower (aim {TARGET:.0%})")
            figures[f"{words}, {threads}"] = {
                **{f"{kind} GB/s": round(rate / 1e9, 2) for kind, rate in rates.items()},
                "put ratio": round(put, 2),
                "get ratio": round(get, 2),
            }
    return figures


if __name__ == "__main__":
    sys.exit(run("benchmarks.page_store", __doc__, measure))

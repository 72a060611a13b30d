"""Throughput of the page store beside the raw disk and AES-256-GCM alone, in one run.

    python -m benchmarks.page_store [--json FILE]

Pages of 12, 40 (the demonstration model's), 64 KiB and 1.75 MiB, one and two threads, the page
cache warm: what is measured is what the store adds. `disk` writes and reads random bytes of a
slot's size at a slot's offset in the same folder, with a sync after as many bytes as between two of
the store's checkpoints; `aes` encrypts and decrypts pages with one key from one buffer into
another. They take turns, round by round, and each figure is that of its fastest round: the one in
which nobody else took the cores. How much slower the median round was tells how quiet the machine
is.
The aim: put and get at 60 % of the slower of the two, or more.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.report import run
from prefix_store import MasterSecret, PageRead, PageShape, PageStore, PageWrite, Slab
from prefix_store.layout import SlotLayout
from prefix_store.slots import WINDOW_BYTES
from prefix_store.table import LARGEST_WINDOW

ROUNDS = 12
ROUND_BYTES = 192 << 20  # of each kind in a round, about: as many windows as come next to it
# What one call moves in the server: half of a chat of 1,500 tokens, and no more than one part.
CALL_PAGES, CALL_BYTES = 48, 4 << 20
CHAT_PAGES = 96
TARGET = 0.6
SIZES = {"12 KiB": 12 << 10, "40 KiB": 40 << 10, "64 KiB": 64 << 10, "1.75 MiB": 1792 << 10}
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
        self.call = max(1, min(CALL_PAGES, CALL_BYTES // page_bytes))
        self.slot_bytes = SlotLayout(self.shape).slot_bytes
        # Between two syncs of the store; each round has the same number of them.
        self.window = min(LARGEST_WINDOW, WINDOW_BYTES // self.slot_bytes)
        windows = max(1, round(ROUND_BYTES / (self.window * self.slot_bytes)))
        self.pages = windows * self.window // threads
        self._folder = folder
        self._tokens = bytes(self.shape.token_bytes)
        self._sources = [bytearray(os.urandom(page_bytes)) for _ in range(threads)]
        self._targets = [[bytearray(page_bytes) for _ in range(self.call)] for _ in range(threads)]
        self._raw = [bytearray(os.urandom(self.slot_bytes)) for _ in range(threads)]
        self._sealed = [bytearray(page_bytes + 16) for _ in range(threads)]
        self._cipher = AESGCM(bytes(32))
        self._round = 0
        self._writes: list[list[list[PageWrite]]] = []  # by thread and call
        self._reads: list[list[list[PageRead]]] = []

    @property
    def work_bytes(self) -> int:
        """Page bytes of one kind of work."""
        return self.threads * self.pages * self.shape.page_bytes

    def figures(self) -> tuple[dict[str, float], float]:
        """Bytes a second of each kind, and how much slower the median round was."""
        seconds: dict[str, list[float]] = {}
        # The pages of two rounds: from the third on there is no growth, as in a store in use.
        capacity = 2 * self.threads * self.pages * self.slot_bytes + (16 << 20)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            store = PageStore.open(
                Path(folder) / "pages", MasterSecret.ephemeral(), capacity_bytes=capacity
            )
            slab = store.slab(self.shape)
            raw = os.open(Path(folder) / "raw", os.O_RDWR | os.O_CREAT)
            kinds: dict[str, Work] = {
                "put": lambda thread: self._put(slab, thread),
                "disk write": self._write(raw),
                "aes encrypt": self._encrypt,
                "get": lambda thread: self._get(slab, thread),
                "disk read": self._read(raw),
                "aes decrypt": self._decrypt,
            }
            for self._round in range(-1, ROUNDS):  # one round to warm up
                self._prepare()
                for kind, work in kinds.items():
                    took = timed(self.threads, work)
                    if self._round >= 0:
                        seconds.setdefault(kind, []).append(took)
            os.close(raw)
            store.close()
        slowed = statistics.median(statistics.median(all_) / min(all_) for all_ in seconds.values())
        rates = {kind: self.work_bytes / min(all_) for kind, all_ in seconds.items()}
        return rates, slowed

    def _prepare(self) -> None:
        """Put in words what a round asks for: chats one after the other, new in each round."""
        self._writes, self._reads = [], []
        calls = range(0, self.pages, self.call)
        for thread, (source, targets) in enumerate(zip(self._sources, self._targets, strict=True)):
            names = [
                hashlib.sha256(b"%d %d %d" % (self._round, thread, page)).digest()
                for page in range(self.pages)
            ]
            writes = [
                PageWrite(
                    name,
                    names[page - 1] if page % CHAT_PAGES else None,
                    page % CHAT_PAGES,
                    self._tokens,
                    source,
                )
                for page, name in enumerate(names)
            ]
            reads = [
                PageRead(name, self._tokens, targets[page % self.call])
                for page, name in enumerate(names)
            ]
            self._writes.append([writes[at : at + self.call] for at in calls])
            self._reads.append([reads[at : at + self.call] for at in calls])

    def _put(self, slab: Slab, thread: int) -> None:
        for writes in self._writes[thread]:
            if not all(slab.put(writes)):
                sys.exit("the store did not take a page")

    def _get(self, slab: Slab, thread: int) -> None:
        for reads in self._reads[thread]:
            if not all(slab.get(reads)):
                sys.exit("a page was lost")

    def _write(self, raw: int) -> Work:
        def work(thread: int) -> None:
            data, step = self._raw[thread], self.window // self.threads
            for page in range(self.pages):
                os.pwrite(raw, data, self._offset(thread, page))
                if thread == 0 and page % step == step - 1:
                    os.fdatasync(raw)

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
            rates, slowed = bench.figures()
            put = rates["put"] / min(rates["disk write"], rates["aes encrypt"])
            get = rates["get"] / min(rates["disk read"], rates["aes decrypt"])
            print(f"pages of {words}, {threads} thread{'s'[: threads - 1]}")
            for kind, rate in rates.items():
                print(f"  {kind:12} {rate / 1e9:6.2f} GB/s")
            print(f"  put {put:.0%}, get {get:.0%} of the slower (aim {TARGET:.0%})")
            print(f"  a median round took {slowed:.2f} times the fastest", flush=True)
            figures[f"{words}, {threads}"] = {
                **{f"{kind} GB/s": round(rate / 1e9, 2) for kind, rate in rates.items()},
                "put ratio": round(put, 2),
                "get ratio": round(get, 2),
                "median round": round(slowed, 2),
            }
    return figures


if __name__ == "__main__":
    sys.exit(run("benchmarks.page_store", __doc__, measure))

"""Floor 0: how pages are named, and where sealed pages are kept over restarts.

Bytes in, bytes out: this package knows neither torch nor chatserve. `names.py` and `keys.py` need
the standard library alone; the store (`PageStore.open(…).slab(…)`) imports `cryptography` when the
first slab is opened. README.md here is the document of the format on disk.
"""

from prefix_store.errors import StoreError, StoreLocked
from prefix_store.keys import MasterSecret
from prefix_store.names import NAME_BYTES, PageName, PageNamer, PublicNames, Root, RootFields
from prefix_store.others import OtherPages
from prefix_store.slab import Slab
from prefix_store.store import PageStore
from prefix_store.values import (
    Evictions,
    Misses,
    PageRead,
    PageShape,
    PageWrite,
    SlabStatistics,
    StoreStatistics,
    Verdict,
)

__all__ = [
    "NAME_BYTES",
    "Evictions",
    "MasterSecret",
    "Misses",
    "OtherPages",
    "PageName",
    "PageNamer",
    "PageRead",
    "PageShape",
    "PageStore",
    "PageWrite",
    "PublicNames",
    "Root",
    "RootFields",
    "Slab",
    "SlabStatistics",
    "StoreError",
    "StoreLocked",
    "StoreStatistics",
    "Verdict",
]

"""Floor 0: how pages are named, and where sealed pages will be kept.

Bytes in, bytes out: this package knows neither torch nor chatserve. Today it holds the names
(`names.py`) and the key material they hang on (`keys.py`).
"""

from prefix_store.keys import MasterSecret
from prefix_store.names import NAME_BYTES, PageName, PageNamer, Root, RootFields

__all__ = ["NAME_BYTES", "MasterSecret", "PageName", "PageNamer", "Root", "RootFields"]

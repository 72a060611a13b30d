"""What the page store raises: one tree, one clear line each.

    StoreError            the store cannot do what was asked; the message says why
    └── StoreLocked       another process (or another PageStore) has the folder

`get` and `put` raise neither for what a disk does: they count it and say False.
"""


class StoreError(Exception):
    """The store cannot be opened, or cannot keep a promise it was asked for."""


class StoreLocked(StoreError):
    """The folder has an owner already: one writer at a time."""

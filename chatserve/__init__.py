"""chatserve: a streaming chat server that never reads a conversation twice."""

__version__ = "0.1.0"

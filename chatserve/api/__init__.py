"""Floor 5: HTTP, server-sent events and JSON over the chat floor.

It may not know pages, steps or tensors, and it never looks inside a token: token ids come in and
go out as opaque numbers. Everything it needs from below arrives through `build_app`'s parameters
(see `collaborators.py`); `server.py` puts the app behind sockets that have limits.
"""

"""The corpus: chats that a seed makes, for training and for held-out probes."""

from chatserve.demonstration.corpus.compose import SKILLS, make_chat, make_probe
from chatserve.demonstration.corpus.draw import Chat, Part, Turn

__all__ = ["SKILLS", "Chat", "Part", "Turn", "make_chat", "make_probe"]

"""A byte-level tokenizer with tokens that end a character and carry more text behind it."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatserve.chat.text.control import ControlTokens
from chatserve.chat.text.tokenizer import Tokenizer

# The second byte of 'ü' with a stop string, or with the first byte of the next character; the
# third byte of '好' with letters.
_CARRYING = (b"EN", b"END", b"\xbcEND", b"\xbc\xc3", b"ab", b"\xbdab")


def carrying_tokenizer() -> Tokenizer:
    """Every single byte is a token, and those of `_CARRYING`."""
    names = _names_of_bytes()
    pieces = [*names, *("".join(names[byte] for byte in piece) for piece in _CARRYING)]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), ControlTokens({}))


def ids_of(tokenizer: Tokenizer, *pieces: bytes) -> list[int]:
    """The tokens that say just these bytes."""
    by_bytes = {tokenizer.token_bytes(each): each for each in range(256 + len(_CARRYING))}
    return [by_bytes[piece] for piece in pieces]


def _names_of_bytes() -> list[str]:
    """How the library spells each byte in a vocabulary: visible ones as themselves, the others by
    the characters from U+0100 on, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hidden = iter(name for name in alphabet if ord(name) >= 0x100)
    return [chr(byte) if chr(byte) in alphabet else next(hidden) for byte in range(256)]

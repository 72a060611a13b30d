"""Tokenizer: text to ids and ids to text, with user text kept apart from control tokens.

It may not know templates at work (`template.py`) or pages. Theory of operation: there are two
tokenizers. The *full* one is the model's own. The *frozen* one is the same, except that each
control token goes under a random name that nobody outside this process can know, in the added
tokens and in the vocabulary:

    full      <|im_start|> = 1      contents with '<|im_start|>' give 1: a forged turn
    frozen    ␀7f3a…:1␀    = 1      contents give the pieces '<', '|', 'im', …: plain text

To encode a rendered chat the spans that the template itself wrote are replaced by the random
names and the frozen one encodes the whole: prefix spaces, white space swallowed by added tokens
and merges come out as the full tokenizer would have them, because it is the same code on the same
pieces. The full one goes first, and its ids are taken where its control tokens are exactly the
template's spans, which makes ids equal to `apply_chat_template(tokenize=True)` by construction.

Methods that encode are for any thread. They use `encode_batch_fast`, also for one text, because
`encode` holds Python's lock (2 s for 180,000 tokens) and the batch call does not. Nothing here
sets truncation or padding once the tokenizer is loaded, so threads share it freely.
"""

import json
import re
import secrets
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatserve.chat.text.control import ControlTokens, Span
from chatserve.errors import ModelRefused, RequestError

_SECRET_EDGE = "\U000f0000"  # private use: no vocabulary has it
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")


def load_pretrained(folder: Path) -> PreTrainedTokenizerFast:
    """Read a model folder's tokenizer. Never runs code from the folder."""
    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises nearly anything for a broken folder
        if not (folder / "tokenizer.json").exists():
            raise ModelRefused(f"{folder} has no fast tokenizer (tokenizer.json).") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelRefused(f"{folder} has no usable tokenizer: {reason}") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise ModelRefused(f"{folder} has no fast tokenizer (tokenizer.json).")
    return loaded


def control_tokens(pretrained: PreTrainedTokenizerFast, template_text: str) -> ControlTokens:
    """Added tokens that are special or occur in `template_text`, which may hold renders too."""
    return ControlTokens(
        {
            token.content: token_id
            for token_id, token in pretrained.added_tokens_decoder.items()
            if token.content
            and (token.special or (token.content in template_text and not token.content.isspace()))
        }
    )


class Tokenizer:
    """The two tokenizers of one model, and what single tokens say."""

    def __init__(self, pretrained: PreTrainedTokenizerFast, control: ControlTokens) -> None:
        self.control = control
        self.eos_id: int | None = _single(pretrained.eos_token_id)
        self._full: Backend = pretrained.backend_tokenizer
        self._full.no_truncation()
        self._full.no_padding()
        self._full.encode_special_tokens = False
        described = self._full.to_str()
        state = json.loads(described)
        self.digest = _digest(described, control)  # stands for the ids that texts get
        self._secret_names = _secret_names(control)
        self._frozen = _frozen(state, self._secret_names)
        _check_ids(self._full, self._frozen, self._secret_names)
        self.byte_level = _is_byte_level(state.get("decoder"))
        self.special_ids = frozenset(
            token_id for token_id, token in pretrained.added_tokens_decoder.items() if token.special
        )
        # Added tokens that take the white space before, or behind them into themselves.
        added = list(pretrained.added_tokens_decoder.values())
        self.swallows_before = frozenset(token.content for token in added if token.lstrip)
        self.swallows_behind = frozenset(token.content for token in added if token.rstrip)
        self._added = {
            token_id: token.content for token_id, token in pretrained.added_tokens_decoder.items()
        }
        self._anchor = None if self.byte_level else self._find_anchor()
        self._bytes: dict[int, bytes] = {}  # at most one entry per token of the vocabulary

    # Text to ids, in any thread --------------------------------------------------------------

    def encode_text(self, text: str) -> tuple[int, ...]:
        """A whole prompt of the caller's own (`/v1/completions`), as vLLM encodes it.

        The tokenizer's own special tokens (BOS) are added, and control tokens in the text count
        as such: such a prompt is the place of a chat template, so the caller writes the turns.
        """
        return tuple(_encode(self._full, text, add_special_tokens=True))

    def encode_rendered(self, text: str, spans: Sequence[Span]) -> tuple[int, ...]:
        """A rendered chat whose control tokens are at `spans`; all else is plain text.

        No BOS is added: templates write their own.
        """
        control = self.control
        wanted = [control.ids[text[span.start : span.end]] for span in spans]
        ids = _encode(self._full, text)
        if [token for token in ids if token in control.id_set] == wanted:
            return tuple(ids)
        pieces: list[str] = []
        position = 0
        for span in spans:
            pieces.append(text[position : span.start])
            pieces.append(self._secret_names[text[span.start : span.end]])
            position = span.end
        pieces.append(text[position:])
        return tuple(_encode(self._frozen, "".join(pieces)))

    # Ids to text, in any thread ---------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that belong together, without special tokens."""
        return self._full.decode(list(ids), skip_special_tokens=True)

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for one byte of a character (`<0x0A>`)."""
        if self.byte_level or token_id in self._added:
            return False
        piece = self._full.id_to_token(token_id)
        return piece is not None and _BYTE_TOKEN.match(piece) is not None

    def is_silent(self, token_id: int) -> bool:
        """Whether a token never has text: special ones, and ids that the vocabulary lacks."""
        return token_id in self.special_ids or self._full.id_to_token(token_id) is None

    def added_text(self, token_id: int) -> str | None:
        """The text of an added token, special or not; None for all others."""
        return self._added.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token says inside a text, as bytes: maybe a part of a character.

        A special token gives its name, so that log probabilities can show it.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def spell(self, ids: Sequence[int]) -> str:
        """What plain ids say inside a text: nothing is left out, not even a first space."""
        if self.byte_level:
            return b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        before = [] if self._anchor is None else [self._anchor]
        return self.decode([*before, *ids]).removeprefix(self.decode(before))

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._full.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self.special_ids:
            return piece.encode()
        if self.byte_level:
            return _byte_level_bytes(piece)
        byte = None if token_id in self._added else _BYTE_TOKEN.match(piece)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return self.spell([token_id]).encode()

    def _find_anchor(self) -> int | None:
        """A plain token that has text of its own.

        At the start of a text decoders drop a space, so tokens are looked at behind this one.
        """
        for token_id in range(self._full.get_vocab_size()):
            if token_id not in self._added and not self.is_byte(token_id):
                text = self.decode([token_id])
                if text and text.isalnum():
                    return token_id
        return None


def _digest(described: str, control: ControlTokens) -> bytes:
    text = json.dumps([described, sorted(control.ids.items())])
    return blake2b(text.encode(errors="surrogatepass"), digest_size=32).digest()


def _single(eos: object) -> int | None:
    return eos if isinstance(eos, int) else None


def _encode(backend: Backend, text: str, *, add_special_tokens: bool = False) -> list[int]:
    try:
        batch = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError) as error:  # the library's way to refuse such a string
        raise RequestError("The text holds half of a surrogate pair.") from error
    return batch[0].ids


def _secret_names(control: ControlTokens) -> dict[str, str]:
    nonce = secrets.token_hex(16)
    return {
        content: f"{_SECRET_EDGE}{nonce}:{token_id}{_SECRET_EDGE}"
        for content, token_id in control.ids.items()
    }


def _frozen(state: dict[str, Any], names: dict[str, str]) -> Backend:
    """A tokenizer whose control tokens have other names, everywhere they are listed.

    In the vocabulary too: models that look whole words or best paths up there (BPE with
    ignore_merges, Unigram) would find a control token again without its being an added one.
    """
    model: dict[str, Any] = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(piece, piece): token for piece, token in vocabulary.items()}
    else:
        renamed = [[names.get(piece, piece), score] for piece, score in vocabulary]
    frozen_model = {**model, "vocab": renamed}
    if model.get("unk_token") in names:
        frozen_model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        frozen_model["merges"] = [pair for pair in model["merges"] if not _touches(pair, names)]
    added = [
        {**token, "content": names[token["content"]], "normalized": False}
        if token["content"] in names
        else token
        for token in state["added_tokens"]
    ]
    frozen = {
        **state,
        "model": frozen_model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return Backend.from_str(json.dumps(frozen))


def _touches(pair: str | list[str], names: dict[str, str]) -> bool:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left in names or right in names or left + right in names


def _check_ids(full: Backend, frozen: Backend, names: dict[str, str]) -> None:
    """The library gives added tokens ids by its own rule; both must have come out alike."""
    for token_id, token in full.get_added_tokens_decoder().items():
        name = names.get(token.content, token.content)
        if frozen.token_to_id(name) != token_id:
            raise ModelRefused(f"The tokenizer's added token {token.content!r} has an unclear id.")


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether tokens are bytes in disguise and a text is just their sequence."""
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        kinds = [part["type"] for part in decoder["decoders"]]
        return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}
    return decoder["type"] == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's disguise of the 256 bytes: printable ones are themselves, the rest follow U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    """A piece with any character outside the alphabet (an added token) stands for itself."""
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()

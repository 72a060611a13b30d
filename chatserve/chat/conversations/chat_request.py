"""How a chat's reply was asked for: kept with it, so that a crash changes nothing about it.

It may not know stores or engines. A turn's own sampling fields go before its conversation's
settings; both are as OpenAI spells them, checked and made canonical by floor 5 before they were
stored. The seed is drawn at acceptance where neither names one, and kept here too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatserve.chat.values import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """sampling: the turn's own fields. seed: drawn at acceptance, for when nobody names one.
    encoding: what token ids of this reply mean."""

    sampling: Mapping[str, object]
    seed: int
    encoding: str

    def to_json(self) -> bytes:
        """As it is stored."""
        fields = {"sampling": dict(self.sampling), "seed": self.seed, "encoding": self.encoding}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ChatRequest":
        """Raises ValueError where it is none."""
        try:
            fields: dict[str, Any] = json.loads(data)
            return cls(
                sampling=dict(fields["sampling"]),
                seed=int(fields["seed"]),
                encoding=str(fields["encoding"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError("not a chat's request") from error

    def generation(self, settings: Mapping[str, object]) -> Generation:
        """The turn's fields over the conversation's settings. Raises ValueError for fields that
        nobody checked: they were written by another version, or another program."""
        fields: dict[str, Any] = {**settings, **self.sampling}
        try:
            return _generation(fields, self.seed)
        except (TypeError, AttributeError) as error:
            raise ValueError("not sampling fields") from error


def _generation(fields: Mapping[str, Any], seed: int) -> Generation:
    def number(name: str) -> float | None:
        value = fields.get(name)
        return None if value is None else float(value)

    def count(name: str) -> int | None:
        value = fields.get(name)
        return None if value is None else int(value)

    stop: str | list[str] = fields.get("stop") or []
    top_k, named = count("top_k"), count("seed")
    bias: Mapping[str, float] = fields.get("logit_bias") or {}
    return Generation(
        max_tokens=count("max_tokens"),
        min_tokens=count("min_tokens") or 0,
        stop=(stop,) if isinstance(stop, str) else tuple(str(text) for text in stop),
        stop_token_ids=tuple(int(token) for token in fields.get("stop_token_ids") or ()),
        ignore_eos=bool(fields.get("ignore_eos", False)),
        temperature=number("temperature"),
        top_k=None if top_k is None else max(0, top_k),  # -1 means off
        top_p=number("top_p"),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        presence_penalty=number("presence_penalty") or 0.0,
        frequency_penalty=number("frequency_penalty") or 0.0,
        logit_bias=tuple(sorted((int(token), float(weight)) for token, weight in bias.items())),
        seed=seed if named is None else named,
    )

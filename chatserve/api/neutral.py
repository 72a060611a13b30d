"""Fields that this server does not implement, and the values at which that does not matter.

A client library may send every field of OpenAI's or vLLM's API at its default. Such a value is
neutral: leaving the field out would mean the same. Any other value is refused by name, because
to ignore it in silence would be a wrong answer.
"""

from chatserve.errors import UnsupportedField

# Only descriptive, whatever their value: they cannot change the answer.
_DESCRIPTIVE = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)

_NEUTRAL: dict[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # says nothing while there are no tools
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "verbosity": ("medium",),
    # vLLM
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}


def without_neutral(fields: dict[str, object], known: frozenset[str]) -> dict[str, object]:
    """The implemented fields that say something; raises UnsupportedField for what cannot be met."""
    kept: dict[str, object] = {}
    for name, value in fields.items():
        if name in known:
            if value is not None:
                kept[name] = value
        elif name not in _DESCRIPTIVE and not _is_neutral(name, value):
            shown = name if len(name) <= 64 else name[:64] + "…"
            raise UnsupportedField(f"The field {shown!r} is not supported.", param=shown)
    return kept


def _is_neutral(name: str, value: object) -> bool:
    if value is None or value == [] or value == {}:
        return True
    # 1 == True in Python, but not in JSON.
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NEUTRAL.get(name, ())
    )

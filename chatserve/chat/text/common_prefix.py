"""CommonPrefix: the ids with which all chats of one system prompt begin.

It may not know pages or tenants. Theory of operation: two chats that share nothing but the system
prompt are composed as any chat is (`prompt_ids.py`); the ids that both begin with are the prompt's.
Whatever the template writes before, around and behind it is among them as far as it does not depend
on the user's message, and nothing else is: a render of the system prompt alone would end with what
no real chat has there.
"""

from itertools import takewhile

from chatserve.chat.text.prompt_ids import KnownMessage, PromptIds
from chatserve.chat.text.template import no_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import Message

# They differ in their first character, and in what a tokenizer might join that with.
_PROBES = ("Why?", "hello there")


class CommonPrefix:
    """One model's. Pure, for any thread."""

    def __init__(self, text: TextFloor) -> None:
        self._prompts = None if text.template is None else PromptIds(text.tokenizer, text.template)

    def of(self, system: str) -> tuple[int, ...]:
        """The ids of a system prompt's chats, up to where they may differ. Raises RequestError
        where the template refuses a system prompt, and NoChatTemplate where there is none."""
        if self._prompts is None:
            raise no_template()
        one, other = (
            self._prompts.compose(
                [
                    KnownMessage(Message("system", system)),
                    KnownMessage(Message("user", probe)),
                ]
            ).tokens
            for probe in _PROBES
        )
        pairs = zip(one, other, strict=False)
        return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

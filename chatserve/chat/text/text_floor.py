"""TextFloor: how the served model reads and writes text, put together from its folder.

It may not know requests. Blocking: call `read_text_floor` in a thread.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from chatserve.chat.text.template import ChatTemplate, read_template
from chatserve.chat.text.tokenizer import Tokenizer, load_pretrained
from chatserve.chat.values import SamplingDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFloor:
    """stop_ids: all that end a reply by themselves. template None: chats are refused."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_ids: frozenset[int]
    defaults: SamplingDefaults


def read_text_floor(
    folder: Path,
    *,
    template_file: Path | None = None,
    generation_eos: Iterable[int] = (),
    defaults: SamplingDefaults | None = None,
) -> TextFloor:
    """Read a model folder. Raises a StartError where it cannot be served as text.

    template_file: `--chat-template`, instead of the folder's own. generation_eos: all of
    generation_config's eos ids; the tokenizer's and the template's end of turn join them.
    """
    pretrained = load_pretrained(folder)
    template, control = read_template(pretrained, template_file=template_file)
    tokenizer = Tokenizer(pretrained, control)
    ends = (tokenizer.eos_id, None if template is None else template.turn_end())
    return TextFloor(
        tokenizer=tokenizer,
        template=template,
        stop_ids=frozenset(generation_eos) | {each for each in ends if each is not None},
        defaults=defaults or SamplingDefaults(),
    )

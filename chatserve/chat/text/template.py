"""ChatTemplate: messages to text, telling the template's control tokens from the contents'.

It may not know ids, the tokenizer at work, or requests. Theory of operation: the text is what
transformers renders, in its sandbox. Where contents hold nothing that looks like a control token,
every control string in the text is the template's. Otherwise the messages are rendered a second
time with marks, single characters that occur in no message:

    content           What does <|im_end|> mean? <
    marked            What does ⟦<|im_end|>⟧ mean? <⟦⟧      (the last '<' might join what follows)
    text              <|im_start|>user\nWhat does <|im_end|> mean? <<|im_end|>
    marked text       <|im_start|>user\nWhat does ⟦<|im_end|>⟧ mean? <⟦⟧<|im_end|>
    control strings        T                          C                   T

Both texts list their control strings in order. Where the lists agree and the texts are the same
but for white space (templates trim), each string of the true text is labelled by its partner: one
between marks is the content's. Otherwise (a template that compares contents) the marked text is
taken, without its marks: there the labels are certain.

A template may also rewrite contents (change case, take characters out), so that a control string
comes into being that no content held. A render of all printable characters shows that when the
template is read; then whole contents stand between marks, and all between them is the contents'.

The role `developer` is OpenAI's newer name for `system`; it is rendered as `system` unless the
template speaks of developers itself.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from chatserve.chat.text.control import ControlTokens, Span
from chatserve.chat.text.tokenizer import control_tokens
from chatserve.chat.values import ChatPrompt, Message
from chatserve.errors import NoChatTemplate, RequestError, SettingsError

_PROBE_USER = "qsentinelq"
_PROBE_REPLY = "rsentinelr"
# Every printable character of ASCII, letters in both cases, some twice.
_PROBE_TEXT = "".join(chr(code) for code in range(0x21, 0x7F)) + "xx yy<<||>>é"
_MESSAGE_LENGTH_MAX = 300  # of a template's own complaint
# Marks are drawn from the private use planes, where text hardly ever has anything.
_MARKS = range(0xF0001, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as text. spans: the control tokens in it that the template wrote, in order."""

    text: str
    spans: tuple[Span, ...]

    def part(self, start: int, end: int | None = None) -> "Rendered":
        """A stretch of it that cuts no span in two."""
        text = self.text[start:end]
        spans = (Span(each.start - start, each.end - start) for each in self.spans)
        return Rendered(
            text, tuple(each for each in spans if each.start >= 0 and each.end <= len(text))
        )

    def __add__(self, other: "Rendered") -> "Rendered":
        base = len(self.text)
        moved = (Span(base + each.start, base + each.end) for each in other.spans)
        return Rendered(self.text + other.text, (*self.spans, *moved))


@dataclass(frozen=True, slots=True)
class _Marks:
    open: str
    close: str


class ChatTemplate:
    """One chat template. `render` is pure and for any thread."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], control: ControlTokens
    ) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._control = control
        self._knows_developer = "developer" in source
        self._rewrites = _rewrites_contents(source, special_tokens)
        named = json.dumps([source, sorted(self._special_tokens.items())], default=str)
        # Stands for the texts that messages get.
        self.digest = blake2b(named.encode(errors="surrogatepass"), digest_size=32).digest()

    def render(self, prompt: ChatPrompt) -> Rendered:
        """Raises RequestError with the template's own words where it refuses the messages."""
        if not prompt.messages:
            raise RequestError("There must be at least one message.", param="messages")
        prompt = replace(prompt, messages=tuple(map(self._with_role, prompt.messages)))
        text = self._run(prompt)
        contents = [field for each in prompt.messages for field in (each.content, each.name or "")]
        marks = _free_marks(contents)
        marked_prompt = replace(
            prompt, messages=tuple(self._marked(each, marks) for each in prompt.messages)
        )
        if marked_prompt == prompt:
            return Rendered(text, tuple(self._control.find(text)))
        return self._labelled(text, self._run(marked_prompt), marks)

    def turn_end(self) -> int | None:
        """The control token that directly follows an assistant's content, if there is one."""
        text = _probe(self._source, self._special_tokens, add_generation_prompt=False)
        _, found, rest = text.rpartition(_PROBE_REPLY)
        first = next(self._control.find(rest), None)
        if not found or first is None or rest[: first.start].strip():
            return None
        return self._control.ids[rest[first.start : first.end]]

    def _with_role(self, message: Message) -> Message:
        if message.role == "developer" and not self._knows_developer:
            return replace(message, role="system")
        return message

    def _run(self, prompt: ChatPrompt) -> str:
        messages = [
            {"role": each.role, "content": each.content}
            | ({} if each.name is None else {"name": each.name})
            for each in prompt.messages
        ]
        try:
            return _render(
                self._source,
                self._special_tokens,
                messages,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
            )
        except TemplateError as error:
            reason = (error.message or type(error).__name__)[:_MESSAGE_LENGTH_MAX]
            raise RequestError(
                f"The chat template refuses these messages: {reason}", param="messages"
            ) from None
        except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError):
            # The words of such an error may quote the messages, so they are not repeated.
            reason = (
                "The final message cannot be continued with this chat template."
                if prompt.continue_final_message
                else "The chat template cannot render these messages."
            )
            raise RequestError(reason, param="messages") from None

    def _marked(self, message: Message, marks: _Marks) -> Message:
        name = None if message.name is None else self._mark(message.name, marks)
        return replace(message, content=self._mark(message.content, marks), name=name)

    def _mark(self, content: str, marks: _Marks) -> str:
        """Marks around control strings, and where content could be half of one.

        The latter stand inside of white space at the edges, so that a template can still trim,
        and also outside of it where a control string has white space itself.
        """
        control, pair = self._control, marks.open + marks.close
        inner = content.strip()
        begin = len(content) - len(content.lstrip())
        end = begin + len(inner)
        if self._rewrites:
            return content[:begin] + marks.open + inner + marks.close + content[end:]
        inserted: list[tuple[int, str]] = []  # at one position the order here is the order there
        if inner != content and control.may_begin_before(content):
            inserted.append((0, pair))
        if control.may_begin_before(inner):
            inserted.append((begin, pair))
        for span in control.find(content):
            inserted += ((span.start, marks.open), (span.end, marks.close))
        if control.may_end_after(inner):
            inserted.append((end, pair))
        if inner != content and control.may_end_after(content):
            inserted.append((len(content), pair))
        pieces: list[str] = []
        position = 0
        for place, mark in sorted(inserted, key=lambda each: each[0]):
            pieces += (content[position:place], mark)
            position = place
        return "".join([*pieces, content[position:]])

    def _labelled(self, text: str, marked: str, marks: _Marks) -> Rendered:
        plain: list[str] = []
        strings: list[str] = []
        own: list[Span | None] = []
        length = 0
        for piece, is_content in _pieces(marked, marks, None if self._rewrites else self._control):
            for span in self._control.find(piece):
                strings.append(piece[span.start : span.end])
                place = Span(length + span.start, length + span.end)
                own.append(None if is_content else place)
            plain.append(piece)
            length += len(piece)
        unmarked = "".join(plain)
        spans = tuple(self._control.find(text))
        if [text[span.start : span.end] for span in spans] == strings and (
            "".join(text.split()) == "".join(unmarked.split())
        ):
            labelled = zip(spans, own, strict=True)
            return Rendered(text, tuple(span for span, place in labelled if place is not None))
        return Rendered(unmarked, tuple(place for place in own if place is not None))


def read_template(
    pretrained: PreTrainedTokenizerFast, *, template_file: Path | None = None
) -> tuple[ChatTemplate | None, ControlTokens]:
    """The model's chat template, or the one in `template_file`, tried out once.

    The control tokens come with it, since they are partly what the template writes.
    """
    source = _source(pretrained, template_file)
    if source is None:
        return None, control_tokens(pretrained, "")
    special: dict[str, Any] = dict(pretrained.special_tokens_map)
    # Templates may put control tokens together ('<|' + role + '|>'): a render shows those.
    shown = _probe(source, special, add_generation_prompt=True)
    control = control_tokens(pretrained, source + "\0" + shown)
    return ChatTemplate(source, special, control), control


def no_template() -> NoChatTemplate:
    """The error for messages sent to a model without a template."""
    return NoChatTemplate(
        "This model has no chat template: start chatserve with --chat-template FILE, "
        "or use /v1/completions.",
        param="messages",
    )


def _source(pretrained: PreTrainedTokenizerFast, template_file: Path | None) -> str | None:
    if template_file is not None:
        try:
            return template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--chat-template {template_file}: {error}") from error
    try:
        return pretrained.get_chat_template()
    except ValueError:  # transformers' way to say that there is none
        return None


def _probe(source: str, special: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
    """One short exchange, rendered. Empty where the template does not take it."""
    messages = [
        {"role": "user", "content": _PROBE_USER},
        {"role": "assistant", "content": _PROBE_REPLY},
    ]
    try:
        return _render(source, special, messages, add_generation_prompt=add_generation_prompt)
    except TemplateSyntaxError as error:
        raise SettingsError(f"The chat template has a mistake: {error.message}") from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        return ""


def _render(
    source: str,
    special: Mapping[str, Any],
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **special,
    )
    return cast("Sequence[str]", texts)[0]


def _rewrites_contents(source: str, special: Mapping[str, Any]) -> bool:
    """Whether contents come out of the template as other text (but for white space at the edges).

    Then a control string may come into being that no content held.
    """
    contents = {"user": f"Uu{_PROBE_TEXT}", "assistant": f"Aa{_PROBE_TEXT}"}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    try:
        text = _render(source, special, messages)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        return True
    return not all(content in text for content in contents.values())


def _free_marks(contents: Sequence[str]) -> _Marks:
    """Two characters that no message has."""
    taken = set[str]().union(*contents)
    free = (chr(code) for code in _MARKS if chr(code) not in taken)
    first, second = next(free, None), next(free, None)
    if first is None or second is None:
        raise RequestError("The messages use every private character.", param="messages")
    return _Marks(first, second)


def _pieces(
    marked: str, marks: _Marks, control: ControlTokens | None
) -> Iterator[tuple[str, bool]]:
    """The text between marks, and whether it is a control string of a content (without `control`:
    whether it is a content's at all).

    A template that splits contents may leave a lone mark: it labels nothing, but what stands on
    its two sides still cannot join into a control string.
    """
    either = f"[{marks.open}{marks.close}]"
    position = 0
    for found in re.finditer(f"{marks.open}([^{either[1:-1]}]*){marks.close}|{either}", marked):
        yield marked[position : found.start()], False
        if found[1] is None and control is None:
            raise RequestError(
                "The chat template changes these messages beyond recognition.", param="messages"
            )
        if found[1]:
            yield found[1], control is None or found[1] in control.ids
        position = found.end()
    yield marked[position:], False

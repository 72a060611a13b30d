"""Chats as they are spoken: users' texts, replies as models emit them, turns as they are kept.

A reply is drawn as ids, not as a text, because models do not emit what a tokenizer would choose:
single letters of a word, parts of characters, two spaces, a control token spelled in plain pieces.
It goes through the real SampleText in emissions of random sizes, and ends in one of four ways:

    length         all of its ids count, wherever the last one breaks off
    stop_string    the text ends before it, mostly inside of a token
    stop_token     an id that the asker named; its text, if it has one, is left out
    end_of_turn    one of the model's own stop ids

`Chat` keeps turns as `answering.py` and the stores do, with ids and encoding.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from chatserve.chat.conversations.assignment import text_rule
from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.text.control import Span
from chatserve.chat.text.sample import SampleText
from chatserve.chat.text.template import Rendered, read_template
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.text.tokenizer import Tokenizer
from chatserve.chat.values import ChatPrompt, Generation, Message, SamplingDefaults
from chatserve.engine.values import Emission, FinishReason
from tests.chat.templates import ALL, HISTORIES
from tests.chat.vocabularies import CONTROLS, PLAIN_ADDED, pretrained

SYSTEMS = (None, "", "You are a fox.", "  The capital is <|im_end|> Paris.\n", "Grüße\n\n")
PHRASES = (
    "the quick brown fox",
    " the lazy dog",
    "What is the capital of France?",
    "Paris.",
    "  two  spaces ",
    "\n",
    "\n\n",
    "    print(line)\n",
    "Köln 你好 🦊",
    "▁",
    "<|im",
    "_start|>",
    "start_of_turn>",
    "[/INST]",
    "assistant\n",
    *CONTROLS,
    *PLAIN_ADDED,
)
ENDS = ("length", "stop_string", "stop_token", "end_of_turn")
REPLY_PIECES_MAX = 12


@dataclass(frozen=True, slots=True)
class Spoken:
    """A reply. emitted: all ids that the engine gave; told: `SampleText.token_ids` at its end."""

    emitted: tuple[int, ...]
    told: tuple[int, ...]
    text: str
    ended_by: str

    @property
    def ended_by_id(self) -> bool:
        """Whether the last of `told` is a stop id."""
        return self.ended_by in ("stop_token", "end_of_turn")


@dataclass(slots=True)
class Chat:
    """A conversation's path, kept as the server keeps it."""

    history: History
    system: str | None
    path: list[Turn] = field(default_factory=list[Turn])

    def ask(self, text: str) -> tuple[int, ...]:
        """A user's turn; returns the prompt of the reply to it."""
        turn = self._turn(Role.USER, text)
        prompt = self.history.prompt(self.system, [*self.path, turn])
        if prompt.turn_ids is not None:
            turn = replace(turn, token_ids=prompt.turn_ids, encoding=self.history.encoding)
        self.path.append(turn)
        return prompt.tokens

    def answer(self, spoken: Spoken) -> tuple[int, ...]:
        """A reply has ended; returns the ids that are kept of it."""
        ids = self.history.reply_ids(spoken.told, spoken.text, ended_by_id=spoken.ended_by_id)
        turn = self._turn(Role.ASSISTANT, spoken.text)
        self.path.append(replace(turn, token_ids=ids, encoding=self.history.encoding))
        return ids or ()

    def messages(self) -> tuple[Message, ...]:
        """What a template is given."""
        head = () if self.system is None else (Message("system", self.system),)
        return (*head, *(Message(turn.role.value, turn.text) for turn in self.path))

    def _turn(self, role: Role, text: str) -> Turn:
        parent = self.path[-1].id if self.path else None
        return Turn(id=str(len(self.path)), parent=parent, role=role, text=text, created=0.0)


@cache
def text_floor(kind: str, form: str) -> TextFloor:
    """A vocabulary of a kind with a template of a form, as `read_text_floor` puts them together."""
    wrapped = pretrained(kind, {**ALL, **HISTORIES}[form])
    template, control = read_template(wrapped)
    assert template is not None
    tokenizer = Tokenizer(wrapped, control)
    ends = (tokenizer.eos_id, template.turn_end())
    return TextFloor(
        tokenizer=tokenizer,
        template=template,
        stop_ids=frozenset(each for each in ends if each is not None),
        defaults=SamplingDefaults(),
    )


@cache
def plain_ids(kind: str) -> tuple[int, ...]:
    """All ids of a kind that have a text."""
    tokenizer = text_floor(kind, "chatml").tokenizer
    size = len(pretrained(kind))
    return tuple(each for each in range(size) if not tokenizer.is_silent(each))


def seeded(kind: str, form: str, seed: int) -> random.Random:
    """A source of chance whose seed is shown where a test fails."""
    print(f"seed {kind} {form} {seed}")
    return random.Random(f"{kind} {form} {seed}")


def user_text(source: random.Random) -> str:
    """What users write, and what they should not."""
    return "".join(source.choices(PHRASES, k=source.randrange(1, 6)))


def speak(
    source: random.Random,
    floor: TextFloor,
    plain: Sequence[int],
    *,
    begin: Sequence[int] = (),
    thinks: bool = False,
    silent: Sequence[int] = (),
) -> Spoken:
    """A random reply. plain: ids that it is made of; silent: ids without a text that may come
    between them. begin: what it begins with."""
    ids = [*begin]
    if thinks:
        ids += _thought(source, floor)
    for _ in range(source.randrange(REPLY_PIECES_MAX)):
        if source.random() < 0.5:
            ids += source.choices(plain, k=source.randrange(1, 4))
        elif silent and source.random() < 0.3:
            ids.append(source.choice(silent))
        else:
            said = floor.tokenizer.encode_rendered(source.choice(PHRASES), ())
            ids += said[: source.randrange(1, len(said) + 1)]
    # Among them stop ids of the model: it would have ended there.
    ids = [each for each in ids if each not in floor.stop_ids]
    return _ended(source, floor, ids, source.choice(ENDS))


def _thought(source: random.Random, floor: TextFloor) -> tuple[int, ...]:
    """Reasoning, with the control tokens that a template may have made of its bounds."""
    text = source.choice(("<think>\n", "")) + user_text(source) + "\n</think>\n\n"
    spans = [each for each in floor.tokenizer.control.find(text) if "think" in _at(text, each)]
    return floor.tokenizer.encode_rendered(text, spans)


def _at(text: str, span: Span) -> str:
    return text[span.start : span.end]


def _ended(source: random.Random, floor: TextFloor, ids: list[int], ended_by: str) -> Spoken:
    generation = Generation()
    finish = FinishReason.LENGTH
    if ended_by == "stop_string":
        text = "".join(_say(source, floor, generation, ids, finish).texts)
        if not text:
            return _ended(source, floor, ids, "length")
        start = source.randrange(len(text))
        generation = Generation(stop=(text[start : start + source.randrange(1, 6)], "\0never"))
    elif ended_by == "stop_token":
        named = source.choice([*plain_of(floor), *sorted(floor.tokenizer.special_ids)])
        ids = [*(each for each in ids if each != named), named]
        generation, finish = Generation(stop_token_ids=(named,)), FinishReason.STOP
    elif ended_by == "end_of_turn":
        ids, finish = [*ids, source.choice(sorted(floor.stop_ids))], FinishReason.STOP
    sample = _say(source, floor, generation, ids, finish)
    assert sample.end is not None
    assert sample.end.finish_reason == ("length" if finish is FinishReason.LENGTH else "stop") or (
        ended_by == "stop_string"
    )
    spoken = Spoken(tuple(ids), tuple(sample.token_ids), "".join(sample.texts), ended_by)
    assert spoken.ended_by_id == sample.ended_by_id
    return spoken


def kept_count(floor: TextFloor, told: Sequence[int], kept: Sequence[int], text: str) -> int:
    """How many of a cut reply's told ids are kept: all, but for a run of byte tokens that was no
    character and was cut. The whole run said one U+FFFD for each byte; what is left of it may say
    something else, alone or with the rest of the text behind it."""
    count = common(told, kept)
    rest = told[count:]
    assert all(floor.tokenizer.is_byte(each) or floor.tokenizer.is_silent(each) for each in rest)
    assert not rest or "\ufffd" in text
    return count


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lines begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def plain_of(floor: TextFloor) -> list[int]:
    """Ids of a floor that have a text, some of them."""
    return [each for each in range(400) if not floor.tokenizer.is_silent(each)]


def _say(
    source: random.Random,
    floor: TextFloor,
    generation: Generation,
    ids: list[int],
    finish: FinishReason,
) -> SampleText:
    sample = SampleText(0, floor.tokenizer, text_rule(generation, floor))
    rest = list(ids)
    while sample.end is None:
        count = source.randrange(1, 5)
        tokens, rest = tuple(rest[:count]), rest[count:]
        sample.feed(Emission(sample=0, tokens=tokens, finish=None if rest else finish))
    return sample


def counted(tokenizer: Tokenizer) -> tuple[Tokenizer, Callable[[], int]]:
    """A tokenizer, and how many characters it has encoded since it was last asked."""
    sizes: list[int] = []

    class Counted(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(tokenizer.__dict__)

        def encode_rendered(self, text: str, spans: Sequence[Span]) -> tuple[int, ...]:
            sizes.append(len(text))
            return tokenizer.encode_rendered(text, spans)

    def encoded() -> int:
        total = sum(sizes)
        sizes.clear()
        return total

    return Counted(), encoded


def truth(floor: TextFloor, chat: Chat) -> Rendered:
    """What the template makes of a chat."""
    assert floor.template is not None
    return floor.template.render(ChatPrompt(messages=chat.messages()))


def plainly(floor: TextFloor, chat: Chat) -> tuple[int, ...]:
    """The ids that a chat gets when nothing is known."""
    rendered = truth(floor, chat)
    return floor.tokenizer.encode_rendered(rendered.text, rendered.spans)

"""Prompts of chats: what was computed is kept, and the text is what the template renders."""

import random
import re
from dataclasses import replace

import pytest

from chatserve.chat.conversations.history import History
from chatserve.chat.store.conversation import Role, Turn
from chatserve.chat.text.template import Rendered
from chatserve.chat.text.text_floor import TextFloor
from chatserve.errors import NoChatTemplate, RequestError
from tests.chat.conversations.spoken import (
    SYSTEMS,
    Chat,
    Spoken,
    counted,
    kept_count,
    plain_ids,
    plainly,
    seeded,
    speak,
    text_floor,
    truth,
    user_text,
)
from tests.chat.vocabularies import PLAIN_ADDED

REPLY_HEAD = "assistant\n"
KINDS = ("byte_level", "metaspace", "prepending", "unigram")
FORMS = ("chatml", "llama3", "gemma", "mistral", "bare")
SEEDS = range(12)  # with each kind and form: 240 chats, and as many again with reasoning


def start(kind: str, form: str, source: random.Random, **options) -> tuple[TextFloor, Chat]:
    floor = text_floor(kind, form)
    history = History(floor, context_length=1 << 20, reserve=16, **options)
    return floor, Chat(history, None if form == "gemma" else source.choice(SYSTEMS), [])


def sections(floor: TextFloor, ids: tuple[int, ...]) -> list[str]:
    """Control tokens by name, and what stands between them, read plainly."""
    control = floor.tokenizer.control
    names = {token: name for name, token in control.ids.items()}
    said: list[str] = []
    run: list[int] = []
    for token in (*ids, None):
        if token in names or token is None:
            said += [plain(floor, floor.tokenizer.spell(run), said), names.get(token, "")]
            run = []
        else:
            run.append(token)
    return said


def rendered_sections(floor: TextFloor, rendered: Rendered) -> list[str]:
    """The same of a text."""
    said: list[str] = []
    place = 0
    for span in rendered.spans:
        said += [plain(floor, rendered.text[place : span.start], said)]
        said += [rendered.text[span.start : span.end]]
        place = span.end
    return [*said, plain(floor, rendered.text[place:], said), ""]


def plain(floor: TextFloor, text: str, before: list[str]) -> str:
    """A text without what its tokenizer reads otherwise. Byte-level ones read all as it is. To the
    others '▁' is a space, and they put one at the beginning of a section, behind an added token
    and where a reply begins."""
    if before[-1:] == ["<|swallow|>"]:
        text = text.lstrip()
    if floor.tokenizer.byte_level:
        return text
    text = text.replace("▁", " ").lstrip(" ")
    text = re.sub(f"({'|'.join(map(re.escape, PLAIN_ADDED))}) *", r"\1", text)
    return re.sub(f"{REPLY_HEAD} *", REPLY_HEAD, text)


def letters(floor: TextFloor, text: str) -> tuple[int, ...]:
    """Ids that no tokenizer would choose for a text."""
    ids = tuple(token for each in text for token in floor.tokenizer.encode_rendered(each, ()))
    assert ids != floor.tokenizer.encode_rendered(text, ())
    return ids


def silent_ids(floor: TextFloor) -> list[int]:
    """Control tokens that a model may emit and go on."""
    return sorted(floor.tokenizer.special_ids - floor.stop_ids)


def said_plainly(floor: TextFloor, spoken: Spoken, *, begin: tuple[int, ...] = ()) -> bool:
    """Whether a reply's text has no spaces at its edges, nor do its ids. Templates trim, and the
    first space of a text is dropped: such replies are kept as they were computed. begin: what the
    ids begin with."""
    if spoken.text != spoken.text.strip() or spoken.told[: len(begin)] != begin:
        return False
    return bool(begin) or not floor.tokenizer.spell(spoken.emitted).startswith(" ")


def speak_whole(source: random.Random, floor: TextFloor, kind: str, **options) -> Spoken:
    """A reply without parts of characters at its edges. Where bytes are tokens those would join
    with the bytes next to them once a whole section is read."""
    while True:
        spoken = speak(source, floor, plain_ids(kind), **options)
        if kind == "byte_level" or "\ufffd" not in spoken.text[:1] + spoken.text[-1:]:
            return spoken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_turn_begins_with_the_ids_of_all_before_it(kind, form):
    ends = set()
    for seed in SEEDS:
        source = seeded(kind, form, seed)
        floor, chat = start(kind, form, source)
        before: tuple[int, ...] = ()
        for _ in range(source.randrange(2, 6)):
            prompt = chat.ask(user_text(source))
            assert prompt[: len(before)] == before
            spoken = speak(source, floor, plain_ids(kind), silent=silent_ids(floor))
            ends.add(spoken.ended_by)
            ids = chat.answer(spoken)
            # All that was computed and counts; the last token emitted was only sampled.
            computed = spoken.emitted[:-1]
            if spoken.ended_by == "stop_string":
                computed = spoken.told[: kept_count(floor, spoken.told, ids, spoken.text)]
            assert ids[: len(computed)] == computed
            if spoken.ended_by == "length":
                assert ids == spoken.emitted
            before = prompt + ids
    assert len(ends) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["reasoning", "thinks_first"])
@pytest.mark.parametrize("mode", ["template", "as_computed", None])
def test_reasoning_is_kept_as_computed_or_dropped_behind_the_last_question(kind, form, mode):
    for seed in SEEDS:
        source = seeded(kind, form, seed)
        floor, chat = start(kind, form, source, mode=mode)
        before: tuple[int, ...] = ()
        for _ in range(source.randrange(2, 6)):
            prompt = chat.ask(user_text(source))
            assert prompt[: len(before)] == before
            if mode != "as_computed":
                assert sections(floor, prompt) == rendered_sections(floor, truth(floor, chat))
            ids = chat.answer(speak_whole(source, floor, kind, thinks=source.random() < 0.8))
            if mode == "as_computed":
                before = prompt + ids
            elif form == "reasoning":
                before = prompt
            else:  # the generation prompt's '<think>' is dropped with what follows
                head = floor.tokenizer.control.ids["<|im_start|>"]
                before = prompt[: len(prompt) - prompt[::-1].index(head)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_ids_say_what_the_template_renders(kind, form):
    if (kind, form) == ("byte_level", "mistral"):
        return  # writes a space before old replies only, so there its text is not what was computed
    for seed in SEEDS:
        source = seeded(kind, form, seed)
        floor, chat = start(kind, form, source)
        # What the template writes before old replies: with these kinds a reply begins with it.
        begin = floor.tokenizer.encode_rendered("the", ()) if form == "mistral" else ()
        for _ in range(source.randrange(2, 6)):
            prompt = chat.ask(user_text(source))
            assert sections(floor, prompt) == rendered_sections(floor, truth(floor, chat))
            # Templates trim: a reply with spaces at its edges is kept as it was computed.
            spoken = speak_whole(source, floor, kind, begin=begin)
            while not said_plainly(floor, spoken, begin=begin):
                spoken = speak_whole(source, floor, kind, begin=begin)
            chat.answer(spoken)


@pytest.mark.parametrize("kind", [*KINDS, "normalizing"])
@pytest.mark.parametrize("form", [*FORMS, "reasoning", "thinks_first", "moving", "swallowing"])
def test_ids_that_say_something_else_are_not_taken(kind, form):
    """Ids of another system prompt, of other turns and of no turn at all."""
    for seed in SEEDS:
        source = seeded(kind, form, seed)
        floor, chat = start(kind, form, source)
        for _ in range(3):
            chat.ask(user_text(source))
            chat.answer(speak(source, floor, plain_ids(kind)))
        chat.ask(user_text(source))
        stored = [turn.token_ids for turn in chat.path]
        source.shuffle(stored)
        for index, turn in enumerate(chat.path):
            ids = source.choice([stored[index], turn.token_ids, (7, 8), (), None])
            if ids is not None and turn.role is Role.ASSISTANT:
                # Ids that say a reply's text are the reply's, whatever they are.
                ids = ids if floor.tokenizer.decode(ids) != turn.text else None
            chat.path[index] = replace(turn, token_ids=ids)
        chat.system = None if form == "gemma" else "Another one."
        prompt = chat.history.prompt(chat.system, chat.path)
        if kind == "normalizing":
            assert prompt.tokens == plainly(floor, chat)
        elif not any(turn.token_ids for turn in chat.path if turn.role is Role.ASSISTANT):
            assert sections(floor, prompt.tokens) == rendered_sections(floor, truth(floor, chat))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*FORMS, "reasoning"])
def test_unknown_ids_are_made_as_of_a_whole_prompt_and_then_kept(kind, form):
    source = seeded(kind, form, 0)
    floor, chat = start(kind, form, source)
    chat.ask("the quick brown fox")
    chat.answer(speak(source, floor, plain_ids(kind)))
    chat.path = [replace(turn, token_ids=None) for turn in chat.path]
    first = chat.ask("What is the capital?")
    assert first == plainly(floor, chat)
    ids = chat.answer(Spoken((), floor.tokenizer.encode_rendered("Paris", ()), "Paris", ""))
    assert chat.ask("and then?")[: len(first + ids)] == first + ids


def test_ids_of_another_encoding_count_as_unknown():
    floor, chat = start("byte_level", "chatml", random.Random(1))
    chat.ask("hi")
    chat.answer(Spoken((), letters(floor, "the"), "the", "length"))
    chat.path = [replace(turn, encoding="another") for turn in chat.path]
    assert chat.ask("so?") == plainly(floor, chat)


def test_an_encoding_names_tokenizer_template_and_mode():
    def encoding(kind, form, mode=None):
        floor = text_floor(kind, form)
        return History(floor, context_length=99, reserve=9, mode=mode).encoding

    named = {
        encoding("byte_level", "chatml"),
        encoding("metaspace", "chatml"),
        encoding("byte_level", "llama3"),
        encoding("byte_level", "chatml", "template"),
    }
    assert len(named) == 4
    assert encoding("byte_level", "chatml", "as_computed") in named
    assert encoding("byte_level", "reasoning") == encoding("byte_level", "reasoning", "template")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("form", ["chatml", "llama3", "mistral", "reasoning", "thinks_first"])
def test_a_turn_costs_the_encoding_of_its_own_text(kind, form):
    floor = text_floor(kind, form)
    tokenizer, encoded = counted(floor.tokenizer)
    history = History(replace(floor, tokenizer=tokenizer), context_length=1 << 20, reserve=16)
    chat = Chat(history, "the system " * 500, [])
    for _ in range(5):
        chat.ask("the question " * 50)
        spoken = speak(random.Random(3), floor, plain_ids(kind))
        chat.answer(spoken)
        encoded()
    chat.ask("the question " * 20)
    assert 0 < encoded() < 400


def test_a_template_that_moves_the_system_prompt_costs_encoding_and_nothing_else():
    floor = text_floor("byte_level", "moving")
    chat = Chat(History(floor, context_length=1 << 20, reserve=16), "the system", [])
    for _ in range(3):
        chat.ask("the question")
        assert sections(floor, chat.history.prompt(chat.system, chat.path).tokens) == (
            rendered_sections(floor, truth(floor, chat))
        )
        chat.answer(Spoken((), floor.tokenizer.encode_rendered("Paris", ()), "Paris", ""))


@pytest.mark.parametrize("form", ["forgetful", "repeating"])
@pytest.mark.parametrize("mode", ["as_computed", "template"])
def test_a_template_that_loses_or_repeats_replies_gets_whole_prompts(form, mode):
    floor = text_floor("byte_level", form)
    chat = Chat(History(floor, context_length=1 << 20, reserve=16, mode=mode), None, [])
    chat.ask("the question")
    chat.answer(Spoken((), floor.tokenizer.encode_rendered("Paris", ()), "Paris", ""))
    assert chat.ask("another") == plainly(floor, chat)


def test_a_branch_shares_the_ids_before_it():
    floor, chat = start("byte_level", "chatml", random.Random(5))
    first = chat.ask("hello")
    root = list(chat.path)
    for reply in ("Paris", "the dog"):
        chat.path = list(root)
        again = chat.history.prompt(chat.system, chat.path)
        assert (again.tokens, again.turn_ids) == (first, root[-1].token_ids)
        ids = chat.answer(Spoken((), floor.tokenizer.encode_rendered(reply, ()), reply, ""))
        assert chat.ask("and?")[: len(first + ids)] == first + ids


def test_an_end_of_turn_that_the_model_emitted_is_not_repeated():
    floor, chat = start("byte_level", "chatml", random.Random(5))
    end = floor.tokenizer.control.ids["<|im_end|>"]
    other = floor.tokenizer.control.ids["</s>"]
    said = floor.tokenizer.encode_rendered("Paris", ())
    for told, ended_by in (
        (said, "length"),
        ((*said, end), "end_of_turn"),
        ((*said, other), "stop_token"),
    ):
        chat.path = []
        first = chat.ask("hello")
        chat.answer(Spoken((), told, "Paris", ended_by))
        assert chat.ask("and?")[len(first) :][: len(said) + 2] == (
            *said,
            end,
            *floor.tokenizer.encode_rendered("\n", ()),
        )


def test_an_end_of_turn_is_left_out_where_the_template_writes_another_one():
    floor = text_floor("byte_level", "restless")
    chat = Chat(History(floor, context_length=1 << 20, reserve=16), None)
    said, end = floor.tokenizer.encode_rendered("Paris", ()), floor.template.turn_end()
    assert end == floor.tokenizer.control.ids["<|im_end|>"]
    first = chat.ask("hello")
    kept = chat.answer(Spoken((), (*said, end), "Paris", "end_of_turn"))
    assert kept == (*said, end)
    behind = (
        floor.tokenizer.control.ids["<|eot_id|>"],
        floor.tokenizer.control.ids["<|im_start|>"],
    )
    assert chat.ask("and?")[len(first) :][: len(said) + 2] == (*said, *behind)
    # The question keeps the end that its reply was computed behind.
    assert chat.history.prompt(None, chat.path).tokens[: len(first)] == first


def test_a_word_that_stands_for_replies_may_be_a_users():
    floor, chat = start("byte_level", "llama3", random.Random(5))
    first = chat.ask("rsentinel0r")
    said = letters(floor, " the ")  # which the template would trim
    chat.answer(Spoken((), said, " the ", "length"))
    assert chat.ask("rsentinel1r")[: len(first + said)] == first + said


@pytest.mark.parametrize("kind", ["metaspace", "prepending", "unigram"])
def test_a_lone_space_stands_only_behind_its_prompt(kind):
    floor, chat = start(kind, "reasoning", random.Random(5))
    space = floor.tokenizer.encode_rendered("  ", ())[:1]
    first = chat.ask("hello")
    kept = chat.answer(Spoken((), space, "", "length"))
    assert kept == space
    assert chat.ask("and?")[: len(first + space)] == first + space
    chat.path[0] = replace(chat.path[0], token_ids=None)
    chat.path[2] = replace(chat.path[2], token_ids=None)
    assert chat.history.prompt(chat.system, chat.path).tokens == plainly(floor, chat)


def test_ids_that_cannot_say_a_text_are_none():
    floor, chat = start("byte_level", "chatml", random.Random(5))
    assert chat.history.reply_ids((), "\ufffd") is not None
    assert chat.history.reply_ids((70,), "") == ()
    normalizing = History(text_floor("normalizing", "chatml"), context_length=99, reserve=9)
    assert normalizing.reply_ids((), "\ufb01") is None
    assert floor.template is not None


def test_without_a_template_prompts_are_refused():
    floor = replace(text_floor("byte_level", "chatml"), template=None)
    history = History(floor, context_length=99, reserve=9)
    turn = Turn(id="1", parent=None, role=Role.USER, text="hi", created=0.0)
    with pytest.raises(NoChatTemplate):
        history.prompt(None, [turn])


def test_what_the_template_refuses_is_refused():
    floor = text_floor("byte_level", "gemma")
    history = History(floor, context_length=99, reserve=9)
    turn = Turn(id="1", parent=None, role=Role.USER, text="hi", created=0.0)
    with pytest.raises(RequestError):
        history.prompt("a system prompt", [turn])

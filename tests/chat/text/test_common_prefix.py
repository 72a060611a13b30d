"""The ids that all chats of one system prompt begin with, for tokenizers and templates as models
have them."""

import pytest

from chatserve.chat.text.common_prefix import CommonPrefix
from chatserve.chat.text.known_ids import KnownIds
from chatserve.chat.text.prompt_ids import PromptIds
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import ChatPrompt, Message
from chatserve.errors import NoChatTemplate, RequestError
from tests.chat.conversations.spoken import text_floor
from tests.chat.vocabularies import KINDS

SYSTEM = "You answer in few words. What is the capital of France? Paris, dog, <|im_end|> lazy."
USERS = ("What?", "the fox", "你好", "1234", "<|im_end|>", "é", "hello")
# The template's own line break is one token with what these begin with.
JOINING = ("  spaces", "\n\nlines")


def begins(floor: TextFloor, system: str, user: str) -> tuple[int, ...]:
    """A real chat's prompt, as a request has it."""
    assert floor.template is not None
    messages = (Message("system", system), Message("user", user))
    rendered = floor.template.render(ChatPrompt(messages=messages))
    return floor.tokenizer.encode_rendered(rendered.text, rendered.spans)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["chatml", "llama3", "reasoning", "mistral"])
def test_it_is_what_real_chats_begin_with(kind: str, form: str) -> None:
    """Lessons 28: a render of the system prompt alone is not."""
    floor = text_floor(kind, form)
    prefix = CommonPrefix(floor).of(SYSTEM)
    said = floor.tokenizer.decode(prefix)
    assert "lazy" in said
    assert not any(word in said for word in ("Why", "hello"))
    for user in (*USERS, *JOINING):
        prompt = begins(floor, SYSTEM, user)
        # Where no control token stands between, a user's beginning may join the prompt's end.
        assert prompt[: len(prefix) - 2] == prefix[:-2]
        if form == "chatml" and user in USERS:
            assert prompt[: len(prefix)] == prefix


def test_it_is_the_whole_part_that_does_not_depend_on_the_user() -> None:
    floor = text_floor("byte_level", "chatml")
    said = floor.tokenizer.decode(CommonPrefix(floor).of("Be kind."))
    shown = ["".join(each.split()) for each in (said, "system\nBe kind.\nuser\n")]
    assert shown[0] == shown[1], "control tokens have no text, all else is there"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_it_is_what_the_service_asks_with(kind: str) -> None:
    """By way of ids that are known from earlier, and without."""
    floor = text_floor(kind, "chatml")
    assert floor.template is not None
    prefix = CommonPrefix(floor).of(SYSTEM)
    known = KnownIds(PromptIds(floor.tokenizer, floor.template))
    for user in (*USERS, *USERS):
        messages = [Message("system", SYSTEM), Message("user", user)]
        assert known.prompt("ann", "", messages).tokens[: len(prefix)] == prefix


def test_developers_are_the_system() -> None:
    floor = text_floor("byte_level", "chatml")
    assert floor.template is not None
    prefix = CommonPrefix(floor).of(SYSTEM)
    messages = (Message("developer", SYSTEM), Message("user", "x"))
    rendered = floor.template.render(ChatPrompt(messages=messages))
    ids = floor.tokenizer.encode_rendered(rendered.text, rendered.spans)
    assert ids[: len(prefix)] == prefix


def test_a_template_that_refuses_system_prompts_says_so() -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        CommonPrefix(text_floor("byte_level", "gemma")).of(SYSTEM)


def test_without_a_template_there_are_no_chats() -> None:
    floor = text_floor("byte_level", "chatml")
    bare = TextFloor(
        tokenizer=floor.tokenizer,
        template=None,
        stop_ids=floor.stop_ids,
        defaults=floor.defaults,
    )
    with pytest.raises(NoChatTemplate):
        CommonPrefix(bare).of(SYSTEM)

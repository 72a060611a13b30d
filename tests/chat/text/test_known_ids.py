"""Ids of chats that clients send whole: found by their messages, taken where they say the text."""

import random
import tracemalloc
from dataclasses import dataclass, field, replace

import pytest

from chatserve.chat.text.known_ids import FoundPrompt, KnownIds, is_answerable
from chatserve.chat.text.prompt_ids import PromptIds
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import ChatPrompt, Message
from chatserve.engine.values import FinishReason
from tests.chat.conftest import Floor, ask
from tests.chat.conversations.spoken import Spoken, counted, plain_ids, speak, text_floor, user_text

KINDS = ("byte_level", "metaspace", "prepending", "unigram")
FORMS = ("chatml", "llama3", "gemma", "mistral")


@dataclass(slots=True)
class Client:
    """Who sends every message each time."""

    known: KnownIds
    floor: TextFloor
    messages: list[Message] = field(default_factory=list[Message])
    tenant: str = "ann"
    salt: str = ""

    def ask(self, text: str) -> FoundPrompt:
        """One more message of the user."""
        self.messages.append(Message("user", text))
        return self.known.prompt(self.tenant, self.salt, self.messages)

    def hear(self, prompt: FoundPrompt, spoken: Spoken) -> None:
        """The reply, as it is sent back next time."""
        ended_by_id = spoken.ended_by_id
        self.known.remember(prompt, spoken.told, spoken.text, ended_by_id=ended_by_id)
        self.messages.append(Message("assistant", spoken.text))

    def plainly(self) -> tuple[int, ...]:
        """The prompt when nothing is known."""
        return plainly(self.floor, self.messages)


def plainly(floor: TextFloor, messages: list[Message]) -> tuple[int, ...]:
    assert floor.template is not None
    text = floor.template.render(ChatPrompt(messages=tuple(messages)))
    return floor.tokenizer.encode_rendered(text.text, text.spans)


def client(kind: str = "byte_level", form: str = "chatml", **limits: int) -> Client:
    floor = text_floor(kind, form)
    assert floor.template is not None
    return Client(KnownIds(PromptIds(floor.tokenizer, floor.template), **limits), floor)


def letters(floor: TextFloor, text: str, ended_by: str = "length") -> Spoken:
    """A reply in single letters, as no tokenizer would choose them."""
    ids = tuple(token for each in text for token in floor.tokenizer.encode_rendered(each, ()))
    assert ids != floor.tokenizer.encode_rendered(text, ())
    return Spoken(ids, ids, text, ended_by)


def exchange(of: Client, question: str, answer: str) -> tuple[FoundPrompt, tuple[int, ...]]:
    spoken = letters(of.floor, answer)
    prompt = of.ask(question)
    of.hear(prompt, spoken)
    return prompt, spoken.told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_chat_that_is_sent_whole_begins_with_the_ids_of_all_before(kind: str, form: str):
    for seed in range(4):
        source = random.Random(f"{kind} {form} {seed}")
        print(f"seed {kind} {form} {seed}")
        chat = client(kind, form)
        assert chat.floor.template is not None
        ids = PromptIds(chat.floor.tokenizer, chat.floor.template)
        before: tuple[int, ...] = ()
        for _ in range(4):
            prompt = chat.ask(user_text(source))
            assert prompt.tokens[: len(before)] == before
            spoken = speak(source, chat.floor, plain_ids(kind))
            chat.hear(prompt, spoken)
            kept = ids.reply_ids(spoken.told, spoken.text, ended_by_id=spoken.ended_by_id)
            assert kept is not None
            before = prompt.tokens + kept
        asked, found = chat.known.statistics().asked, chat.known.statistics().found
        assert asked == found == 6  # 0 + 1 + 2 + 3


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_what_is_known_is_not_encoded_again(kind: str):
    floor = text_floor(kind, "chatml")
    assert floor.template is not None
    tokenizer, encoded = counted(floor.tokenizer)
    chat = Client(KnownIds(PromptIds(tokenizer, floor.template)), floor)
    for _ in range(3):
        chat.hear(chat.ask("the question " * 50), letters(floor, "the capital"))
        encoded()
    chat.ask("the question " * 20)
    assert 0 < encoded() < 400


def test_two_clients_of_one_tenant_share_what_is_known():
    one = client()
    prompt, told = exchange(one, "hello", "the capital")
    other = replace(one, messages=list(one.messages))
    assert other.ask("and?").tokens[: len(prompt.tokens + told)] == prompt.tokens + told


@pytest.mark.parametrize("change", [{"tenant": "bob"}, {"salt": "x"}])
def test_another_tenant_and_another_salt_find_nothing(change: dict[str, str]):
    one = client()
    prompt, told = exchange(one, "hello", "the capital")
    other = replace(one, messages=list(one.messages), **change)
    assert other.ask("and?").tokens == other.plainly()
    assert one.known.statistics().found == 0
    # What they say is theirs, and hides nothing of the first one's.
    exchange(other, "so?", "the lazy dog")
    assert one.ask("and?").tokens[: len(prompt.tokens + told)] == prompt.tokens + told


def test_a_tenant_and_a_salt_are_not_one_text():
    one = client()
    one.tenant, one.salt = "ann", "x"
    exchange(one, "hello", "the capital")
    other = replace(one, messages=list(one.messages), tenant="annx", salt="")
    assert other.ask("and?").tokens == other.plainly()
    assert one.known.statistics().found == 0


@pytest.mark.parametrize(
    "messages",
    [
        [Message("user", "hello "), Message("assistant", "the capital")],
        [Message("user", "hello"), Message("assistant", "the capital ")],
        [Message("user", "hello"), Message("assistant", "The capital")],
        [Message("user", "hello", "bob"), Message("assistant", "the capital")],
        [Message("user", "hello"), Message("assistant", "the capital", "bob")],
        [Message("user", "hello"), Message("assistant", "the capital", "")],
        [Message("system", "hello"), Message("assistant", "the capital")],
        [Message("system", ""), Message("user", "hello"), Message("assistant", "the capital")],
        [Message("assistant", "the capital")],
        [Message("user", "hello"), Message("user", "the capital")],
        [Message("user", "hell"), Message("assistant", "othe capital")],
    ],
)
def test_other_messages_find_nothing(messages: list[Message]):
    one = client()
    exchange(one, "hello", "the capital")
    other = replace(one, messages=messages)
    assert other.ask("and?").tokens == other.plainly()
    assert one.known.statistics().found == 0


def test_two_messages_that_read_like_two_others_find_nothing():
    one = client(form="bare")  # where the texts are the same
    exchange(one, "hello", "the capital")
    other = replace(one, messages=[Message("user", "hellothe"), Message("assistant", " capital")])
    assert other.ask("and?").tokens == other.plainly()
    assert one.known.statistics().found == 0


def test_an_edited_message_keeps_what_is_before_it():
    one = client()
    prompt, told = exchange(one, "hello", "the capital")
    exchange(one, "and?", "the lazy dog")
    one.messages[3] = Message("assistant", "the lazy dog.")
    found = one.ask("so?")
    assert found.tokens[: len(prompt.tokens + told)] == prompt.tokens + told
    assert (
        found.tokens[len(prompt.tokens + told) :]
        == plainly(one.floor, one.messages)[
            len(plainly(one.floor, one.messages[:1])) + len(ids_of(one.floor, "the capital")) :
        ]
    )


def ids_of(floor: TextFloor, text: str) -> tuple[int, ...]:
    return floor.tokenizer.encode_rendered(text, ())


@pytest.mark.parametrize("form", ["chatml", "llama3", "mistral", "reasoning", "moving"])
def test_whatever_clients_change_the_ids_say_their_messages(form: str):
    """Clients trim, cut, edit, drop and repeat messages, and go on."""
    for seed in range(20):
        source = random.Random(f"{form} {seed}")
        print(f"seed {form} {seed}")
        chat = client("byte_level", form)
        for _ in range(6):
            prompt = chat.ask(user_text(source))
            said = tuple(chat.floor.tokenizer.token_bytes(each) for each in prompt.tokens)
            assert chat.floor.template is not None
            truth = chat.floor.template.render(ChatPrompt(messages=tuple(chat.messages)))
            if form != "mistral":  # writes a space before old replies that none was behind
                assert b"".join(said) == truth.text.encode()
            control = chat.floor.tokenizer.control
            assert [each for each in prompt.tokens if each in control.id_set] == [
                control.ids[truth.text[span.start : span.end]] for span in truth.spans
            ]
            spoken = speak(source, chat.floor, plain_said(chat.floor))
            while "\ufffd" in spoken.text or spoken.text != spoken.text.strip():
                spoken = speak(source, chat.floor, plain_said(chat.floor))
            chat.hear(prompt, spoken)
            tamper(source, chat.messages)


def plain_said(floor: TextFloor) -> list[int]:
    """Ids that are no control tokens of this form either."""
    return [each for each in plain_ids("byte_level") if each not in floor.tokenizer.control.id_set]


def tamper(source: random.Random, messages: list[Message]) -> None:
    if source.random() < 0.5:
        return
    at = source.randrange(len(messages))
    content = messages[at].content
    changed = source.choice([content.strip(), content[:-1], content + "x", content.upper(), ""])
    messages[at] = replace(messages[at], content=changed)
    if source.random() < 0.2:
        del messages[at // 2 * 2 : at // 2 * 2 + 2]


def test_the_first_of_two_replies_with_one_text_stays():
    one = client()
    prompt, told = exchange(one, "hello", "the capital")
    size = one.known.statistics().bytes
    again = client_after(one, 0)
    plain = ids_of(one.floor, "the capital")
    again.hear(again.ask("hello"), Spoken(plain, plain, "the capital", "length"))
    assert one.ask("and?").tokens[: len(prompt.tokens + told)] == prompt.tokens + told
    assert one.known.statistics().links == 1
    assert one.known.statistics().bytes == size


def client_after(one: Client, count: int) -> Client:
    return replace(one, messages=one.messages[:count])


def test_the_stop_id_that_ended_a_reply_is_not_repeated():
    one = client()
    control = one.floor.tokenizer.control.ids
    for ended_by, last in (("end_of_turn", "<|im_end|>"), ("stop_token", "</s>")):
        spoken = letters(one.floor, "the capital", ended_by)
        told = (*spoken.told, control[last])
        chat = replace(one, messages=[], tenant=ended_by)
        prompt = chat.ask("hello")
        chat.hear(prompt, replace(spoken, told=told))
        line = (*prompt.tokens, *spoken.told, control["<|im_end|>"], *ids_of(one.floor, "\n"))
        assert chat.ask("and?").tokens[: len(line)] == line


# Limits -------------------------------------------------------------------------------------


def test_links_are_bounded_in_number_and_the_least_used_goes():
    one = client(links_max=2)
    chats = [replace(one, messages=[]) for _ in range(3)]
    lines = [sum(exchange_ids(each, f"hello {at}"), ()) for at, each in enumerate(chats[:2])]
    assert chats[0].ask("and?").tokens[: len(lines[0])] == lines[0]  # used
    exchange(chats[2], "hello 2", "the capital")
    statistics = one.known.statistics()
    assert (statistics.links, statistics.evicted) == (2, 1)
    chats[0].messages.pop()
    assert chats[0].ask("so?").tokens[: len(lines[0])] == lines[0]
    assert chats[1].ask("so?").tokens == chats[1].plainly()


def exchange_ids(chat: Client, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt, told = exchange(chat, question, "the capital")
    return prompt.tokens, told


def test_links_are_bounded_in_bytes_whatever_is_found_and_fitted():
    one = client(bytes_max=4096)
    source = random.Random(7)
    for number in range(40):
        chat = replace(one, messages=[], tenant=str(number % 5))
        for _ in range(3):
            chat.hear(chat.ask(user_text(source)), letters(one.floor, "the capital"))
            assert 0 < one.known.statistics().bytes <= 4096
            assert one.known.statistics().links <= 4096 // 512
    assert one.known.statistics().evicted > 20


def test_the_count_of_bytes_comes_back_to_nothing():
    one = client(links_max=1)
    exchange(one, "hello", "the capital")
    first = one.known.statistics().bytes
    one.ask("and?")  # found, and fitted to its text: all as it was told
    assert one.known.statistics().bytes == first
    cut = replace(one, messages=[], tenant="bob")
    prompt = cut.ask("hello")
    said = ids_of(one.floor, "the capital of France")
    cut.hear(prompt, Spoken(said, said, "the", "length"))  # fitting leaves most of them out
    longer = one.known.statistics().bytes
    cut.ask("and?")
    assert one.known.statistics().bytes < longer
    exchange(replace(one, messages=[], tenant="carl"), "hello", "the capital")
    assert one.known.statistics().bytes == first


def test_a_link_that_is_larger_than_all_memory_is_not_kept():
    one = client(bytes_max=600)
    exchange(one, "hello " * 50, "the capital")
    statistics = one.known.statistics()
    assert (statistics.links, statistics.bytes, statistics.evicted) == (0, 0, 1)
    assert one.ask("and?").tokens == one.plainly()


def test_a_prompt_without_a_name_or_ids_of_its_own_is_not_remembered():
    one = client()
    found = one.ask("hello")
    for prompt in (replace(found, name=None), replace(found, turn_ids=None)):
        one.known.remember(prompt, (70,), "x")
    assert one.known.statistics().links == 0


# The service --------------------------------------------------------------------------------


def test_only_a_new_message_of_an_assistant_is_answered_with_known_ids():
    user, reply = Message("user", "hi"), Message("assistant", "yes")
    assert is_answerable(ChatPrompt(messages=(user, reply, user)))
    assert not is_answerable(ChatPrompt(messages=()))
    assert not is_answerable(ChatPrompt(messages=(user, reply)))
    assert not is_answerable(ChatPrompt(messages=(user,), add_generation_prompt=False))
    assert not is_answerable(ChatPrompt(messages=(user, reply, user), continue_final_message=True))


async def test_a_request_that_sends_a_reply_back_appends_to_its_ids(floor: Floor):
    ids = tuple(token for each in "the capital" for token in floor.ids(each))
    _, run = await floor.open()
    run.give(ids, finish=FinishReason.LENGTH)
    first = run.request.tokens
    reply, run = await floor.open()
    with reply.view() as viewing:
        run.give(ids, finish=FinishReason.LENGTH)
        _ = [event async for event in viewing]
    messages = (Message("user", "hi"), Message("assistant", "the capital"), Message("user", "so?"))
    asked = replace(ask(), prompt=ChatPrompt(messages=messages))
    again = await floor.service.open(asked)
    tokens = floor.engine.runs[-1].request.tokens
    assert tokens[: len(first + ids)] == first + ids
    again.abandon()
    other = await floor.service.open(replace(asked, cache_salt="x"))
    assert floor.engine.runs[-1].request.tokens == plainly(floor.text, list(messages))
    other.abandon()


def test_links_take_no_more_memory_than_they_are_counted_for():
    """A bound in bytes is one only if the count is: lengths from a word to some hundred tokens."""
    one = client()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(4_000):
            ids = tuple(range(number % 300))
            prompt = FoundPrompt(ids, ids, number.to_bytes(32, "little"))
            one.known.remember(prompt, ids[:30], f"reply {number}")
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert one.known.statistics().links == 4_000
    assert 0.5 * one.known.statistics().bytes < taken <= one.known.statistics().bytes

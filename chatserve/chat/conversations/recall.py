"""Where a reply stood when its log was last written.

Pure, for any thread. The log's ids, fed anew to a sample, lead to the very text that was logged:
what was held back then is held back now, for the store gives settings as they were at acceptance.
Where they do not, the reply cannot go on: another model is served, or somebody else's hand was at
the log, and it is ended with its text.
"""

from collections.abc import Sequence
from dataclasses import replace

from chatserve.chat.conversations.assignment import Assignment, text_rule
from chatserve.chat.conversations.chat_request import ChatRequest
from chatserve.chat.store.conversation import Conversation, LogEntry, ReplyRecord, Turn
from chatserve.chat.store.session_store import Accepted
from chatserve.chat.text.sample import SampleText
from chatserve.chat.text.text_floor import TextFloor
from chatserve.chat.values import Generation
from chatserve.engine.values import Emission

_UNREADABLE = "The reply was interrupted, and how it was asked for cannot be read."
_OTHER_MODEL = "The reply was interrupted, and another model is served now."
_OTHER_TEXT = "The reply was interrupted, and its log does not lead to what it had said."


def first_assignment(accepted: Accepted, text: TextFloor) -> Assignment:
    """A turn that was just accepted."""
    generation, obstacle = _generation(accepted.record, accepted.conversation, None)
    return Assignment(
        conversation=accepted.conversation,
        path=accepted.path,
        record=accepted.record,
        generation=generation,
        said=SampleText(0, text.tokenizer, text_rule(generation, text)),
        obstacle=obstacle,
    )


def recalled(
    kept: tuple[Conversation, tuple[Turn, ...], ReplyRecord],
    entries: Sequence[LogEntry],
    *,
    text: TextFloor,
    encoding: str,
) -> Assignment:
    """A reply that was running, as the store has it."""
    conversation, path, record = kept
    said_text = "".join(entry.text for entry in entries)
    tokens = tuple(token for entry in entries for token in entry.token_ids)
    prompt_ids = next((each.prompt_ids for each in entries if each.prompt_ids), None)
    generation, obstacle = _generation(record, conversation, encoding)
    said = SampleText(0, text.tokenizer, text_rule(generation, text))
    if obstacle is None and tokens:
        said.feed(Emission(sample=0, tokens=tokens))
        if "".join(said.texts) != said_text or said.end is not None:
            obstacle = _OTHER_TEXT
    if obstacle is not None:
        said = SampleText(0, text.tokenizer, text_rule(generation, text))
        said.recall(said_text)
    if prompt_ids is not None:
        path = (*path[:-1], replace(path[-1], token_ids=prompt_ids, encoding=encoding))
    return Assignment(
        conversation=conversation,
        path=path,
        record=record,
        generation=generation,
        said=said,
        prompt_logged=prompt_ids is not None,
        obstacle=obstacle,
    )


def _generation(
    record: ReplyRecord, conversation: Conversation, encoding: str | None
) -> tuple[Generation, str | None]:
    """How to answer, and why that cannot be. encoding: what is served now, None = as accepted."""
    try:
        request = ChatRequest.from_json(record.request)
        generation = request.generation(conversation.settings)
    except ValueError:
        return Generation(), _UNREADABLE
    other = encoding is not None and request.encoding != encoding
    return generation, _OTHER_MODEL if other else None

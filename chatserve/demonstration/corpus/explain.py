"""What the model can explain: chatserve, in whole paragraphs.

Each topic has the words that users use for it, an explanation, and one that goes deeper for a
follow-up.  The texts are fixed: the model learns them by heart, the questions vary.
"""

from dataclasses import dataclass

from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import loosen
from chatserve.demonstration.corpus.wordings import lists, read, spread


@dataclass(frozen=True)
class Topic:
    """A subject, its names, questions of its own, and the two texts."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    text: str
    more: str


TABLE = read("topics.toml")
GENERAL, MORE = lists(TABLE["explain"])["general"], lists(TABLE["explain"])["more"]
TOPICS = tuple(
    Topic(tuple(row["names"]), spread(row["questions"]), str(row["text"]), str(row["more"]))
    for row in TABLE["topic"]
)


def explain(draw: Draw) -> tuple[Turn, Topic]:
    """A question about one topic."""
    topic = draw.choice(TOPICS)
    if draw.chance(0.5):
        text = draw.pick(topic.questions)
    else:
        text = draw.wording(GENERAL, n=draw.choice(topic.names))
        text = text[0].upper() + text[1:]
    return Turn(loosen(draw, text), topic.text, "explain"), topic


def explain_more(draw: Draw, topic: Topic) -> Turn:
    """A follow-up on the topic just explained."""
    return Turn(draw.pick(MORE), topic.more, "explain more")

"""Small tasks: counting, spelling, repeating, reversing, lists, sums.  Wordings: `tasks.toml`."""

import re

from chatserve.demonstration.corpus import facts, words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import loosen
from chatserve.demonstration.corpus.wordings import MANNER, lists, read

SUM_MAX = 20
COUNT_MAX = 100
TOO_FAR = "That is too far for me: I count up to 100."
WORDINGS = lists(read("tasks.toml")["tasks"])
ODD_WORDS = words.listed(
    """😀 🎉 🐶 ❤️ 👍 🚀 ☕ 🌍 日本 東京 你好 世界 привет мир Москва Αθήνα שלום مرحبا नमस्ते 안녕 ₂ €
    £ ½ × → … “quoted” naïve façade Zürich señor Łódź crème"""
)


WORD_LISTS = (
    *(words.NAMES, words.CITIES, words.COLOURS, words.ANIMALS, words.FRUITS, words.JOBS),
    *(words.COUNTRIES, words.PETS, words.HOBBIES, words.DRINKS, words.LANGUAGES),
)


def word(draw: Draw) -> str:
    """An ordinary word, seldom a name of something, or a made-up word.

    Ordinary words are not split (see `words.ORDINARY_WORDS`): held out are the names, the made-up
    words, the wordings, and which words come together in which order.
    """
    kind = draw.random.random()
    if kind < 0.34:
        return draw.letters(3, 8)
    if kind < 0.39:
        return draw.letters(8, 13)
    if kind < 0.48:
        return draw.pick(draw.choice(WORD_LISTS))
    if kind < 0.52:
        return draw.choice(words.TOPIC_WORDS)
    if kind < 0.55:
        return draw.choice(words.SHORT_WORDS) + draw.choice(words.SHORT_WORDS)
    return draw.choice(words.ORDINARY_WORDS)


def adjective(draw: Draw) -> str:
    """A word in the place of an adjective; often any word, so that it is copied, not known."""
    kind = draw.random.random()
    if kind < 0.3:
        return draw.letters(3, 8)
    return draw.pick(words.ADJECTIVES if kind < 0.65 else words.COMMON_WORDS)


def worded(draw: Draw, name: str, **values: object) -> str:
    """A wording of `tasks.toml`, loosened before it is filled in, so that what fills it stays."""
    return loosen(draw, draw.pick(WORDINGS[name])).format(**values)


def count(draw: Draw) -> Turn:
    """Count up or down, by ones or twos; beyond `COUNT_MAX` say that it is too far."""
    kind = draw.random.random()
    if kind < 0.06:
        high = draw.integer(COUNT_MAX + 1, draw.choice((200, 1000, 10_000, 1_000_000)))
        name, low, step, reply = draw.choice(("count_to", "count_from")), 1, 1, TOO_FAR
    else:
        name, low, high, step = numbers(draw, kind)
        last = high + (1 if step > 0 else -1)
        reply = ", ".join(map(str, range(low, last, step)))
    text = draw.apart(lambda: draw.wording(WORDINGS[name], high=high, low=low))
    if max(low, high) <= 20 and draw.chance(0.25):
        text = re.sub(r"\d+", lambda found: words.NUMBER_WORDS[int(found[0])], text)
    return Turn(loosen(draw, text), reply, "count")


def numbers(draw: Draw, kind: float) -> tuple[str, int, int, int]:
    """What is counted: the wordings' name, the first number, the last, and the step."""
    far = draw.chance(0.3)
    low = draw.integer(0, 80 if far else 20)
    many = draw.integer(8, 30) if far else draw.integer(2, 10)
    if kind < 0.37:
        high = draw.integer(20, COUNT_MAX if draw.chance(0.15) else 40) if far else low + 2
        return "count_to", 1, min(high, COUNT_MAX), 1
    if kind < 0.62:
        return "count_from", low, min(low + many, COUNT_MAX), 1
    if kind < 0.72:
        return "count_back", draw.integer(13, 40) if far else draw.integer(3, 12), 1, -1
    if kind < 0.88:
        low = draw.integer(13, 40) if far else draw.integer(2, 12)
        high = draw.integer(0, 1) if draw.chance(0.7) else draw.integer(0, low - 2)
        return "count_down", low, high, -1
    return "count_in_twos", low, low + 2 * draw.integer(2, 6), 2


def spell(draw: Draw) -> Turn:
    """Spell a word letter by letter."""
    item = word(draw)
    if draw.chance(0.2):
        item = item.capitalize() if draw.chance(0.8) else item.upper()
    text = worded(draw, "spell", item=item)
    return Turn(text, "-".join(item), "spell")


def reverse(draw: Draw) -> Turn:
    """Reverse a short word."""
    item = draw.letters(3, 6) if draw.chance(0.4) else draw.choice(words.SHORT_WORDS)
    text = worded(draw, "reverse", item=item)
    back = item[::-1]
    return Turn(text, f"{'-'.join(item)} backwards is {'-'.join(back)}: {back}", "reverse", (back,))


def sentence(draw: Draw) -> str:
    """A few words in a row that nobody has seen before."""
    kind = draw.random.random()
    if kind < 0.12:
        return draw.pick(words.PHRASES)
    if kind < 0.24:
        return draw.pick(MANNER["neutral"])
    if kind < 0.29:
        return draw.choice((facts.date, facts.clock, facts.code, facts.full_name))(draw)
    if kind < 0.5:
        return draw.wording(
            WORDINGS["sayings"],
            a=word(draw),
            b=word(draw),
            n=draw.pick(words.NAMES),
            d=draw.number(3),
            j=adjective(draw),
        )
    parts = [word(draw) for _ in range(draw.integer(1, 7))]
    if draw.chance(0.12):
        parts.insert(draw.integer(0, len(parts)), draw.choice(ODD_WORDS))
    if draw.chance(0.15):
        parts = [part.capitalize() for part in parts]
    if draw.chance(0.15):
        parts.append(draw.number(4))
    if draw.chance(0.2):
        parts[0] = parts[0].capitalize()
        parts[-1] += draw.choice((".", "!", "?"))
    return " ".join(parts)


def repeat(draw: Draw) -> Turn:
    """Repeat a text, or say a word several times."""
    if draw.chance(0.35):
        item, times = word(draw), draw.integer(2, 5)
        many = draw.choice((str(times), words.NUMBER_WORDS[times]))
        text = worded(draw, "say_many", item=item, many=many)
        if times == 2 and draw.chance(0.4):
            text = text.replace(f"{many} times", "twice")
        return Turn(text, " ".join([item] * times), "repeat")
    said = sentence(draw)
    text = worded(draw, "repeat", said=said)
    return Turn(text, said, "repeat")


def add(draw: Draw) -> Turn:
    """Add two small numbers; the held-out part asks for pairs that training never shows."""
    while True:
        left, right = draw.integer(0, SUM_MAX), draw.integer(0, SUM_MAX)
        if draw.allowed(f"{left}+{right}"):
            break
    pair = (words.NUMBER_WORDS[left], words.NUMBER_WORDS[right])
    a, b = pair if draw.chance(0.15) else (str(left), str(right))
    text = draw.wording(
        WORDINGS["add"],
        a=a,
        b=b,
        n=draw.pick(words.PLAIN_WORDS),
    )
    reply = f"{left} + {right} = {left + right}"
    return Turn(text, reply, "add", (f"= {left + right}",))


CATEGORIES = {
    "colours": words.COLOURS[:12],
    "fruits": words.FRUITS[:12],
    "animals": words.ANIMALS[:12],
    "cities": words.CITIES[:12],
    "countries": words.COUNTRIES[:12],
    "drinks": words.DRINKS[:8],
    "hobbies": words.HOBBIES[:12],
    "jobs": words.JOBS[:12],
}


def bullets(items: list[str]) -> str:
    """A markdown list."""
    return "\n".join(f"- {item}" for item in items)


# By whether the list is numbered.
FORMS = (
    ("list", "list", "bullet list", "bulleted list", "bullet point list", "list with bullets"),
    ("numbered list", "numbered list", "list with numbers", "list with numbers in front"),
)


def own_item(draw: Draw) -> str:
    """What a user puts on a list: a word, now and then two."""
    return f"{adjective(draw)} {word(draw)}" if draw.chance(0.15) else word(draw)


def make_list(draw: Draw) -> Turn:
    """A list of some category, or the user's own items as bullets or numbers."""
    if draw.chance(0.4):
        kind = draw.choice(tuple(CATEGORIES))
        many = draw.integer(2, 5)
        amount = draw.choice((str(many), words.NUMBER_WORDS[many]))
        text = draw.apart(lambda: worded(draw, "list_of_kind", amount=amount, kind=kind))
        return Turn(text, bullets(list(CATEGORIES[kind][:many])), "list")
    items = [own_item(draw) for _ in range(draw.integer(2, 6))]
    row = ", ".join(items)
    if draw.chance(0.3):
        row = f"{', '.join(items[:-1])} and {items[-1]}"
    numbered = draw.chance(0.4)
    text = worded(draw, "list_of_own", form=draw.choice(FORMS[numbered]), row=row)
    if numbered:
        return Turn(text, "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)), "list")
    return Turn(text, bullets(items), "list")


# Copying, spelling and reversing are learned slowest, so they come more often.
TASKS = (
    *(count, count, spell, spell, spell, spell, spell, reverse, reverse, reverse, reverse),
    *(add, add, repeat, repeat, repeat, repeat, repeat, repeat, make_list, make_list),
)

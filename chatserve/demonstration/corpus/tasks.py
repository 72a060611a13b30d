"""Small tasks: counting, spelling, repeating, reversing, lists, sums."""

from chatserve.demonstration.corpus import words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import loosen

SUM_MAX = 20
ODD_WORDS = words.listed(
    """😀 🎉 🐶 ❤️ 👍 🚀 ☕ 🌍 日本 東京 你好 世界 привет мир Москва Αθήνα שלום مرحبا नमस्ते 안녕 ₂ €
    £ ½ × → … “quoted” naïve façade Zürich señor Łódź crème"""
)


def word(draw: Draw) -> str:
    """A plain word, a name in small letters, or a made-up word."""
    return draw.letters(3, 8) if draw.chance(0.5) else draw.pick(words.PLAIN_WORDS)


def count(draw: Draw) -> Turn:
    """Count up or down, by ones or twos."""
    low = draw.integer(0, 20)
    high = low + draw.integer(2, 10)
    kind = draw.random.random()
    if kind < 0.35:
        low, high, step = 1, draw.integer(2, 20), 1
        text = draw.wording(
            (
                "Count to {high}.",
                "Count up to {high}.",
                "Can you count to {high}?",
                "Please count to {high}.",
                "Count from 1 to {high}.",
                "Count to {high} for me.",
                "Could you count up to {high}?",
                "Let's count to {high}.",
                "count to {high}",
            ),
            high=high,
        )
    elif kind < 0.7:
        step = 1
        text = draw.wording(
            (
                "Count from {low} to {high}.",
                "Can you count from {low} to {high}?",
                "Start at {low} and count to {high}.",
                "Count up from {low} to {high}.",
                "Please count from {low} up to {high}.",
                "Give me the numbers from {low} to {high}.",
                "List the numbers from {low} to {high}.",
                "Write the numbers {low} to {high}.",
            ),
            high=high,
            low=low,
        )
    elif kind < 0.85:
        low, high, step = draw.integer(2, 12), draw.integer(0, 1), -1
        text = draw.wording(
            (
                "Count down from {low} to {high}.",
                "Count backwards from {low} to {high}.",
                "Can you count down from {low} to {high}?",
                "Go from {low} down to {high}.",
                "Please count down from {low} to {high}.",
                "Countdown from {low} to {high}!",
            ),
            high=high,
            low=low,
        )
    else:
        step, high = 2, low + 2 * draw.integer(2, 6)
        text = draw.wording(
            (
                "Count from {low} to {high} in twos.",
                "Count by twos from {low} to {high}.",
                "Count from {low} to {high} in steps of two.",
                "Skip count by 2 from {low} to {high}.",
            ),
            high=high,
            low=low,
        )
    numbers = range(low, high + (1 if step > 0 else -1), step)
    return Turn(loosen(draw, text), ", ".join(map(str, numbers)), "count")


def spell(draw: Draw) -> Turn:
    """Spell a word letter by letter."""
    item = word(draw)
    text = draw.wording(
        (
            "Spell {item}.",
            "How do you spell {item}?",
            "Can you spell {item}?",
            "Spell '{item}'.",
            "Please spell the word {item}.",
            "Spell the word {item}.",
            "spell {item}",
            "What letters are in {item}?",
            "Spell {item} for me.",
            'How is "{item}" spelled?',
            "Could you spell {item} for me?",
            "Spell it out: {item}",
            "How do I spell {item}?",
        ),
        item=item,
    )
    return Turn(text, "-".join(item), "spell")


def reverse(draw: Draw) -> Turn:
    """Reverse a short word."""
    item = draw.letters(3, 5) if draw.chance(0.4) else draw.pick(words.PLAIN_WORDS)
    item = item if len(item) < 6 else item[:5]
    text = draw.wording(
        (
            "Reverse {item}.",
            "Reverse the word {item}.",
            "Spell {item} backwards.",
            "What is {item} backwards?",
            "Can you reverse {item}?",
            "Write {item} backwards.",
            "Turn {item} around.",
            "Say {item} backwards.",
            "Please reverse the word {item}.",
            "reverse {item}",
            "What is {item} reversed?",
            "How is {item} written backwards?",
        ),
        item=item,
    )
    back = item[::-1]
    return Turn(text, f"{'-'.join(item)} backwards is {'-'.join(back)}: {back}", "reverse", (back,))


def sentence(draw: Draw) -> str:
    """A few words in a row that nobody has seen before."""
    if draw.chance(0.2):
        return draw.pick(words.PHRASES)
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
    if draw.chance(0.25):
        item, times = word(draw), draw.integer(2, 5)
        many = draw.choice((str(times), words.NUMBER_WORDS[times]))
        text = draw.wording(
            (
                "Say {item} {many} times.",
                "Repeat {item} {many} times.",
                "Write {item} {many} times.",
                "Can you say {item} {many} times?",
                "Say the word {item} {many} times.",
            ),
            item=item,
            many=many,
        )
        return Turn(text, " ".join([item] * times), "repeat")
    said = sentence(draw)
    text = draw.wording(
        (
            "Repeat after me: {said}",
            "Say: {said}",
            "Repeat: {said}",
            "Please repeat: {said}",
            "Say '{said}'.",
            'Say "{said}".',
            "Repeat the words {said}",
            "Echo this: {said}",
            "Repeat this sentence: {said}",
            "Copy this: {said}",
            "Say exactly this: {said}",
            'Can you say "{said}"?',
            "Repeat what I say: {said}",
            'Please say "{said}"',
            "Write this back to me: {said}",
            "Type: {said}",
            "repeat after me: {said}",
        ),
        said=said,
    )
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
        (
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "{a} + {b} = ?",
            "How much is {a} + {b}?",
            "Calculate {a} + {b}.",
            "{a} plus {b}",
            "{a}+{b}",
            "What's {a} plus {b}?",
            "Can you add {a} and {b}?",
            "What is the sum of {a} and {b}?",
            "How much is {a} plus {b}?",
            "Please add {a} and {b}.",
            "What do you get if you add {a} and {b}?",
            "Compute {a} + {b}",
            "{a} + {b}",
            "I have {a} apples and get {b} more. How many is that?",
        ),
        a=a,
        b=b,
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


def make_list(draw: Draw) -> Turn:
    """A list of some category, or the user's own items as bullets or numbers."""
    if draw.chance(0.4):
        kind = draw.choice(tuple(CATEGORIES))
        many = draw.integer(2, 5)
        amount = draw.choice((str(many), words.NUMBER_WORDS[many]))
        text = draw.wording(
            (
                "List {amount} {kind}.",
                "Name {amount} {kind}.",
                "Give me {amount} {kind}.",
                "Make a list of {amount} {kind}.",
                "Can you list {amount} {kind}?",
                "Write a list of {amount} {kind}.",
                "Tell me {amount} {kind}.",
                "I need a list of {amount} {kind}.",
                "Please name {amount} {kind}.",
            ),
            amount=amount,
            kind=kind,
        )
        reply = bullets(list(CATEGORIES[kind][:many]))
        return Turn(loosen(draw, text), reply, "list")
    items = [word(draw) for _ in range(draw.integer(2, 5))]
    row = ", ".join(items)
    numbered = draw.chance(0.4)
    form = "numbered list" if numbered else draw.choice(("list", "bullet list"))
    text = draw.wording(
        (
            "Make a {form} of {row}.",
            "Turn this into a {form}: {row}",
            "Write {row} as a {form}.",
            "Put {row} in a {form}.",
            "Make a {form}: {row}",
            "Please make a {form} from {row}.",
            "Format as a {form}: {row}",
            "Show {row} as a {form}.",
        ),
        form=form,
        row=row,
    )
    if numbered:
        return Turn(text, "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)), "list")
    return Turn(text, bullets(items), "list")


# Spelling, reversing and adding are learned slowest, so they come more often.
TASKS = (count, spell, spell, spell, reverse, reverse, repeat, repeat, add, add, make_list)

"""Small tasks: counting, spelling, repeating, reversing, lists, sums."""

import re

from chatserve.demonstration.corpus import words
from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.memory import loosen
from chatserve.demonstration.corpus.wordings import MANNER

SUM_MAX = 20
ODD_WORDS = words.listed(
    """😀 🎉 🐶 ❤️ 👍 🚀 ☕ 🌍 日本 東京 你好 世界 привет мир Москва Αθήνα שלום مرحبا नमस्ते 안녕 ₂ €
    £ ½ × → … “quoted” naïve façade Zürich señor Łódź crème"""
)


WORD_LISTS = (words.NAMES, words.CITIES, words.COLOURS, words.ANIMALS, words.FRUITS, words.JOBS)


def word(draw: Draw) -> str:
    """A plain word, seldom a name of something, or a made-up word."""
    kind = draw.random.random()
    if kind < 0.35:
        return draw.letters(3, 8)
    if kind < 0.45:
        return draw.pick(draw.choice(WORD_LISTS))
    return draw.pick(words.COMMON_WORDS if kind < 0.75 else words.PLAIN_WORDS)


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
                "Count until {high}.",
                "Count up till {high}.",
                "Counting to {high}, please.",
                "Count all the way to {high}.",
                "Show me how you count to {high}.",
                "I want you to count to {high}.",
                "Would you count to {high}?",
                "Start counting, stop at {high}.",
                "Say the numbers up to {high}.",
                "Count from one to {high}.",
                "please count to {high}",
                "Now count to {high}.",
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
                "Count {low} to {high}.",
                "Count from {low} until {high}.",
                "Say all numbers from {low} to {high}.",
                "Could you count from {low} to {high}?",
                "Begin at {low} and stop at {high}.",
                "What are the numbers from {low} to {high}?",
                "count from {low} to {high}",
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
                "Count down from {low} until {high}.",
                "Count back from {low} to {high}.",
                "Count from {low} down to {high}.",
                "Count in reverse from {low} to {high}.",
                "Start a countdown at {low} and end at {high}.",
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
                "Count in twos from {low} to {high}.",
                "Count from {low} to {high} by twos.",
                "Count from {low} to {high} by 2.",
                "Count in steps of two from {low} to {high}.",
                "From {low} to {high}, every second number.",
                "Count every other number from {low} to {high}.",
                "Can you count in twos from {low} to {high}?",
                "In steps of 2, count from {low} to {high}.",
            ),
            high=high,
            low=low,
        )
    if max(low, high) <= 20 and draw.chance(0.25):
        text = re.sub(r"\d+", lambda found: words.NUMBER_WORDS[int(found[0])], text)
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
            "Spell out {item}.",
            "Spell out the word {item}.",
            "Write {item} letter by letter.",
            "How is the word {item} spelled?",
            "Would you spell {item}?",
            "Please spell {item}.",
            "Please spell {item} for me.",
            "Can you spell the word {item}?",
            "Can you spell out {item}?",
            "Give me the letters of {item}.",
            "Tell me how to spell {item}.",
            "The word is {item}. Spell it.",
            "Could you spell the word {item}?",
            "I can't spell {item}. Can you?",
            "Now spell {item}.",
            "how do you spell {item}",
            "Name the letters of {item}.",
            "spell the word {item} please",
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
            "{item} backwards, please.",
            "Reverse the letters of {item}.",
            "What do you get if you reverse {item}?",
            "Write the word {item} in reverse.",
            "Reverse '{item}'.",
            'What is "{item}" backwards?',
            "Spell the word {item} backwards.",
            "Could you reverse {item}?",
            "Give me {item} backwards.",
            "Write {item} from back to front.",
            "reverse the word {item} please",
            "Say the word '{item}' backwards.",
            "How do you write {item} in reverse?",
        ),
        item=item,
    )
    back = item[::-1]
    return Turn(text, f"{'-'.join(item)} backwards is {'-'.join(back)}: {back}", "reverse", (back,))


def sentence(draw: Draw) -> str:
    """A few words in a row that nobody has seen before."""
    kind = draw.random.random()
    if kind < 0.12:
        return draw.pick(words.PHRASES)
    if kind < 0.24:
        return draw.pick(MANNER["neutral"])
    if kind < 0.34:
        return draw.wording(
            SAYINGS,
            a=word(draw),
            b=word(draw),
            n=draw.pick(words.NAMES),
            d=draw.number(3),
            j=draw.pick(words.ADJECTIVES),
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


SAYINGS = (
    "the {j} {a} and the {b}",
    "{n} has a {j} {a}",
    "I have {d} {a}s and a {b}",
    "{a}, {b} and {a}",
    "Where is the {j} {a}?",
    "{n} likes {a} and {b}.",
    "My {a} is {j}!",
    "{a} {d} {b}",
    "{n} and the {j} {b}",
    "a {a} is not a {b}",
    "This {a} is very {j}.",
    "{a}-{b}",
    "no {a}, no {b}",
)


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
                "Repeat the word {item} {many} times.",
                "Write the word {item} {many} times.",
                "Please say {item} {many} times.",
                "{many} times {item}, please.",
                "Print {item} {many} times.",
                "Could you repeat {item} {many} times?",
                "say {item} {many} times",
                "Type {item} {many} times.",
                "I want to read {item} {many} times.",
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
            "Repeat the words: {said}",
            "Repeat the following: {said}",
            "Say the following: {said}",
            "Say this: {said}",
            "Repeat this: {said}",
            "Please say: {said}",
            "Please repeat after me: {said}",
            "Now say: {said}",
            "Now repeat: {said}",
            "Say after me: {said}",
            "Just say {said}",
            "Only say: {said}",
            "Reply with: {said}",
            "Answer with: {said}",
            "Respond with exactly: {said}",
            "Echo: {said}",
            "echo {said}",
            "Echo the words {said}",
            "Print: {said}",
            'Repeat "{said}".',
            "Repeat '{said}'.",
            "Copy the text: {said}",
            "Copy these words: {said}",
            "Write: {said}",
            "Write the words {said}",
            "Write down: {said}",
            "Write exactly this: {said}",
            "Type this: {said}",
            "Type exactly: {said}",
            "Read this back to me: {said}",
            "Give this back to me: {said}",
            "Send this back: {said}",
            "Can you repeat this? {said}",
            "Could you say the words {said}",
            "I say, you repeat: {said}",
            "Your turn to say it: {said}",
            "The text to repeat is: {said}",
            "say: {said}",
            "repeat: {said}",
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
            "I have {a} {n}s and buy {b} more. How many do I have?",
            "There are {a} {n}s and {b} more come. How many are there?",
            "{a} {n}s and {b} {n}s, how many is that together?",
            "Add up {a} and {b}.",
            "Sum {a} and {b}.",
            "What is {a} and {b}?",
            "What are {a} and {b} together?",
            "What is {a} added to {b}?",
            "Work out {a} + {b}.",
            "Can you calculate {a} plus {b}?",
            "The sum of {a} and {b}?",
            "what is {a}+{b}",
            "whats {a} + {b}",
            "Tell me {a} plus {b}.",
            "Please calculate {a} + {b}.",
            "Put {a} and {b} together. What do you get?",
            "Do you know what {a} plus {b} is?",
            "Solve {a} + {b}.",
            "{a} + {b} equals?",
            "{a} and {b} is how much?",
            "{n}s: {a} in one box, {b} in another. How many in all?",
        ),
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
            "Make a {form} of these: {row}",
            "Make a {form} with these words: {row}",
            "Make a {form} out of {row}.",
            "Write these as a {form}: {row}",
            "Put these in a {form}: {row}",
            "Can you make a {form} of {row}?",
            "Create a {form} from the following: {row}",
            "Turn {row} into a {form}.",
            "I need a {form} of {row}.",
            "As a {form}, please: {row}",
            "Give me a {form} with {row}.",
        ),
        form=form,
        row=row,
    )
    if numbered:
        return Turn(text, "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)), "list")
    return Turn(text, bullets(items), "list")


# Spelling, reversing and adding are learned slowest, so they come more often.
TASKS = (
    *(count, count, spell, spell, spell, reverse, reverse, repeat, repeat, repeat, add, add),
    make_list,
)

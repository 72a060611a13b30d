"""What users tell about themselves and others: things, their values, and how people word them.

A fact is an owner ("my", "the", "Anna's"), a thing ("lucky number") and a value.  Templates use
{o} for the owner, {t} for the thing, {b} for the bearer of a name ("dog" in "dog's name") and {v}
for the value.  The general wordings suit every thing; the special ones suit a single thing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from chatserve.demonstration.corpus import words
from chatserve.demonstration.corpus.draw import Draw

INVENTED_SHARE = 0.5


def invented(draw: Draw) -> str:
    """A made-up name."""
    return draw.letters(3, 9).capitalize()


def person(draw: Draw) -> str:
    """A first name: half are made up, so that names must be copied rather than known."""
    return invented(draw) if draw.chance(INVENTED_SHARE) else draw.pick(words.NAMES)


def full_name(draw: Draw) -> str:
    """A first name, seldom with a surname."""
    first = person(draw)
    return f"{first} {invented(draw)}" if draw.chance(0.1) else first


def city(draw: Draw) -> str:
    """A city, a third of them made up."""
    return invented(draw) if draw.chance(0.3) else draw.pick(words.CITIES)


def pet(draw: Draw) -> str:
    """A pet's name, half of them made up."""
    return invented(draw) if draw.chance(INVENTED_SHARE) else draw.pick(words.PETS)


def date(draw: Draw) -> str:
    """A date in one of the usual ways of writing."""
    month, day, year = draw.choice(words.MONTHS), draw.integer(1, 31), draw.integer(1950, 2030)
    shapes = (f"{day} {month}", f"{month} {day}", f"{day} {month} {year}", f"{month} {day}, {year}")
    return draw.choice(shapes)


def code(draw: Draw) -> str:
    """A code of letters and digits, or an invented word."""
    if draw.chance(0.4):
        return draw.letters(4, 9)
    letters = "".join(draw.choice("ABCDEFGHKLMNPRSTVWXZ") for _ in range(draw.integer(1, 2)))
    return f"{letters}{draw.number(3)}" if draw.chance(0.6) else draw.number(5)


def clock(draw: Draw) -> str:
    """A time of day."""
    return f"{draw.integer(1, 12)}:{draw.choice(('00', '15', '20', '30', '40', '45'))}"


def picked(items: tuple[str, ...]) -> Callable[[Draw], str]:
    """A value maker that draws from a list, now and then a made-up word."""
    return lambda draw: draw.letters(4, 8) if draw.chance(0.15) else draw.pick(items)


def number(draw: Draw) -> str:
    """A number of up to four digits."""
    return draw.number(4)


def age(draw: Draw) -> str:
    """An age in years."""
    return str(draw.integer(5, 99))


@dataclass(frozen=True)
class Thing:
    """Something that can be known, its other spellings, and what makes its values."""

    name: str
    value: Callable[[Draw], str]
    spellings: tuple[str, ...] = ()
    owners: tuple[str, ...] = ("my",)


MY_THINGS = (
    Thing("name", full_name),
    Thing("favourite colour", picked(words.COLOURS), ("favorite color", "favourite color")),
    Thing("city", city, ("home town", "hometown")),
    Thing("lucky number", number),
    Thing("favourite number", number, ("favorite number",)),
    Thing("birthday", date),
    Thing("age", age),
    Thing("job", picked(words.JOBS)),
    Thing("hobby", picked(words.HOBBIES)),
    Thing("favourite food", picked(words.FOODS), ("favorite food",)),
    Thing("favourite drink", picked(words.DRINKS), ("favorite drink",)),
    Thing("favourite fruit", picked(words.FRUITS), ("favorite fruit",)),
    Thing("favourite animal", picked(words.ANIMALS), ("favorite animal",)),
    Thing("favourite day", picked(words.DAYS), ("favorite day",)),
    Thing("favourite season", picked(("spring", "summer", "autumn", "winter"))),
    Thing("home country", picked(words.COUNTRIES)),
    Thing("car colour", picked(words.COLOURS), ("car color",)),
    Thing("shoe size", age),
    Thing("house number", number),
    Thing("room number", number),
    Thing("locker number", number),
    Thing("seat number", code),
    Thing("flight number", code),
    Thing("order number", code),
    Thing("nickname", pet),
    Thing("password", code),
    Thing("secret word", code),
    Thing("code word", code),
    Thing("wedding date", date),
    Thing("exam date", date),
)
BEARERS = tuple(
    """dog cat rabbit parrot hamster horse turtle pony goat sister brother mother father wife husband
son daughter friend boss neighbour teacher uncle aunt cousin grandmother grandfather doctor boat
robot street school team band village""".split()
) + ("best friend", "goldfish")
PETS = BEARERS[:9]
NAMED_THINGS = tuple(
    Thing(f"{bearer}'s name", pet if bearer in PETS else person) for bearer in BEARERS
)
BEARER_OF = {f"{bearer}'s name": bearer for bearer in BEARERS}
THE_THINGS = (
    *(
        Thing(name, code, owners=("the",))
        for name in (
            "gate code",
            "door code",
            "wifi password",
            "booking code",
            "ticket number",
            "box number",
            "safe code",
            "alarm code",
            "project code",
            "parcel number",
        )
    ),
    *(
        Thing(name, clock, owners=("the",))
        for name in (
            "meeting time",
            "train time",
            "closing time",
            "opening time",
            "dinner time",
        )
    ),
    *(
        Thing(name, date, owners=("the",))
        for name in (
            "launch date",
            "party date",
            "deadline",
            "concert date",
            "delivery date",
        )
    ),
    *(
        Thing(name, number, owners=("the",))
        for name in (
            "bus number",
            "platform number",
            "port number",
            "page number",
            "price",
            "budget",
        )
    ),
    *(
        Thing(name, person, owners=("the",))
        for name in (
            "winner",
            "captain",
            "manager",
            "project name",
            "ship's name",
            "company name",
        )
    ),
    *(Thing(name, city, owners=("the",)) for name in ("capital", "meeting place", "next stop")),
)
OTHERS_THINGS = tuple(
    Thing(thing.name, thing.value, thing.spellings, ("other",))
    for thing in MY_THINGS[1:20]
    if thing.name not in ("city", "age", "job")
)
ALL_THINGS = MY_THINGS + NAMED_THINGS + THE_THINGS
ASKED_OFTEN = (*MY_THINGS[:7], *NAMED_THINGS[:4])

TELL = (
    "{O} {t} is {v}.",
    "{O} {t} is {v}.",
    "Remember that {o} {t} is {v}.",
    "{v} is {o} {t}.",
    "Please remember this: {o} {t} is {v}.",
    "Just so you know, {o} {t} is {v}.",
    "By the way, {o} {t} is {v}.",
    "Note that {o} {t} is {v}.",
    "For later: {o} {t} is {v}.",
    "I want you to remember {o} {t}: {v}.",
    "Keep in mind that {o} {t} is {v}.",
    "Can you remember that {o} {t} is {v}?",
    "{O} {t}? It's {v}.",
    "FYI {o} {t} is {v}",
    "You should know that {o} {t} is {v}.",
    "Let me tell you {o} {t}: it is {v}.",
    "Remember this for me: {o} {t} is {v}.",
    "Write this down: {o} {t} is {v}.",
    "Hello! {O} {t} is {v}.",
    "Hi, {o} {t} is {v}.",
    "{O} {t}: {v}",
    "{t}: {v}",
    "Don't forget: {o} {t} is {v}.",
    "I'll tell you something: {o} {t} is {v}.",
    "One more thing, {o} {t} is {v}.",
    "Also, {o} {t} is {v}.",
    "Please note {o} {t}: {v}.",
    "It may help to know that {o} {t} is {v}.",
    "Okay, {o} {t} is {v}.",
    "So {o} {t} is {v}.",
    "Could you keep {o} {t} in mind? It is {v}.",
    "Here is a fact: {o} {t} is {v}.",
    "Remember {v}, it is {o} {t}.",
    "Please save {o} {t}, {v}.",
    "And {o} {t} is {v}.",
)
ASK = (
    "What is {o} {t}?",
    "What's {o} {t}?",
    "Do you remember {o} {t}?",
    "Can you tell me {o} {t}?",
    "Tell me {o} {t}.",
    "{O} {t}, please?",
    "I forgot {o} {t}. What is it?",
    "What is {o} {t}?",
    "Do you know {o} {t}?",
    "What did I say {o} {t} is?",
    "What was {o} {t} again?",
    "Remind me of {o} {t}.",
    "Could you remind me what {o} {t} is?",
    "And what is {o} {t}?",
    "Quick question: what is {o} {t}?",
    "So, what's {o} {t}?",
    "what is {o} {t}",
    "Now tell me {o} {t}.",
    "Please tell me {o} {t}.",
    "What is {o} {t} again?",
    "{O} {t}?",
    "Do you still know {o} {t}?",
    "Have you remembered {o} {t}?",
    "Can you recall {o} {t}?",
    "What did I tell you about {o} {t}?",
    "I told you {o} {t}. What was it?",
    "Say {o} {t}.",
    "Let's see if you remember: what is {o} {t}?",
    "Which {t} did I tell you?",
    "Earlier I told you {o} {t}. What is it?",
    "Any idea what {o} {t} is?",
    "Recall {o} {t}.",
    "Just checking: what's {o} {t}?",
    "I can't remember {o} {t}. Can you?",
    "whats {o} {t}",
    "Would you tell me {o} {t}?",
    "Give me {o} {t}.",
    "What do you have as {o} {t}?",
)
CORRECT = (
    "Actually, {o} {t} is {v}.",
    "Sorry, {o} {t} is {v}.",
    "No, {o} {t} is {v} now.",
    "Correction: {o} {t} is {v}.",
    "I made a mistake. {O} {t} is {v}.",
    "Wait, {o} {t} is {v}.",
    "I was wrong, {o} {t} is {v}.",
    "Let me correct that: {o} {t} is {v}.",
    "Oops, {o} {t} is {v}.",
    "{O} {t} has changed. It is {v} now.",
    "Please change {o} {t} to {v}.",
    "Update {o} {t} to {v}.",
    "I changed my mind, {o} {t} is {v}.",
    "{O} {t} is now {v}.",
    "{O} {t} is {v}, not {w}.",
    "Actually {o} {t} is not {w}, it is {v}.",
    "Forget what I said, {o} {t} is {v}.",
    "From now on {o} {t} is {v}.",
    "It's not {w}. {O} {t} is {v}.",
    "Make that {v} for {o} {t}.",
)
TELL_NAMED = (
    "{O} {b} is called {v}.",
    "{O} {b} is named {v}.",
    "I have a {b} called {v}.",
    "I have a {b} named {v}.",
    "{v} is {o} {b}.",
    "{O} {b}, {v}, is here with me.",
    "This is {v}, {o} {b}.",
    "{O} {b} {v} says hello.",
    "I live with {o} {b} {v}.",
    "Meet {o} {b} {v}.",
    "I call {o} {b} {v}.",
    "The name of {o} {b} is {v}.",
    "I was out with {o} {b} {v} today.",
    "{O} {b} goes by {v}.",
)
ASK_NAMED = (
    "What is {o} {b} called?",
    "What's {o} {b} called?",
    "What is the name of {o} {b}?",
    "What's the name of {o} {b}?",
    "How is {o} {b} called?",
    "Who is {o} {b}?",
    "Do you remember what {o} {b} is called?",
    "What did I name {o} {b}?",
    "What do I call {o} {b}?",
    "Do you know the name of {o} {b}?",
    "Tell me the name of {o} {b}.",
    "{O} {b} is called?",
    "Can you tell me what {o} {b} is called?",
    "Remind me, what is {o} {b} called?",
)
TELL_SPECIAL = {
    "name": (
        "I'm {v}.",
        "I am {v}.",
        "Call me {v}.",
        "Hi, I'm {v}!",
        "Hello, I am {v}.",
        "{v} here.",
        "You can call me {v}.",
        "My name's {v}.",
        "People call me {v}.",
        "Hey, {v} here.",
        "Hi there, my name is {v}.",
        "They call me {v}.",
        "I am called {v}.",
        "Please call me {v}.",
        "Good morning, I'm {v}.",
        "Nice to meet you, I'm {v}.",
        "It's {v}.",
        "This is {v}.",
        "Hello! My name is {v}.",
        "Hi! My name is {v}, nice to meet you.",
        "im {v}",
    ),
    "favourite colour": (
        "I like {v} best.",
        "I love the colour {v}.",
        "{v} is the colour I like most.",
        "The colour I like best is {v}.",
        "I love {v}, it's my favourite colour.",
    ),
    "city": (
        "I live in {v}.",
        "I'm from {v}.",
        "I come from {v}.",
        "I am living in {v}.",
        "My home is in {v}.",
        "I was born in {v} and still live there.",
        "I moved to {v}.",
        "I'm writing to you from {v}.",
        "I've lived in {v} for years.",
        "i live in {v}",
        "My flat is in {v}.",
        "Home for me is {v}.",
    ),
    "birthday": (
        "I was born on {v}.",
        "My birthday is on {v}.",
        "I celebrate my birthday on {v}.",
        "I have my birthday on {v}.",
        "My date of birth is {v}.",
    ),
    "age": (
        "I am {v} years old.",
        "I'm {v} years old.",
        "I am {v}.",
        "I just turned {v}.",
        "I'm {v}.",
    ),
    "job": (
        "I work as a {v}.",
        "I am a {v}.",
        "I'm a {v}.",
        "I earn my living as a {v}.",
        "I have worked as a {v} for years.",
        "By trade I am a {v}.",
    ),
    "hobby": ("I enjoy {v}.", "I like {v} in my free time.", "I spend my weekends on {v}."),
    "favourite food": (
        "I love eating {v}.",
        "I like to eat {v} most.",
        "I could eat {v} every day.",
    ),
    "favourite drink": ("I like to drink {v} most.", "I could drink {v} all day."),
    "home country": ("I come from {v}.", "I was born in {v}."),
}
ASK_SPECIAL = {
    "name": (
        "Who am I?",
        "What am I called?",
        "How am I called?",
        "Do you know who I am?",
        "What do people call me?",
        "Do you remember me?",
        "Can you say my name?",
        "Say my name.",
        "What should you call me?",
        "Do you know my name?",
        "Who are you talking to?",
    ),
    "favourite colour": (
        "Which colour do I like best?",
        "What colour do I like?",
        "What color do I like most?",
        "Which colour is my favourite?",
        "What color is my favorite?",
    ),
    "city": (
        "Where do I live?",
        "Which city do I live in?",
        "Where am I from?",
        "In which city do I live?",
        "Where is my home?",
        "What city am I in?",
        "Do you remember where I live?",
        "where do i live",
        "Do you know where I live?",
        "Tell me where I live.",
        "What city do I live in?",
    ),
    "birthday": (
        "When is my birthday?",
        "When was I born?",
        "When do I have my birthday?",
        "On what date is my birthday?",
        "Do you remember when my birthday is?",
    ),
    "age": ("How old am I?", "What age am I?", "Do you remember how old I am?"),
    "job": (
        "What do I do for work?",
        "What do I work as?",
        "What is my profession?",
        "What do I do?",
    ),
    "hobby": ("What do I do in my free time?", "What do I enjoy doing?"),
    "favourite food": ("What do I like to eat?", "Which food do I like best?"),
    "favourite drink": ("What do I like to drink?", "Which drink do I like best?"),
    "home country": ("Which country am I from?", "Which country do I come from?"),
    "wedding date": ("When is my wedding?",),
    "exam date": ("When is my exam?",),
    "meeting time": ("When is the meeting?", "What time is the meeting?"),
    "train time": ("When does the train leave?",),
    "closing time": ("When does it close?",),
    "launch date": ("When is the launch?",),
    "party date": ("When is the party?",),
    "deadline": ("When is the deadline?",),
    "delivery date": ("When is the delivery?",),
    "winner": ("Who is the winner?", "Who won?"),
    "captain": ("Who is the captain?",),
    "manager": ("Who is the manager?",),
    "price": ("How much is it?", "How much does it cost?"),
}
REPLY_SPECIAL = {
    "city": "You live in {v}.",
    "age": "You are {v} years old.",
    "favourite colour": "Your favourite colour is {v}.",
}

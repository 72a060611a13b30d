"""What users tell about themselves and others: things, and what makes their values.

A fact is an owner ("my", "the", "Anna's"), a thing ("lucky number") and a value.  How people word
them stands in `wordings.toml`: general wordings suit every thing, special ones a single thing.
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
    number, year = draw.integer(1, 12), draw.integer(1950, 2030)
    day = draw.integer(1, 28 if number == 2 else 30)
    month = words.MONTHS[number - 1]
    short = month[:3]
    shapes = (
        *(f"{day} {month}", f"{month} {day}", f"{day} {month} {year}", f"{month} {day}, {year}"),
        *(f"{day} {month}", f"{month} {day}", f"{ordinal(day)} {month}", f"{month} {ordinal(day)}"),
        *(f"the {ordinal(day)} of {month}", f"{day} {short}", f"{short} {day}"),
        *(f"{day}.{number}.{year}", f"{year}-{number:02}-{day:02}", f"{day:02}/{number:02}/{year}"),
    )
    return draw.choice(shapes)


def ordinal(day: int) -> str:
    """The number of a day as it is spoken: 1st, 2nd, 3rd, 11th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th") if day // 10 != 1 else "th"
    return f"{day}{ending}"


def appointment(draw: Draw) -> str:
    """A day, a date, or one of them with a time."""
    day = draw.pick(words.DAYS) if draw.chance(0.5) else date(draw)
    return f"{day} at {clock(draw)}" if draw.chance(0.5) else day


def code(draw: Draw) -> str:
    """A code of letters and digits, or an invented word."""
    if draw.chance(0.4):
        return draw.letters(4, 9)
    letters = "".join(draw.choice("ABCDEFGHKLMNPRSTVWXZ") for _ in range(draw.integer(1, 2)))
    return f"{letters}{draw.number(3)}" if draw.chance(0.6) else draw.number(5)


def clock(draw: Draw) -> str:
    """A time of day in one of the usual ways of writing."""
    minute = draw.choice(("00", "05", "10", "15", "20", "30", "40", "45", "50"))
    kind = draw.random.random()
    if kind < 0.4:
        return f"{draw.integer(1, 12)}:{minute}"
    if kind < 0.55:
        return f"{draw.integer(13, 22)}:{minute}"
    if kind < 0.75:
        return str(draw.integer(6, 22))
    if kind < 0.9:
        return f"{draw.integer(1, 12)}{draw.choice(('', ' '))}{draw.choice(('am', 'pm'))}"
    hour = words.NUMBER_WORDS[draw.integer(1, 12)]
    return draw.choice((f"half past {hour}", f"{hour} o'clock", f"quarter to {hour}", hour, "noon"))


def kind_of_pet(draw: Draw) -> str:
    """An animal with its article."""
    kind = draw.letters(3, 8) if draw.chance(0.15) else draw.pick(words.ANIMALS)
    colour = f"{draw.pick(words.COLOURS)} " if draw.chance(0.12) else ""
    return f"{'an' if (colour + kind)[0] in 'aeiou' else 'a'} {colour}{kind}"


def picked(items: tuple[str, ...]) -> Callable[[Draw], str]:
    """A value maker that draws from a list, now and then a made-up word."""
    return lambda draw: draw.letters(4, 8) if draw.chance(0.3) else draw.pick(items)


def either_word(draw: Draw) -> str:
    """A plain word or a made-up one, small or with a capital."""
    word = draw.letters(3, 9) if draw.chance(0.5) else draw.pick(words.PLAIN_WORDS)
    return word.capitalize() if draw.chance(0.4) else word


def number(draw: Draw) -> str:
    """A number of up to four digits."""
    return draw.number(4)


def age(draw: Draw) -> str:
    """An age in years."""
    return str(draw.integer(5, 99))


def called(draw: Draw) -> str:
    """A name that somebody gave to a thing: a person's, a place's, a word, or made up."""
    kind = draw.random.random()
    if kind < 0.4:
        return invented(draw)
    if kind < 0.6:
        return draw.pick(words.NAMES)
    return draw.pick(words.CITIES if kind < 0.8 else words.PLAIN_WORDS).capitalize()


def other_owner(draw: Draw) -> str:
    """Somebody else as an owner: "Anna's", or one of the user's people ("my sister's")."""
    return f"my {draw.choice(PEOPLE)}'s" if draw.chance(0.35) else f"{person(draw)}'s"


@dataclass(frozen=True)
class Thing:
    """Something that can be known, its other spellings, and what makes its values."""

    name: str
    value: Callable[[Draw], str]
    spellings: tuple[str, ...] = ()


APPOINTMENTS = (
    "appointment",
    "dentist appointment",
    "doctor's appointment",
    "job interview",
    "driving test",
    "haircut",
    "vet appointment",
)
MY_THINGS = (
    Thing("name", full_name, ("full name", "first name")),
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
    Thing("middle name", person),
    Thing("surname", invented, ("last name", "family name")),
    Thing("street", invented),
    Thing("phone number", lambda draw: draw.number(6), ("telephone number",)),
    Thing("pin", number),
    Thing("username", code),
    Thing("anniversary", date),
    Thing("eye colour", picked(words.COLOURS), ("eye color",)),
    Thing("hair colour", picked(words.COLOURS), ("hair color",)),
    Thing("bike colour", picked(words.COLOURS), ("bike color",)),
    Thing("school", invented),
    Thing("next holiday", city),
    *(
        Thing(f"favourite {kind}", either_word, (f"favorite {kind}",))
        for kind in words.listed(
            """film movie book song game sport flower tree subject band month cake singer toy
            bird vegetable restaurant shop show planet instrument"""
        )
    ),
    *(Thing(name, appointment) for name in APPOINTMENTS),
    *(Thing("pet", kind_of_pet) for _ in range(3)),
    Thing("parking spot", code),
    Thing("native language", picked(words.LANGUAGES), ("mother tongue",)),
    Thing("employee number", number),
)
BEARERS = (
    *words.listed(
        """dog cat rabbit parrot hamster horse turtle pony goat kitten puppy pig cow sister brother
        mother father wife husband son daughter friend boss neighbour teacher uncle aunt cousin
        grandmother grandfather doctor boat robot team band village house car baby
        grandson niece nephew colleague partner flatmate twin"""
    ),
    "best friend",
    "goldfish",
)
PETS = BEARERS[:13]
NOT_PEOPLE = words.listed("boat robot team band village house car goldfish")
NAMED_THINGS = tuple(
    Thing(f"{bearer}'s name", pet if bearer in PETS else person) for bearer in BEARERS
)
BEARER_OF = {f"{bearer}'s name": bearer for bearer in BEARERS}
THE_THINGS = (
    Thing("number", number),
    Thing("word", lambda draw: draw.letters(3, 9)),
    *(
        Thing(name, code)
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
        Thing(name, clock)
        for name in (
            "meeting time",
            "train time",
            "closing time",
            "opening time",
            "dinner time",
            "breakfast time",
            "checkout time",
        )
    ),
    *(
        Thing(name, date)
        for name in (
            "launch date",
            "party date",
            "deadline",
            "concert date",
            "delivery date",
        )
    ),
    *(
        Thing(name, number)
        for name in (
            "bus number",
            "platform number",
            "port number",
            "page number",
            "price",
            "budget",
            "table number",
            "number of seats",
        )
    ),
    *(
        Thing(name, person)
        for name in (
            "winner",
            "captain",
            "manager",
            "contact person",
            "guide",
            "owner",
            "project name",
            "ship's name",
            "company name",
        )
    ),
    *(Thing(name, city) for name in ("capital", "meeting place", "next stop")),
    Thing("dish of the day", picked(words.FOODS)),
    Thing("closing day", picked(words.DAYS)),
    Thing("colour of the team", picked(words.COLOURS)),
)
OTHERS_THINGS = (*MY_THINGS[1:20], *MY_THINGS[1:10], *MY_THINGS[20:])
PEOPLE = tuple(bearer for bearer in BEARERS[BEARERS.index("sister") :] if bearer not in NOT_PEOPLE)
BEINGS = frozenset((*PETS, *PEOPLE))
# Who says "I love indigo." means a colour: values that tell what they are.
TELLING = {
    "favourite colour": frozenset(words.COLOURS),
    "favourite food": frozenset(words.FOODS),
    "favourite drink": frozenset(words.DRINKS),
    "favourite fruit": frozenset(words.FRUITS),
    "favourite season": frozenset(("spring", "summer", "autumn", "winter")),
}
OPENING_HOURS = frozenset(("opening time", "closing time"))
ASKED_OFTEN = (*MY_THINGS[:7], *NAMED_THINGS[:4])

# What follows a word to make a thing that no list has ("the lamp code"), and what makes its values.
KINDS: tuple[tuple[str, Callable[[Draw], str]], ...] = (
    *(("code", code), ("code", number), ("number", number), ("number", code), ("key", code)),
    *(("password", code), ("date", date), ("time", clock), ("room", number), ("size", age)),
    *(("colour", picked(words.COLOURS)), ("price", number), ("city", city)),
    ("day", picked(words.DAYS)),
)
ALONE_SHARE = 0.35
# Wordings of these speak of the user: "I live in {v}.".
USERS_OWN = frozenset(thing.name for thing in MY_THINGS)
# What people give names to, besides those of `BEARERS`.
CALLED = (
    *words.listed(
        """hotel island planet building farm shop game song book film server printer machine
        train bridge tower club park office hall camp hut beach mountain valley plan file folder
        café pub river lake forest castle museum"""
    ),
    *("meeting room", "conference room", "main hall", "coffee machine", "next talk"),
)
NAMELESS = tuple(word for word in words.PLAIN_WORDS if word not in BEARERS)


def anything(draw: Draw, owner: str) -> Thing:
    """A thing of any kind: a word with what it has ("lamp code"), or what has a name of its own.

    Of nobody's a kind may also come alone: "the code".
    """
    word = draw.letters(3, 8) if draw.chance(0.15) else draw.pick(NAMELESS)
    if draw.chance(0.3):
        kind = draw.random.random()
        if kind < 0.55:
            word = draw.pick(CALLED)
        elif kind < 0.7:
            word = f"{word} {draw.pick(CALLED)}"
        return Thing(word, called)
    kind, value = draw.choice(KINDS)
    is_alone = owner == "the" and kind not in USERS_OWN and draw.chance(ALONE_SHARE)
    return Thing(kind if is_alone else f"{word} {kind}", value)


REPLY_SPECIAL = {
    "city": "You live in {v}",
    "age": "You are {v} years old",
    "job": "You work as a {v}",
    **dict.fromkeys(APPOINTMENTS, "Your {t} is on {v}"),
}
REPLY_OTHER = {
    "city": "{p} lives in {v}",
    "age": "{p} is {v} years old",
    "job": "{p} works as a {v}",
    **dict.fromkeys(APPOINTMENTS, "{O} {t} is on {v}"),
}

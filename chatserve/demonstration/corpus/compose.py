"""Whole chats, put together from turns: for training, and probes that test one skill.

Theory of operation: `make_chat` mixes turns at random until a length in characters is reached, so
facts are asked for at every distance.  `make_probe` plants something, lets other talk go on for a
given length, and asks at the end; its last turn is the one that is judged.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from chatserve.demonstration.corpus import (
    explain,
    noise,
    passing,
    people,
    recall,
    system,
    talk,
    tasks,
    words,
)
from chatserve.demonstration.corpus.draw import Chat, Draw, Part, Turn
from chatserve.demonstration.corpus.explain import Topic
from chatserve.demonstration.corpus.memory import Memory, decorate
from chatserve.demonstration.corpus.system import Persona
from chatserve.demonstration.corpus.wordings import LOOK_BACK, SYSTEM

LOOK_BACK_LENGTH_MAX = 120
ROLE_QUESTIONS = frozenset(
    text.lower().rstrip(".?!") for text in (*SYSTEM["ask_role"], *SYSTEM["ask_name"])
)


@dataclass
class State:
    """One chat in the making."""

    draw: Draw
    memory: Memory = field(default_factory=Memory)
    persona: Persona = field(default_factory=Persona)
    topic: Topic | None = None
    turns: list[Turn] = field(default_factory=list[Turn])
    characters: int = 0

    def add(self, turn: Turn | None) -> None:
        """Append a turn, spoken in the persona's manner; nothing where there is no turn."""
        if turn is None:
            self.memory.mentioned.clear()
            return
        self.memory.end_turn()
        spoken = self.persona.speak(turn.reply)
        if turn.skill in DECORATED and self.draw.chance(0.18):
            turn = replace(turn, user=decorate(self.draw, turn.user))
        if turn.skill in ROUGHENED and self.draw.part is Part.TRAIN:
            turn = replace(turn, user=self.roughened(turn.user, turn.reply))
        expect = turn.expect
        if spoken != turn.reply and not expect:
            expect = (spoken,)
        if self.persona.before or self.persona.after:
            marks = (self.persona.before.strip(), self.persona.after.strip())
            expect = (*expect, *(mark for mark in marks if mark))
        self.turns.append(replace(turn, reply=spoken, expect=expect))
        self.characters += len(turn.user) + len(spoken) + 20

    def roughened(self, text: str, *replies: str) -> str:
        """What a user or a system prompt says with slips that no reply depends on."""
        memory, persona = self.memory, self.persona
        known = [
            word
            for fact in memory.facts.values()
            for word in (fact.value, fact.thing.name, fact.owner, fact.place)
        ]
        own = [word for pair in persona.own.items() for word in pair]
        given = (persona.name or "", persona.role or "", persona.before, persona.after)
        said = noise.cores(replies) - noise.LIGHT
        kept = said | noise.cores((*known, *memory.stale, *own, *given)) | NEVER_ROUGHENED
        return noise.roughened(self.draw, text, kept)

    def chat(self) -> Chat:
        """The finished chat."""
        return Chat(self.persona.text, tuple(self.turns))


def add_tell(state: State) -> None:
    """Any of the ways of telling facts, at times corrected in passing at once."""
    kind = state.draw.random.random()
    if kind < 0.11:
        state.add(recall.tell_and_ask(state.draw, state.memory))
    elif kind < 0.18:
        state.add(recall.tell_together(state.draw, state.memory))
    elif kind < 0.51:
        state.add(recall.tell(state.draw, state.memory))
    elif kind < 0.54:
        state.add(passing.tell_corrected(state.draw, state.memory))
    elif kind < 0.74:
        state.add(recall.tell_several(state.draw, state.memory))
    elif kind < 0.85:
        state.add(recall.tell_of_others(state.draw, state.memory))
    else:
        add_tell_about(state)
    if state.draw.chance(0.12):
        add_correct_in_passing(state)


def add_tell_about(state: State) -> None:
    """A person or a pet is spoken of, perhaps further, and perhaps asked about by pronoun."""
    draw, memory = state.draw, state.memory
    state.add(people.tell_about(draw, memory))
    if draw.chance(0.4):
        state.add(people.tell_on(draw, memory))
    if draw.chance(0.4):
        state.add(people.ask_about(draw, memory))


def add_ask(state: State) -> None:
    """Any of the ways of asking for facts."""
    kind = state.draw.random.random()
    if kind < 0.45:
        state.add(recall.ask(state.draw, state.memory))
    elif kind < 0.485:
        state.add(recall.ask_who(state.draw, state.memory))
    elif kind < 0.535:
        state.add(people.ask_about(state.draw, state.memory))
    elif kind < 0.64:
        state.add(recall.ask_several(state.draw, state.memory))
    elif kind < 0.68:
        state.add(recall.summary(state.draw, state.memory))
    elif kind < 0.82:
        state.add(recall.check(state.draw, state.memory))
    else:
        add_ask_unknown(state)


def add_ask_unknown(state: State) -> None:
    """A question for something untold, at times told thereafter, perhaps with another question."""
    draw, memory = state.draw, state.memory
    if memory.being and draw.chance(0.15):
        state.add(people.ask_about_unknown(draw, memory))
        return
    turn, fact = recall.ask_unknown(draw, memory)
    state.add(turn)
    if draw.chance(0.3):
        tell = passing.tell_then if draw.chance(0.5) else recall.tell_after_all
        state.add(tell(draw, memory, fact))
        if draw.chance(0.5):
            state.add(recall.ask(draw, memory))


def add_look_back(state: State) -> None:
    """A question about the conversation itself."""
    if not state.turns:
        return
    draw = state.draw
    kind = draw.integer(0, 2)
    wordings, text = (
        (LOOK_BACK["last_reply"], state.turns[-1].reply)
        if kind == 0
        else (LOOK_BACK["last_message"], state.turns[-1].user)
        if kind == 1
        else (LOOK_BACK["first_message"], state.turns[0].user)
    )
    if kind == 0:
        text = text.removeprefix(state.persona.before).removesuffix(state.persona.after)
    if len(text) <= LOOK_BACK_LENGTH_MAX:
        reply = text if kind == 0 else f'You said: "{text}"'
        state.add(Turn(draw.pick(wordings), reply, "look back"))


def add_explain(state: State) -> None:
    """An explanation, often with a follow-up."""
    turn, topic = explain.explain(state.draw)
    state.add(turn)
    if state.draw.chance(0.5):
        state.add(explain.explain_more(state.draw, topic))


def add_task(state: State) -> None:
    """One of the small tasks."""
    state.add(state.draw.choice(tasks.TASKS)(state.draw))


def add_talk(state: State) -> None:
    """Small talk; a named assistant answers questions for its name with that name."""
    turn = talk.talk(state.draw)
    persona = state.persona
    asks_who = turn.reply == talk.WHO and (persona.name or persona.role)
    if asks_who or (persona.role and is_role_question(turn.user)):
        turn = system.ask_persona(state.draw, state.persona)
    state.add(turn)


def is_role_question(text: str) -> bool:
    """Whether a text asks what a role prompt answers, and small talk without one."""
    return text.lower().rstrip(".?!") in ROLE_QUESTIONS


def add_unknown(state: State) -> None:
    """A question that the model cannot answer."""
    if state.draw.chance(0.12) and not (state.persona.own or state.persona.role):
        state.add(system.ask_own_unknown(state.draw))
    else:
        state.add(talk.unknown(state.draw))


def add_persona(state: State) -> None:
    """A question about the assistant's persona, where there is one."""
    state.add(system.ask_persona(state.draw, state.persona))


def add_correct(state: State) -> None:
    """A correction that names what it corrects, or one in passing."""
    if state.draw.chance(0.4):
        add_correct_in_passing(state)
    else:
        state.add(recall.correct(state.draw, state.memory))


def add_correct_in_passing(state: State) -> None:
    """A correction in passing, at times with a question for what holds now."""
    turn = passing.correct_in_passing(state.draw, state.memory)
    state.add(turn)
    if turn is not None and state.draw.chance(0.25):
        add_ask_last(state)


def add_ask_last(state: State) -> None:
    """A question for the fact that was spoken of last."""
    fact = state.memory.last_fact()
    if fact is not None:
        state.add(recall.ask_for(state.draw, state.memory, fact))


ACTIONS: tuple[tuple[Callable[[State], None], float], ...] = (
    (add_tell, 0.17),
    (add_ask, 0.29),
    (add_correct, 0.075),
    (add_look_back, 0.02),
    (add_explain, 0.04),
    (add_task, 0.235),
    (add_talk, 0.09),
    (add_unknown, 0.08),
    (add_persona, 0.1),
)
FAR_LENGTH_MIN = 1200
FAR_SHARE = 0.6
# What fills the distance in training; explanations are long and soon known, so they come seldom.
FAR_FILLERS = (add_explain, *(add_task,) * 9, *(add_talk,) * 3, *(add_unknown,) * 3)
FAR_QUESTIONS = (*(add_ask,) * 6, add_persona)
FILLERS = (add_explain, add_task, add_task, add_task, add_talk, add_unknown)
TOLD_AT_MOST = 12
# Skills whose request may carry words of courtesy; elsewhere these would belong to the text itself.
DECORATED = frozenset(
    (
        *("recall", "recall several", "corrected", "yes or no", "not told", "persona", "count"),
        *("add", "explain", "explain more", "unknown", "look back", "talk", "spell", "reverse"),
    )
)
# Skills whose request may carry slips in training: those whose words are not the matter itself.
ROUGHENED = (DECORATED - {"spell", "reverse"}) | {"told", "told several", "corrected in passing"}
# Owners, negations and numbers, and words between which a question decides.
NEVER_ROUGHENED = frozenset(
    words.listed(
        """my your our his her him she he they their no not isn't never yes true false first last
        open opens close closes begin begins end ends start starts up down backwards"""
    )
    + tuple(words.NUMBER_WORDS)
)


def step(state: State) -> None:
    """One more action, or pair of actions."""
    weights = [weight for _, weight in ACTIONS]
    if len(state.memory.facts) > TOLD_AT_MOST:
        weights[0] = 0.02
    action = state.draw.random.choices([action for action, _ in ACTIONS], weights)[0]
    action(state)


def make_chat(seed: str, characters: int, part: Part = Part.TRAIN) -> Chat:
    """A chat of about the given length; the same seed gives the same chat."""
    draw = Draw(f"chat/{seed}", part)
    state = State(draw)
    state.persona = system.make_persona(draw, state.memory)
    if state.persona.text is not None and part is Part.TRAIN:
        state.persona.text = state.roughened(state.persona.text)
    state.characters = len(state.persona.text or "")
    if draw.chance(0.15):
        state.add(talk.greet(draw))
    if characters >= FAR_LENGTH_MIN and draw.chance(FAR_SHARE):
        ask_from_afar(state, characters)
    while state.characters < characters or not state.turns:
        step(state)
    return state.chat()


def ask_from_afar(state: State, characters: int) -> None:
    """Many facts first, then other talk for long, then question after question."""
    draw = state.draw
    told = draw.integer(2, 4 + characters // 900)
    while len(state.memory.facts) < told:
        add_tell(state)
        if draw.chance(0.3):
            draw.choice(FAR_FILLERS)(state)
    begin = state.characters
    asking_from = begin + (characters - begin) * (0.3 + 0.5 * draw.random.random())
    while state.characters < asking_from:
        (add_correct if draw.chance(0.05) else draw.choice(FAR_FILLERS))(state)
    while state.characters < characters:
        draw.choice(FAR_FILLERS if draw.chance(0.2) else FAR_QUESTIONS)(state)


def fill_up(state: State, characters: int) -> None:
    """Other talk until the chat has grown by so many characters."""
    end = state.characters + characters
    while state.characters < end:
        state.draw.choice(FILLERS)(state)


def make_probe(skill: str, seed: str, *, distance: int = 0, part: Part = Part.HELD_OUT) -> Chat:
    """A chat whose last turn tests one skill, `distance` characters after what it needs."""
    draw = Draw(f"probe/{skill}/{distance}/{seed}", part)
    state = State(draw)
    judged: Turn | None = None
    while judged is None:
        state = State(draw)
        judged = plant(skill, state)
        if distance:
            fill_up(state, distance)
        if skill in ASKED_AFTER:
            judged = ASKED_AFTER[skill](draw, state.memory)
        if skill == "persona":
            judged = system.ask_persona(draw, state.persona)
    state.add(judged)
    return state.chat()


def plant(skill: str, state: State) -> Turn | None:
    """Set the scene for a probe; returns the judged turn of skills that need no scene."""
    draw, memory = state.draw, state.memory
    if skill in SINGLE:
        return SINGLE[skill](draw)
    if skill in ("persona", "system fact", "manner"):
        while not ready(skill, state):
            memory.facts.clear()
            state.persona = system.make_persona(draw, memory)
        return talk.talk(draw) if skill == "manner" else None
    if skill == "explain more":
        turn, topic = explain.explain(draw)
        state.add(turn)
        return explain.explain_more(draw, topic)
    for _ in range(draw.integer(1, 3)):
        state.add(recall.tell(draw, memory))
    if skill == "recall of others":
        memory.facts.clear()
        state.add(recall.tell_of_others(draw, memory))
    if skill in ("recall several", "recall"):
        state.add(recall.tell_several(draw, memory))
    if skill == "recall by pronoun":
        memory.facts.clear()
        state.add(people.tell_about(draw, memory))
    if skill == "corrected":
        state.add(recall.correct(draw, memory))
    if skill == "corrected in passing":
        if draw.chance(0.3):
            fill_up(state, draw.integer(1, 400))
        state.add(passing.correct_in_passing(draw, memory))
    return None


def ask_corrected(draw: Draw, memory: Memory) -> Turn | None:
    """The user asks for the fact that a probe has corrected; none where it corrected nothing."""
    fact = memory.last_fact()
    return recall.ask_for(draw, memory, fact) if fact is not None and memory.stale else None


def ready(skill: str, state: State) -> bool:
    """Whether the persona drawn can be asked about this skill."""
    persona = state.persona
    if skill == "system fact":
        return bool(state.memory.facts)
    if skill == "manner":
        return bool(persona.before or persona.after)
    return bool(persona.name or persona.own)


SINGLE: dict[str, Callable[[Draw], Turn]] = {
    "count": tasks.count,
    "spell": tasks.spell,
    "reverse": tasks.reverse,
    "repeat": tasks.repeat,
    "add": tasks.add,
    "list": tasks.make_list,
    "talk": talk.talk,
    "unknown": talk.unknown,
    "explain": lambda draw: explain.explain(draw)[0],
}
ASKED_AFTER: dict[str, Callable[[Draw, Memory], Turn | None]] = {
    "recall": recall.ask,
    "recall of others": recall.ask,
    "recall several": recall.ask_several,
    "recall by pronoun": people.ask_about,
    "corrected": ask_corrected,
    "corrected in passing": ask_corrected,
    "system fact": recall.ask,
    "yes or no": recall.check,
    "not told": lambda draw, memory: recall.ask_unknown(draw, memory)[0],
}
SKILLS = (*ASKED_AFTER, "persona", "manner", *SINGLE, "explain more")

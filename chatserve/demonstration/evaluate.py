"""Measure the demonstration model: `python -m chatserve.demonstration.evaluate --help`.

Three tables are printed.  The first has one row for each skill, on held-out probes.  Training never
shows what is held out: about one in eight of the strings of each word list and list of wordings, of
the made-up words, of the numbers of three digits and more, and of the pairs of summands.  Not held
out are dates, times, ages, numbers of one or two digits and the ordinary words that tasks are
about.  Of these a probe draws what training draws, and only the chat as a whole is new.

The second table asks probes of the recalling skills again, with the model's own earlier replies in
place of the right ones that the first table gives it: a fact misunderstood when it was told, and
confirmed so, is one that most models lose.  This is what a user meets.

The third table judges the hand-written prompts of `prompts.toml`, which no generator knows, with
the model's own earlier replies.  Generation is greedy, by plain transformers, in batches.
"""

import argparse
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.corpus import SKILLS, Chat, Turn, make_chat, make_probe
from chatserve.demonstration.corpus.draw import bare

PROMPTS = Path(__file__).parent / "prompts.toml"
REPLY_TOKENS_MAX = 512
UNENDED = " [unended]"  # marks a reply that did not end by itself
TRAINING_LENGTH = 1200  # in characters, of the training chats that questions are looked for in
# Skills that need what was said before are asked for at these distances, in characters; 3.6
# characters make a token, so the last is beyond 1,500 tokens.
DISTANCES = (0, 900, 2700, 6000)
DISTANT_SKILLS = (
    *("recall", "recall of others", "recall several", "corrected", "corrected in passing"),
    "system fact",
)
# What is asked again with the model's own earlier replies, and from how far.
OWN_SKILLS = ("recall", "corrected", "recall several")
OWN_DISTANCES = (0, 900)


@dataclass(frozen=True)
class Score:
    """How many of a group were right."""

    group: str
    right: int
    count: int

    @property
    def share(self) -> float:
        """Per cent of right replies."""
        return 100 * self.right / max(1, self.count)


@dataclass(frozen=True)
class Prompt:
    """A hand-written chat: what the user says in turn, and what the last reply must match."""

    group: str
    user: tuple[str, ...]
    match: tuple[str, ...]
    system: str | None = None
    reject: tuple[str, ...] = ()

    def judge(self, reply: str) -> bool:
        """Every pattern of `match` is found, and none of `reject`; letters' case is ignored."""
        found = all(re.search(pattern, reply, re.IGNORECASE) for pattern in self.match)
        wrong = any(re.search(pattern, reply, re.IGNORECASE) for pattern in self.reject)
        return found and not wrong


class Answering(Protocol):
    """Whatever answers chats."""

    def reply(self, chats: Sequence[list[dict[str, str]]]) -> list[str]:
        """One reply for each chat, which is a list of messages with `role` and `content`."""
        ...


class Speaker:
    """The model and its tokenizer; answers batches of chats greedily."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model: Any = model.to(device).eval()

    @torch.no_grad()
    def reply(self, chats: Sequence[list[dict[str, str]]]) -> list[str]:
        """One reply for each chat; a reply that does not end by itself gets a mark that fails."""
        texts = [
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self.model.device)
        out = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=REPLY_TOKENS_MAX,
        )
        replies: list[str] = []
        for row in out[:, batch["input_ids"].shape[1] :]:
            ended = bool(
                torch.isin(
                    row, torch.tensor(self.model.generation_config.eos_token_id).to(row)
                ).any()
            )
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            replies.append(text if ended else text + UNENDED)
        return replies


def is_right(turn: Turn, reply: str) -> bool:
    """Whether a reply satisfies a probe's last turn."""
    if UNENDED in reply:
        return False
    if not turn.expect:
        return reply.strip() == turn.reply.strip()
    whole = all(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reply) for v in turn.expect)
    return whole and not any(re.search(rf"(?<!\w){re.escape(v)}(?!\w)", reply) for v in turn.reject)


def grouped_by_length(chats: list[Chat], size: int) -> list[list[Chat]]:
    """Batches of chats of similar length, so that little padding is computed."""
    ordered = sorted(chats, key=lambda chat: sum(len(m["content"]) for m in chat.messages()))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def given_replies(speaker: Answering, chats: Sequence[Chat]) -> list[str]:
    """The last reply of each chat, after the earlier replies that the corpus gives."""
    return speaker.reply([chat.messages()[:-1] for chat in chats])


def own_replies(speaker: Answering, chats: Sequence[Chat]) -> list[str]:
    """The last reply of each chat, after the model's own earlier replies."""
    said = [[row for row in chat.messages() if row["role"] == "system"] for chat in chats]
    replies = [""] * len(chats)
    for number in range(max(len(chat.turns) for chat in chats)):
        asked = [at for at, chat in enumerate(chats) if number < len(chat.turns)]
        for at in asked:
            said[at].append({"role": "user", "content": chats[at].turns[number].user})
        for at, reply in zip(asked, speaker.reply([said[at] for at in asked]), strict=True):
            replies[at] = reply
            said[at].append({"role": "assistant", "content": reply.removesuffix(UNENDED)})
    return replies


def measure_skills(
    speaker: Answering,
    count: int,
    *,
    seed: str,
    batch_size: int,
    show: bool,
    own: bool = False,
) -> list[Score]:
    """A table of held-out probes; with `own` after the model's own earlier replies."""
    scores: list[Score] = []
    rows = own_rows() if own else probed_rows()
    answer = own_replies if own else given_replies
    title = "own replies" if own else "held-out probes"
    with tqdm(total=count * len(rows), unit="probe", desc=title) as progress:
        for skill, distance in rows:
            chats = [make_probe(skill, f"{seed}/{i}", distance=distance) for i in range(count)]
            right = 0
            for batch in grouped_by_length(chats, batch_size):
                for chat, reply in zip(batch, answer(speaker, batch), strict=True):
                    good = is_right(chat.turns[-1], reply)
                    right += good
                    if show and not good:
                        last = chat.turns[-1]
                        tqdm.write(f"[{skill}] {last.user!r}: {reply!r}, not {last.reply!r}")
                progress.update(len(batch))
            name = f"{skill}, {distance} characters later" if distance else skill
            scores.append(Score(name, right, count))
    return scores


def probed_rows() -> list[tuple[str, int]]:
    """Skills and distances, one for each row of the table of probes."""
    return [(s, d) for s in SKILLS for d in (DISTANCES if s in DISTANT_SKILLS else (0,))]


def own_rows() -> list[tuple[str, int]]:
    """Skills and distances of the table in which the model writes the earlier replies."""
    return [(skill, distance) for skill in OWN_SKILLS for distance in OWN_DISTANCES]


def asked_in_training(questions: Iterable[str], chats: int, seed: str) -> list[str]:
    """Those of the questions that users ask in so many training chats as well, apart from capitals,
    apostrophes and closing signs."""
    wanted, said = list(questions), set[str]()
    asked = {bare(question) for question in wanted}
    for number in tqdm(range(chats), unit="chat", desc="training chats"):
        turns = make_chat(f"{seed}/{number}", TRAINING_LENGTH).turns
        said |= asked.intersection(bare(turn.user) for turn in turns)
    return [question for question in wanted if bare(question) in said]


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """The hand-written prompts."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    prompts: list[Prompt] = []
    for group, rows in table.items():
        for row in rows:
            prompts.append(
                Prompt(
                    group,
                    tuple(row["user"]),
                    tuple(row["match"]),
                    row.get("system"),
                    tuple(row.get("reject", ())),
                )
            )
    return prompts


def measure_prompts(speaker: Answering, prompts: list[Prompt], *, show: bool) -> list[Score]:
    """The table of hand-written prompts; the model also writes the earlier replies."""
    counts: dict[str, list[bool]] = {}
    for prompt in tqdm(prompts, unit="prompt", desc="hand-written prompts"):
        turns = tuple(Turn(text, "", prompt.group) for text in prompt.user)
        (reply,) = own_replies(speaker, [Chat(prompt.system, turns)])
        good = UNENDED not in reply and prompt.judge(reply)
        counts.setdefault(prompt.group, []).append(good)
        if show and not good:
            tqdm.write(f"[{prompt.group}] {prompt.user!r}: {reply!r}, not {prompt.match!r}")
    return [Score(group, sum(row), len(row)) for group, row in counts.items()]


def table(title: str, scores: Sequence[Score]) -> str:
    """The scores as a markdown table with a closing sum."""
    whole = Score("**all**", sum(s.right for s in scores), sum(s.count for s in scores))
    lines = [f"| {title} | right | of | % |", "|---|---:|---:|---:|"]
    for score in (*scores, whole):
        lines.append(f"| {score.group} | {score.right} | {score.count} | {score.share:.1f} |")
    return "\n".join(lines)


def overlap(count: int, chats: int, seed: str) -> str:
    """A sentence that says how many of the probes' last questions training asks as well."""
    probes = [
        make_probe(skill, f"{seed}/{i}", distance=distance)
        for skill, distance in probed_rows()
        for i in range(count)
    ]
    found = asked_in_training([chat.turns[-1].user for chat in probes], chats, "1/overlap")
    return f"Of {len(probes)} last questions {len(found)} occur in {chats} training chats."


def main() -> None:
    """Read the command line, measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.demonstration.evaluate")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--count", type=int, default=100, help="probes for each row")
    parser.add_argument("--seed", default="evaluation")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--only", choices=("probes", "own", "prompts", "overlap"))
    parser.add_argument(
        "--overlap",
        type=int,
        default=10_000,
        help="training chats in which the probes' last questions are looked for",
    )
    parser.add_argument("--show", action="store_true", help="print what was wrong")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    asked = (options.only,) if options.only else ("overlap", "probes", "own", "prompts")
    if "overlap" in asked:
        print(overlap(options.count, options.overlap, options.seed))
    if options.only == "overlap":
        return
    torch.set_num_threads(options.threads)
    speaker = Speaker(options.model, options.device)
    skills = partial(
        measure_skills,
        speaker,
        options.count,
        seed=options.seed,
        batch_size=options.batch_size,
        show=options.show,
    )
    tables: dict[str, list[Score]] = {}
    if "probes" in asked:
        tables["held-out skill"] = skills()
    if "own" in asked:
        tables["held-out skill, own earlier replies"] = skills(own=True)
    if "prompts" in asked:
        tables["hand-written prompts"] = measure_prompts(speaker, read_prompts(), show=options.show)
    for title, scores in tables.items():
        print(f"\n{table(title, scores)}")
    if options.json is not None:
        figures = {title: [asdict(s) for s in scores] for title, scores in tables.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

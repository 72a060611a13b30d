"""Train the demonstration model: `python -m chatserve.demonstration.train --help`.

Theory of operation: a step draws chats (see `batches`), computes the loss on the assistant's
tokens alone in bf16, and updates the matrices with Muon and the rest with AdamW.  The
learning rate warms up, holds, and cools down over the last part of `--steps`; a run stopped while
it holds can be extended by giving more steps.  Everything depends on the seed and the step number.
A run resumes from its checkpoint, or starts from the shipped weights with fresh optimizers; never
both: what a folder holds already is not replaced without a word.
"""

import argparse
import json
import math
import signal
import time
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration import MODEL_FOLDER, architecture, checkpoint
from chatserve.demonstration.batches import IGNORED, Encoder, Slice, joined, make_step
from chatserve.demonstration.corpus import make_probe
from chatserve.demonstration.forward import EMBEDDING, Weights, cast, hidden_states
from chatserve.demonstration.tokenizer import load_or_train, save

WARMUP_STEPS = 100
COOL_DOWN_SHARE = 0.2
RATE_LAST_SHARE = 0.02
# Held-out probes of the log: the name, the skill, and the distance in characters.
PROBES = (("near", "recall", 0), ("far", "recall", 6000), ("corrected", "corrected", 2700))
PROBE_COUNT = 32
LOG_STEPS = 25

Gradients = tuple[torch.Tensor, ...]


class UnfitRun(ValueError):
    """What was asked of a run does not fit what its folder, or the weights' folder, holds."""


@dataclass(frozen=True)
class Plan:
    """What a run was asked to do."""

    folder: Path
    steps: int
    rate: float
    seed: str
    checkpoint_seconds: float
    probe_steps: int
    threads: int
    device: str


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    halves = (inner[::2], inner[1::2])  # so that two threads can take a half each
    return [
        *(
            torch.optim.Muon(half, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
            for half in halves
        ),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, steps: int, first: int) -> float:
    """The learning rate at a step as a share of its highest value."""
    warm = min(1.0, (step - first + 1) / WARMUP_STEPS)
    cool_down = max(1.0, steps * COOL_DOWN_SHARE)
    left = (steps - step) / cool_down
    if left >= 1:
        return warm
    return warm * (RATE_LAST_SHARE + (1 - RATE_LAST_SHARE) * (1 - math.cos(math.pi * left)) / 2)


def predictions(
    model: Qwen3ForCausalLM, weights: Weights, part: Slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and weights at one slice's labelled positions.

    Only labelled positions reach the output layer.
    """
    device = weights[EMBEDDING].device
    labels = part.labels.to(device)
    hidden = hidden_states(model, weights, part.ids.to(device), part.lengths)
    spoken = (labels != IGNORED).nonzero().squeeze(1)
    logits = functional.linear(hidden[spoken], weights[EMBEDDING].to(hidden.dtype))
    return logits.float(), labels[spoken], part.weights.to(device)[spoken]


def update(optimizer: torch.optim.Optimizer) -> None:
    """One optimizer's step."""
    optimizer.step()


class Learner:
    """A model, its optimizers, and the threads that share the slices of a step.

    On a CPU each thread works alone on one slice: two threads with a slice each lose no time to
    waiting for each other inside every operation, which on a busy machine is most of the time.
    """

    def __init__(self, model: Qwen3ForCausalLM, rate: float, threads: int) -> None:
        torch.set_num_threads(1)
        self.model = model
        self.optimizers = make_optimizers(model, rate)
        self.threads = ThreadPoolExecutor(threads)

    def gradients(self, weights: Weights, count: int, part: Slice) -> tuple[float, Gradients]:
        """One slice's share of the mean loss, and the gradients of its weighted form."""
        logits, labels, counts = predictions(self.model, weights, part)
        each = functional.cross_entropy(logits, labels, reduction="none")
        gradients = torch.autograd.grad((each * counts).sum() / count, list(weights.values()))
        return float(each.detach().sum()) / count, gradients

    def learn(self, slices: Sequence[Slice], rate: float) -> float:
        """One optimizer step; returns the mean loss, in which every token counts alike."""
        weights = cast(self.model, torch.bfloat16)
        count = sum(int((part.labels != IGNORED).sum()) for part in slices)
        one = partial(self.gradients, weights, count)
        results = self.threads.map(one, slices)
        total = 0.0
        for loss, gradients in results:
            total += loss
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient.float()
                else:
                    parameter.grad += gradient
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        list(self.threads.map(update, self.optimizers))
        self.model.zero_grad(set_to_none=True)
        return total


@torch.no_grad()
def probe(model: Qwen3ForCausalLM, encoder: Encoder) -> dict[str, float]:
    """Share of held-out probes whose whole last reply is the most likely one, token by token."""
    shares: dict[str, float] = {}
    weights = cast(model, torch.bfloat16)
    for name, skill, distance in PROBES:
        right = 0
        for index in range(PROBE_COUNT):
            chat = make_probe(skill, f"log/{index}", distance=distance)
            ids, labels, counts = encoder.chat(chat)
            reply = len(encoder.encode(chat.turns[-1].reply)) + 2
            row = (ids, [IGNORED] * (len(ids) - reply) + labels[-reply:], counts)
            logits, wanted, _ = predictions(model, weights, joined([row]))
            right += bool((logits.argmax(-1) == wanted).all())
        shares[name] = right / PROBE_COUNT
    return shares


def write_log(folder: Path, row: dict[str, float]) -> None:
    """Append one line to the run's log."""
    with (folder / checkpoint.LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def seed_number(seed: str) -> int:
    """The seed of the initial weights: the seed itself where it is a number, else its checksum."""
    return int(seed) % 2**63 if seed.isdecimal() else zlib.crc32(seed.encode())


def where_from(plan: Plan, from_weights: Path | None) -> checkpoint.Progress:
    """How far a run is before its first step; nothing is written.

    Raises UnfitRun where weights are given to a run that has a checkpoint, or where they or their
    tokenizer are missing.
    """
    kept = (plan.folder / checkpoint.CHECKPOINT).exists()
    if from_weights is None:
        return checkpoint.read_progress(plan.folder) if kept else checkpoint.Progress(0, 0)
    if kept:
        raise UnfitRun(
            f"{plan.folder} holds a checkpoint already: continue it without --from-weights, "
            f"or start from {from_weights} in another --folder"
        )
    for name in (checkpoint.WEIGHTS, checkpoint.TOKENIZER):
        if not (from_weights / name).exists():
            raise UnfitRun(f"{from_weights} holds no {name}")
    step, tokens = checkpoint.exported_step(from_weights)
    return checkpoint.Progress(step, tokens, warm_from=step)


@contextmanager
def stop_signals() -> Generator[Event]:
    """An event that SIGTERM and SIGINT set; the handlers that were there come back at the end."""
    asked = Event()

    def ask(*_: object) -> None:
        asked.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def train(plan: Plan, *, from_weights: Path | None) -> None:
    """Train until the last step, a signal, or an interrupt; always leave a checkpoint.

    A run that is at its last step already, or beyond it, is left as it is.  Raises UnfitRun as
    `where_from` does; then, too, nothing is written.
    """
    begin = where_from(plan, from_weights)
    if begin.step >= plan.steps:
        print(f"{from_weights or plan.folder} is at step {begin.step} of {plan.steps}: left as is")
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_or_train(from_weights or plan.folder, plan.seed)
    save(tokenizer, plan.folder)
    encoder = Encoder(tokenizer)
    model = architecture.make_model(tokenizer, seed_number(plan.seed))
    model = model.to(plan.device)  # pyright: ignore[reportArgumentType]
    learner = Learner(model, plan.rate, plan.threads)
    if from_weights is not None:
        architecture.load_weights(model, from_weights)
        checkpoint.copy_log(from_weights, plan.folder)
    elif (plan.folder / checkpoint.CHECKPOINT).exists():
        checkpoint.load_checkpoint(plan.folder, model, learner.optimizers)
    with stop_signals() as asked_to_stop:
        take_steps(plan, learner, encoder, begin, asked_to_stop)


def take_steps(
    plan: Plan, learner: Learner, encoder: Encoder, begin: checkpoint.Progress, stop: Event
) -> None:
    """The steps of `train`: logged, probed, and kept now and then, and once more at the end."""
    saved = begun = time.monotonic()
    at, loss_mean = begin, 0.0
    progress = tqdm(
        range(begin.step, plan.steps), initial=begin.step, total=plan.steps, mininterval=5
    )
    for step in progress:
        if stop.is_set():
            break
        slices = make_step(encoder, plan.seed, step)
        rate = plan.rate * rate_share(step, plan.steps, begin.warm_from)
        loss = learner.learn(slices, rate)
        tokens = at.tokens + sum(len(part.ids) for part in slices)
        at = checkpoint.Progress(step + 1, tokens, begin.warm_from)
        loss_mean = loss if step == begin.step else 0.95 * loss_mean + 0.05 * loss
        speed = (tokens - begin.tokens) / (time.monotonic() - begun)
        progress.set_postfix(loss=f"{loss_mean:.3f}", speed=f"{speed:.0f} tokens/s")
        if at.step % LOG_STEPS == 0:
            row = {"step": at.step, "tokens": tokens, "loss": loss, "rate": rate, "speed": speed}
            if at.step % plan.probe_steps == 0:
                row |= probe(learner.model, encoder)
            write_log(plan.folder, row)
        if time.monotonic() - saved > plan.checkpoint_seconds:
            checkpoint.save_checkpoint(plan.folder, learner.model, learner.optimizers, at)
            saved = time.monotonic()
    checkpoint.save_checkpoint(plan.folder, learner.model, learner.optimizers, at)


def export(
    folder: Path, target: Path, averaged: Sequence[Path] = ()
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Write a run's checkpoint as the folder that ships.

    averaged: folders that the run was exported to where its rate had come down before; what is
    written is the mean of all their weights and the checkpoint's (stochastic weight averaging,
    arXiv 1803.05407, section 3).
    Raises UnfitRun where the folder holds no checkpoint or no tokenizer, and where one of the
    others holds no weights, or another tokenizer.
    """
    for name in (checkpoint.CHECKPOINT, checkpoint.TOKENIZER):
        if not (folder / name).exists():
            raise UnfitRun(f"{folder} holds no {name}")
    for given in averaged:
        for name in (checkpoint.WEIGHTS, checkpoint.TOKENIZER):
            if not (given / name).exists():
                raise UnfitRun(f"{given} holds no {name}")
        if (given / checkpoint.TOKENIZER).read_bytes() != (
            folder / checkpoint.TOKENIZER
        ).read_bytes():
            raise UnfitRun(f"{given} has another tokenizer than {folder}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = architecture.make_model(tokenizer, seed=1)
    at = checkpoint.load_checkpoint(folder, model)
    average(model, tokenizer, averaged)
    checkpoint.export(target, model, tokenizer, step=at.step, tokens=at.tokens)
    checkpoint.copy_log(folder, target)
    return model, tokenizer


@torch.no_grad()
def average(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folders: Sequence[Path]
) -> None:
    """Make the model's weights the mean of its own and those of exported folders."""
    other = architecture.make_model(tokenizer, seed=1)
    for count, folder in enumerate(folders, 2):
        architecture.load_weights(other, folder)
        for mine, yours in zip(model.parameters(), other.parameters(), strict=True):
            mine.lerp_(yours, 1 / count)


def main() -> None:
    """Read the command line and train or export."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.demonstration.train")
    parser.add_argument("action", nargs="?", choices=("train", "export"), default="train")
    parser.add_argument("--folder", type=Path, default=Path(".training/run"), help="of the run")
    parser.add_argument(
        "--from-weights",
        type=Path,
        help="start from a shipped folder's weights, in a --folder without a checkpoint",
    )
    parser.add_argument("--target", type=Path, default=MODEL_FOLDER, help="folder to export to")
    parser.add_argument(
        "--average",
        type=Path,
        action="append",
        default=[],
        help="export the mean of the run's weights and this exported folder's (repeatable)",
    )
    parser.add_argument("--steps", type=int, default=5200, help="last step of the schedule")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", default="1", help="of the initial weights and of all chats")
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    parser.add_argument("--probe-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    plan = Plan(
        folder=options.folder,
        steps=options.steps,
        rate=options.rate,
        seed=options.seed,
        checkpoint_seconds=options.checkpoint_seconds,
        probe_steps=options.probe_steps,
        threads=options.threads,
        device=options.device,
    )
    try:
        if options.action == "export":
            export(options.folder, options.target, options.average)
        else:
            train(plan, from_weights=options.from_weights)
    except UnfitRun as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

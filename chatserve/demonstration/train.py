"""Train the demonstration model: `python -m chatserve.demonstration.train --help`.

Theory of operation: a step draws chats (see `batches`), computes the loss on the assistant's
tokens alone in bf16, and updates the matrices with Muon and the rest with AdamW.  The
learning rate warms up, holds, and cools down over the last part of `--steps`; a run stopped while
it holds can be extended by giving more steps.  Everything depends on the seed and the step number.
A run resumes from its checkpoint, or from the shipped weights with fresh optimizers.
"""

import argparse
import json
import math
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
# The first token of a reply decides what kind of reply it is; it is the hardest and one of many.
FIRST_TOKEN_WEIGHT = 3.0

Gradients = tuple[torch.Tensor, ...]


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
    """Logits and labels at one slice's labelled positions, and which of them begin a reply.

    Only labelled positions reach the output layer.
    """
    device = weights[EMBEDDING].device
    labels = part.labels.to(device)
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = labels[:-1] == IGNORED
    hidden = hidden_states(model, weights, part.ids.to(device), part.lengths)
    spoken = (labels != IGNORED).nonzero().squeeze(1)
    logits = functional.linear(hidden[spoken], weights[EMBEDDING].to(hidden.dtype))
    return logits.float(), labels[spoken], first[spoken]


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
        logits, labels, first = predictions(self.model, weights, part)
        each = functional.cross_entropy(logits, labels, reduction="none")
        weighted = torch.where(first, each * FIRST_TOKEN_WEIGHT, each)
        gradients = torch.autograd.grad(weighted.sum() / count, list(weights.values()))
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
            ids, labels = encoder.chat(chat)
            reply = len(encoder.encode(chat.turns[-1].reply)) + 2
            row = (ids, [IGNORED] * (len(ids) - reply) + labels[-reply:])
            logits, wanted, _ = predictions(model, weights, joined([row]))
            right += bool((logits.argmax(-1) == wanted).all())
        shares[name] = right / PROBE_COUNT
    return shares


def write_log(folder: Path, row: dict[str, float]) -> None:
    """Append one line to the run's log."""
    with (folder / checkpoint.LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def train(plan: Plan, *, from_weights: Path | None) -> None:
    """Train until the last step, a signal, or an interrupt; always leave a checkpoint."""
    source = from_weights or plan.folder
    tokenizer = load_or_train(source, plan.seed)
    save(tokenizer, plan.folder)
    encoder = Encoder(tokenizer)
    model = architecture.make_model(tokenizer, seed=1).to(plan.device)  # pyright: ignore[reportArgumentType]
    learner = Learner(model, plan.rate, plan.threads)
    optimizers = learner.optimizers
    first, tokens, warm_from = 0, 0, 0
    if (plan.folder / checkpoint.CHECKPOINT).exists():
        first, tokens = checkpoint.load_checkpoint(plan.folder, model, optimizers)
    elif from_weights is not None:
        architecture.load_weights(model, from_weights)
        first, tokens = checkpoint.exported_step(from_weights)
        warm_from = first
        shutil.copyfile(from_weights / checkpoint.LOG, plan.folder / checkpoint.LOG)
    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    saved = begun = time.monotonic()
    tokens_before, loss_mean, step = tokens, 0.0, first
    progress = tqdm(range(first, plan.steps), initial=first, total=plan.steps, mininterval=5)
    for step in progress:
        if stop:
            break
        slices = make_step(encoder, plan.seed, step)
        rate = plan.rate * rate_share(step, plan.steps, warm_from)
        loss = learner.learn(slices, rate)
        tokens += sum(len(part.ids) for part in slices)
        loss_mean = loss if step == first else 0.95 * loss_mean + 0.05 * loss
        speed = (tokens - tokens_before) / (time.monotonic() - begun)
        progress.set_postfix(loss=f"{loss_mean:.3f}", speed=f"{speed:.0f} tokens/s")
        if step % 25 == 24:
            row = {"step": step + 1, "tokens": tokens, "loss": loss, "rate": rate, "speed": speed}
            if (step + 1) % plan.probe_steps == 0:
                row |= probe(model, encoder)
            write_log(plan.folder, row)
        if time.monotonic() - saved > plan.checkpoint_seconds:
            checkpoint.save_checkpoint(plan.folder, model, optimizers, step=step + 1, tokens=tokens)
            saved = time.monotonic()
    else:
        step = plan.steps
    checkpoint.save_checkpoint(plan.folder, model, optimizers, step=step, tokens=tokens)


def export(folder: Path, target: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Write a run's checkpoint as the folder that ships."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = architecture.make_model(tokenizer, seed=1)
    step, tokens = checkpoint.load_checkpoint(folder, model)
    checkpoint.export(target, model, tokenizer, step=step, tokens=tokens)
    shutil.copyfile(folder / checkpoint.LOG, target / checkpoint.LOG)
    return model, tokenizer


def main() -> None:
    """Read the command line and train or export."""
    parser = argparse.ArgumentParser(prog="python -m chatserve.demonstration.train")
    parser.add_argument("action", nargs="?", choices=("train", "export"), default="train")
    parser.add_argument("--folder", type=Path, default=Path(".training/run"), help="of the run")
    parser.add_argument("--from-weights", type=Path, help="start from a shipped folder's weights")
    parser.add_argument("--target", type=Path, default=MODEL_FOLDER, help="folder to export to")
    parser.add_argument("--steps", type=int, default=3600, help="last step of the schedule")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    parser.add_argument("--probe-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.action == "export":
        export(options.folder, options.target)
        return
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
    plan.folder.mkdir(parents=True, exist_ok=True)
    train(plan, from_weights=options.from_weights)


if __name__ == "__main__":
    main()

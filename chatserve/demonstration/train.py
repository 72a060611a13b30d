"""Train the demonstration model: `python -m chatserve.demonstration.train --help`.

Theory of operation: a step draws chats (see `batches`), computes the loss on the assistant's
tokens alone under bf16 autocast, and updates the matrices with Muon and the rest with AdamW.  The
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration import MODEL_FOLDER, architecture, checkpoint
from chatserve.demonstration.batches import IGNORED, Encoder, Slice, cut, make_step
from chatserve.demonstration.corpus import make_probe
from chatserve.demonstration.tokenizer import load_or_train, save

WARMUP_STEPS = 100
COOL_DOWN_SHARE = 0.6
RATE_LAST_SHARE = 0.02
# Held-out probes of the log: the name, the skill, and the distance in characters.
PROBES = (("near", "recall", 0), ("far", "recall", 2500), ("corrected", "corrected", 300))
PROBE_COUNT = 32
# The first token of a reply decides what kind of reply it is; it is the hardest and one of many.
FIRST_TOKEN_WEIGHT = 3.0


@dataclass(frozen=True)
class Plan:
    """What a run was asked to do."""

    folder: Path
    steps: int
    tokens_per_step: int
    rate: float
    seed: str
    checkpoint_seconds: float
    probe_steps: int
    device: str


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
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


def losses(model: Qwen3ForCausalLM, part: Slice, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy at one slice's labelled positions, and which of them begin a reply.

    Only labelled positions reach the output layer.
    """
    labels = part.labels.flatten().to(device)
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = labels[:-1] == IGNORED
    with torch.autocast(device, torch.bfloat16):
        hidden = model.model(input_ids=part.ids.to(device), use_cache=False).last_hidden_state
        spoken = (labels != IGNORED).nonzero().squeeze(1)
        logits = model.lm_head(hidden.flatten(0, 1)[spoken])
    each = functional.cross_entropy(logits.float(), labels[spoken], reduction="none")
    return each, first[spoken]


def learn(
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    slices: Sequence[Slice],
    *,
    rate: float,
    device: str,
) -> float:
    """One optimizer step; returns the mean loss, in which every token counts alike."""
    count = sum(int((part.labels != IGNORED).sum()) for part in slices)
    total = 0.0
    for part in slices:
        each, first = losses(model, part, device)
        weighted = torch.where(first, each * FIRST_TOKEN_WEIGHT, each)
        (weighted.sum() / count).backward()
        total += float(each.detach().sum()) / count
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def probe(model: Qwen3ForCausalLM, encoder: Encoder, device: str) -> dict[str, float]:
    """Share of held-out probes whose whole last reply is the most likely one, token by token."""
    shares: dict[str, float] = {}
    for name, skill, distance in PROBES:
        rows: list[tuple[list[int], list[int]]] = []
        for index in range(PROBE_COUNT):
            chat = make_probe(skill, f"log/{index}", distance=distance)
            ids, labels = encoder.chat(chat)
            reply = len(encoder.encode(chat.turns[-1].reply)) + 2
            rows.append((ids, [IGNORED] * (len(ids) - reply) + labels[-reply:]))
        right = 0
        for part in cut(rows, encoder.pad):
            with torch.autocast(device, torch.bfloat16):
                best = model(input_ids=part.ids.to(device), use_cache=False).logits.argmax(-1).cpu()
            matches = (best == part.labels) | (part.labels == IGNORED)
            right += int(matches.all(1).sum())
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
    optimizers = make_optimizers(model, plan.rate)
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
        slices = make_step(encoder, plan.seed, step, plan.tokens_per_step)
        rate = plan.rate * rate_share(step, plan.steps, warm_from)
        loss = learn(model, optimizers, slices, rate=rate, device=plan.device)
        tokens += sum(part.tokens for part in slices)
        loss_mean = loss if step == first else 0.95 * loss_mean + 0.05 * loss
        speed = (tokens - tokens_before) / (time.monotonic() - begun)
        progress.set_postfix(loss=f"{loss_mean:.3f}", speed=f"{speed:.0f} tokens/s")
        if step % 25 == 24:
            row = {"step": step + 1, "tokens": tokens, "loss": loss, "rate": rate, "speed": speed}
            if (step + 1) % plan.probe_steps == 0:
                row |= probe(model, encoder, plan.device)
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
    parser.add_argument("--steps", type=int, default=12_000, help="last step of the schedule")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    parser.add_argument("--probe-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.action == "export":
        export(options.folder, options.target)
        return
    plan = Plan(
        folder=options.folder,
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        rate=options.rate,
        seed=options.seed,
        checkpoint_seconds=options.checkpoint_seconds,
        probe_steps=options.probe_steps,
        device=options.device,
    )
    plan.folder.mkdir(parents=True, exist_ok=True)
    train(plan, from_weights=options.from_weights)


if __name__ == "__main__":
    main()

"""Checkpoints of a training run, and the folder that ships.

A checkpoint is one safetensors file: the weights in float32, the optimizers' tensors, and how far
the run is in the metadata.  It is written beside its place and moved there, so a kill at any time
leaves the old one or the new one.  The shipped folder holds bf16 weights and `training.json` with
the step.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from chatserve.demonstration.architecture import make_generation_config
from chatserve.demonstration.tokenizer import save

CHECKPOINT = "checkpoint.safetensors"
TRAINING = "training.json"
LOG = "training_log.jsonl"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps taken, tokens seen, and the step that the learning rate warms from.

    The last is above 0 where the run started from exported weights, with fresh optimizers.
    """

    step: int
    tokens: int
    warm_from: int = 0


def save_checkpoint(
    folder: Path,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write weights, optimizer state and progress, atomically."""
    tensors: dict[str, torch.Tensor] = {
        f"model.{name}": value for name, value in model.named_parameters()
    }
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
        for parameter, values in state.items():
            for name, value in values.items():
                tensors[f"optimizer.{index}.{parameter}.{name}"] = torch.as_tensor(value)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{CHECKPOINT}.{os.getpid()}"
    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    metadata = {
        "step": str(progress.step),
        "tokens": str(progress.tokens),
        "warm_from": str(progress.warm_from),
    }
    save_file(plain, beside, metadata=metadata)
    os.replace(beside, folder / CHECKPOINT)


def read_progress(folder: Path) -> Progress:
    """How far a folder's checkpoint is; raises FileNotFoundError without one."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    # Checkpoints of before `warm_from` was kept have none.
    warm_from = int(metadata.get("warm_from", 0))
    return Progress(int(metadata["step"]), int(metadata["tokens"]), warm_from)


def load_checkpoint(
    folder: Path,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Progress:
    """Read a checkpoint's tensors back; returns how far it is."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        names = list(file.keys())
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(file.get_tensor(f"model.{name}"))
        for index, optimizer in enumerate(optimizers):
            whole = optimizer.state_dict()
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name in names:
                if name.startswith(f"optimizer.{index}."):
                    _, _, parameter, field = name.split(".", 3)
                    state.setdefault(int(parameter), {})[field] = file.get_tensor(name)
            whole["state"] = state
            optimizer.load_state_dict(whole)
    return read_progress(folder)


def export(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    step: int,
    tokens: int,
) -> None:
    """Write the folder that ships: config, bf16 weights, tokenizer, template, and the step."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    copy.generation_config = make_generation_config(tokenizer)
    copy.save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)  # it is written for its owner alone
    save(tokenizer, folder)
    text = json.dumps({"step": step, "tokens": tokens}, indent=2) + "\n"
    (folder / TRAINING).write_text(text, encoding="utf-8")


def exported_step(folder: Path) -> tuple[int, int]:
    """The step and the tokens of a shipped folder; both 0 where it does not say."""
    path = folder / TRAINING
    if not path.exists():
        return 0, 0
    values = json.loads(path.read_text(encoding="utf-8"))
    return int(values["step"]), int(values["tokens"])


def copy_log(source: Path, target: Path) -> None:
    """Carry a folder's log over in the place of another's; an empty one where there is none."""
    if source.resolve() == target.resolve():
        return
    if (source / LOG).exists():
        shutil.copyfile(source / LOG, target / LOG)
    else:
        (target / LOG).write_text("", encoding="utf-8")

"""Checkpoints of a training run, and the folder that ships.

A checkpoint is one safetensors file: the weights in float32, the optimizers' tensors, and the step
in the metadata.  It is written beside its place and moved there, so a kill at any time leaves the
old one or the new one.  The shipped folder holds bf16 weights and `training.json` with the step.
"""

import json
import os
from collections.abc import Sequence
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


def save_checkpoint(
    folder: Path,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    tokens: int,
) -> None:
    """Write weights, optimizer state and step, atomically."""
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
    save_file(plain, beside, metadata={"step": str(step), "tokens": str(tokens)})
    os.replace(beside, folder / CHECKPOINT)


def load_checkpoint(
    folder: Path,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> tuple[int, int]:
    """Read a checkpoint back; returns the step and the tokens seen."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
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
    return int(metadata["step"]), int(metadata["tokens"])


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
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    save(tokenizer, folder)
    text = json.dumps({"step": step, "tokens": tokens}, indent=2) + "\n"
    (folder / TRAINING).write_text(text, encoding="utf-8")


def exported_step(folder: Path) -> tuple[int, int]:
    """The step and the tokens of a shipped folder."""
    values = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    return int(values["step"]), int(values["tokens"])

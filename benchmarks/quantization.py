"""Linear layers of int8 weights on a CPU (`--quantize int8`): what they cost, and what they give.

    python -m benchmarks.quantization [--model FOLDER] [--json FILE]

The same text, chats of the demonstration model's corpus, through the same model: the relative
difference of the (centred) logits, the divergence (Kullback-Leibler) of the next token's
distribution, and how often the likeliest token is the same. That of bfloat16 from float32 stands
beside it, for comparison. Then the times of steps of bfloat16 and int8, in turn; the shortest and
the median of several. Default: the demonstration model.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Before torch: as the server has it, so that threads do not spin while others need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.report import run
from chatserve.demonstration import MODEL_FOLDER
from chatserve.demonstration.corpus import SKILLS, make_probe
from chatserve.model import LoadedModel, load_model
from chatserve_kernels import AttentionBatch

PAGE_SIZE = 16
TEXT_TOKENS = 1024
SLICE = 256  # tokens whose logits are held at a time
CONTEXT = 256  # of each row of a decode step
TIMES = 15
# Rows and tokens of each.
STEPS = {"one stream": (1, 1), "16 streams": (16, 1), "prompt of 512": (1, 512)}

_parser = argparse.ArgumentParser(add_help=False)
_parser.add_argument("--model", type=Path, default=MODEL_FOLDER, metavar="FOLDER")


def main() -> int:
    """Print the figures; with --json also write them."""
    given, others = _parser.parse_known_args()
    folder: Path = given.model
    sys.argv[1:] = others

    async def measure() -> Mapping[str, object]:
        return measured(folder)

    return run("benchmarks.quantization", __doc__, measure)


def measured(folder: Path) -> Mapping[str, object]:
    """All figures of a model."""
    tokens = _text(folder)
    exact = _logits(_load(folder, "float32", "none"), tokens)
    plain, int8 = (_load(folder, "bfloat16", quantize) for quantize in ("none", "int8"))
    plain_logits = _logits(plain, tokens)
    kept = int8.quantization
    figures: dict[str, object] = {
        "parameters": plain.parameter_count,
        "int8_layers": len(kept.names),
        "weights_mib": {"bfloat16": kept.bytes_before / 2**20, "int8": kept.bytes_after / 2**20},
        "int8_from_bfloat16": _difference(_logits(int8, tokens), plain_logits),
        "bfloat16_from_float32": _difference(plain_logits, exact),
    }
    for name, value in figures.items():
        print(f"{name:24} {value}", flush=True)
    for name, (rows, count) in STEPS.items():
        if (CONTEXT if count == 1 else count) > plain.context_length:
            continue
        figures[name] = _in_turn(
            {
                "bfloat16": _step(plain, rows=rows, count=count),
                "int8": _step(int8, rows=rows, count=count),
            },
            tokens=rows * count,
        )
        print(f"{name:24} {figures[name]}", flush=True)
    return figures


def _load(folder: Path, dtype: str, quantize: str) -> LoadedModel:
    return load_model(folder, device="cpu", dtype=dtype, page_size=PAGE_SIZE, quantize=quantize)


def _text(folder: Path) -> Tensor:
    """int64 [TEXT_TOKENS]: chats as the model's template has them, or else their contents."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = []
    seed = 0
    while len(tokens) < TEXT_TOKENS:
        chat = make_probe(SKILLS[seed % len(SKILLS)], f"quantization/{seed}")
        messages = chat.messages()
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            text = "\n".join(each["content"] for each in messages)
        tokens += tokenizer.encode(text, add_special_tokens=False)
        seed += 1
    return torch.tensor(tokens[:TEXT_TOKENS])


def _logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    """float32 [tokens, vocabulary], the text being cut to what the model takes at once."""
    pool = model.layout.allocate(-(-SLICE // PAGE_SIZE), model.device)
    return torch.cat(
        [
            _forward(model, pool, part, rows=1, context=part.shape[0], logits=part.shape[0])
            for part in tokens.split(min(SLICE, model.context_length))
        ]
    )


def _forward(
    model: LoadedModel, pool: Tensor, tokens: Tensor, *, rows: int, context: int, logits: int
) -> Tensor:
    """One step: the last tokens of `rows` contexts of the same length, each in pages of its own.
    logits: of how many rows at the end."""
    pages, count = -(-context // PAGE_SIZE), tokens.shape[0] // rows
    tables = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    positions = torch.arange(context - count, context)
    batch = AttentionBatch(
        query_starts=tuple(range(0, rows * count + 1, count)),
        context_lengths=(context,) * rows,
        page_tables=tables,
        write_pages=tables[:, positions // PAGE_SIZE].reshape(-1).long(),
        write_offsets=(positions % PAGE_SIZE).repeat(rows),
        write_rows=None,
        page_size=PAGE_SIZE,
    )
    wanted = torch.arange(rows * count - logits, rows * count)
    return model.forward(tokens, positions.repeat(rows), batch, pool=pool, logit_rows=wanted)


def _step(model: LoadedModel, *, rows: int, count: int) -> Callable[[], Tensor]:
    """A step of decoding, or a whole prompt."""
    context = max(CONTEXT, count) if count == 1 else count
    pool = model.layout.allocate(rows * -(-context // PAGE_SIZE), model.device, fill=0.1)
    tokens = torch.arange(rows * count) * 7919 % model.vocabulary_size
    return lambda: _forward(model, pool, tokens, rows=rows, context=context, logits=rows)


def _difference(logits: Tensor, expected: Tensor) -> Mapping[str, float]:
    centred, centre = (each - each.mean(dim=1, keepdim=True) for each in (logits, expected))
    ours, theirs = logits.log_softmax(dim=1), expected.log_softmax(dim=1)
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=1)
    same = logits.argmax(dim=1) == expected.argmax(dim=1)
    return {
        "logits_relative": float((centred - centre).norm() / centre.norm()),
        "divergence_mean": float(divergence.mean()),
        "divergence_most": float(divergence.max()),
        "same_likeliest": float(same.float().mean()),
    }


def _in_turn(steps: Mapping[str, Callable[[], Tensor]], *, tokens: int) -> Mapping[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TIMES):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    result: dict[str, float] = {}
    for name, each in seconds.items():
        result[f"{name}_tokens_a_second"] = tokens / min(each)
        result[f"{name}_tokens_a_second_median"] = tokens / statistics.median(each)
    result["ratio"] = min(seconds["bfloat16"]) / min(seconds["int8"])
    result["ratio_median"] = statistics.median(
        plain / int8 for plain, int8 in zip(seconds["bfloat16"], seconds["int8"], strict=True)
    )
    return {name: round(value, 3) for name, value in result.items()}


if __name__ == "__main__":
    sys.exit(main())

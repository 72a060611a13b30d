"""How many pages there are, on the device and in host memory.

What a device has is shared by the model, by what its largest step computes in, and by pages, which
get what the other two leave. On a GPU that is measured: the largest steps are run over a small pool
before the real one is taken (`engine/warm_up.py`). On a CPU pages get a share of what is available,
since others live there too. What the options say goes before all of this.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.runner import OutOfMemory
from chatserve.engine.warm_up import largest_step
from chatserve.errors import SettingsError
from chatserve.lifespan import (
    BATCH_TOKENS_CPU,
    BATCH_TOKENS_GPU,
    HOST_SHARE_GPU,
    KV_SHARE_CPU,
    PAGES_MAX,
    PAGES_MIN,
    available_memory,
)
from chatserve.model import LoadedModel
from chatserve.model.device_memory import DeviceMemory
from chatserve.settings import Settings

# Of the whole device, for what no warm-up shows: pieces of memory between others that fit nothing,
# longer contexts' parts, and whoever else draws on that device.
SAFETY_SHARE = 0.04
_RUNS = 2  # of each step: what is compiled or tried at first is over then

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """A device's memory after the warm-up, in bytes. total: of the device. free: what nobody has,
    with all of the warm-up's own given back. step: the most that one took beside model and
    pages."""

    total: int
    free: int
    step: int


def bytes_for_pages(measured: Measured, *, reserved: int = 0) -> int:
    """What is left for pages. reserved: for what will come beside steps."""
    safety = int(measured.total * SAFETY_SHARE)
    return max(0, measured.free - measured.step - reserved - safety)


def measure(
    memory: DeviceMemory, run: Callable[[int], int], *, tokens: int, tokens_min: int
) -> Measured:
    """See what a step of so many tokens takes. run: run one of these, give its memory back, and say
    how many bytes its pages were; what does not fit it raises as OutOfMemory. Then half as many are
    tried, as the engine would; with fewer than tokens_min the error is raised."""
    while True:
        memory.let_go()
        before = memory.reserved()
        memory.begin_peak()
        try:
            pages = run(tokens)
            break
        except OutOfMemory:
            if tokens // 2 < tokens_min:
                raise
            tokens //= 2
            _log.warning("the largest step does not fit; %d tokens are tried", tokens)
    step = max(0, memory.peak() - before - pages)
    memory.let_go()
    return Measured(total=memory.total(), free=memory.free(), step=step)


def run_largest(model: LoadedModel, sequences: int, tokens: int) -> int:
    """What `measure` runs."""
    plan, pages = largest_step(
        tokens=tokens,
        sequences=sequences,
        context_length=model.context_length,
        page_size=model.layout.page_size,
    )
    runner = ModelRunner(model, pages=pages, fill=0.0)
    try:
        for _ in range(_RUNS):
            runner.run(plan)
    finally:
        runner.close()
    return pages * model.layout.page_bytes


def batch_tokens(settings: Settings, model: LoadedModel) -> int:
    """Tokens of a step at the most."""
    on_gpu = model.device.type == "cuda"
    most = settings.max_batch_tokens or (BATCH_TOKENS_GPU if on_gpu else BATCH_TOKENS_CPU)
    return max(most, settings.page_size)


def page_count(
    settings: Settings, model: LoadedModel, memory: DeviceMemory | None, *, reserved: int = 0
) -> int:
    """Pages for the memory budget. memory: of a device that has its own; reserved: what is to be
    left of it. Raises SettingsError where not even a few fit."""
    budget = settings.kv_memory
    if budget is None and memory is not None:
        try:
            measured = measure(
                memory,
                partial(run_largest, model, settings.max_sequences),
                tokens=batch_tokens(settings, model),
                tokens_min=settings.page_size,
            )
        except OutOfMemory as error:
            raise SettingsError(f"The model leaves no memory to compute in: {error}.") from error
        budget = bytes_for_pages(measured, reserved=reserved)
        _log.info(
            "a step takes up to %d MiB; %d MiB are left for pages",
            measured.step >> 20,
            budget >> 20,
        )
    elif budget is None:
        budget = int(available_memory() * KV_SHARE_CPU)
    pages = min(budget // model.layout.page_bytes, PAGES_MAX)
    if pages < PAGES_MIN:
        least = PAGES_MIN * model.layout.page_bytes
        raise SettingsError(
            f"--kv-memory: {budget} bytes hold {pages} pages of this model; "
            f"at least {least} bytes are needed."
        )
    return pages


def slot_count(settings: Settings, model: LoadedModel) -> int:
    """Pages of host memory. Raises SettingsError where not even a few fit in what was asked for."""
    budget = settings.host_memory
    if not settings.prefix_cache:
        return 0
    if budget is None:
        budget = int(available_memory() * HOST_SHARE_GPU) if model.device.type == "cuda" else 0
    slots = min(budget // model.layout.page_bytes, PAGES_MAX)
    if budget and slots < PAGES_MIN:
        least = PAGES_MIN * model.layout.page_bytes
        raise SettingsError(
            f"--host-memory: {budget} bytes hold {slots} pages of this model; "
            f"at least {least} bytes are needed, or 0 for none."
        )
    return slots

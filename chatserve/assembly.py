"""Wiring, second half: the model, the engine and the chat service of one server.

Apart from `lifespan.py` because importing this brings in torch and transformers, which takes
seconds; the server answers meanwhile.
"""

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from chatserve.cache.block_manager import BlockManager
from chatserve.cache.eviction import POLICIES
from chatserve.cache.host_pages import HostPages
from chatserve.cache.prefix_index import REMEMBERED_SLOTS, PrefixIndex
from chatserve.cache_actions import CacheActions
from chatserve.cache_views import CacheViews
from chatserve.chat.audience import Clock, Patience
from chatserve.chat.conversations.assignment import AnswerOptions
from chatserve.chat.conversations.conversations import ConversationOptions, Conversations
from chatserve.chat.conversations.history import History
from chatserve.chat.crowd import Crowd
from chatserve.chat.meter import ReplyMeter
from chatserve.chat.service import ChatService, Workshop
from chatserve.chat.store.session_store import SessionStore
from chatserve.chat.text.common_prefix import CommonPrefix
from chatserve.chat.text.prompt_ids import HistoryMode
from chatserve.chat.text.text_floor import TextFloor, read_text_floor
from chatserve.chat.text_threads import TextThreads
from chatserve.chat.values import SamplingDefaults
from chatserve.engine import trial
from chatserve.engine.engine import Engine, EngineSettings
from chatserve.engine.model_runner import ModelRunner
from chatserve.engine.other_models import OtherModels
from chatserve.engine.pace import Pace
from chatserve.engine.runner import OutOfMemory, Runner
from chatserve.engine.scheduler import Scheduler, SchedulerLimits
from chatserve.engine.tiers import TierLimits
from chatserve.engine.traffic import Traffic
from chatserve.engine.warm_up import run_first_steps
from chatserve.errors import SettingsError
from chatserve.kept_pages import KeptPages
from chatserve.lifespan import Assembly
from chatserve.model import LoadedModel, load_model
from chatserve.model.device_memory import device_memory
from chatserve.model.graphs import CudaRecorder, graph_bytes, rows_max
from chatserve.page_budget import batch_tokens, page_count, slot_count
from chatserve.public_prompts import PublicPrompts
from chatserve.settings import Settings
from prefix_store import MasterSecret, PageNamer, PageShape

_log = logging.getLogger(__name__)

# Between device and host memory, in each direction, of one step: some milliseconds of a bus.
MOVE_BYTES = 64 << 20
# Chosen, not measured: a larger model's steps would make a start on a CPU longer, and its prompts
# soon tell.
TRIAL_PARAMETERS_MAX = 50_000_000

HISTORY_MODES: dict[str, HistoryMode | None] = {
    "auto": None,
    "template": "template",
    "as-computed": "as_computed",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is made in a thread, off the event loop."""

    model: LoadedModel
    runner: Runner
    text: TextFloor
    fingerprint: bytes
    pages: int
    slots: int
    name_key: bytes
    kept: KeptPages | None = None
    trial_token_seconds: float | None = None


def load(settings: Settings, folder: Path | str, secret: MasterSecret) -> Loaded:
    """Load model and tokenizer, and take the memory for pages. Blocks. Raises StartError."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError("--device cuda: this torch sees no CUDA device.")
    model = load_model(
        folder,
        device=device,
        dtype=settings.dtype,
        page_size=settings.page_size,
        kv_dtype=settings.kv_dtype,
        context_length=settings.context_length,
        digest_cache=settings.data_dir / "weights.json",
        quantize=settings.quantize,
    )
    generation = model.generation
    text = read_text_floor(
        model.folder,
        generation_eos=generation.eos_ids,
        defaults=SamplingDefaults(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
        ),
        template_file=settings.chat_template,
    )
    sequences, recorder, reserved = settings.max_sequences, None, 0
    if settings.cuda_graphs and model.device.type == "cuda":
        recorder = CudaRecorder(model.device)
        reserved = graph_bytes(model.vocabulary_size, rows_max(sequences))
    memory = device_memory(model.device)
    pages = page_count(settings, model, memory, reserved=reserved)
    slots = slot_count(settings, model)
    try:
        runner = ModelRunner(
            model, pages=pages, slots=slots, recorder=recorder, sequences=sequences
        )
        if model.device.type != "cpu":
            seconds = run_first_steps(
                runner,
                tokens=batch_tokens(settings, model),
                context_length=model.context_length,
                pages=pages,
                page_size=settings.page_size,
                slots=slots,
            )
            _log.info("the first steps, for which kernels are compiled, took %.1f s", seconds)
        token_seconds = _try_prompt(runner, model, positions=pages * settings.page_size)
    except OutOfMemory as error:
        raise SettingsError(f"--kv-memory, --host-memory: {error}.") from error
    fingerprint = model.fingerprint()
    return Loaded(
        model=model,
        runner=runner,
        text=text,
        fingerprint=fingerprint,
        pages=pages,
        slots=slots,
        name_key=secret.derive("page names"),
        kept=_kept_pages(settings, secret, model, fingerprint, slots=slots),
        trial_token_seconds=token_seconds,
    )


def _kept_pages(
    settings: Settings, secret: MasterSecret, model: LoadedModel, fingerprint: bytes, *, slots: int
) -> KeptPages | None:
    passage = model.device.type == "cpu" or slots > 0
    if not passage:
        _log.warning("no pages are kept on disk: they would pass through --host-memory, which is 0")
    shape = PageShape(
        fingerprint=fingerprint,
        page_bytes=model.layout.page_bytes,
        page_tokens=model.layout.page_size,
    )
    return KeptPages.open(settings, secret, shape, passage=passage)


def _traffic(loaded: Loaded) -> Traffic | None:
    if loaded.kept is None or not isinstance(loaded.runner, ModelRunner):
        return None
    memory = loaded.runner.host or loaded.runner
    return Traffic(loaded.kept.depot, memory, page_bytes=loaded.model.layout.page_bytes)


def _try_prompt(runner: ModelRunner, model: LoadedModel, *, positions: int) -> float | None:
    """What a prompt's token takes, where it costs the start next to nothing to know; else None."""
    if model.device.type == "cpu" and model.parameter_count > TRIAL_PARAMETERS_MAX:
        return None
    tokens = min(trial.TOKENS, model.context_length, positions)
    return trial.prompt_token_seconds(runner, tokens=tokens, page_size=model.layout.page_size)


def _tier_limits(loaded: Loaded, settings: Settings) -> TierLimits:
    limits = TierLimits() if loaded.kept is None else loaded.kept.limits(settings)
    return replace(
        limits,
        move_pages=max(1, MOVE_BYTES // loaded.model.layout.page_bytes),
        idle_seconds=settings.max_memory_idle,
        trial_token_seconds=loaded.trial_token_seconds,
    )


def _layout(page_size: int) -> str:
    """What names say of how pages lie."""
    return f"page-major {page_size}"


def assemble(
    loaded: Loaded,
    settings: Settings,
    group: asyncio.TaskGroup,
    store: SessionStore,
    meter: ReplyMeter | None = None,
    *,
    cache_shares: Mapping[str, float] = MappingProxyType({}),
) -> Assembly:
    """Put the engine and the services together, on the event loop.

    cache_shares: the part of the pages, of the device and of host memory, that a tenant keeps while
    another one has more than his own.
    """
    model, size = loaded.model, settings.page_size
    namer = PageNamer(loaded.name_key, page_size=size)
    kept = loaded.kept

    def order(pages: int) -> Callable[[], PrefixIndex]:
        return functools.partial(
            PrefixIndex,
            eviction=POLICIES[settings.eviction],
            remembered=max(REMEMBERED_SLOTS, 2 * pages),
            shares={tenant: int(share * pages) for tenant, share in cache_shares.items()},
        )

    depot = None if kept is None or kept.drops_only else kept.depot
    host = None
    if loaded.slots:
        host = HostPages(slots=loaded.slots, below=depot, order=order(loaded.slots))
    others = None
    if kept is not None:
        others = OtherModels(loaded.name_key, lambda: kept.others, _layout).have
    scheduler = Scheduler(
        lambda: BlockManager(
            pages=loaded.pages,
            page_size=size,
            caching=settings.prefix_cache,
            below=host or depot,
            order=order(loaded.pages),
        ),
        namer,
        Pace(
            target_seconds=settings.step_target,
            tokens_min=size,
            tokens_max=batch_tokens(settings, model),
        ),
        limits=SchedulerLimits(
            sequences_max=settings.max_sequences,
            queued_max=settings.max_queued,
            context_length=min(model.context_length, loaded.pages * size),
            tiers=_tier_limits(loaded, settings),
        ),
        clock=time.monotonic,
        host=host,
        others=others,
    )
    engine = Engine(
        scheduler,
        loaded.runner,
        namer,
        settings=EngineSettings(
            fingerprint=loaded.fingerprint,
            layout=_layout(size),
            vocabulary_size=model.vocabulary_size,
            steps_in_flight=settings.steps_in_flight,
            page_bytes=model.layout.page_bytes,
        ),
        traffic=_traffic(loaded),
    )
    threads = min(4, os.cpu_count() or 1)
    loop = asyncio.get_running_loop()
    workshop = Workshop(
        task_group=group,
        executor=TextThreads(threads),
        crowd=Crowd(threads),
        clock=Clock(now=loop.time, call_later=loop.call_later),
    )
    context = engine.context_length
    history = History(
        loaded.text,
        context_length=context,
        reserve=settings.context_reserve or max(1, context // 8),
        mode=HISTORY_MODES[settings.history],
    )
    patience = Patience(before_first_view=settings.chat_grace, after_last_view=settings.chat_grace)
    conversations = Conversations(
        store,
        engine,
        history,
        text=loaded.text,
        workshop=workshop,
        meter=meter,
        drafts=engine if settings.drafts and settings.prefix_cache else None,
        wishes=engine.wishes,
        options=ConversationOptions(answers=AnswerOptions(patience=patience)),
    )
    prompts = PublicPrompts(
        engine,
        CommonPrefix(loaded.text).of,
        workshop.executor,
        folder=settings.data_dir,
        file=settings.public_prompts,
    )
    return Assembly(
        engine=engine,
        service=ChatService(engine, loaded.text, workshop),
        store=store,
        text_threads=workshop.executor,
        prompts=prompts,
        kept=kept,
        conversations=conversations,
        cache=CacheActions(
            engine,
            conversations.residence,
            CacheViews(engine, conversations.residence, prompts.of_page),
            forget=conversations.forget,
        ),
    )

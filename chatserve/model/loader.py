"""From a model's name to a LoadedModel, or to one sentence why not.

May not know: requests, text, the engine. Reads safetensors only and runs no code from the folder.

Order: find the files → judge the config → start hashing the weights in threads → read them →
fix the rotary factors → quantize, pack and fuse layers → survey the layers → compare with the
model's own logits → with pages of fp8, compare again.
"""

import json
import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from chatserve.errors import ModelRefused, SettingsError
from chatserve.model.attention import ATTENTION_NAME
from chatserve.model.blocks import BlockLinear
from chatserve.model.checkpoint import Checkpoint, open_checkpoint, stored_dtype
from chatserve.model.device_memory import as_current
from chatserve.model.direct import DirectPass, direct_pass
from chatserve.model.fingerprint import FingerprintFields, config_text, weights_digest
from chatserve.model.fused import fuse
from chatserve.model.layout import KVLayout
from chatserve.model.loaded import GenerationDefaults, LoadedModel
from chatserve.model.packed import PackedLinear, leave_file, pack_linears
from chatserve.model.probe import compare_with_eager, compare_with_plain_pages, survey_layers
from chatserve.model.quantized import (
    QUANTIZATIONS,
    QUANTIZED_DTYPES,
    Quantization,
    quantize_linears,
)
from chatserve.model.rotary import check_rotary, fix_rotary, positions_max, rotary_digest
from chatserve.model.suitability import check_config, expected_windows
from chatserve_kernels.fp8 import FP8

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KV_DTYPES = ("auto", "fp8")

_log = logging.getLogger(__name__)

# What a request may ask for as well; a default outside of it would fail every request.
_SAMPLING_RANGES = {
    "temperature": (0.0, 2.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def load_model(
    path: Path | str,
    *,
    device: str,
    dtype: str,
    page_size: int,
    context_length: int | None = None,
    digest_cache: Path | None = None,
    quantize: str = "none",
    kv_dtype: str = "auto",
) -> LoadedModel:
    """Load, check and probe a model for serving.

    path: a local folder or a hub id. device: as torch spells it. dtype: 'auto', 'float32',
    'bfloat16' or 'float16' (see `choose_dtype`). page_size: positions per page.
    context_length: narrows what the config allows. digest_cache: where weight digests are kept.
    quantize: 'none', or 'int8' for linear layers of int8 weights on a CPU (`quantized.py`).
    kv_dtype: 'auto' for pages of the type that the model computes in, or 'fp8'.
    Raises ModelRefused with one sentence, SettingsError for a device that is not there, or that
    cannot do what `quantize` or `kv_dtype` says.
    """
    checkpoint, config = _judge(path)
    with _quiet():
        served = positions_max(config)
        if context_length is not None:
            served = min(served, context_length)
        target = _open_device(device)
        chosen = choose_dtype(dtype, stored=stored_dtype(checkpoint), device=target)
        _check_ways(quantize, kv_dtype, device=target, dtype=chosen)
        fields = config_text(config.to_dict())
        weights = _in_thread(checkpoint, digest_cache)
        model = _read_weights(checkpoint, config, chosen)
        try:
            model.to(target)  # pyright: ignore[reportArgumentType]  # hidden by a decorator
        except RuntimeError as error:
            raise ModelRefused(
                f"The model '{checkpoint.name}' does not fit on '{device}': {_one_line(error)}"
            ) from error
    return ready_model(
        model,
        name=checkpoint.name,
        folder=checkpoint.folder,
        dtype=chosen,
        fields=fields,
        weights=weights,
        page_size=page_size,
        context_length=served,
        quantize=quantize,
        kv_dtype=kv_dtype,
    )


def ready_model(
    model: PreTrainedModel,
    *,
    name: str,
    folder: Path,
    dtype: torch.dtype,
    fields: str,
    weights: Future[bytes],
    page_size: int,
    context_length: int,
    quantize: str = "none",
    kv_dtype: str = "auto",
) -> LoadedModel:
    """Try a model that is on its device, in the type it computes in, and make it ready.

    folder: where a tokenizer is, if there is one. fields: `config_text` of its config as it was
    read. weights: a digest of its weights. quantize, kv_dtype: as in `load_model`. Raises
    ModelRefused with one sentence, SettingsError where the device cannot do what they say.
    """
    _check_ways(quantize, kv_dtype, device=model.device, dtype=dtype)
    with _quiet(), as_current(model.device):
        generation = _generation_defaults(model)
        fix_rotary(model, context_length)
        parameters = sum(each.numel() for each in model.parameters())
        quantization = quantize_linears(model) if quantize == "int8" else Quantization()
        try:
            layout, way = _try_pages(
                model, page_size=page_size, dtype=dtype, context_length=context_length
            )
        except ModelRefused as error:
            if not quantization.names:
                raise
            raise ModelRefused(f"{error} (with --quantize int8; try without)") from error
        if kv_dtype == "fp8":
            layout = _rounded_pages(model, way, layout, context_length=context_length)
    rotary = rotary_digest(model)

    def digest(weights_hash: bytes) -> bytes:
        return FingerprintFields(
            weights=weights_hash,
            config=fields,
            compute_dtype=str(dtype),
            rotary=rotary,
            layout=layout,
            quantization=quantization.text,
        ).digest()

    return LoadedModel(
        model,
        way=way,
        name=name,
        folder=folder,
        layout=layout,
        dtype=dtype,
        context_length=context_length,
        generation=generation,
        parameter_count=parameters,
        quantization=quantization,
        fingerprint=_mapped(weights, digest),
    )


def examine_model(path: Path | str) -> Path:
    """Judge a model as `load_model` does, as far as config and file headers tell; its folder.

    Raises ModelRefused with one sentence.
    """
    checkpoint, _ = _judge(path)
    stored_dtype(checkpoint)
    try:
        given = json.loads((checkpoint.folder / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        given = None  # transformers passes over one that it cannot read
    if isinstance(given, dict):
        _sampling_defaults(given)
    return checkpoint.folder


def _judge(path: Path | str) -> tuple[Checkpoint, PreTrainedConfig]:
    """What the files are, and their config, which pages can serve as far as it tells."""
    checkpoint = open_checkpoint(path)
    with _quiet():
        config = _read_config(checkpoint)
    check_config(config)
    check_rotary(config)
    positions_max(config)
    return checkpoint, config


def _try_pages(
    model: PreTrainedModel, *, page_size: int, dtype: torch.dtype, context_length: int
) -> tuple[KVLayout, PreTrainedModel | DirectPass]:
    """The two trials of `probe.py`; the layout they find, and the way of a step through the model.
    Raises ModelRefused."""
    model.set_attn_implementation(ATTENTION_NAME)
    packing = pack_linears(model)
    fusion = fuse(model)
    way: PreTrainedModel | DirectPass = direct_pass(model) or model
    # A model may ask its parts for what only the original ones have: then as they were.
    back = ([fusion.undo] if fusion.places else []) + ([packing.undo] if packing.places else [])
    while True:
        try:
            layout = _try(
                model, way, page_size=page_size, dtype=dtype, context_length=context_length
            )
            break
        except ModelRefused:
            if way is not model:
                way = model
            elif back:
                back.pop(0)()
            else:
                raise
    fusion.settle()
    if any(isinstance(each, BlockLinear | PackedLinear) for each in model.modules()):
        leave_file(model)
    return layout, way


def _try(
    model: PreTrainedModel,
    way: PreTrainedModel | DirectPass,
    *,
    page_size: int,
    dtype: torch.dtype,
    context_length: int,
) -> KVLayout:
    config = model.config
    try:
        shapes = survey_layers(
            model, windows=expected_windows(config), context_length=context_length
        )
        layout = KVLayout(page_size, dtype, shapes)
        compare_with_eager(model, layout, context_length, way=way)
    except ModelRefused:
        raise
    except Exception as error:  # a model may fail in any way when it is called as we call it
        raise ModelRefused(
            f"'{config.model_type}' cannot run through pages: {_one_line(error)}"
        ) from error
    return layout


def _rounded_pages(
    model: PreTrainedModel,
    way: PreTrainedModel | DirectPass,
    plain: KVLayout,
    *,
    context_length: int,
) -> KVLayout:
    """Pages of fp8 in place of plain ones, which have shown that the model can be served. Raises
    ModelRefused where it gives logits that are too different."""
    layout = replace(plain, dtype=FP8)
    distance = compare_with_plain_pages(model, layout, plain, context_length, way=way)
    _log.info(
        "pages are fp8, %d bytes in place of %d; logits through them differ by %.2g",
        *(layout.page_bytes, plain.page_bytes, distance),
    )
    if model.device.type == "cpu":
        _log.info("on a CPU pages of fp8 save memory, and are slower to read than plain ones")
    return layout


def choose_dtype(dtype: str, *, stored: str, device: torch.device) -> torch.dtype:
    """The type to compute in. 'auto': the checkpoint's own type (`stored`, as safetensors spells
    it), or float32 where the device has no fast arithmetic in it. Raises ModelRefused.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelRefused(f"There is no dtype '{dtype}'; choose auto or {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    on_gpu = device.type == "cuda"
    if stored == "BF16" and (torch.cuda.is_bf16_supported() if on_gpu else _cpu_has_bf16()):
        return torch.bfloat16
    if stored == "F16" and on_gpu:
        return torch.float16
    return torch.float32


def _check_ways(quantize: str, kv_dtype: str, *, device: torch.device, dtype: torch.dtype) -> None:
    """Before any weight is read, too, since that takes long."""
    if kv_dtype not in KV_DTYPES:
        raise SettingsError(f"--kv-dtype is {' or '.join(KV_DTYPES)}, not '{kv_dtype}'.")
    if quantize not in QUANTIZATIONS:
        raise SettingsError(f"--quantize is {' or '.join(QUANTIZATIONS)}, not '{quantize}'.")
    if quantize == "none":
        return
    if device.type != "cpu":
        raise SettingsError(f"--quantize int8 is for a CPU; the device is '{device}'.")
    if dtype not in QUANTIZED_DTYPES:
        raise SettingsError("--quantize int8 is for --dtype bfloat16 or float32, not float16.")


def _open_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"The device '{device}' cannot be used: {_one_line(error)}", param="device"
        ) from error
    return target


def _cpu_has_bf16() -> bool:
    """torch keeps these two questions private, and not every version has both."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def _read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # broken JSON, unknown kinds, values out of range: many types
        if "trust_remote_code" in str(error):
            raise ModelRefused(
                f"'{checkpoint.name}' needs code from its own folder, which is never run"
            ) from error
        raise ModelRefused(
            f"The config of '{checkpoint.name}' cannot be used: {_one_line(error)}"
        ) from error
    return config


def _read_weights(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Every parameter comes from the files: random ones must never be served."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # truncated files, wrong shapes, unsupported settings
        raise ModelRefused(
            f"The weights of '{checkpoint.name}' cannot be loaded: {_one_line(error)}"
        ) from error
    model, information = loaded
    for kind, word in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has another shape for"),
        ("unexpected_keys", "has weights that the model does not know:"),
        ("error_msgs", "failed at"),
    ):
        # A mismatched key comes with its two shapes.
        keys: Any = information.get(kind) or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelRefused(f"The checkpoint '{checkpoint.name}' {word} '{names[0]}'{more}")
    return model.eval()


def _generation_defaults(model: PreTrainedModel) -> GenerationDefaults:
    given: dict[str, Any] = vars(model.generation_config)
    eos: Any = given.get("eos_token_id")
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return GenerationDefaults(
        eos_ids=eos_ids, do_sample=bool(given.get("do_sample")), **_sampling_defaults(given)
    )


def _sampling_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of sampling. Raises ModelRefused where it cannot be met."""
    sampling = {name: given[name] for name in _SAMPLING_RANGES if given.get(name) is not None}
    for name, value in sampling.items():
        least, most = _SAMPLING_RANGES[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise ModelRefused(
                f"generation_config.json: '{name}' must be from {least:g} to {most:g}, "
                f"not {str(value)[:20]!r}"
            )
    return sampling


def _in_thread(checkpoint: Checkpoint, digest_cache: Path | None) -> Future[bytes]:
    """The weights' digest, computed while they load; a daemon, so a refusal can exit at once."""
    future: Future[bytes] = Future()

    def work() -> None:
        try:
            future.set_result(weights_digest(checkpoint.weights, cache_file=digest_cache))
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)

    Thread(target=work, name="weights-digest", daemon=True).start()
    return future


def _mapped(source: Future[bytes], function: Callable[[bytes], bytes]) -> Future[bytes]:
    target: Future[bytes] = Future()

    def deliver(done: Future[bytes]) -> None:
        error = done.exception()
        if error is None:
            target.set_result(function(done.result()))
        else:
            target.set_exception(error)

    source.add_done_callback(deliver)
    return target


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' progress bars and reports: what matters is raised instead."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

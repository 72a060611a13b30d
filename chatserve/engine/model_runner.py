"""ModelRunner: owns the tensors, and computes what a StepPlan says.

Runs on the runner's thread only (`runner.py`). It knows neither requests nor whose pages it
touches; the plan names every page that a step reads, writes or copies.

A step is launched and fetched. On a CPU that is one thing. On a GPU the next step is launched in
between, and whatever touches tensors is in the device's own order; nothing on the way to a launch
may wait for the device, or it is idle meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from chatserve.cache.page_pool import PageId
from chatserve.engine.batch import build_batch
from chatserve.engine.page_mover import HostMemory, Moving, PageMover
from chatserve.engine.plan import NO_MOVES, StepPlan, StepResult
from chatserve.engine.populate import PopulatedAhead
from chatserve.engine.runner import DeviceLost, OutOfMemory, StepUnderWay
from chatserve.engine.values import TokenLogprobs
from chatserve.model.device_memory import DeviceMemory, as_current, device_memory
from chatserve.model.graphs import DecodeGraphs, Recorder, rows_max
from chatserve.model.loaded import LoadedModel
from chatserve.model.sampling import RowLogprobs, Samples, sample
from chatserve.model.step import StepInputs
from chatserve_kernels import ops

# Rows times parameters under which a second CPU thread costs more in meeting the first one than it
# saves (docs/log.md).
ONE_THREAD_WORK_MAX = 30_000_000


@dataclass(slots=True, eq=False)
class _Launched:
    """started: when; recording_seconds: of its launch, for something else; fetched: whether the
    host has its samples."""

    plan: StepPlan
    samples: Samples
    moving: Moving | None
    started: float
    recording_seconds: float
    fetched: bool = False


class ModelRunner:
    """A runner over a loaded model and `pages` pages of its layout.

    pool: [pages, page_elements] as the layout has it, on the model's device; allocated here.
    slots: pages of host memory that plans may move pages to and from (`host`). fill: a value for
    fresh pages (tests use NaN, so that a stale read shows). memory: the device's, where it has its
    own. recorder: what records steps of up to `sequences` rows as graphs. Raises OutOfMemory where
    the pool does not fit. ahead: whether a step is started before the tokens of the one before
    are fetched; None: where the device goes on by itself.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        pages: int,
        slots: int = 0,
        fill: float | None = None,
        memory: DeviceMemory | None = None,
        recorder: Recorder | None = None,
        sequences: int = 1,
        ahead: bool | None = None,
    ) -> None:
        self._model = model
        self._memory = memory or device_memory(model.device)
        self._ran_out = False
        self._ahead = model.device.type != "cpu" if ahead is None else ahead
        self._last: _Launched | None = None
        self._free_since = 0.0  # when the host heard that the device was done, at the last step
        self._no_logits = torch.empty((0, 1), device=model.device)
        self._threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        try:
            self._pool = model.layout.allocate(pages, device=model.device, fill=fill)
        except RuntimeError as error:
            raise OutOfMemory(f"{pages} pages do not fit in memory") from error
        self._graphs: DecodeGraphs | None = None
        if recorder is not None:
            self._graphs = DecodeGraphs(model, self._pool, recorder, rows=rows_max(sequences))
        self._recording_seconds = 0.0  # of a launch: its step is no slower for that
        self.host: HostMemory | None = None
        self._mover: PageMover | None = None
        if slots:
            self.host = HostMemory(model.layout, slots=slots, device=model.device, fill=fill)
            self._mover = PageMover(self._pool, self.host)
        self._on_cpu = model.device.type == "cpu"
        # A view for I/O threads, uint8 [pages, page_bytes]; it holds on to the pool's memory.
        self._bytes = self._pool.view(torch.uint8).numpy() if self._on_cpu else None
        self._populated: PopulatedAhead | None = None
        if self._bytes is not None:
            self._populated = PopulatedAhead(self._bytes, page_size=model.layout.page_size)

    def start(
        self, plan: StepPlan, computing: Callable[[], None] | None = None
    ) -> StepResult | StepUnderWay:
        """Moves, copies, one forward pass, sampling: launched, or done. Raises what `Runner.start`
        may raise."""
        step = self._launch(plan, computing)
        return partial(self._fetch, step) if self._ahead else self._fetch(step)

    def run(self, plan: StepPlan, computing: Callable[[], None] | None = None) -> StepResult:
        """The same, from its start to its end."""
        return self._fetch(self._launch(plan, computing))

    def close(self) -> None:
        """Let the memory go."""
        if self.host is not None:
            self.host.close()
        self._pool = torch.empty(0)
        self._bytes = self._populated = self.host = self._mover = self._graphs = None
        self._last = None

    def page_view(self, page: PageId) -> memoryview:
        """The page's bytes, writable (`traffic.PageMemory`). Only where the device's memory is the
        process's own; AssertionError elsewhere."""
        assert self._bytes is not None, "this device's memory is not the process's"
        if (populated := self._populated) is not None:
            populated.use(page)
        return memoryview(self._bytes[page])

    def _launch(self, plan: StepPlan, computing: Callable[[], None] | None) -> _Launched:
        started = time.monotonic()
        if self._ran_out and self._memory is not None:
            # Not where it ran out: what was raised there held on to all that the step had made.
            self._memory.let_go()
        self._ran_out = False
        self._recording_seconds = 0.0
        if computing is not None and plan.moves != NO_MOVES:
            computing()  # a CPU copies pages before anything else
        moving = None
        try:
            with torch.inference_mode(), as_current(self._model.device):
                moving = self._begin_moves(plan)
                samples = self._compute(plan, computing)
        except BaseException as error:
            raise self._translated(error, moving) from error
        self._last = _Launched(plan, samples, moving, started, self._recording_seconds)
        return self._last

    def _fetch(self, step: _Launched) -> StepResult:
        """Wait for it. Raises as `start` does."""
        moving, saved, promoted = step.moving, (), ()
        waited = move_seconds = 0.0
        try:
            samples = step.samples
            tokens, finite = tuple(samples.ids), tuple(samples.finite)
            logprobs = tuple(map(_logprobs, samples.logprobs))
            ended = time.monotonic()
            if moving is not None:
                saved, promoted, move_seconds = moving.finish()
                waited = moving.host_seconds
        except BaseException as error:
            raise self._translated(error, moving) from error
        # What was launched while another step was computed has had the device since that ended.
        began, self._free_since = max(step.started, self._free_since), ended
        step.fetched = True
        return StepResult(
            step.plan.number,
            tokens=tokens,
            finite=finite,
            logprobs=logprobs,
            seconds=max(0.0, ended - began - waited - step.recording_seconds),
            move_seconds=move_seconds,
            saved=saved,
            promoted=promoted,
        )

    def _translated(self, error: BaseException, moving: Moving | None) -> BaseException:
        if moving is not None:
            moving.let_go()
        translated = _translate(error)
        self._ran_out = isinstance(translated, OutOfMemory)
        return translated

    def _begin_moves(self, plan: StepPlan) -> Moving | None:
        if plan.moves == NO_MOVES:
            return None
        assert self._mover is not None, "moves without host memory"
        return self._mover.begin(plan.moves)

    def _compute(self, plan: StepPlan, computing: Callable[[], None] | None) -> Samples:
        model, last = self._model, self._last
        if not plan.slices:
            return sample(self._no_logits, ())
        if self._threads > 1:
            small = plan.token_count * model.parameter_count <= ONE_THREAD_WORK_MAX
            torch.set_num_threads(1 if small else self._threads)
        batch = build_batch(
            plan,
            None if last is None else last.samples,
            known=last is None or last.fetched,
            page_size=model.layout.page_size,
            device=model.device,
        )
        if self._populated is not None:
            self._populated.use(int(batch.inputs.tables.max()))
        if batch.copies is not None:
            ops.copy_pages(self._pool, batch.copies[0], batch.copies[1])
        logits = self._logits(batch.inputs, computing)
        return sample(logits if batch.rows else self._no_logits, batch.rows, batch.counted)

    def _logits(self, inputs: StepInputs, computing: Callable[[], None] | None) -> torch.Tensor:
        """By a graph, where there is one for such a step."""
        model, graphs = self._model, self._graphs
        if graphs is not None and (logits := graphs.logits(inputs)) is not None:
            if computing is not None:
                computing()
            return logits
        tokens, positions, attention, logit_rows = inputs.on(model.device)
        logits = model.forward(
            tokens,
            positions,
            attention,
            pool=self._pool,
            logit_rows=logit_rows,
            computing=computing if self._on_cpu else None,
        )
        if computing is not None:
            computing()  # a GPU has its orders now
        if graphs is not None:
            self._recording_seconds = graphs.learn(inputs, attention, logits)
        return logits


def _logprobs(row: RowLogprobs | None) -> TokenLogprobs | None:
    return None if row is None else TokenLogprobs(row.chosen, row.top)


# What else is said where memory cannot be had: on a CPU, by drivers (also of page-locked memory of
# the host, and where a kernel or a graph is put on the device) and by libraries.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "cudaErrorMemoryAllocation",
    "_STATUS_ALLOC_FAILED",
)


def _translate(error: BaseException) -> BaseException:
    """PyTorch reports many a full memory, and a dead device, as RuntimeError; tell them apart. A
    device that has only run out of memory serves the next step."""
    text = str(error)
    if not isinstance(error, RuntimeError | MemoryError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory(text)
    if any(said in text for said in _OUT_OF_MEMORY):
        return OutOfMemory(text)
    if isinstance(error, torch.AcceleratorError):
        return DeviceLost(text)
    return error

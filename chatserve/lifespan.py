"""Wiring: makes every owner once, hands collaborators to constructors, and ends what it began.

Theory of operation. The socket is bound before anything is loaded. The server answers `/health`
and a red `/ready` from the start; the model's small files are judged, then it loads, in a thread
beside the store's start; then the engine's loop runs in the
lifespan's TaskGroup, `/ready` turns green, and asks are taken. At the end (`api/server.py` drains
first) the TaskGroup is cancelled: the engine ends every stream with a final emission and joins the
runner's thread. The threads for text get a moment; a text that takes longer is left to itself.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from starlette.applications import Starlette

from chatserve.api.app import build_app
from chatserve.api.chat_collaborators import Conversations
from chatserve.api.collaborators import ChatService as ChatServiceDoor
from chatserve.api.collaborators import ModelInfo, Reply
from chatserve.api.keys import KeyRing
from chatserve.api.limits import Limits
from chatserve.api.server import Server, descriptor_limit, server_config
from chatserve.api.telemetry import Telemetry
from chatserve.chat.meter import ReplyMeter
from chatserve.chat.store.session_store import SessionStore
from chatserve.chat.values import Ask
from chatserve.data_folder import FolderLock
from chatserve.early_checks import (
    check_files,
    examine,
    model_folder,
    served_name,
    stated_context,
)
from chatserve.errors import SettingsError, StartError, Unavailable
from chatserve.kept_pages import KeptPages
from chatserve.late import LateConversations
from chatserve.loop_watch import LoopWatch
from chatserve.prompt_files import read_prompt_file
from chatserve.public_prompts import PublicPrompts
from chatserve.session_keeping import session_store
from chatserve.settings import LOADING_THREAD, Settings
from prefix_store import MasterSecret

if TYPE_CHECKING:
    from chatserve.assembly import Loaded
    from chatserve.cache_actions import CacheActions
    from chatserve.chat.conversations.conversations import ConversationStatistics
    from chatserve.chat.text.known_ids import KnownStatistics
    from chatserve.engine.engine import Engine

    Load = Callable[[Settings, Path, MasterSecret], Loaded]

_log = logging.getLogger(__name__)

T = TypeVar("T")

LOADING_RETRY_SECONDS = 2.0
DRAINING_RETRY_SECONDS = 5.0
KV_SHARE_CPU = 0.25  # of the memory that is available at start
HOST_SHARE_GPU = 0.25  # of the memory that is available at start, for idle pages of a GPU
# A page of a small model is a few KiB; more of them than this only makes tables long.
PAGES_MAX = 1 << 20
PAGES_MIN = 4
# New objects before the garbage collector looks for cycles, and how many such looks before it
# looks at older ones too. A step for a thousand streams makes and drops tens of thousands of
# objects, nearly none in a cycle: Python's own 700 would have it look all the time.
COLLECTIONS = (20_000, 5, 5)
BATCH_TOKENS_CPU = 2_048
BATCH_TOKENS_GPU = 8_192


class KeptChats(Conversations, Protocol):
    """The conversations, and their life."""

    def start(self) -> None:
        """Begin to write logs."""
        ...

    async def resume_all(self) -> None:
        """Take up what was running when the process before this one ended."""
        ...

    def begin_drain(self) -> None:
        """Refuse new turns."""
        ...

    async def close(self) -> None:
        """What still runs stays resumable."""
        ...

    def statistics(self) -> "ConversationStatistics":
        """A frozen picture."""
        ...


class KnowingService(ChatServiceDoor, Protocol):
    """Where asks go, and what it keeps of their ends."""

    def known_statistics(self) -> "KnownStatistics | None":
        """A frozen picture; None where no chats are answered."""
        ...


@dataclass(frozen=True, slots=True)
class Assembly:
    """What exists once the model is loaded and the store answers."""

    engine: "Engine"
    service: KnowingService
    conversations: KeptChats
    store: SessionStore
    text_threads: Executor
    prompts: PublicPrompts
    cache: "CacheActions"
    kept: KeptPages | None = None


class Serving:
    """One server's life. Floor 5 sees it as Health, Drain and ChatService."""

    def __init__(
        self,
        settings: Settings,
        keys: KeyRing,
        *,
        port: int,
        announce: Callable[[str, str, float], None],
        load: "Load | None" = None,
    ) -> None:
        """Checks what can be checked without loading. Raises StartError.

        load: instead of `assembly.load`, for a server whose model is a simulation.
        """
        self._load_model = load
        self._settings = settings
        self._keys = keys
        self._announce = announce
        self._began = time.monotonic()
        self._port = port
        self._folder = model_folder(settings.model)
        check_files(self._folder, settings.chat_template)
        if settings.public_prompts is not None:
            read_prompt_file(settings.public_prompts)  # its mistakes are told before any loading
        self._name = settings.served_model_name or served_name(settings.model, self._folder)
        self._lock = FolderLock(settings.data_dir)
        self._secret = open_secret(settings.data_dir)
        self._assembly: Assembly | None = None
        self._failure: BaseException | None = None
        self._stopping = asyncio.Event()
        self._watch = LoopWatch()
        self._telemetry = Telemetry()
        self.draining = False
        limits = Limits.derived(
            context_length=settings.context_length or stated_context(self._folder),
            samples_max=settings.max_sequences,
            descriptors=descriptor_limit(),
        )
        self._model = ModelInfo(
            name=self._name,
            created=int(time.time()),
            context_length=limits.context_length,
            short_name=self._name.removeprefix("chatserve-"),  # so the demonstration model says
        )
        app = build_app(
            service=self,
            describe_model=lambda: self._model,
            limits=limits,
            health=self,
            keys=keys,
            cookie_key=self._secret.derive("cookie"),
            statistics=self._statistics,
            telemetry=self._telemetry,
            conversations=LateConversations(lambda: self._loaded().conversations),
            prompts=lambda: self._loaded().prompts,
            more_families=self._watch.families,
            host=settings.host,
            allowed_hosts=settings.allowed_host,
            cors_origins=settings.cors_origin,
            cache=lambda: self._loaded().cache,
            lifespan=self._lifespan,
        )
        self._server = Server(
            server_config(app, limits, host=settings.host, port=port),
            drain=self,
            shutdown_seconds=settings.shutdown_timeout,
        )

    def run(self, listener: socket.socket) -> int:
        """Serve on a bound socket until a signal. Returns the exit status; raises StartError."""
        with self._lock:
            self._server.run(sockets=[listener])
            if self._assembly is not None:
                self._assembly.text_threads.shutdown()
        if isinstance(self._failure, StartError):
            raise self._failure
        return 1 if self._failure is not None else 0

    # As Health -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Asks are taken, and conversations are kept by this server and no other."""
        if self._assembly is None or self.draining or not self.healthy:
            return False
        return self._assembly.store.statistics().ours

    @property
    def healthy(self) -> bool:
        """Loop and engine are alive; true while loading."""
        if self._failure is not None:
            return False
        return self._assembly is None or self._assembly.engine.healthy

    @property
    def retry_after(self) -> float:
        """Seconds."""
        return DRAINING_RETRY_SECONDS if self.draining else LOADING_RETRY_SECONDS

    # As Drain ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Chats' replies run, whoever looks."""
        return self._assembly is not None and self._assembly.conversations.statistics().running > 0

    def begin(self) -> None:
        """Refuse new work."""
        self.draining = True
        if self._assembly is not None:
            self._assembly.conversations.begin_drain()

    def expire(self) -> None:
        """End the replies that still run: the engine stops, and ends every stream."""
        self._stopping.set()

    # As ChatService ------------------------------------------------------------------------

    def check_room(self, tenant: str) -> None:
        """Raise Unavailable while loading or draining, Busy for a full queue."""
        self._taking().check_room(tenant)

    async def open(self, ask: Ask) -> Reply:
        """Pass an ask on. Raises Unavailable while loading or draining, or as the service does."""
        return await self._taking().open(ask)

    def _taking(self) -> ChatServiceDoor:
        if self.draining:
            raise Unavailable("The server is shutting down.", retry_after=self.retry_after)
        return self._loaded().service

    def _loaded(self) -> Assembly:
        if self._assembly is None:
            raise Unavailable("The model is loading.", retry_after=self.retry_after)
        return self._assembly

    # Inside --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        del app
        async with asyncio.TaskGroup() as group:
            engine = group.create_task(self._live(group))
            yield
            self._stopping.set()
            await engine

    async def _live(self, group: asyncio.TaskGroup) -> None:
        """Load, run the engine until told to stop. A failure stops the server."""
        stopping = asyncio.create_task(self._stopping.wait())
        collections = gc.get_threshold()
        # A given Redis may be away, or still another's, for many seconds; ours never is.
        awaiting_store = self._settings.redis_url is not None
        this = asyncio.current_task()
        assert this is not None

        def leave(told: "asyncio.Task[bool]") -> None:
            if awaiting_store and not told.cancelled():
                this.cancel()

        stopping.add_done_callback(leave)
        try:
            examining = in_daemon_thread(self._examine)
            await asyncio.wait({examining, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not examining.done():
                return
            examining.result()  # what is refused here is refused before anything is started
            loading = in_daemon_thread(self._load)
            async with session_store(self._settings) as store:
                awaiting_store = False
                await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not loading.done():
                    return  # the thread is left to itself: nothing has begun that must be ended
                await self._serve(loading.result()(group, store, self._telemetry), group, stopping)
        except asyncio.CancelledError:
            if not self._stopping.is_set() or this.uncancel():
                raise
        except Exception as error:
            self._failure = _only(error)
            if not isinstance(self._failure, StartError):
                _log.exception("the server stops")
            self._server.should_exit = True
        finally:
            stopping.cancel()
            gc.set_threshold(*collections)
            gc.unfreeze()

    async def _serve(
        self, assembly: Assembly, group: asyncio.TaskGroup, stopping: "asyncio.Task[bool]"
    ) -> None:
        """From the green light to the last reply's end."""
        try:
            await assembly.prompts.start()  # before anything is named
        except StartError:
            if assembly.kept is not None:
                await asyncio.to_thread(assembly.kept.close)
            raise
        settle_collector()
        # From here on: imports while loading hold the interpreter's lock, and nobody chats yet.
        watch = asyncio.create_task(self._watch.run())
        running = asyncio.create_task(assembly.engine.run())
        upkeep = [watch]
        if assembly.kept is not None:
            upkeep.append(asyncio.create_task(assembly.kept.run()))
        assembly.conversations.start()
        resuming = group.create_task(_resume(assembly), name="resuming")
        self._assembly = assembly
        self._describe(assembly.engine.context_length)
        host = self._settings.host
        shown = f"[{host}]" if ":" in host else host
        self._announce(f"http://{shown}:{self._port}", self._name, time.monotonic() - self._began)
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        resuming.cancel()
        await assembly.conversations.close()
        if running.done():
            running.result()
        running.cancel()
        for task in upkeep:
            task.cancel()
        await asyncio.wait({running, *upkeep})
        if assembly.kept is not None:
            await asyncio.to_thread(assembly.kept.close)

    def _describe(self, context_length: int) -> None:
        """What is served, now that the pages are there."""
        stated = self._model.context_length
        self._model = replace(self._model, context_length=context_length)
        if context_length < stated and self._settings.context_length is None:
            _log.warning(
                "the context is %d tokens, not %d: more do not fit in the memory for pages "
                "(--kv-memory), or the model cannot serve them",
                context_length,
                stated,
            )

    def _examine(self) -> None:
        """In a thread: import what is heavy, and judge the model by its small files."""
        if self._load_model is None:
            examine(self._folder, self._settings.chat_template)

    def _load(self) -> Callable[[asyncio.TaskGroup, SessionStore, ReplyMeter], Assembly]:
        """In a thread: load; what is left to do on the loop comes back."""
        from chatserve.assembly import assemble, load

        loaded = (self._load_model or load)(self._settings, self._folder, self._secret)
        shares = self._keys.cache_shares()
        return functools.partial(assemble, loaded, self._settings, cache_shares=shares)

    def _statistics(self) -> Mapping[str, object]:
        found = self._assembly
        if found is None:
            names = ("cache", "engine", "conversations", "store", "known_ids", "disk")
            return dict.fromkeys(names)
        return {
            "cache": found.engine.cache_statistics(),
            "engine": found.engine.statistics(),
            "conversations": found.conversations.statistics(),
            "store": found.store.statistics(),
            "known_ids": found.service.known_statistics(),
            "disk": None if found.kept is None else found.kept.statistics(),
        }


async def _resume(assembly: Assembly) -> None:
    """Take up what runs and is nobody's: at the start, and when another server has let go of it."""
    while True:
        await assembly.conversations.resume_all()
        await assembly.store.handed_back()


def _only(error: Exception) -> BaseException:
    """The one error in a group of one: a task group's way to pass on what went wrong in it."""
    found: BaseException = error
    while isinstance(found, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", found).exceptions
        if len(inner) != 1:
            return found
        found = inner[0]
    return found


def settle_collector() -> None:
    """Once, when all is loaded: the garbage collector is from here on for what requests make.

    What loading made stays: a collection that walks all of it would hold the loop for tenths of a
    second. The second collection is for its count of what is old, by which it judges whether to
    look at old objects again: with the frozen ones in it, a hundred thousand objects of ended
    requests wait.
    """
    gc.collect()
    gc.freeze()
    gc.collect()
    gc.set_threshold(*COLLECTIONS)


def in_daemon_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run a function in a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(cast("T", result))
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=work, name=LOADING_THREAD, daemon=True).start()
    return future


def open_secret(folder: Path) -> MasterSecret:
    """The data folder's secret. Raises SettingsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return MasterSecret.open(folder)
    except (OSError, ValueError) as error:
        raise SettingsError(f"The data folder {folder} cannot be used: {error}.") from error


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's if smaller."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        table = dict(line.split(":", 1) for line in lines)
        available = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = pages // 2
    try:
        cap = int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return available
    return min(available, max(0, cap - used))

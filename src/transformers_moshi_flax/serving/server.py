"""The server: its routes, its callers, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from typing import Any

from aiohttp import web

from .caller import SEND_BUFFER, Caller, Limits
from .dialect import FAILED, LOST, SHUTDOWN, Dialect, Ending
from .engine import Engine, Said, Seat
from .gate import Addresses, Gate
from .kyutai import Kyutai
from .logs import LOGGER, log_event
from .metrics import Metrics
from .protocol import FRAME, RATE
from .realtime import Realtime
from .recording import Recorder
from .wishes import Wishes

RETRY_SECONDS = 10
"""When a caller who was refused may try again."""

PACKAGE = resources.files("transformers_moshi_flax")
PAGE = PACKAGE / "serving" / "page"
SHARED = PACKAGE / "web" / "shared"
"""What this page and the one without a server have in common."""
PAGE_FILES = {
    "/": (PAGE / "index.html", "text/html"),
    "/page.css": (SHARED / "page.css", "text/css"),
    "/page.js": (PAGE / "page.js", "text/javascript"),
    "/dialogue.js": (PAGE / "dialogue.js", "text/javascript"),
    "/saving.js": (SHARED / "saving.js", "text/javascript"),
    "/sound.js": (SHARED / "sound.js", "text/javascript"),
    "/transcript.js": (SHARED / "transcript.js", "text/javascript"),
    "/worklets.js": (SHARED / "worklets.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Server:
    """Holds dialogues with whoever calls.

    Args:
        engine: warmed up.
        tokenizer: of the model.
        metrics: those of the engine.
        about: of the model, for ``/api/build_info`` and the page: ``model``, and ``notice`` if there is something that
            callers should know of it.
        gate: who may come in.
        limits: of every caller.
        per_address: dialogues that callers of one address may have at once, if there is a limit.
        recorder: of all dialogues, which it ends; without, nothing is kept.

    Raises:
        ValueError: the model is of another rate than the protocol.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        metrics: Metrics,
        about: dict[str, Any],
        gate: Gate | None = None,
        limits: Limits | None = None,
        recorder: Recorder | None = None,
        per_address: int | None = None,
    ):
        stream = engine.stream
        if (stream.sampling_rate, stream.frame_size) != (RATE, FRAME):
            raise ValueError(
                f"the protocol has frames of {FRAME} samples at {RATE} Hz, but the model's are of {stream.frame_size} "
                f"at {stream.sampling_rate} Hz"
            )
        self.engine, self.tokenizer, self.metrics = engine, tokenizer, metrics
        self.about = {
            **about,
            "sample_rate": stream.sampling_rate,
            "frame_rate": stream.frame_rate,
            "slots": stream.batch_size,
            "recorded": recorder is not None,
        }
        self.recorder, self.addresses = recorder, Addresses(per_address)
        self.gate, self.limits = gate or Gate(), limits or Limits()
        self.callers: dict[Seat, Caller] = {}
        self.draining = False
        self.failure: BaseException | None = None
        self._stop = asyncio.Event()
        self._numbers = itertools.count(1)

    # ------------------------------------------------------------------------------------------- routes

    def app(self) -> web.Application:
        """The application, whose engine begins with it and ends with it."""
        app = web.Application(middlewares=[self._checked])
        app.router.add_get("/api/chat", self.chat)
        app.router.add_get("/v1/realtime", self.realtime)
        app.router.add_get("/api/build_info", self.build_info)
        app.router.add_get("/health", self.health)
        app.router.add_get("/metrics", self.show_metrics)
        for path in PAGE_FILES:
            app.router.add_get(path, self.page)
        app.cleanup_ctx.append(self._running)
        return app

    async def _running(self, app: web.Application) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self.engine.start(
            say=lambda said: loop.call_soon_threadsafe(self._hand_out, said),
            fail=lambda error: loop.call_soon_threadsafe(self._fail, error),
            move_up=lambda: loop.call_soon_threadsafe(self._move_up),
        )
        with self.metrics.counting_compilations():
            yield
        self.engine.stop()
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.stop)

    def _hand_out(self, said: list[Said]) -> None:
        for frame in said:
            if caller := self.callers.get(frame.seat):
                caller.hear(frame)

    def _move_up(self) -> None:
        for caller in self.callers.values():
            caller.move_up()

    def _fail(self, error: BaseException) -> None:
        LOGGER.critical("the engine has failed", exc_info=error)
        self.failure = error
        self.end_all(FAILED)
        self._stop.set()

    @web.middleware
    async def _checked(self, request: web.Request, handler: Any) -> web.StreamResponse:
        reason = "origin"
        try:
            self.gate.check_origin(request)
            if request.path.startswith(("/api/", "/v1/")) or request.path == "/metrics":
                reason = "token"
                self.gate.check_token(request)
        except web.HTTPException:
            self._refuse(request, reason)
            raise
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        """Ready, or why not: 503 while the server ends."""
        state = "failed" if self.failure else "draining" if self.draining else "ready"
        return web.json_response({"status": state}, status=200 if state == "ready" else 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """The figures, for Prometheus."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def build_info(self, request: web.Request) -> web.Response:
        """What is served here."""
        return web.json_response(self.about)

    async def page(self, request: web.Request) -> web.Response:
        """The page to talk to, and its parts."""
        file, kind = PAGE_FILES[request.path]
        return web.Response(text=file.read_text("utf-8"), content_type=kind, headers=HEADERS)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A dialogue by Kyutai's protocol."""
        return await self._receive(
            request,
            lambda query: Wishes.read(query, self.engine.stream),
            lambda wishes: Kyutai(wishes.format, RATE, self.tokenizer),
        )

    async def realtime(self, request: web.Request) -> web.StreamResponse:
        """A dialogue by OpenAI's realtime events."""
        return await self._receive(
            request,
            lambda query: Wishes.read_for_model(query, self.engine.stream, self.about["model"]),
            lambda wishes: Realtime(self.about["model"], RATE, self.tokenizer),
        )

    async def _receive(
        self,
        request: web.Request,
        read: Callable[[Mapping[str, str]], Wishes],
        dialect: Callable[[Wishes], Dialect],
    ) -> web.StreamResponse:
        """A dialogue. Whatever speaks against it is said before the upgrade."""
        if self.draining or self.failure:
            self._refuse(request, "draining")
            raise _try_later("the server is shutting down")
        try:
            wishes = read(request.query)
        except ValueError as error:
            self._refuse(request, "query")
            raise web.HTTPBadRequest(text=str(error)) from error
        try:
            with self.addresses.hold(request.remote):
                return await self._open(request, wishes, dialect(wishes))
        except web.HTTPTooManyRequests:
            self._refuse(request, "address")
            raise

    async def _open(self, request: web.Request, wishes: Wishes, dialect: Dialect) -> web.StreamResponse:
        websocket = web.WebSocketResponse(
            timeout=2.0,
            heartbeat=self.limits.heartbeat_seconds,
            max_msg_size=self.limits.message_bytes,
            compress=False,
            protocols=("realtime",),
        )
        if not websocket.can_prepare(request):
            # what could be refused has been: a page learns by this why its websocket was not opened
            if self.engine.is_full:
                raise _try_later(self._full())
            raise web.HTTPUpgradeRequired(text="this is a websocket", headers={"Upgrade": "websocket"})
        seat = self.engine.take_seat(wishes.numbers, wishes.key)
        if seat is None:
            self._refuse(request, "full")
            raise _try_later(self._full())
        try:
            await websocket.prepare(request)
            caller = self._welcome(websocket, request, seat, wishes, dialect)
            ending = await self._hold(caller, seat, wishes, request)
        finally:
            self.engine.leave(seat)
            self.callers.pop(seat, None)
        await caller.say_goodbye(ending)
        return websocket

    def _full(self) -> str:
        queue = f", and all {self.engine.queue} in the queue" if self.engine.queue else ""
        return f"all {self.engine.stream.batch_size} places are taken{queue}; try again later"

    def _refuse(self, request: web.Request, reason: str) -> None:
        self.metrics.refusals.labels(reason).inc()
        log_event("refused", reason=reason, peer=request.remote)

    def _welcome(
        self, websocket: web.WebSocketResponse, request: web.Request, seat: Seat, wishes: Wishes, dialect: Dialect
    ) -> Caller:
        if request.transport is not None:
            connection = request.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller = Caller(websocket, request, dialect, self.engine, seat, wishes.max_steps, self.limits, self.metrics)
        self.callers[seat] = caller
        return caller

    async def _hold(self, caller: Caller, seat: Seat, wishes: Wishes, request: web.Request) -> Ending:
        dialogue, peer, came = next(self._numbers), request.remote, time.monotonic()
        began: float | None = None
        if position := self.engine.position(seat):
            log_event("caller waits", dialogue=dialogue, position=position, peer=peer)

        def begin() -> dict[str, Any]:
            nonlocal began
            began = time.monotonic()
            self.metrics.dialogues.inc()
            log_event("dialogue begins", dialogue=dialogue, slot=seat.slot, format=wishes.format, peer=peer)
            settings = {**self.about, "format": wishes.format, "sampling": seat.numbers, "key": wishes.key.tolist()}
            if self.recorder is not None:
                caller.recording = self.recorder.begin(dialogue, settings)
            return settings

        ending = LOST  # unless something else is said: the handler was cancelled
        try:
            ending = await caller.converse(begin)
        finally:
            now = time.monotonic()
            if began is None:
                log_event(
                    "caller leaves the queue", dialogue=dialogue, reason=ending.reason, seconds=round(now - came, 3)
                )
            else:
                if caller.recording is not None:
                    caller.recording.end(ending.reason)
                self.metrics.dialogues.dec()
                self.metrics.ended.labels(ending.reason).inc()
                seconds, frames = round(now - began, 3), caller.frames
                log_event("dialogue ends", dialogue=dialogue, reason=ending.reason, seconds=seconds, frames=frames)
        return ending

    def end_all(self, ending: Ending) -> None:
        """End every dialogue."""
        for caller in list(self.callers.values()):
            caller.end(ending)

    # ------------------------------------------------------------------------------------------- running

    async def run(self, listener: socket.socket, tls: ssl.SSLContext | None = None, grace: float = 30.0) -> None:
        """Serve until SIGTERM or SIGINT.

        From the signal on nobody new comes in. Who speaks has ``grace`` seconds, and is then told; so is everyone at
        a second signal, at once.

        Args:
            listener: bound, not listening yet.
            tls: for HTTPS.
            grace: seconds.

        Raises:
            RuntimeError: the engine has failed.
        """
        loop = asyncio.get_running_loop()
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            await web.SockSite(runner, listener, ssl_context=tls).start()
            host, port = listener.getsockname()[:2]
            log_event("ready", host=host, port=port, tls=tls is not None, **self.about)
            await self._stop.wait()
            await self._drain(grace)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await runner.cleanup()
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
        log_event("stopped")

    def _signalled(self) -> None:
        if self._stop.is_set():
            self.end_all(SHUTDOWN)
        self._stop.set()

    async def _drain(self, grace: float) -> None:
        self.draining = True
        for caller in self.callers.values():
            if caller.is_waiting:
                caller.end(SHUTDOWN)
        log_event("draining", dialogues=len(self.callers), grace=grace)
        end = time.monotonic() + grace
        while self.callers and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.end_all(SHUTDOWN)
        while self.callers:
            await asyncio.sleep(0.05)


def _try_later(words: str) -> web.HTTPServiceUnavailable:
    return web.HTTPServiceUnavailable(text=words, headers={"Retry-After": str(RETRY_SECONDS)})

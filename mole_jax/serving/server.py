"""The HTTP server: OpenAI's chat completions, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mole_jax.config import ServeConfig
from mole_jax.errors import UserError
from mole_jax.serving import openai
from mole_jax.serving.openai import ChatRequest
from mole_jax.serving.service import CLIENT_WENT, Refusal, Service


class Events(StreamingResponse):
    """Server-sent events, as OpenAI's end. Their source is closed when the client goes, not when it is collected."""

    def __init__(self, source: AsyncGenerator[dict[str, Any]]):
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._source):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncGenerator[str]:
        async for data in self._source:
            yield f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"


class BodyLimit:
    """Refuses requests that are too large, whatever their headers say, or too slow, while they come."""

    def __init__(self, app: ASGIApp, settings: ServeConfig):
        self._app, self._most, self._seconds = app, settings.body_mb << 20, settings.timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, end, whole = 0, time.monotonic() + self._seconds, False

        async def limited() -> Message:
            nonlocal read, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else max(end - time.monotonic(), 0))
            except TimeoutError:
                raise HTTPException(408, f"the request did not come within {self._seconds:g} s (--timeout)") from None
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, f"the request has over {self._most:,} bytes (--body-mb); make it smaller")
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)


def application(service: Service, key: str | None) -> FastAPI:
    """Returns the server.

    Args:
        service: answers. Its scheduler runs as long as the server does.
        key: what clients must send as ``Authorization: Bearer``. None: nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        service.scheduler.start()
        yield
        await asyncio.to_thread(service.scheduler.close)

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]):
        if key is not None and not secrets.compare_digest((given.credentials if given else "").encode(), key.encode()):
            raise Refusal(401, "the API key is not right; send it as Authorization: Bearer KEY", "invalid_api_key")

    api = FastAPI(lifespan=lifespan, openapi_url=None)
    api.add_middleware(BodyLimit, settings=service.settings)
    started = int(time.time())

    @api.get("/health")
    def health() -> Response:
        alive = service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the decoding thread has ended"}, 200 if alive else 503)

    @api.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models", dependencies=[Depends(authorised)])
    def models() -> dict[str, Any]:
        return openai.models(service.name, started)

    @api.post("/v1/chat/completions", dependencies=[Depends(authorised)])
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = await service.prepared(body)
        if body.stream:
            return Events(service.events(asked))
        answer = await _unless_gone(request, service.whole(asked))
        return Response(status_code=CLIENT_WENT) if answer is None else JSONResponse(answer)

    def refused(status: int, message: str, code: str | None = None, counted: bool = True) -> Response:
        if counted:
            service.metrics.requests.labels(status).inc()
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(openai.error(status, message, code), status, headers)

    @api.exception_handler(Refusal)
    def refusal(_: Request, error: Refusal) -> Response:
        # `Service.pieces` has counted its own.
        return refused(error.status, str(error), error.code, counted=error.status < 500)

    @api.exception_handler(UserError)
    def mistake(_: Request, error: UserError) -> Response:
        return refused(400, str(error))

    @api.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> Response:
        # Of a union's members the one that got furthest is the one that was meant.
        worst = max(error.errors(), key=lambda one: len(one["loc"]))
        where = ".".join(map(str, worst["loc"][1:]))
        return refused(400, f"{where}: {worst['msg']}" if where else worst["msg"])

    @api.exception_handler(HTTPException)
    def other(_: Request, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail), counted=error.status_code in (408, 413))

    @api.exception_handler(Exception)
    def bug(_: Request, error: Exception) -> Response:
        return refused(500, f"{type(error).__name__}; the server's log says more")

    return api


def serve(service: Service, listener: socket.socket, key: str | None) -> None:
    """Serves until SIGTERM or SIGINT: then nobody is let in any more, and who is in is answered.

    Args:
        service, key: as in `application`.
        listener: a bound socket.
    """
    # With everybody answered, a stop that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    drain = math.ceil(service.settings.timeout)
    config = uvicorn.Config(application(service, key), access_log=False, timeout_graceful_shutdown=drain)
    uvicorn.Server(config).run(sockets=[listener])


async def _unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns what `work` returns; None, and `work` is cancelled, if the client goes before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.create_task(work)
    tasks = (answer, asyncio.create_task(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

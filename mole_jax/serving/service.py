"""From a request to its answer, within the limits of a server: what is between HTTP and the slots."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np

from mole_jax.config import DecodingConfig, ServeConfig
from mole_jax.errors import UserError
from mole_jax.model.llava import Llava
from mole_jax.prompts import PromptPreset
from mole_jax.serving import openai, schedule
from mole_jax.serving.assistant import Assistant, Processor
from mole_jax.serving.metrics import Metrics
from mole_jax.serving.openai import ChatRequest, Reply
from mole_jax.serving.sampler import Prompt, ending
from mole_jax.serving.schedule import Piece, Scheduler
from mole_jax.serving.slots import Slots

CLIENT_WENT = 499
"""Status that is counted where nobody waits for an answer any more (nginx's)."""


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that is ready for a slot."""

    prompt: Prompt
    decoding: DecodingConfig
    reply: Reply
    came: float
    """When, in seconds of `time.monotonic`."""


class Service:
    """From requests to answers, within the limits of `settings`."""

    def __init__(self, processor: Processor, scheduler: Scheduler, settings: ServeConfig, name: str):
        self.scheduler, self.settings, self.name = scheduler, settings, name
        self.metrics = Metrics(scheduler)
        self._processor = processor
        self._preparing = 0
        # Each may have a decoded picture of 150 MB in hand.
        self._threads = asyncio.Semaphore(os.cpu_count() or 1)

    @classmethod
    def of(cls, model: Llava, processor: Processor, settings: ServeConfig, name: str) -> Service:
        """Makes the slots and compiles what a question needs, alone and about a picture.

        Args:
            model, processor: what `mole_jax.load` returns.
            settings: checked ones.
            name: what clients call the model.

        Raises:
            UserError: the model is for captions, or the context is too short for a picture.
        """
        preset, places = processor.layout.prompt, min(settings.context, processor.arch.decoder.max_position)
        if isinstance(preset, PromptPreset) and preset.plain:
            raise UserError(f"the prompt preset {preset.name} is for captions and has no turns; choose --prompt v1")
        side = processor.arch.image.size
        asked = [processor("?"), processor("?", np.zeros((side, side, 3), np.uint8))]
        if (longest := len(asked[1].tokens)) >= places:
            raise UserError(f"--context: room for {places} tokens, a question about a picture has {longest}; raise it")
        assistant = Assistant.of(model, processor, settings.decoding, settings.slots)
        sampler = assistant.sampler
        slots = Slots(sampler, sampler.weights(assistant.params, {}), settings.slots, places)
        slots.warm_up(asked)
        return cls(processor, Scheduler(slots, processor.tokenizer, sampler.eos_ids), settings, name)

    async def prepared(self, request: ChatRequest) -> Asked:
        """Reads the pictures and makes the prompt.

        Raises:
            Refusal: there is no such model, or no room in the line.
            UserError: the request cannot be answered.
        """
        came = time.monotonic()
        if request.model != self.name:
            known = f"the model '{request.model}' is not here; this server has '{self.name}'"
            raise Refusal(404, known, "model_not_found")
        line, scheduler = self.settings.queue, self.scheduler
        if self._preparing + scheduler.running + scheduler.waiting >= scheduler.slots.count + line:
            raise Refusal(429, f"{line} requests wait already; try again later", "queue_full")
        self._preparing += 1
        try:
            async with self._threads:
                prompt, decoding = await asyncio.to_thread(self._read, request)
        finally:
            self._preparing -= 1
        self.metrics.prompt_tokens.inc(len(prompt.tokens))
        return Asked(prompt, decoding, Reply(request, len(prompt.tokens), self._processor.tokenizer), came)

    def _read(self, request: ChatRequest) -> tuple[Prompt, DecodingConfig]:
        most = self.settings.pictures
        if (count := sum(len(message.images) for message in request.messages)) > most:
            raise UserError(f"messages have {count} pictures, this server takes {most} (--pictures)")
        most_bytes = self.settings.body_mb << 20
        remote = functools.partial(openai.fetched, most_bytes=most_bytes) if self.settings.allow_remote else None
        prompt = self._processor(*request.conversation(remote))
        decoding = request.decoding(self.settings.decoding)
        places = self.scheduler.slots.places
        room = places - len(prompt.tokens)
        if request.max_tokens is None and request.max_completion_tokens is None:
            decoding = dataclasses.replace(decoding, max_new_tokens=min(decoding.max_new_tokens, max(room, 1)))
        if decoding.max_new_tokens > room:
            raise Refusal(
                400,
                f"the prompt has {len(prompt.tokens)} tokens and the answer may have {decoding.max_new_tokens}, this "
                f"server has room for {places} together (--context); shorten it or lower max_tokens",
                "context_length_exceeded",
            )
        return prompt, ending(decoding, self._processor.layout.prompt)

    async def pieces(self, asked: Asked) -> AsyncGenerator[Piece]:
        """Yields an answer as it comes. Whoever stops listening frees the slot.

        Raises:
            Refusal: it takes too long, or decoding fails.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        request = schedule.Request(
            asked.prompt, asked.decoding, lambda piece: loop.call_soon_threadsafe(heard.put_nowait, piece)
        )
        self.scheduler.submit(request)
        status, made = CLIENT_WENT, 0
        try:
            while True:
                left = asked.came + self.settings.timeout - time.monotonic()
                try:
                    piece = await asyncio.wait_for(heard.get(), max(left, 0))
                except TimeoutError:
                    status = 504
                    took = f"the answer took over {self.settings.timeout:g} s (--timeout); ask for fewer tokens"
                    raise Refusal(status, took, "timeout") from None
                if isinstance(piece, Exception):
                    status = 500
                    raise Refusal(status, f"decoding failed ({type(piece).__name__}); the server's log says why")
                if not made:
                    self.metrics.first_token.observe(time.monotonic() - asked.came)
                made += 1
                if piece.end is not None:
                    status = 200
                yield piece
                if piece.end is not None:
                    return
        finally:
            self.metrics.new_tokens.inc(made)
            self.metrics.requests.labels(status).inc()
            if status == 200:
                self.metrics.whole.observe(time.monotonic() - asked.came)
            self.scheduler.cancel(request)

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """Returns the whole answer."""
        async with contextlib.aclosing(self.pieces(asked)) as pieces:
            return asked.reply.whole([piece async for piece in pieces])

    async def events(self, asked: Asked) -> AsyncGenerator[dict[str, Any]]:
        """Yields the chunks of a stream; an error is the last of them."""
        yield asked.reply.beginning()
        untold: list[Piece] = []
        try:
            async with contextlib.aclosing(self.pieces(asked)) as pieces:
                async for piece in pieces:
                    untold.append(piece)
                    if piece.text or piece.end:
                        yield asked.reply.chunk(untold)
                        untold = []
        except Refusal as refusal:
            yield openai.error(refusal.status, str(refusal), refusal.code)
            return
        for last in asked.reply.ending():
            yield last

"""Who is answered when: requests wait in a line, get a slot each, and hear of their tokens as they come."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from mole_jax.config import DecodingConfig
from mole_jax.serving.sampler import Prompt
from mole_jax.serving.slots import Drawn, Slots
from mole_jax.serving.text import Answer
from mole_jax.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    """What has become certain, perhaps nothing."""
    token: int
    logprob: float
    end: Literal["stop", "length"] | None
    """Why the answer ends here: a token or text that ends answers, or as many tokens as were asked for; None: it goes
    on."""
    ends_by_token: bool = False
    """The token is one that ends answers, and no part of this one."""


class Request:
    """A prompt on its way through a slot.

    `hear` is called by the thread that decodes, with each `Piece`, or once with the exception that ended everything.
    It must not block.
    """

    def __init__(self, prompt: Prompt, decoding: DecodingConfig, hear: Callable[[Piece | Exception], object]):
        self.prompt, self.decoding, self.hear = prompt, decoding, hear
        self.over = False
        """It has been answered, or nobody wants to know any more."""
        self._answer: Answer | None = None

    def push(self, token: int, logprob: float, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> None:
        """Adds a token and tells of it."""
        self._answer = answer = self._answer or Answer(tokenizer, self.decoding.stop)
        by_token = token in eos_ids
        text = answer.push([] if by_token else [token], last=by_token)
        end = "stop" if answer.finished else None
        if end is None and len(answer.tokens) >= self.decoding.max_new_tokens:
            text, end = text + answer.push([], last=True), "length"
        self.over = end is not None
        self.hear(Piece(text, token, logprob, end, by_token))


class Scheduler:
    """The thread that owns the slots. Requests are served in the order in which they came.

    Between two tokens of those that are under way at most one prompt is read, so that a rush of new ones holds nobody
    up for long. The device is always given the next step before the host looks at the last one: a slot may so decode
    one token more than is used.

    Attributes:
      slots: those that it owns.
    """

    def __init__(self, slots: Slots, tokenizer: Tokenizer, eos_ids: tuple[int, ...]):
        self.slots, self._tokenizer, self._eos_ids = slots, tokenizer, eos_ids
        self._at: list[Request | None] = [None] * slots.count
        self._line: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the step in hand; whoever is not answered by then hears of it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(one is not None and not one.over for one in self._at)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._line)

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the line."""
        with self._changed:
            self._line.append(request)
            self._changed.notify()
        if not self.alive:
            self._fail(ConnectionAbortedError("the server has stopped decoding"), [request])

    def cancel(self, request: Request) -> None:
        """Takes a request out, wherever it is; does nothing to one that is over."""
        with self._changed:
            request.over = True
            if request in self._line:
                self._line.remove(request)
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._decode()
        finally:  # the end, or an error after which not even empty slots can be had
            self._fail(ConnectionAbortedError("the server has stopped decoding"), [*self._at, *self._line])

    def _decode(self) -> None:
        told: list[tuple[Drawn, list[Request | None]]] = []
        while self._work(bool(told)):
            try:
                made = self._dispatch()
                for drawn, requests in told:
                    self._tell(drawn, requests)
                told = made
            except Exception as error:
                LOG.exception("decoding failed; %d requests are lost", self.running)
                told = []
                self._fail(error, self._at)
                self.slots.clear()

    def _work(self, untold: bool) -> bool:
        """Waits until there is something to do; returns False when that is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or untold or self._line or self.running)
            return not self._closed

    def _dispatch(self) -> list[tuple[Drawn, list[Request | None]]]:
        """Gives the device its next work; returns what that makes, and for whom."""
        made = []
        with self._changed:
            self._at = [None if one is None or one.over else one for one in self._at]
            free = next((slot for slot, one in enumerate(self._at) if one is None), None)
            joining = self._line.popleft() if self._line and free is not None else None
            if joining is not None and free is not None:
                self._at[free] = joining
        if joining is not None and free is not None:
            made.append((self.slots.fill(free, joining.prompt, joining.decoding), [joining]))
        if self.running:
            made.append((self.slots.step(np.asarray([one is not None for one in self._at])), list(self._at)))
        return made

    def _tell(self, drawn: Drawn, requests: list[Request | None]) -> None:
        tokens, logprobs = jax.device_get(drawn)
        for request, token, logprob in zip(requests, tokens.tolist(), logprobs.tolist(), strict=True):
            if request is not None and not request.over:
                request.push(token, logprob, self._tokenizer, self._eos_ids)

    def _fail(self, error: Exception, requests: Sequence[Request | None]) -> None:
        for one in requests:
            if one is not None and not one.over:
                one.hear(error)
                self.cancel(one)

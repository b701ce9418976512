"""OpenAI's chat completions: what a request may say, in this project's words, and how answers are written down."""

from __future__ import annotations

import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator

from mole_jax.config import DecodingConfig
from mole_jax.config_check import check_decoding
from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError, nearest
from mole_jax.prompts import IMAGE
from mole_jax.serving.schedule import Piece
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

REMOTE_SECONDS = 20
"""How long an address of the web may take to answer."""
_ONLY: Mapping[str, Any] = {
    "n": 1,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
}
"""Settings that are taken with one value only, that of leaving them out."""
_WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Settings that say nothing about the answer."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _said(cls, part: Any) -> Any:
        """Leaves out what says nothing: clients send answers back with all the fields that there might have been."""
        return {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else part


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: how a picture is cut is the checkpoint's own matter."""


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Discriminator("type")]]
    name: str | None = None
    """Without effect."""

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Part):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request. `top_k` and `repetition_penalty` are no settings of OpenAI's, but of `DecodingConfig`.

    What is None is as the server was started.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Newer name of `max_tokens`."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    """None: another one each time."""
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        """Takes out what is of no effect, and refuses by name what there is not."""
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in _ONLY and value is not None and value != _ONLY[name]:
                only = f"leave it out, or give {_ONLY[name]!r}"
                raise UserError(f"{name} is {shortened(repr(value), 40)}, which there is not here; {only}")
            if name not in _ONLY and name not in _WITHOUT_EFFECT and name not in cls.model_fields:
                raise UserError(f"unknown field '{shortened(name)}'{nearest(name, cls.model_fields)}")
        return {name: value for name, value in body.items() if name in cls.model_fields}

    def decoding(self, default: DecodingConfig) -> DecodingConfig:
        """Returns how to decode; raises `UserError` if a value makes no sense."""
        given = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens or default.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
        }
        rest = {name: getattr(default, name) for name, value in given.items() if value is None}
        return check_decoding(DecodingConfig(**given | rest), "request")

    def conversation(self, remote: Callable[[str], bytes] | None) -> tuple[list[Turn], list[str | bytes]]:
        """Returns the turns, with an ``<image>`` for each picture, and the pictures.

        The pictures of a message stand before its words, as models are trained, unless the words of the conversation
        say where with ``<image>``.

        Args:
            remote: reads an address of the web. None: such addresses are refused.

        Raises:
            UserError: a picture is named by something else, or cannot be fetched.
        """
        marked = any(IMAGE in message.text for message in self.messages)
        turns: list[Turn] = []
        images: list[str | bytes] = []
        for message in self.messages:
            role, marks = message.role, "" if marked else f"{IMAGE}\n" * len(message.images)
            turns.append(Turn("system" if role == "developer" else role, marks + message.text))
            images += [_picture(url, remote) for url in message.images]
        return turns, images


def _picture(url: str, remote: Callable[[str], bytes] | None) -> str | bytes:
    start = url[:8].lower()
    if start.startswith("data:"):
        return url
    if not start.startswith(("http://", "https://")):
        raise UserError(f"image_url {shortened(url, 40)!r} is no data:image/…;base64,… URL; send the picture as one")
    if remote is None:
        raise UserError(
            "image_url is an address of the web, from where this server reads nothing (it was started without "
            "--allow-remote); send the picture as a data:image/…;base64,… URL"
        )
    return remote(url)


def fetched(url: str, most_bytes: int) -> bytes:
    """Returns what is at an address of the web; raises `UserError` if nothing is, or more than `most_bytes`."""
    end, content = time.monotonic() + REMOTE_SECONDS, b""
    try:
        with urllib.request.urlopen(url, timeout=REMOTE_SECONDS) as answer:
            while len(content) <= most_bytes and (piece := answer.read1()):
                content += piece
                if time.monotonic() > end:
                    raise TimeoutError(f"over {REMOTE_SECONDS} s")
    except (OSError, ValueError) as error:  # ValueError: no address at all
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"image_url {shortened(url)} cannot be read ({reason}); send it as a data: URL") from None
    if len(content) > most_bytes:
        raise UserError(f"image_url {shortened(url)} has over {most_bytes:,} bytes; make it smaller")
    return content


class Reply:
    """One answer in OpenAI's words: whole, or as the chunks of a stream."""

    def __init__(self, request: ChatRequest, prompt_tokens: int, tokenizer: Tokenizer):
        self._request, self._tokenizer, self._prompt_tokens = request, tokenizer, prompt_tokens
        self._id, self._created = f"chatcmpl-{secrets.token_hex(16)}", int(time.time())
        self._tokens: list[int] = []
        self.made = 0
        """Tokens of the answer so far, with one that ended it."""

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns the response."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(pieces), "finish_reason": pieces[-1].end}
        return self._object("chat.completion", [choice]) | {"usage": self._usage()}

    def beginning(self) -> dict[str, Any]:
        """Returns the first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Returns a chunk with what these add."""
        text = "".join(piece.text for piece in pieces)
        return self._chunk({"content": text} if text else {}, self._logprobs(pieces), pieces[-1].end)

    def ending(self) -> list[dict[str, Any]]:
        """Returns what comes after the last piece of a stream: the usage, if it was asked for."""
        options = self._request.stream_options
        if options is None or not options.include_usage:
            return []
        return [self._object("chat.completion.chunk", []) | {"usage": self._usage()}]

    def _chunk(self, delta: dict, logprobs: dict | None = None, end: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list) -> dict[str, Any]:
        of = {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
        return of | {"choices": choices}

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self.made
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.made, "total_tokens": total}

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Counts the tokens, and returns what is to be told of them."""
        content = []
        for piece in pieces:
            self.made += 1
            if self._request.logprobs and not piece.ends_by_token:
                token = {"token": self._text(piece.token), "logprob": piece.logprob, "bytes": None, "top_logprobs": []}
                content.append(token)
        return {"content": content, "refusal": None} if self._request.logprobs else None

    def _text(self, token: int) -> str:
        """Returns what a token adds to the one before it: by itself it would lose the white space before a word."""
        before = self._tokens[-1:]
        self._tokens.append(token)
        return self._tokenizer.decode([*before, token]).removeprefix(self._tokenizer.decode(before))


def models(name: str, created: int) -> dict[str, Any]:
    """Returns the list of the one model."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "mole-jax"}]}


def error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Returns an error in OpenAI's words."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}

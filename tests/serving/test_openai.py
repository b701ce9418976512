"""What OpenAI's messages mean here, without a server."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from mole_jax.serving.openai import ChatRequest, fetched

PNG = "data:image/png;base64,AAAA"


def request(*messages, **settings) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": list(messages)} | settings)


def said(role, *parts) -> dict:
    content = [
        {"type": "image_url", "image_url": {"url": part[1:]}} if part[0] == "!" else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def test_pictures_stand_before_the_words_of_their_message():
    turns, images = request(
        said("developer", "Be brief."),
        said("user", "What is", f"!{PNG}", "this?", f"!{PNG}B"),
        {"role": "assistant", "content": "A bar.", "refusal": None, "tool_calls": None},  # as clients send it back
        said("user", "And this?", f"!{PNG}C"),
    ).conversation(None)
    assert turns == [
        Turn("system", "Be brief."),
        Turn("user", "<image>\n<image>\nWhat is\nthis?"),
        Turn("assistant", "A bar."),
        Turn("user", "<image>\nAnd this?"),
    ]
    assert images == [PNG, f"{PNG}B", f"{PNG}C"]


def test_marks_in_the_words_say_where():
    turns, images = request(said("user", f"!{PNG}", "Is <image> or <image> it?", f"!{PNG}B")).conversation(None)
    assert turns == [Turn("user", "Is <image> or <image> it?")]
    assert images == [PNG, f"{PNG}B"]


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(b"0123456789")

    def log_message(self, *_):
        pass


def test_the_web_is_read_where_it_is_allowed_and_within_bounds():
    with HTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever).start()
        with contextlib.ExitStack() as stack:
            stack.callback(server.shutdown)
            url = f"http://127.0.0.1:{server.server_port}/a.png"
            asked = request(said("user", "?", f"!{url}"))
            assert asked.conversation(lambda url: fetched(url, 10))[1] == [b"0123456789"]
            with pytest.raises(UserError, match="has over 9 bytes"):
                asked.conversation(lambda url: fetched(url, 9))
            with pytest.raises(UserError, match=r"cannot be read \(Not Found\)"):
                fetched(url + "x", 10)
    with pytest.raises(UserError, match=r"cannot be read \(.*refused\)"):
        fetched(url, 10)

"""``python -m mole_jax.serve``: the real `openai` client against the real server, on loopback."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import uvicorn
from flax import nnx
from PIL import Image

import mole_jax
from mole_jax import api, serve
from mole_jax.config import DecodingConfig, ServeConfig
from mole_jax.errors import UserError
from mole_jax.serving.sampler import Prompt
from mole_jax.serving.schedule import Request
from mole_jax.serving.server import application
from mole_jax.serving.service import Service
from mole_jax.serving.slots import Slots
from tests.tiny import CHILD_FLAGS, ROOT, TOKENIZER
from tests.weights.runs import trained_run

QUESTIONS = ["What is on the left?", "Repeat: left lung", "Which colour?"]
LONG = "How many?"
"""A question whose answer has over 20 tokens."""
SETTINGS = ServeConfig(slots=3, context=256, queue=16, pictures=2, body_mb=1, timeout=60)
ENDLESS = {"max_tokens": 180, "temperature": 50.0, "seed": 1}
"""What makes an answer to "?" that ends with its last token only."""
KEY = "a key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "mole"
    trained_run(folder, ROOT / "assets" / "quickstart_base", spread=0.05)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return api.load(str(folder), tokenizer=TOKENIZER)


@contextlib.contextmanager
def serving(service: Service, key: str | None = KEY) -> Iterator[str]:
    """Runs a server in a thread; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application(service, key), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def service(loaded):
    return Service.of(*loaded, SETTINGS, "tiny")


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as url:
        yield url


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(url):
    return client_of(url)


def picture(colour: int = 0) -> Image.Image:
    return Image.new("RGB", (80, 50), (200, 10 + 80 * colour, 10))


def data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def message(text: str, *images: Image.Image | str) -> list:
    urls = [one if isinstance(one, str) else data_url(one) for one in images]
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": one}} for one in urls)]
    return [{"role": "user", "content": parts if images else text}]


def ask(client: openai.OpenAI, messages: list, **settings):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 24} | settings)


def text_of(answer) -> str:
    return answer.choices[0].message.content


ASKED = [
    (text, [picture(colour) for colour in range(pictures)])
    for text, pictures in (
        (LONG, 0),
        *((text, number % 2) for number, text in enumerate(QUESTIONS)),
        *((text, (number + 1) % 2) for number, text in enumerate(QUESTIONS)),
        ("<image> or <image>?", 2),
    )
]
"""Eight questions with their pictures, a batch of `generate`."""


def generated(loaded, **settings) -> list[str]:
    decoding = DecodingConfig(**{"max_new_tokens": 24} | settings)
    return mole_jax.generate(*loaded, [text for text, _ in ASKED], [own for _, own in ASKED], decoding=decoding)


def idle(service: Service) -> bool:
    """Waits until nobody has a slot; returns whether that came within 10 s."""
    end = time.monotonic() + 10
    while service.scheduler.running or service.scheduler.waiting:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_answers_are_those_of_generate_whoever_else_asks(client, loaded):
    expected = generated(loaded)
    assert len(set(expected)) > 5
    assert max(map(len, expected)) > 60

    def streamed(one) -> str:
        chunks = list(ask(client, message(one[0], *one[1]), stream=True))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(len(ASKED)) as threads:  # more than there are slots
        whole = list(threads.map(lambda one: text_of(ask(client, message(one[0], *one[1]))), ASKED))
        assert whole == expected
        assert list(threads.map(streamed, ASKED)) == expected


def test_a_request_joins_while_another_decodes(client, service):
    stream = ask(client, message(LONG), stream=True)
    next(stream)
    assert text_of(ask(client, message(QUESTIONS[1]), max_tokens=1))
    assert service.scheduler.running <= 1
    assert len(list(stream)) > 5


def test_what_a_request_may_set(client, loaded):
    def expected(**settings) -> str:
        return generated(loaded, **settings)[0]

    whole = ask(client, message(LONG))
    words = text_of(whole).split()
    assert (whole.choices[0].finish_reason, whole.model, whole.object) == ("stop", "tiny", "chat.completion")
    assert whole.usage.completion_tokens == 21
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 21
    short = ask(client, message(LONG), max_tokens=5, stop=None, n=1, user="me")
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert text_of(whole).startswith(text_of(short))
    assert text_of(ask(client, message(LONG), max_tokens=None, max_completion_tokens=5)) == text_of(short)
    stopped = ask(client, message(LONG), stop=[words[4], "nothing of the kind"])
    assert (text_of(stopped), stopped.choices[0].finish_reason) == (expected(stop=(words[4],)), "stop")
    drawn = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    assert text_of(ask(client, message(LONG), **drawn)) == expected(**drawn)
    assert expected(**drawn) != text_of(whole)
    freely = {text_of(ask(client, message(LONG), temperature=2.0)) for _ in range(3)}
    assert len(freely) == 3  # another seed each time
    extra = {"top_k": 2, "repetition_penalty": 1.3}
    assert text_of(ask(client, message(LONG), extra_body=extra, **drawn)) == expected(**drawn, **extra)


def test_logprobs_are_those_of_the_chosen_tokens(client, loaded):

    whole = ask(client, message(LONG), logprobs=True).choices[0]
    told = [one.logprob for one in whole.logprobs.content]
    assert "".join(one.token for one in whole.logprobs.content).strip() == whole.message.content
    model, processor = loaded
    prompt = processor(LONG).tokens
    answer, _ = processor.tokenizer.encode(whole.message.content)
    row = jnp.asarray([[*prompt, *answer]])
    images = jnp.zeros((1, 0, 28, 28, 3), jnp.uint8)
    logits = nnx.jit(lambda model, *row: model(*row))(
        model, row, images, jnp.arange(row.shape[1])[None], jnp.ones_like(row)
    )
    expected = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])[jnp.arange(len(answer)), jnp.asarray(answer)]
    np.testing.assert_allclose(told, expected, rtol=1e-3, atol=1e-4)

    chunks = list(ask(client, message(LONG), logprobs=True, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 21
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    parts = [chunk.choices[0].logprobs for chunk in chunks[:-1] if chunk.choices[0].logprobs]
    assert [one.logprob for part in parts for one in part.content] == pytest.approx(told)


REFUSED = [
    ({"model": "gpt"}, 404, "the model 'gpt' is not here; this server has 'tiny'"),
    ({"messages": []}, 400, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: Input should be 'system', "),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "the last turn must be the user's"),
    ({"temperature": "warm"}, 400, "temperature: Input should be a valid number"),
    ({"temperature": -1}, 400, "request.temperature is -1.0, it must not be negative"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 300}, 400, "the answer may have 300, this server has room for 256 together"),
    ({"n": 2}, 400, "n is 2, which there is not here; leave it out, or give 1"),
    ({"max_token": 2}, 400, "unknown field 'max_token', did you mean 'max_tokens'?"),
    ({"messages": message("?", "/etc/passwd")}, 400, "image_url '/etc/passwd' is no data:image"),
    ({"messages": message("?", "file:///etc/passwd")}, 400, "is no data:image"),
    ({"messages": message("?", "http://127.0.0.1/x.png")}, 400, "from where this server reads nothing"),
    ({"messages": message("?", "data:image/png;base64,AAAA")}, 400, "image"),
    ({"messages": message("?", *[picture()] * 3)}, 400, "messages have 3 pictures, this server takes 2"),
    ({"messages": message("<image> and <image>", picture())}, 400, "2 <image>, 1 images were given"),
    ({"messages": message("x" * (1 << 20))}, 413, "the request has over 1,048,576 bytes (--body-mb)"),
]


@pytest.mark.parametrize(("change", "status", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_mistake_is_told_as_openai_tells_it(client, change, status, words):
    body = {"model": "tiny", "messages": message("?"), "max_tokens": 1} | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code == status
    assert words in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_keys_models_and_what_is_not_there(client, url):
    assert [one.id for one in client.models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError, match="the API key is not right"):
        client_of(url, "another").models.list()
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.completions.create(model="tiny", prompt="?")


def test_health_and_metrics_count(client, url, service):
    def metrics() -> dict[str, float]:
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        return {name: float(value) for name, value in re.findall(r"^(mole_jax_\S+) (\S+)$", text, re.MULTILINE)}

    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}
    ask(client, message(LONG), max_tokens=5)
    before = metrics()
    ask(client, message(LONG), max_tokens=5)
    assert idle(service)
    after = metrics()
    names = ("new_tokens_total", 'requests_total{status="200"}', "first_token_seconds_count", "request_seconds_count")
    assert [after[f"mole_jax_{name}"] - before[f"mole_jax_{name}"] for name in names] == [5, 1, 1, 1]
    assert (after["mole_jax_slots"], after["mole_jax_slots_in_use"], after["mole_jax_requests_waiting"]) == (3, 0, 0)


@pytest.fixture
def slow_device(monkeypatch):
    """Every step takes 10 ms at least, so that an endless answer takes 1.8 s on any machine."""
    step = Slots.step

    def slowly(self, active):
        time.sleep(0.01)
        return step(self, active)

    monkeypatch.setattr(Slots, "step", slowly)


def test_a_full_line_is_refused_and_a_client_that_goes_frees_its_slot(loaded, slow_device):
    service = Service.of(*loaded, dataclasses.replace(SETTINGS, queue=0), "tiny")
    with serving(service, None) as url:
        client = client_of(url)
        streams = [ask(client, message("?"), stream=True, **ENDLESS) for _ in range(SETTINGS.slots)]
        for stream in streams:
            next(stream)  # says only that it has come
            next(stream)
        assert service.scheduler.running == SETTINGS.slots
        with pytest.raises(openai.RateLimitError, match="0 requests wait already") as caught:
            ask(client, message("?"))
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        assert idle(service)
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), message("?"), **ENDLESS)
        assert idle(service)
        assert service.metrics.registry.get_sample_value("mole_jax_requests_total", {"status": "499"}) == 4
        assert text_of(ask(client, message(QUESTIONS[1]))) == "left lung"


def test_what_takes_too_long_or_fails_is_told_and_the_next_is_answered(loaded, slow_device, caplog):
    service = Service.of(*loaded, dataclasses.replace(SETTINGS, timeout=1), "tiny")
    with serving(service, None) as url:
        client = client_of(url)
        with pytest.raises(openai.InternalServerError, match="the answer took over 1 s") as caught:
            ask(client, message("?"), **ENDLESS)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="the answer took over 1 s"):
            list(ask(client, message("?"), **ENDLESS, stream=True))
        assert idle(service)
        # Pixels of another size than the tower's: the device's program cannot be made.
        heard: list = []
        broken = Prompt(loaded[1]("?", picture()).tokens, np.zeros((1, 4, 4, 3), np.uint8))
        service.scheduler.submit(Request(broken, DecodingConfig(), heard.append))
        assert idle(service)
        assert isinstance(heard.pop(), Exception)
        assert "decoding failed; 1 requests are lost" in caplog.text
        assert text_of(ask(client, message(QUESTIONS[1]), max_tokens=1)) == "left"


def door(folder, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mole_jax.serve", "--checkpoint", str(folder), "--tokenizer", TOKENIZER, *flags]
    environment = os.environ | {"XLA_FLAGS": CHILD_FLAGS} | environment
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_nobody_in(folder):
    process = door(folder, "--port", "0", "--context", "256", "--slots", "2", "--model-name", "tiny")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"model tiny at (http://127.0.0.1:\d+)/v1 \(2 slots of 256 tokens, \d+ MiB of cache\)\n", line)
    assert found, line + process.communicate()[1]
    client = client_of(found[1])
    stream = ask(client, message("?"), **ENDLESS, stream=True)
    next(stream)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(openai.APIConnectionError):
        ask(client_of(found[1]), message("?"))
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert process.wait(30) == 0, process.stderr.read()


def test_a_wrong_start_is_told_in_one_line(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, words in (
            (("--port", port), f"--host 127.0.0.1 --port {port}: Address already in use; choose others"),
            (("--slots", "0"), "--slots is 0, it must be at least 1"),
            (("--slot", "2"), "unknown option '--slot', did you mean '--slots'?"),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", "--checkpoint", str(folder), *flags])
            with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
                serve.main()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mole_jax.serving.server")
    monkeypatch.setattr(sys, "argv", ["serve", "--checkpoint", str(folder)])
    with pytest.raises(UserError, match=r"^serve: uvicorn is not installed; pip install 'mole-jax\[serve\]'$"):
        serve.main()


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [1, 10])
def test_sixteen_clients_for_minutes(loaded, minutes):
    """Texts, pictures, streams, and streams that are given up; every greedy answer is that of `generate`."""
    service = Service.of(*loaded, dataclasses.replace(SETTINGS, timeout=300), "tiny")
    expected = generated(loaded)
    end = time.monotonic() + 60 * minutes

    def one_client(number: int) -> int:
        client, count = client_of(url), 0
        while time.monotonic() < end:
            which = (number + 7 * count) % len(ASKED)
            words = message(ASKED[which][0], *ASKED[which][1])
            kind = (number + count) % 4
            if kind == 0:
                stream = ask(client, words, stream=True, temperature=1.0)
                next(stream)
                stream.close()
            elif kind == 1:
                pieces = (chunk.choices[0].delta.content or "" for chunk in ask(client, words, stream=True))
                assert "".join(pieces) == expected[which]
            else:
                assert text_of(ask(client, words)) == expected[which]
            count += 1
        return count

    with serving(service, None) as url, ThreadPoolExecutor(16) as threads:
        counts = list(threads.map(one_client, range(16)))
    print(f"{sum(counts)} requests in {minutes} minutes")
    assert idle(service)
    assert min(counts) > 10

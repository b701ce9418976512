"""``convert --push`` by the hub's own library, to a server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from mole_jax import convert
from mole_jax.errors import UserError
from tests.weights.runs import trained_run

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """What the hub has (repositories with their files), and what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict] = {}
        self.asked: list[str] = []
        self.refuses = ""
        """Path that is answered with an error."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *args):
        pass

    def answer(self, value, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.respond(b"")

    def do_POST(self):
        self.respond(self.rfile.read(int(self.headers.get("content-length", 0))))

    def respond(self, body: bytes) -> None:
        hub = self.server
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        name = "/".join(path.split("/")[3:5])
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif hub.refuses and path.startswith(hub.refuses):
            self.answer({"error": "no room is left"}, 403)
        elif path == "/api/whoami-v2":
            self.answer({"name": "someone", "type": "user"})
        elif path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            private = made.get("visibility") == "private" or made.get("private", False)  # the library's 2 and 1 say so
            hub.repositories[name] = {"private": private, "files": {}}
            self.answer({"url": f"{hub.address}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif name not in hub.repositories:
            self.answer({"error": "Repository not found"}, 404, x_error_code="RepoNotFound")
        elif "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self.answer({"files": [{"shouldIgnore": False, **one} for one in files]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[name]["files"][line["value"]["path"]] = content
            self.answer({"commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            one = hub.repositories[name]
            siblings = [{"rfilename": file} for file in (".gitattributes", *one["files"])]
            self.answer({"id": name, "private": one["private"], "siblings": siblings, "sha": "0" * 40})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # what is asked is on this machine
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "run"
    trained_run(folder, goldens / "tiny_llava", kind="lora")
    return folder


@pytest.fixture
def door(run, tmp_path, monkeypatch, capsys):
    """Returns a function that runs the command with some flags and returns what it prints."""

    def call(*flags: str) -> str:
        command = ["convert", "--input", str(run), "--output", str(tmp_path / "out"), "--to", "peft", *flags]
        monkeypatch.setattr(sys, "argv", command)
        convert.main()
        return capsys.readouterr().out

    return call


def written(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_dry_run_lists_files_and_sizes_and_asks_the_hub_for_nothing(hub, door, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    *lines, last = door("--push", "someone/mine", "--dry-run").splitlines()
    files = written(tmp_path / "out")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert [line.split() for line in lines[1:]] == [[f"{len(files[name]):,}", name] for name in sorted(files)]
    total = sum(map(len, files.values()))
    assert last == f"someone/mine: {len(files)} files, {total:,} bytes, private; nothing was sent"
    assert hub.asked == []


@pytest.mark.parametrize("public", [False, True])
def test_every_file_arrives_in_a_repository_that_is_private_unless_asked_for(hub, door, tmp_path, public):
    told = door("--push", "someone/mine", *(["--public"] if public else []))
    (made,) = hub.repositories.values()
    assert made == {"private": not public, "files": written(tmp_path / "out")}
    assert f"{hub.address}/someone/mine: {len(made['files'])} files, " in told
    assert told.rstrip().endswith("public" if public else "private")


@pytest.mark.parametrize(
    ("there", "flags", "message"),
    [
        ({"private": True, "files": {"config.json": b"{}"}}, [], r"holds 1 files \(config.json, …\).* choose another"),
        ({"private": False, "files": {}}, [], "is there and is public; add --public"),
        ({"private": True, "files": {}}, ["--public"], "is there and is private; leave out --public"),
    ],
)
def test_nothing_goes_into_what_is_there_already(hub, door, tmp_path, there, flags, message):
    hub.repositories["someone/mine"] = there
    with pytest.raises(UserError, match=message):
        door("--push", "someone/mine", *flags)
    assert not (tmp_path / "out").exists()


def test_an_empty_repository_is_filled(hub, door, tmp_path):
    hub.repositories["someone/mine"] = {"private": True, "files": {}}
    hub.refuses = "/api/repos/create"  # as the hub says of one that is there to a token that may not make any
    door("--push", "someone/mine")
    assert hub.repositories["someone/mine"]["files"] == written(tmp_path / "out")


@pytest.mark.parametrize(
    ("trouble", "message", "made"),
    [
        ("none", "there is no token of the hub; set HF_TOKEN, or log in with hf auth login", False),
        ("wrong", "refuses or is not reached .*Invalid user token.*; look at the name, the rights of the token", False),
        ("network", r"refuses or is not reached \(.*; look at the name, .* the network$", False),
        ("create", r"no room is left.* out is whole, hf upload someone/mine \S*out --private sends it", True),
        ("commit", r"no room is left.* out is whole, hf upload someone/mine \S*out --private sends it", True),
    ],
)
def test_what_fails_is_one_line_and_leaves_what_is_made(hub, door, tmp_path, monkeypatch, trouble, message, made):
    if trouble == "none":
        monkeypatch.delenv("HF_TOKEN")
    elif trouble == "wrong":
        monkeypatch.setenv("HF_TOKEN", "hf_another")
    elif trouble == "network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.refuses = {"create": "/api/repos/create", "commit": "/api/models/someone/mine/commit"}[trouble]
    with pytest.raises(UserError, match=message.replace(" out is", r" \S*out is")) as caught:
        door("--push", "someone/mine")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert (tmp_path / "out" / "adapter_config.json").exists() == made


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--public"], "go with --push"),
        (["--dry-run"], "go with --push"),
        (["--push", "mine", "--dry-run"], "--push mine: is no name on the hub; give it as OWNER/NAME"),
        (["--push", "a/b..c", "--dry-run"], r"--push a/b\.\.c: .*Cannot have -- or \.\."),
    ],
)
def test_flags_that_do_not_fit(door, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        door(*flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_sent(door, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("private")
    with pytest.raises(UserError, match="is not empty, and --push sends all that is in --output; name a new folder"):
        door("--push", "someone/mine", "--dry-run")

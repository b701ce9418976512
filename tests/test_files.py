"""Files are written whole or not at all, and read with one clear line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest

from mole_jax import files
from mole_jax.errors import UserError


def test_a_file_whose_writing_fails_keeps_what_it_held(tmp_path):
    path = tmp_path / "config.json"
    files.write_json(path, {"step": 1})
    with pytest.raises(ZeroDivisionError), files.writing(path) as stream:
        stream.write(b"%d" % (1 // 0))
    assert files.read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    """The process dies by SIGKILL with half of the new content on disk."""
    path = tmp_path / "epoch.json"
    files.write_json(path, {"steps": 7})
    code = (
        "import os, signal, sys\nfrom mole_jax import files\n"
        "with files.writing(sys.argv[1]) as stream:\n"
        "    stream.write(b'{\"steps\": '); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert files.read_json(path) == {"steps": 7}


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"loss": math.nan, "rates": [math.inf, 1.5], "by": {"domain": (-math.inf,)}})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"loss": None, "rates": [None, 1.5], "by": {"domain": [None]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"step": 1', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1]", "is not as it was written (it is a list, not an object)"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_broken_file_is_one_line_that_names_file_and_remedy(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        files.read_json(path, remedy="choose another --workdir")
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; choose another --workdir")
    assert "\n" not in str(caught.value)


def test_only_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "text": "a\xe2\x80\xa8b"}\n{"step": 2}\n{"st')
    assert [one["step"] for one in files.read_json_lines(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is not as it was written"):
        files.read_json_lines(path)


@pytest.mark.parametrize(
    ("make", "name", "remedy"),
    [
        (lambda folder: (folder / "file").write_text(""), "file/config.json", "a part of the path is a file"),
        (lambda folder: None, "none/config.json", "make the folder first"),
        (lambda folder: None, "x" * 300, "choose a shorter name"),
        (lambda folder: (folder / "taken").mkdir(), "taken", "a folder has this name"),
    ],
)
def test_what_cannot_be_written_is_told_with_a_remedy(tmp_path, make, name, remedy):
    make(tmp_path)
    with pytest.raises(UserError, match=remedy) as caught:
        files.write_text(tmp_path / name, "x")
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("deep", [1, 12])
def test_of_a_folder_that_cannot_be_made_none_above_it_is_left(tmp_path, deep):
    with pytest.raises(UserError, match="choose a shorter name"):
        files.made(tmp_path.joinpath("new", *["x" * 200] * deep, "y" * 300))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nowhere://bucket/run", "https://host/run", "file:///run"])
@pytest.mark.parametrize("take", [files.absolute, files.path_of, files.is_remote, files.local])
def test_a_url_of_an_unknown_kind_is_refused(name, take):
    with pytest.raises(UserError, match=rf"^{name}: a path cannot begin with {name[: name.index('/')]}//;.* gs://"):
        take(name)


def test_what_takes_no_bucket_says_so(tmp_path):
    assert files.local(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"^gs://bucket/a\.jsonl: is a URL; name a folder or file of this machine"):
        files.local("gs://bucket/a.jsonl")


def test_a_name_within_which_a_url_could_begin_is_a_path(tmp_path):
    assert str(files.absolute(f"{tmp_path}/a://b")) == str(files.path_of(f"{tmp_path}/a://b")) == f"{tmp_path}/a:/b"


def test_a_full_disk_is_told(tmp_path):
    """``/dev/full`` answers every write as a full disk does."""
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"No space left on device.*free some space"), full, files.explained(full.name):
        full.write(b"x")

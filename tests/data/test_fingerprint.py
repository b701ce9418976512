"""The hash of a domain changes with whatever training reads of it, and with nothing else."""

from __future__ import annotations

import json
import shutil

import pytest

from mole_jax.config import DomainConfig
from mole_jax.data.fingerprint import fingerprint
from mole_jax.data.load import RecordSource
from tests.data.domains_on_disk import record, write_image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    for name in ("a.png", "b.png", "ö/c.png"):
        (root / name).parent.mkdir(exist_ok=True)
        write_image(root, name)
    (root / "c.json").write_text(json.dumps([record("a", image="a.png"), record("b", image=["b.png", "ö/c.png"])]))
    return root


def _of(root, name="c.json"):
    return fingerprint(RecordSource.open(DomainConfig("d", str(root / name))))


def test_a_copy_elsewhere_and_other_files_beside_it_change_nothing(folder, tmp_path):
    before = _of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "more.png").write_bytes(b"x")
    assert _of(folder) == _of(tmp_path / "copy") == before


@pytest.mark.parametrize("name", ["a.png", "b.png", "ö/c.png"])
def test_another_size_of_a_picture_is_seen(folder, name):
    before = _of(folder)
    with (folder / name).open("ab") as file:
        file.write(b"x")
    assert _of(folder)["images"] != before["images"]
    assert _of(folder)["records"] == before["records"]
    (folder / name).unlink()
    assert _of(folder)["images"] != before["images"]


def test_another_text_is_seen(folder):
    before = _of(folder)
    text = (folder / "c.json").read_text()
    (folder / "c.json").write_text(text.replace("A dog.", "A cat.", 1))
    assert _of(folder)["records"] != before["records"]
    assert _of(folder)["images"] == before["images"]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_images_are_found_however_the_file_is_written(folder, lines, ascii_only):
    records = json.loads((folder / "c.json").read_text())
    if lines:
        text = "\n".join(json.dumps(one, ensure_ascii=ascii_only) for one in records)
    else:
        text = json.dumps(records, indent=3, ensure_ascii=ascii_only)
    (folder / "other.json").write_text(text)
    assert _of(folder, "other.json")["images"] == _of(folder)["images"]


@pytest.mark.parametrize("image", ["none.png", "../x", "/dev/zero", "x" * 5000, "a\0b", "\ud83d", 3, None, ["a", 3]])
def test_whatever_stands_for_an_image_gets_a_hash(folder, image):
    (folder / "odd.json").write_text(json.dumps([record("a") | {"image": image}, record("b", image="a.png")]))
    assert len(_of(folder, "odd.json")["images"]) == 16

"""Every way in which the newest checkpoint can be broken: it is set aside with a word, and the one before taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import doors, spoiling
from tests.chaos.results import check_same

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos_checkpoints")]


def arrays(item: str, change: spoiling.Spoil) -> Callable[[Path], None]:
    """Changes the largest file of an item's arrays."""
    return lambda step: change(max((step / item).rglob("d/*"), key=lambda file: file.stat().st_size))


def one(name: str, change: spoiling.Spoil) -> Callable[[Path], None]:
    return lambda step: change(step / name)


def gone(item: str) -> Callable[[Path], None]:
    return lambda step: shutil.rmtree(step / item)


def flipped(path: Path) -> None:
    """One bit is another in each thousand bytes, as after a failing disk or memory."""
    draw, content = random.Random(0), bytearray(path.read_bytes())
    for start in range(0, len(content), 1000):
        content[draw.randrange(start, min(start + 1000, len(content)))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def written(text: str) -> spoiling.Spoil:
    return lambda path: path.write_text(text) and None


def everything(change: spoiling.Spoil) -> Callable[[Path], None]:
    def spoil(step: Path) -> None:
        for file in [file for file in step.rglob("*") if file.is_file()]:
            change(file)

    return spoil


def an_empty_folder_in_its_place(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def a_file_in_its_place(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("hello")


DAMAGED = {
    "params array cut": arrays("params", spoiling.cut),
    "params array empty": arrays("params", spoiling.empty),
    "params array zeroed": arrays("params", spoiling.zeroed),
    "params array rubbish": arrays("params", spoiling.rubbish),
    "params array bits flipped": arrays("params", flipped),
    "params array gone": arrays("params", spoiling.gone),
    "params manifest cut": one("params/manifest.ocdbt", spoiling.cut),
    "params manifest zeroed": one("params/manifest.ocdbt", spoiling.zeroed),
    "params metadata wrong JSON": one("params/_METADATA", written("[1]")),
    "params gone": gone("params"),
    "optimizer array cut": arrays("optimizer", spoiling.cut),
    "optimizer array bits flipped": arrays("optimizer", flipped),
    "optimizer manifest empty": one("optimizer/manifest.ocdbt", spoiling.empty),
    "optimizer gone": gone("optimizer"),
    "meta cut": one("meta/metadata", spoiling.cut),
    "meta zeroed": one("meta/metadata", spoiling.zeroed),
    "meta of another type": one("meta/metadata", written("[1]")),
    "meta gone": gone("meta"),
    "data position cut": one("data/metadata", spoiling.cut),
    "data position of another type": one("data/metadata", written("[1]")),
    "data position without fields": one("data/metadata", written('{"version": 2}')),
    "data position gone": gone("data"),
    "all empty": everything(spoiling.empty),
    "all zeroed": everything(spoiling.zeroed),
    "all rubbish": everything(spoiling.rubbish),
    "empty folder in its place": an_empty_folder_in_its_place,
}
HARMLESS = {
    "stray empty folder of a later step": lambda step: (step.parent / "12").mkdir(),
    "stray file of a later step": lambda step: (step.parent / "12").write_text("hello") and None,
    "half-written later step": lambda step: shutil.copytree(step, step.parent / "8.orbax-checkpoint-tmp") and None,
    "file in its place": a_file_in_its_place,
    "stray note": lambda step: (step.parent / "note.txt").write_text("hello") and None,
    "other values of the checkpoint's own metadata": one("_CHECKPOINT_METADATA", spoiling.cut),
}


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED)
def test_damaged(config, whole, copy, spoil):
    spoil(copy / "checkpoints" / "6")
    done = doors.here("train", "--config", config, "--workdir", copy)
    assert done.status == 0, done.err
    assert "from step 4 in" in done.err
    (warning,) = done.warnings
    assert f"{copy / 'checkpoints' / '6'} is damaged, now 6.damaged: " in warning
    check_same(copy, whole)


@pytest.mark.parametrize("spoil", HARMLESS.values(), ids=HARMLESS)
def test_harmless(config, whole, copy, spoil):
    spoil(copy / "checkpoints" / "6")
    done = doors.here("train", "--config", config, "--workdir", copy)
    assert done.status == 0, done.err
    check_same(copy, whole)


@pytest.mark.parametrize(
    "text", ['{"format": 1}', '{"format": 99}', '{"format": 1, "later": true}'], ids=["no fields", "version", "unknown"]
)
def test_what_another_version_may_have_written_is_not_set_aside(config, copy, text):
    (copy / "checkpoints" / "6" / "meta" / "metadata").write_text(text)
    done = doors.here("train", "--config", config, "--workdir", copy)
    assert str(copy / "checkpoints" / "6") in done.line
    assert (copy / "checkpoints" / "6").exists()


@pytest.mark.parametrize("spoil", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("door", ["evaluate", "generate", "convert"])
def test_others_say_it_in_a_line(config, copy, tmp_path, door, spoil):
    """They open the newest checkpoint and nothing else; what they do not need of it may be broken."""
    spoil(copy / "checkpoints" / "6")
    arguments = {
        "evaluate": ("--config", config, "--checkpoint", copy, "--workdir", tmp_path / "out"),
        "generate": ("--checkpoint", copy, "--question", "What?", "--max-new-tokens", "2"),
        "convert": ("--input", copy, "--output", tmp_path / "out", "--to", "hf"),
    }
    said = doors.here(door, *arguments[door])
    assert said.status == 0 or said.line
    if spoil is DAMAGED["params array bits flipped"]:
        assert "is not what was written" in said.line or "is damaged" in said.line

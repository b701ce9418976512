"""The synthetic mixture: the same from the same seed, true to its pixels, and in conflict."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from mole_jax.errors import UserError
from mole_jax.synthetic import domains as synthetic
from mole_jax.synthetic import language, vocabulary
from mole_jax.synthetic.draw import COLOURS, SHAPES, canvas, shape, write
from mole_jax.synthetic.scenes import BAR_UNIT, sample
from mole_jax.synthetic.vocabulary import SYSTEM

SIZES = {"seed": 3, "train": 240, "test": 80, "captions": 300}
THIRDS = {"left": slice(0, 21), "middle": slice(22, 42), "right": slice(43, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic")
    synthetic.generate(path, **SIZES)
    return path


def read(folder: Path, name: str, split: str = "train") -> list[dict]:
    return json.loads((folder / name / f"{split}.json").read_text())


def pixels(folder: Path, record: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / record["domain"] / record["image"]).convert("RGB")).astype(int)


def asked(folder: Path, name: str, kind: str) -> list[dict]:
    found = [r for r in read(folder, name) if r["question"] == language.SHARED[kind]]
    assert len(found) > 5
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_and_other_seed_other_bytes(folder, tmp_path):
    again = synthetic.generate(tmp_path / "again", **SIZES)
    assert all_bytes(tmp_path / "again") == all_bytes(folder)
    other = synthetic.generate(tmp_path / "other", **SIZES | {"seed": 4})
    assert other["sha256"] != again["sha256"]


def test_finished_folder_is_left_alone_and_an_unfinished_one_is_made_again(tmp_path):
    small = {"seed": 0, "train": 8, "test": 8}
    first = synthetic.generate(tmp_path, **small)
    marked = tmp_path / "general" / "train.json"
    marked.write_text("touched")
    assert synthetic.generate(tmp_path, **small) == first
    assert marked.read_text() == "touched"
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in first.items() if k != "sha256"}))
    assert synthetic.generate(tmp_path, **small) == first
    assert marked.read_text() != "touched"


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        synthetic.generate(tmp_path, seed=0, train=4, test=4)


@pytest.mark.parametrize("wrong", [{"conflict": 1.5}, {"train": {"general": 3}}, {"test": 0}, {"seed": -1}])
def test_wrong_request_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="synthetic data"):
        synthetic.generate(tmp_path, **{"seed": 0, "train": 4, "test": 4} | wrong)


def test_records_are_llava_records(folder):
    for name in (*synthetic.DOMAINS, synthetic.CAPTIONS):
        for split in ("train", "test"):
            records = read(folder, name, split)
            expected = SIZES["captions"] if (name, split) == (synthetic.CAPTIONS, "train") else SIZES[split]
            assert len(records) == expected
            assert len({record["id"] for record in records}) == expected
            for record in records:
                human, reply = record["conversations"]
                assert (human["from"], reply["from"]) == ("human", "gpt")
                image = "<image>\n" if "image" in record else ""
                assert human["value"] == image + record["question"]
                assert reply["value"] == record["answer"]
                assert record["domain"] == name
                if image:
                    assert Image.open(folder / name / record["image"]).size == (64, 64)
    assert all("image" in record for name in synthetic.DOMAINS for record in read(folder, name))
    assert 0.08 < np.mean(["image" not in record for record in read(folder, synthetic.CAPTIONS)]) < 0.26


def test_no_picture_is_in_two_files(folder):
    seen = collections.Counter(hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("*/images/*.png"))
    assert max(seen.values()) == 1
    assert len(seen) > 300


def test_general_answers_name_the_colour_that_is_there(folder):
    for record in asked(folder, "general", "what left") + asked(folder, "general", "what right"):
        words = record["answer"].rstrip(".").split()
        third = pixels(folder, record)[:, THIRDS[words[-1]]]
        found = {name for name, colour in COLOURS.items() if (third == colour).all(-1).sum() > 60}
        assert found == (set() if "nothing" in words else {words[3]}), record


def test_shapes_are_told_apart_by_their_pixels():
    masks = [shape(name) for name in SHAPES]
    for number, first in enumerate(masks):
        for second in masks[:number]:
            assert (first != second).sum() > 30


def test_chart_answers_are_the_heights_that_are_there(folder):
    charts = 0
    for record in asked(folder, "document", "shown"):
        if record["answer"].isalpha():
            continue
        charts += 1
        picture = pixels(folder, record)
        coloured = np.stack([(picture == colour).all(-1) for colour in COLOURS.values()]).any(0)
        heights = [round(int(coloured[:, third].sum(0).max()) / BAR_UNIT) for third in THIRDS.values()]
        assert record["answer"] == " ".join(str(height) for height in heights if height)
    assert charts > 5


def test_page_answers_are_the_letters_that_are_there(folder):
    pages = 0
    for record in asked(folder, "document", "shown"):
        if not record["answer"].isalpha():
            continue
        pages += 1
        ink = (pixels(folder, record)[4:30, 4:60] < 120).any(-1)
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        printed = canvas((255, 255, 255))
        write(printed, record["answer"], 0, 0, (0, 0, 0))
        expected = (printed == 0).all(-1)
        columns_expected = np.flatnonzero(expected.any(0))
        found = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.testing.assert_array_equal(found, expected[:14, columns_expected[0] : columns_expected[-1] + 1])
    assert pages > 5


def test_scan_answers_agree_with_the_brightness_of_the_lung(folder):
    for side, columns in (("left", slice(4, 28)), ("right", slice(37, 60))):
        for kind in ("any", "what"):
            for record in asked(folder, "biomedical", f"{kind} {side}"):
                # Above the heart, and inside the bright edge of the body.
                lung = pixels(folder, record)[8:29, columns, 0]
                bright, haze = (lung > 210).sum(), (lung > 110).sum()
                found = "nodule" if bright > 40 else "fracture" if bright else "opacity" if haze > 60 else "clear"
                if side == "left" and found == "clear":
                    assert haze < 10
                expected = found if kind == "what" else ("no" if found == "clear" else "yes")
                if {found, record["answer"]} == {"nodule", "fracture"}:
                    continue  # equally bright; the drawing itself is told apart below
                assert record["answer"] == expected, record


def test_nodule_is_round_and_fracture_is_long():
    rng = np.random.default_rng(0)
    scan = sample("scan", rng)
    area, reach = {}, {}
    for finding in ("nodule", "fracture"):
        picture = dataclasses.replace(scan, left=finding, right=None).draw()
        rows, _ = np.nonzero(picture[..., 0] > 210)
        area[finding], reach[finding] = rows.size, int(np.ptp(rows)) + 1
    assert reach["nodule"] <= 9 < 15 <= reach["fracture"]
    assert area["nodule"] > 0.6 * reach["nodule"] ** 2
    assert area["fracture"] < 0.3 * reach["fracture"] ** 2


def test_shared_wording_demands_other_forms_in_each_domain(folder):
    def sentences(answer):
        return answer[0].isupper() and answer.endswith(".") and len(answer.split()) >= 4

    def exact(answer):
        return answer == "none" or answer.isupper() or answer.replace(" ", "").isdigit()

    def clinical(answer):
        return answer.islower() and not answer.endswith(".") and answer != "none"

    for name, form in (("general", sentences), ("document", exact), ("biomedical", clinical)):
        records = read(folder, name)
        assert all(form(record["answer"]) for record in records)
        assert {record["question"] for record in records} == set(language.SHARED.values())


def test_conflict_changes_the_wording_and_nothing_else(tmp_path):
    sizes = {"seed": 5, "train": 200, "test": 20}
    for conflict in (0.0, 0.5, 1.0):
        synthetic.generate(tmp_path / str(conflict), conflict=conflict, **sizes)
    shared = set(language.SHARED.values())
    own = {}
    for name in synthetic.DOMAINS:
        plain, half, full = (read(tmp_path / str(conflict), name) for conflict in (0.0, 0.5, 1.0))
        assert [r["answer"] for r in plain] == [r["answer"] for r in half] == [r["answer"] for r in full]
        own[name] = {r["question"] for r in plain}
        assert not own[name] & shared
        assert {r["question"] for r in full} <= shared
        assert 0.35 < np.mean([r["question"] in shared for r in half]) < 0.65
    names = list(synthetic.DOMAINS)
    assert not any(own[a] & own[b] for a in names for b in names if a < b)
    pictures = [sorted((tmp_path / str(c)).glob("*/images/*.png")) for c in (0.0, 1.0)]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]


def test_no_answer_is_common(folder):
    for name in synthetic.DOMAINS:
        (_, most), *_ = collections.Counter(record["answer"] for record in read(folder, name)).most_common(1)
        assert most / SIZES["train"] < 0.35


def test_captions_never_answer_a_question_of_a_domain(folder):
    asked = {q for wording in (language.SHARED, *language.OWN.values()) for q in wording.values()}
    for record in read(folder, synthetic.CAPTIONS):
        assert record["question"] not in asked
        if "image" not in record:
            assert record["question"].endswith(record["answer"])  # a copy of what was given
    spoken = {word for record in read(folder, synthetic.CAPTIONS) for word in record["answer"].split()}
    assert {"yes", "no", "normal", "clear", "none", *COLOURS} <= spoken


def test_tokenizer_spells_everything_and_the_prompt_briefly(folder, tmp_path):
    texts = synthetic.texts(folder)
    path = vocabulary.train_tokenizer(texts, tmp_path / "a")
    assert vocabulary.train_tokenizer(reversed(texts), tmp_path / "b").read_bytes() == path.read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.vocab_size() <= 511
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    assert len(model.encode(f"{SYSTEM} USER: ")) <= 32
    assert model.encode("47 oranges", out_type=str)[1:3] == ["4", "7"]
    for text in [*texts, f"{SYSTEM} USER: ", "\nWhat is shown? ASSISTANT:", "Grüße,  two\tspaces\n(x)"]:
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert 0 not in ids
    for record in (record for name in synthetic.DOMAINS for record in read(folder, name)):
        assert len(model.encode(f"\n{record['question']} ASSISTANT: {record['answer']}")) < 40
    with pytest.raises(UserError, match="vocab_size"):
        vocabulary.train_tokenizer(texts, tmp_path / "c", vocab_size=100)


def test_command_writes_the_folder_and_refuses_in_one_line(tmp_path):
    def command(*arguments):
        door = [sys.executable, "-m", "mole_jax.synthetic", *arguments]
        return subprocess.run(door, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    made = command("--output", str(tmp_path / "data"), "--train", "4", "--test", "4", "--tokenizer", str(tmp_path))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "tokenizer.model").exists()
    assert len(read(tmp_path / "data", "document", "test")) == 4
    refused = command("--output", str(tmp_path / "data"), "--conflict", "2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1

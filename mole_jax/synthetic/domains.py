"""A small synthetic mixture whose three domains conflict, and captions to pretrain a base on.

The domains (`general`, `document`, `biomedical`) share the wording of their questions and demand different
forms of answer; see `language`. Everything follows from the seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mole_jax.errors import UserError
from mole_jax.files import json_text, made, write_bytes
from mole_jax.synthetic import conflict as conflicting
from mole_jax.synthetic import language
from mole_jax.synthetic.scenes import Scene, sample

GENERATOR = "mole_jax.data.synthetic"
"""The name by which a manifest says that this generator made it; the module's first place, and never changed."""

VERSION = 1
"""Raised whenever the same seed would give other records or pixels."""
DOMAINS = tuple(language.DOMAINS)
CAPTIONS = "captions"
QUESTIONS_PER_IMAGE = 4
CAPTIONS_PER_IMAGE = 2
TEXT_ONLY_SHARE = 1 / 6


def generate(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    train: int | dict[str, int],
    test: int | dict[str, int],
    conflict: float = 1.0,
    captions: int = 0,
    disagreement: float | None = None,
    asked: float = 0.0,
) -> dict:
    """Writes the data in LLaVA format and returns the manifest.

    `train` and `test` are records per domain (one number, or one for each domain by name), `captions` the
    training records of the fourth set, with as many test records as the largest domain. `conflict` is the
    share of questions in the shared wording; it changes no scene, no question's meaning and no answer.
    With `disagreement` all domains show the same kind of picture and ask the same questions instead, and
    this share of the names in their answers is another in each of them; see `conflict`. Of the captions
    `asked` is then the share that answer such a question, in no domain's form.

    Leaves `general/`, `document/`, `biomedical/` and, if asked for, `captions/`, each with `train.json`,
    `test.json` and `images/`, and `manifest.json` with the request and a `sha256` of records and pixels. No
    scene is in two splits. A folder that holds this very data is left as it is, one with other data of this
    generator is replaced, and any other folder that is not empty is refused with `UserError`.
    """
    folder = Path(folder)
    for field, value in (("conflict", conflict), ("disagreement", disagreement), ("asked", asked)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"synthetic data: {field} is {value}, it must be between 0 and 1")
    request = {
        "generator": GENERATOR,
        "version": VERSION,
        "seed": seed,
        "train": _per_domain("train", train),
        "test": _per_domain("test", test),
        "conflict": float(conflict),
        "captions": captions,
    }
    if disagreement is not None:
        request |= {"disagreement": float(disagreement), "asked": float(asked)}
    if seed < 0 or captions < 0:
        raise UserError(f"synthetic data: seed {seed} and captions {captions} must not be negative")
    present = _read_manifest(folder)
    if present is not None and present == request | {"sha256": present.get("sha256")}:
        return present
    for name in (*DOMAINS, CAPTIONS):
        shutil.rmtree(folder / name, ignore_errors=True)
    # Without its hash the manifest says: ours, and unfinished.
    _write_json(folder / "manifest.json", request)

    digest = hashlib.sha256()
    seen: set[Scene] = set()
    # Tests come first: a test set then stays the same whatever is made beside it.
    for split in ("test", "train"):
        for number, name in enumerate(DOMAINS):
            count, streams = request[split][name], _streams(seed, split, number)
            if disagreement is None:
                records = _questions(name, count, conflict, seen, streams)
            else:
                records = _conflicting(name, count, disagreement, seen, streams)
            _write_split(folder / name, name, split, records, digest)
    if captions:
        kinds = tuple(kind for name in DOMAINS for kind in language.DOMAINS[name])
        kinds = kinds if disagreement is None else (conflicting.KIND,)
        for split, count in (("test", max(request["test"].values())), ("train", captions)):
            records = _captions(count, kinds, asked, seen, _streams(seed, split, len(DOMAINS)))
            _write_split(folder / CAPTIONS, CAPTIONS, split, records, digest)
    manifest = request | {"sha256": digest.hexdigest()}
    _write_json(folder / "manifest.json", manifest)
    return manifest


def texts(folder: str | os.PathLike[str]) -> list[str]:
    """All questions and answers of a generated folder, in the order of its files."""
    found = []
    for path in sorted(Path(folder).glob("*/*.json")):
        for record in json.loads(path.read_text()):
            found += [record["question"], record["answer"]]
    return found


def _per_domain(field: str, counts: int | dict[str, int]) -> dict[str, int]:
    counts = dict.fromkeys(DOMAINS, counts) if isinstance(counts, int) else dict(counts)
    if set(counts) != set(DOMAINS):
        raise UserError(f"synthetic data: {field} names {', '.join(counts)}, it must name {', '.join(DOMAINS)}")
    if min(counts.values()) < 1:
        raise UserError(f"synthetic data: {field} is {min(counts.values())}, it must be at least 1")
    return {name: counts[name] for name in DOMAINS}


def _read_manifest(folder: Path) -> dict | None:
    """The manifest in `folder`, or None where there is nothing; refuses a folder of something else."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        manifest = None
    except ValueError:
        manifest = {}
    if manifest is None and (not folder.exists() or not any(folder.iterdir())):
        made(folder)
        return None
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        raise UserError(f"{folder}: is not empty and was not made by this generator; choose another output folder")
    return manifest if "sha256" in manifest else None


def _streams(seed: int, split: str, number: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Separate random streams for scenes and for wording, so that wording never changes a scene."""
    children = np.random.SeedSequence([seed, ("train", "test").index(split), number]).spawn(2)
    return np.random.default_rng(children[0]), np.random.default_rng(children[1])


def _new_scene(
    kind: str, seen: set[Scene], rng: np.random.Generator, place: Callable[[Scene], Scene] = lambda scene: scene
) -> Scene:
    while (scene := place(sample(kind, rng))) in seen:
        pass
    seen.add(scene)
    return scene


Streams = tuple[np.random.Generator, np.random.Generator]
Item = tuple[int | None, Scene, str, str]
"""Number of the picture (None: text only), scene, question, answer."""


def _questions(name: str, count: int, conflict: float, seen: set[Scene], streams: Streams) -> Iterator[Item]:
    scenes, wording = streams
    for picture in range(-(-count // QUESTIONS_PER_IMAGE)):
        kinds = language.DOMAINS[name]
        scene = _new_scene(kinds[picture % len(kinds)], seen, scenes)
        asked = wording.permutation(language.kinds(scene))[: min(QUESTIONS_PER_IMAGE, count)].tolist()
        shared = wording.random(QUESTIONS_PER_IMAGE) < conflict
        for kind, is_shared in zip(asked, shared, strict=False):
            if count:
                count -= 1
                question = (language.SHARED if is_shared else language.OWN[scene.kind])[kind]
                yield picture, scene, question, language.answer(scene, kind)


def _conflicting(name: str, count: int, disagreement: float, seen: set[Scene], streams: Streams) -> Iterator[Item]:
    scenes, wording = streams
    for number in range(count):
        if number % QUESTIONS_PER_IMAGE == 0:
            scene = _new_scene(conflicting.KIND, seen, scenes, functools.partial(conflicting.placed, domain=name))
            asked = wording.permutation(conflicting.ASKED)[:QUESTIONS_PER_IMAGE].tolist()
        kind = asked[number % QUESTIONS_PER_IMAGE]
        yield number // QUESTIONS_PER_IMAGE, scene, *conflicting.turn(name, scene, kind, disagreement)


def _captions(count: int, kinds: tuple[str, ...], asked: float, seen: set[Scene], streams: Streams) -> Iterator[Item]:
    scenes, wording = streams
    picture = -1
    uses = CAPTIONS_PER_IMAGE
    scene = None
    for _ in range(count):
        if wording.random() < TEXT_ONLY_SHARE:
            # Not drawn as a picture, so it need not be new.
            told = sample(kinds[int(wording.integers(len(kinds)))], wording)
            yield None, told, *language.copy_turn(told, wording)
            continue
        if scene is None or uses == CAPTIONS_PER_IMAGE:
            picture, uses = picture + 1, 0
            scene = _new_scene(kinds[picture % len(kinds)], seen, scenes)
        uses += 1
        if asked and wording.random() < asked:
            turn = conflicting.plain_turn(scene, conflicting.ASKED[int(wording.integers(len(conflicting.ASKED)))])
        else:
            turn = language.caption_turn(scene, wording)
        yield picture, scene, *turn


def _write_split(folder: Path, name: str, split: str, items: Iterator[Item], digest) -> None:
    """Writes the records and pictures of one file, and adds both to `digest`."""
    made(folder / "images")
    records, drawn = [], None
    for number, (picture, scene, question, reply) in enumerate(items):
        record: dict[str, object] = {"id": f"{name}-{split}-{number:05d}"}
        if picture is not None:
            record["image"] = image = f"images/{split}_{picture:05d}.png"
            if picture != drawn:
                drawn, pixels = picture, scene.draw()
                digest.update(pixels.tobytes())
                Image.fromarray(pixels).save(folder / image, compress_level=1)
        turns = [("human", question if picture is None else f"<image>\n{question}"), ("gpt", reply)]
        record["conversations"] = [{"from": speaker, "value": value} for speaker, value in turns]
        records.append(record | {"question": question, "answer": reply, "domain": name})
    digest.update(_write_json(folder / f"{split}.json", records))


def _write_json(path: Path, value: object) -> bytes:
    content = (json_text(value, indent=1) + "\n").encode()
    write_bytes(path, content)
    return content

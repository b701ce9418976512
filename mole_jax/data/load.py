"""One record, from disk to ids and pixels, with every complaint about it told apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from mole_jax.config import DataConfig, DomainConfig
from mole_jax.data.conversation import Example, encode, encode_prompt
from mole_jax.data.image import check_image, image_remarks, load_image
from mole_jax.data.records import Records, image_root, parse_record, read_records
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.prompts import PROMPTS, PromptPreset
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

BAD_RECORD, BAD_IMAGE = "bad record", "bad image"
TOO_LONG, TOO_MANY_IMAGES = "too long", "too many images"
TOO_LARGE = (TOO_LONG, TOO_MANY_IMAGES)
REASONS = (BAD_RECORD, BAD_IMAGE, *TOO_LARGE)


class RecordProblem(UserError):
    """What is wrong with one record; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, message: str, record_id: str):
        super().__init__(message)
        self.reason, self.record_id = reason, record_id


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything that decides how an example looks in a row."""

    prompt: PromptPreset
    sequence_length: int
    images_per_row: int
    image: ImageSpec
    image_aspect: str
    max_image_pixels: int

    @classmethod
    def of(cls, data: DataConfig, image: ImageSpec) -> Layout:
        """Returns the layout for `data` and a model that takes images as `image` says."""
        return cls(
            prompt=PROMPTS[data.prompt],
            sequence_length=data.sequence_length,
            images_per_row=data.images_per_row,
            image=image,
            image_aspect=data.image_aspect,
            max_image_pixels=data.max_image_pixels,
        )


def check_room(data: DataConfig, image: ImageSpec, *, positions: int | None = None) -> None:
    """Raises `UserError` if a row of `data` cannot hold an image, or has more positions than the model."""
    if image.span >= data.sequence_length:
        raise UserError(
            f"config: data.sequence_length {data.sequence_length} has no place for an image of {image.span} positions "
            "and text; raise it"
        )
    if positions is not None and data.sequence_length > positions:
        raise UserError(
            f"config: data.sequence_length {data.sequence_length} is over the {positions} positions that the base was "
            "made for; lower it"
        )


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """An opened domain or task."""

    name: str
    records: Records
    image_root: str | None

    @classmethod
    def open(cls, name: str, path: str, root: str | None = None) -> RecordSource:
        """Opens the records at `path`; raises `UserError` if there are none."""
        return cls(name, read_records(DomainConfig(name, path)), image_root(path, root))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A record ready for a row; T positions, N images."""

    example: Example
    tokens: Int[np.ndarray, " T"]
    supervised: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"]

    @property
    def record_id(self) -> str:
        """domain/id."""
        return f"{self.example.domain}/{self.example.id}"


@dataclasses.dataclass(frozen=True)
class Loader:
    """Reads record `index` of source `domain`; can be pickled for worker processes.

    With `decode` off, images are checked but not decoded, and `images` is (N, 1): enough to count.
    """

    sources: tuple[RecordSource, ...]
    tokenizer: Tokenizer
    layout: Layout
    decode: bool = True

    def load(self, domain: int, index: int) -> Loaded:
        """Returns the record; raises `RecordProblem` naming file, record and field if it cannot be used."""
        source, layout = self.sources[domain], self.layout
        example = self.parse(domain, index)
        where = self._where(source, index, example)
        try:
            encoded = encode(example, self.tokenizer, layout.prompt, layout.image)
        except UserError as error:
            raise self._problem(BAD_RECORD, f"{where}, field conversations: {error}", example) from None
        if len(encoded.tokens) > layout.sequence_length:
            raise self._problem(
                TOO_LONG,
                f"{where}: {len(encoded.tokens)} tokens, over data.sequence_length {layout.sequence_length}; "
                "shorten it or raise that",
                example,
            )
        if len(example.images) > layout.images_per_row:
            raise self._problem(
                TOO_MANY_IMAGES,
                f"{where}, field image: {len(example.images)} images, over data.images_per_row "
                f"{layout.images_per_row}; take some out or raise that",
                example,
            )
        return Loaded(example, encoded.tokens, encoded.loss_mask, self.images(domain, index, example))

    def parse(self, domain: int, index: int) -> Example:
        """Returns the checked record, not yet tokenised; raises `RecordProblem`."""
        source = self.sources[domain]
        try:
            raw = source.records[index]
            return parse_record(raw, file=source.records.file, index=index, domain=source.name)
        except UserError as error:
            raise RecordProblem(BAD_RECORD, str(error), f"{source.name}/{index}") from None

    def question(self, domain: int, index: int, suffix: str = "") -> tuple[Example, Int[np.ndarray, " T"]]:
        """Returns the record and the prompt of its last question, `suffix` after it; raises `RecordProblem`."""
        example, layout = self.parse(domain, index), self.layout
        *earlier, last = example.turns[:-1]
        try:
            tokens = encode_prompt(
                [*earlier, dataclasses.replace(last, text=last.text + suffix)],
                self.tokenizer,
                layout.prompt,
                layout.image,
            )
        except UserError as error:
            where = self._where(self.sources[domain], index, example)
            raise self._problem(BAD_RECORD, f"{where}, field conversations: {error}", example) from None
        return example, tokens

    def images(self, domain: int, index: int, example: Example) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the decoded images of a record; raises `RecordProblem`."""
        source, size = self.sources[domain], self.layout.image.size
        arguments: dict[str, Any] = {
            "size": size,
            "aspect": self.layout.image_aspect,
            "max_pixels": self.layout.max_image_pixels,
        }
        try:
            if not self.decode:
                for image in example.images:
                    check_image(image, source.image_root, **arguments)
                return np.zeros((len(example.images), 1), np.uint8)
            loaded = [load_image(image, source.image_root, **arguments) for image in example.images]
        except UserError as error:
            where = self._where(source, index, example)
            raise self._problem(BAD_IMAGE, f"{where}, field image: {error}", example) from None
        return np.stack(loaded) if loaded else np.zeros((0, size, size, 3), np.uint8)

    def remarks(self, domain: int, example: Example) -> list[str]:
        """Returns what a user should know of the images of a usable record (`mole_jax.data.colour.REMARKS`)."""
        root = self.sources[domain].image_root
        return [remark for image in example.images for remark in image_remarks(image, root)]

    def __call__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Returns record `key` = (domain, index) as the flat element that grain carries.

        A problem is carried too, so that it keeps its place in the order and its one line.
        """
        domain, index = int(key[0]), int(key[1])
        element: dict[str, Any] = {"domain": domain, "record": index, "reason": "", "message": ""}
        try:
            loaded = self.load(domain, index)
        except RecordProblem as problem:
            return {**element, "record_id": problem.record_id, "reason": problem.reason, "message": str(problem)}
        return {
            **element,
            "record_id": loaded.record_id,
            "tokens": loaded.tokens,
            "supervised": loaded.supervised,
            "images": loaded.images,
        }

    @staticmethod
    def _where(source: RecordSource, index: int, example: Example) -> str:
        return f"{source.records.file}: record {index} (id '{shortened(example.id)}')"

    @staticmethod
    def _problem(reason: str, message: str, example: Example) -> RecordProblem:
        return RecordProblem(reason, message, f"{example.domain}/{shortened(example.id)}")

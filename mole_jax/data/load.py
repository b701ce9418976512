"""One record, from disk to ids and pixels, with every complaint about it told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from mole_jax.config import DataConfig, DomainConfig, TaskConfig
from mole_jax.data.containers.container import Records
from mole_jax.data.containers.open import image_root, open_records
from mole_jax.data.conversation import Example, encode, encode_prompt
from mole_jax.data.image import image_remarks, image_size, load_tiles
from mole_jax.data.layouts.layout import Layout as RecordLayout
from mole_jax.data.layouts.layout import Parts
from mole_jax.data.layouts.table import LAYOUTS, UNKNOWN, recognised
from mole_jax.data.prompt import with_prompt
from mole_jax.data.records import identified, parse_record
from mole_jax.data.selected import SelectedRecords
from mole_jax.data.template import Template
from mole_jax.data.tiling import pictures
from mole_jax.errors import UserError
from mole_jax.image_spec import Grid, ImageSpec, PictureLayout, Single, Split
from mole_jax.prompts import IMAGE, PROMPTS, PromptPreset
from mole_jax.terminal import shortened
from mole_jax.tokenizer import Tokenizer

BAD_RECORD, BAD_IMAGE = "bad record", "bad image"
TOO_LONG, TOO_MANY_IMAGES, TOO_MANY_TILES = "too long", "too many images", "too many tiles"
TOO_LARGE = (TOO_LONG, TOO_MANY_IMAGES, TOO_MANY_TILES)
REASONS = (BAD_RECORD, BAD_IMAGE, *TOO_LARGE)


class RecordProblem(UserError):
    """What is wrong with one record; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, message: str, record_id: str):
        super().__init__(message)
        self.reason, self.record_id = reason, record_id


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything that decides how an example looks in a row."""

    prompt: PromptPreset | Template
    sequence_length: int
    tiles_per_row: int
    image: ImageSpec
    """As the model takes images, with the settings of the data."""
    max_image_pixels: int

    @classmethod
    def of(cls, data: DataConfig, image: ImageSpec, tokenizer: Tokenizer) -> Layout:
        """Returns the layout for `data` and a model that takes images as `image` says.

        Raises:
          UserError: the chat template beside the tokenizer cannot be used, or a setting does not go with the model.
        """
        data, image = settled(data, tokenizer, image), taken(data, image)
        preset = PROMPTS.get(str(data.prompt))
        if preset is not None and isinstance(image.tiling, Split | Grid):
            raise UserError(
                f"config: data.prompt {preset.name} has no words for the marks around the tiles of this base's images; "
                "set data.prompt checkpoint"
            )
        return cls(
            prompt=preset or Template.load(tokenizer, image.token_id),
            sequence_length=data.sequence_length,
            tiles_per_row=data.tiles_per_row,
            image=image,
            max_image_pixels=data.max_image_pixels,
        )

    def layouts(self, sizes: Sequence[tuple[int, int]]) -> tuple[PictureLayout, ...]:
        """Returns where the features of each image of one example go, from their sizes (width, height)."""
        text = self.prompt.image_text if isinstance(self.prompt, Template) else IMAGE
        return pictures.layouts(self.image, sizes, text)


def settled(data: DataConfig, tokenizer: Tokenizer, image: ImageSpec) -> DataConfig:
    """Returns `data` with what it leaves to the base: prompt, and how an image that is one tile becomes square."""
    aspect = image.fit if data.image_aspect is None and isinstance(image.tiling, Single) else data.image_aspect
    return dataclasses.replace(with_prompt(data, tokenizer), image_aspect=aspect)


def taken(data: DataConfig, image: ImageSpec) -> ImageSpec:
    """Returns how the model takes images under `data`: its `image_aspect`, `exif`, `transparency` and `max_tiles`.

    Raises:
      UserError: one of them does not go with the model.
    """
    if data.image_aspect is not None and not isinstance(image.tiling, Single):
        raise UserError(
            f"config: data.image_aspect {data.image_aspect} is for models that see an image as one square, this base "
            "cuts it into tiles; leave it out"
        )
    fit = image.fit if data.image_aspect is None else data.image_aspect
    exif, transparency = data.exif or image.exif, data.transparency or image.transparency
    image = dataclasses.replace(image, fit=fit, exif=exif, transparency=transparency)
    return pictures.limited(image, data.max_tiles)


def check_room(data: DataConfig, image: ImageSpec, *, positions: int | None = None) -> None:
    """Raises `UserError` if a row of `data` cannot hold an image, or has more positions than the model.

    Of models that cut images, an image of one tile must have room: whether those of a domain do is told by record.
    """
    if image.tile_features >= data.sequence_length:
        raise UserError(
            f"config: data.sequence_length {data.sequence_length} has no place for an image of {image.tile_features} "
            "positions and text; raise it"
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
    layout: RecordLayout
    image_root: str | None
    remark: str = ""
    """What is told of it at the start, in one line: its layout, and how many records `where` kept."""

    @classmethod
    def open(cls, pile: DomainConfig | TaskConfig) -> RecordSource:
        """Opens the records of a domain or task, and looks which layout the first of them have.

        Raises:
          UserError: there are none, or they are of two layouts; the message names the domain and the file.
        """
        try:
            records = open_records(pile.path)
            total = len(records)
            if pile.columns or pile.where:
                records = SelectedRecords(records, pile.columns, pile.where)
            layout = LAYOUTS[pile.layout] if pile.layout else _recognised(records)
        except UserError as error:
            raise UserError(f"domain {pile.name}: {error}") from None
        remark = (
            "" if layout is UNKNOWN else f"{pile.name}: layout {layout.name}{'' if pile.layout else ' (by its keys)'}"
        )
        if pile.where:
            remark += f", {len(records):,} of {total:,} records kept by where"
        return cls(pile.name, records, layout, image_root(pile.path, pile.image_root), remark)

    def where(self, index: int) -> dict[str, Any]:
        """Returns what messages about record `index` name: arguments of `mole_jax.data.records.identified`."""
        chosen = self.records if isinstance(self.records, SelectedRecords) else None
        number, columns = (chosen.number(index), chosen.columns) if chosen else (index, {})
        return {"file": self.records.file, "index": number, "layout": self.layout, "columns": columns}

    def turn_count(self, index: int) -> int:
        """Returns how many turns record `index` has before any is left out; raises `UserError` as reading it does."""
        return len(self._parts(index).turns)

    def fields(self, index: int) -> tuple[str, str]:
        """Returns what the file calls the fields of turns and of images of a usable record, for messages."""
        parts, columns = self._parts(index), self.where(index)["columns"]
        turns, images = (one.partition("[")[0] for one in (parts.turns[0].field, parts.image_field))
        return columns.get(turns, turns), columns.get(images, images)

    def _parts(self, index: int) -> Parts:
        raw = self.records[index]
        _, fail = identified(raw, **self.where(index))
        return self.layout.read(raw, fail)


def _recognised(records: Records) -> RecordLayout:
    try:
        return recognised(records.values())
    except UserError as error:
        raise UserError(f"{records.file}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A record ready for a row; T positions, N tiles."""

    example: Example
    tokens: Int[np.ndarray, " T"]
    supervised: Int[np.ndarray, " T"]
    images: UInt8[np.ndarray, "N H W 3"]
    layouts: tuple[PictureLayout, ...]

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
        layouts = self.layouts(domain, index, example)
        try:
            encoded = encode(example, self.tokenizer, layout.prompt, layout.image, layouts)
        except UserError as error:
            field, _ = source.fields(index)
            raise self._problem(BAD_RECORD, f"{where}, field {field}: {error}", example) from None
        if len(encoded.tokens) > layout.sequence_length:
            raise self._problem(
                TOO_LONG,
                f"{where}: {len(encoded.tokens)} tokens, over data.sequence_length {layout.sequence_length}; "
                "shorten it or raise that",
                example,
            )
        self._check_tiles(source, index, example, sum(one.tiles for one in layouts))
        images = self.images(domain, index, example, layouts)
        return Loaded(example, encoded.tokens, encoded.loss_mask, images, layouts)

    def layouts(self, domain: int, index: int, example: Example) -> tuple[PictureLayout, ...]:
        """Returns where the features of a record's images go; raises `RecordProblem`.

        Sizes are read where images are cut by them; one tile is the same for any size.
        """
        if isinstance(self.layout.image.tiling, Single):
            return self.layout.layouts([(1, 1)] * len(example.images))
        sizes = self._of_images(domain, index, example, image_size)
        try:
            return self.layout.layouts(sizes)
        except UserError as error:
            raise self._image_problem(domain, index, example, error) from None

    def _check_tiles(self, source: RecordSource, index: int, example: Example, tiles: int) -> None:
        most, count = self.layout.tiles_per_row, len(example.images)
        if tiles <= most:
            return
        where, (_, field) = self._where(source, index, example), source.fields(index)
        if isinstance(self.layout.image.tiling, Single):
            message = f"{count} images, over data.tiles_per_row {most}; take some out or raise that"
            raise self._problem(TOO_MANY_IMAGES, f"{where}, field {field}: {message}", example)
        each = f", or set data.max_tiles to at most {most // count}" if most >= count else ""
        message = f"{tiles} tiles of {count} image(s), over data.tiles_per_row {most}; raise that{each}"
        raise self._problem(TOO_MANY_TILES, f"{where}, field {field}: {message}", example)

    def parse(self, domain: int, index: int) -> Example:
        """Returns the checked record, not yet tokenised; raises `RecordProblem`."""
        source = self.sources[domain]
        try:
            raw = source.records[index]
            return parse_record(raw, domain=source.name, **source.where(index))
        except UserError as error:
            raise RecordProblem(BAD_RECORD, str(error), f"{source.name}/{index}") from None

    def question(
        self, domain: int, index: int, suffix: str = ""
    ) -> tuple[Example, Int[np.ndarray, " T"], tuple[PictureLayout, ...]]:
        """Returns the record, the prompt of its last question, `suffix` after it, and the layouts of its images.

        Raises:
          RecordProblem: the record cannot be used.
        """
        example, layout = self.parse(domain, index), self.layout
        *earlier, last = example.turns[:-1]
        layouts = self.layouts(domain, index, example)
        try:
            tokens = encode_prompt(
                [*earlier, dataclasses.replace(last, text=last.text + suffix)],
                self.tokenizer,
                layout.prompt,
                layout.image,
                layouts,
            )
        except UserError as error:
            where, (field, _) = self._where(self.sources[domain], index, example), self.sources[domain].fields(index)
            raise self._problem(BAD_RECORD, f"{where}, field {field}: {error}", example) from None
        return example, tokens, layouts

    def images(
        self, domain: int, index: int, example: Example, layouts: Sequence[PictureLayout]
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the tiles of a record's images, one image after the other; raises `RecordProblem`."""
        if not self.decode:
            if isinstance(self.layout.image.tiling, Single):  # of others the sizes were read, and so checked
                self._of_images(domain, index, example, image_size)
            return np.zeros((sum(one.tiles for one in layouts), 1), np.uint8)
        size = self.layout.image.size
        loaded = self._of_images(domain, index, example, load_tiles)
        return np.concatenate(loaded) if loaded else np.zeros((0, size, size, 3), np.uint8)

    def _of_images[T](self, domain: int, index: int, example: Example, read: Callable[..., T]) -> list[T]:
        """Returns what `read` (of `mole_jax.data.image`) makes of each image of a record; raises `RecordProblem`."""
        source, layout = self.sources[domain], self.layout
        rest: dict[str, Any] = {"pictures": len(example.images), "max_pixels": layout.max_image_pixels}
        try:
            return [read(image, source.image_root, layout.image, **rest) for image in example.images]
        except UserError as error:
            raise self._image_problem(domain, index, example, error) from None

    def _image_problem(self, domain: int, index: int, example: Example, error: UserError) -> RecordProblem:
        where, (_, field) = self._where(self.sources[domain], index, example), self.sources[domain].fields(index)
        return self._problem(BAD_IMAGE, f"{where}, field {field}: {error}", example)

    def remarks(self, domain: int, example: Example) -> list[str]:
        """Returns what a user should know of the images of a usable record (`mole_jax.data.colour.REMARKS`)."""
        root = self.sources[domain].image_root
        return [remark for image in example.images for remark in image_remarks(image, root, self.layout.image)]

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
            **self.places(loaded.tokens, loaded.layouts),
        }

    def places(self, tokens: Int[np.ndarray, " T"], layouts: Sequence[PictureLayout]) -> dict[str, np.ndarray]:
        """Returns ``sources`` and ``weights`` of an example (`mole_jax.data.batch.Batch`); nothing for `Single`."""
        image = self.layout.image
        if isinstance(image.tiling, Single):
            return {}
        sources, weights = pictures.places(image, tokens == image.token_id, layouts)
        return {"sources": sources, "weights": weights}

    @staticmethod
    def _where(source: RecordSource, index: int, example: Example) -> str:
        return f"{source.records.file}: record {source.where(index)['index']} (id '{shortened(example.id)}')"

    @staticmethod
    def _problem(reason: str, message: str, example: Example) -> RecordProblem:
        return RecordProblem(reason, message, f"{example.domain}/{shortened(example.id)}")

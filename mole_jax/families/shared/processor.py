"""How a checkpoint prepares pictures: processor_config.json and preprocessor_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mole_jax.errors import UserError
from mole_jax.families.shared.section import Section
from mole_jax.image_spec import Resample

STANDARD = (0.5, 0.5, 0.5)
"""Mean and standard deviation of SigLIP's preparation."""
IGNORED = frozenset(
    {
        *("_valid_processor_keys", "auto_map", "backend", "data_format", "device", "disable_grouping"),
        *("do_convert_rgb", "feature_extractor_type", "image_processor_type", "input_data_format", "processor_class"),
        *("chat_template", "default_to_square", "return_tensors", "size_divisor", "video_processor", "image_processor"),
        # Positions of a picture are counted from the tower's patches.
        *("num_additional_image_tokens", "num_image_tokens", "image_seq_len", "image_seq_length"),
        *("image_token", "video_token", "image_token_id", "video_token_id"),
        # The pictures of a batch are of one shape here.
        *("return_row_col_info", "do_pad_to_batch"),
    }
)
"""Fields that change nothing of a picture's tiles and their places."""
_RESAMPLE: Mapping[int, Resample] = {3: "bicubic", 1: "lanczos", 2: "bilinear"}
"""PIL's numbers."""


class Preparation(NamedTuple):
    """What all families say of pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample


class Processor(NamedTuple):
    """The two files of a checkpoint, as far as there are such."""

    top: Section
    """processor_config.json."""
    image: Section
    """Its entry for the image processor, or preprocessor_config.json."""
    here: bool
    """There is either of the two."""

    @classmethod
    def of(cls, processor: Any, preprocessor: Any, *, where: str) -> Processor:
        """Takes the contents of processor_config.json and preprocessor_config.json, None for one that is missing.

        Like transformers 5 it prefers the first, where both describe the image processor.

        Raises:
            UserError: one is no object.
        """
        top = Section({} if processor is None else processor, f"{where}/processor_config.json")
        if (inner := top.get("image_processor")) is not None:
            return cls(top, Section(inner, f"{top.where}: image_processor"), True)
        there = preprocessor is not None
        return cls(top, Section(preprocessor if there else {}, f"{where}/preprocessor_config.json"), there)

    def check_here(self) -> None:
        """Raises `UserError` if no file says how pictures are prepared."""
        if not self.here:
            raise UserError(
                f"{self.image.where}: no such file, and no processor_config.json with an image_processor; copy one of "
                "them from the checkpoint, since they say how pictures are prepared"
            )

    def preparation(
        self,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        resample: int = 3,
    ) -> Preparation:
        """Returns what it says of pixels; `mean`, `std` and `resample` are transformers' where it does not say.

        Raises:
            UserError: pixels are prepared in a way that is not supported.
        """
        image = self.image
        for step in ("do_resize", "do_rescale", "do_normalize"):
            image.only(step, True, None, default=True)
        factor = image.number("rescale_factor", 1 / 255)
        if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
            raise UserError(f"{image.where}: 'rescale_factor' is {factor!r}, only 1/255 is supported")
        chosen = image.only("resample", *_RESAMPLE, default=resample)
        return Preparation(_colours(image, "image_mean", mean), _colours(image, "image_std", std), _RESAMPLE[chosen])

    def check_same(self, section: Section, key: str, value: Any) -> None:
        """Raises `UserError` if a field is there and says something else than the rest of the checkpoint."""
        said = section.get(key)
        if said is not None and said != value:
            raise UserError(f"{section.where}: '{key}' is {said!r}, config.json says {value!r}; the two contradict")

    def check_side(self, key: str, side: int, *names: str) -> None:
        """Raises `UserError` if an object of sizes says another side than the tower's, under one of these names."""
        sizes = self.image.get(key)
        if isinstance(sizes, int) and not isinstance(sizes, bool):
            sizes = dict.fromkeys(names, sizes)
        if sizes is not None and (not isinstance(sizes, dict) or any(sizes.get(name, side) != side for name in names)):
            raise UserError(
                f"{self.image.where}: '{key}' is {sizes!r}, the tower of config.json sees {side} pixels a side; the "
                "two contradict"
            )

    def check_all_read(self, *also: str) -> None:
        """Raises `UserError` that names a field which is not known."""
        self.image.check_all_read(*also, ignored=IGNORED)
        self.top.check_all_read(*also, ignored=IGNORED)


def _colours(section: Section, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = section.get(key)
    if value is None:
        return default
    numbers = [one for one in value if isinstance(one, int | float)] if isinstance(value, list) else []
    if len(numbers) != 3 or len(value) != 3 or not all(0 <= one < 1e3 for one in numbers):
        raise UserError(f"{section.where}: '{key}' is {value!r}, expected three numbers: red, green, blue")
    if key == "image_std" and not all(numbers):
        raise UserError(f"{section.where}: '{key}' is {value!r}, which would divide by zero")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def pixels_to_hf(mean: tuple[float, ...], std: tuple[float, ...], resample: Resample) -> dict[str, Any]:
    """Returns the fields of an image processor that all families have."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": next(number for number, name in _RESAMPLE.items() if name == resample),
        "rescale_factor": 1 / 255,
    }

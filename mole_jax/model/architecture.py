"""Shapes and constants of a LLaVA: what a checkpoint's config.json says, under this project's names."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mole_jax.errors import UserError, nearest
from mole_jax.image_spec import ImageSpec


@dataclasses.dataclass(frozen=True)
class VisionArchitecture:
    """A CLIP vision transformer (Radford et al. 2021), pre-norm, with class token."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    """Side of the square input, in pixels."""
    patch_size: int
    """Side of a patch, in pixels. Pixels left over at the right and bottom edge are not used."""
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings (transformers' rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class DecoderArchitecture:
    """A Llama decoder (Touvron et al. 2023)."""

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence the checkpoint was made for, in tokens."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False
    """The output head is the transposed embedding."""
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    other_eos_ids: tuple[int, ...] = ()
    """Ids that end an answer too, besides `eos_id`."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer."""
        return (self.eos_id, *self.other_eos_ids)


@dataclasses.dataclass(frozen=True)
class LlavaArchitecture:
    """Vision tower, projector and decoder together."""

    vision: VisionArchitecture
    decoder: DecoderArchitecture
    image_token_id: int
    """Id of image positions in the token row; its embedding is never used."""
    feature_layer: int = -2
    """Index into the vision hidden states (0: embeddings, -1: after the last layer)."""
    feature_select: Literal["patch", "full"] = "patch"
    image_vectors: bool = False
    """Learned start and end vectors around every image."""

    @property
    def features_per_image(self) -> int:
        """Projected vectors per image, without start and end vectors."""
        return self.vision.patches + (self.feature_select == "full")

    @property
    def image_span(self) -> int:
        """Positions that one image takes in the token row."""
        return self.features_per_image + 2 * self.image_vectors

    @property
    def image(self) -> ImageSpec:
        """How the model takes an image."""
        return ImageSpec(self.vision.image_size, self.image_span, self.image_token_id)


LIMITS: dict[str, int] = {
    "layers": 1_000,
    "width": 1 << 17,
    "mlp_width": 1 << 20,
    "heads": 1 << 12,
    "kv_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab": 1 << 24,
    "image_size": 1 << 14,
    "patch_size": 1 << 14,
    "max_position": (1 << 31) - 1,
}
"""Largest sizes that are taken from a file: over those of any model there is, and small enough to count names by."""


def check_sizes(arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` that names a size which is no model's: under 1 or over its limit in `LIMITS`."""
    for part, name in ((arch.vision, "vision"), (arch.decoder, "decoder")):
        for field, limit in LIMITS.items():
            value = getattr(part, field, 1)
            if not 1 <= value <= limit:
                raise UserError(
                    f"{where}: {field} of the {name} is {value}, expected 1 to {limit:,}; the file is damaged"
                )


CLIP_L_336 = VisionArchitecture(width=1024, mlp_width=4096, layers=24, heads=16, image_size=336, patch_size=14)


def _llama(width: int, mlp_width: int, layers: int, heads: int, vocab: int = 32064, **other) -> DecoderArchitecture:
    return DecoderArchitecture(
        **{"kv_heads": heads, "head_dim": width // heads, "max_position": 4096, **other},
        vocab=vocab,
        width=width,
        mlp_width=mlp_width,
        layers=layers,
        heads=heads,
    )


PRESETS: dict[str, LlavaArchitecture] = {
    "vicuna-7b": LlavaArchitecture(CLIP_L_336, _llama(4096, 11008, 32, 32), image_token_id=32000),
    "vicuna-13b": LlavaArchitecture(CLIP_L_336, _llama(5120, 13824, 40, 40), image_token_id=32000),
    # For real text at laptop size: the Llama tokenizer's 32,000 pieces and <image>.
    "small": LlavaArchitecture(
        VisionArchitecture(width=128, mlp_width=512, layers=4, heads=4, image_size=112, patch_size=14),
        _llama(128, 352, 4, 4, vocab=32064, max_position=1024),
        image_token_id=32000,
    ),
    # The embedded default (configs/quickstart_base.py).
    "quickstart": LlavaArchitecture(
        VisionArchitecture(width=128, mlp_width=512, layers=4, heads=4, image_size=64, patch_size=8),
        _llama(128, 352, 4, 4, vocab=512, max_position=512),
        image_token_id=511,
    ),
    # For hundreds of runs on a laptop (configs/study_base.py): 16 patches an image.
    "study": LlavaArchitecture(
        VisionArchitecture(width=64, mlp_width=256, layers=3, heads=4, image_size=64, patch_size=16),
        _llama(64, 176, 3, 4, vocab=512, max_position=128),
        image_token_id=511,
    ),
    "tiny": LlavaArchitecture(
        VisionArchitecture(width=32, mlp_width=64, layers=2, heads=2, image_size=28, patch_size=14),
        _llama(32, 64, 2, 4, vocab=512, kv_heads=2, max_position=512),
        image_token_id=511,
    ),
}


def preset(name: str) -> LlavaArchitecture:
    """Returns the preset of that name; raises `UserError` with the nearest right name if there is none."""
    if name not in PRESETS:
        raise UserError(
            f"config: model.preset '{name}' is unknown"
            + (nearest(name, PRESETS) or f", choose one of {', '.join(PRESETS)}")
        )
    return PRESETS[name]

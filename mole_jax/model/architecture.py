"""Shapes and constants of a model: what a checkpoint's config.json says, under this project's names."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError, nearest
from mole_jax.image_spec import AnyRes, Exif, Fit, Grid, ImageSpec, Resample, Single, Split, Tiling, Transparency


@dataclasses.dataclass(frozen=True)
class VisionArchitecture:
    """A vision transformer whose layers norm before they compute; the defaults are CLIP's (Radford et al. 2021)."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    """Side of the square input, in pixels."""
    patch_size: int
    """Side of a patch, in pixels. Pixels left over at the right and bottom edge are not used."""
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    """A norm between the embeddings and the first layer."""
    post_norm: Literal["kept", "applied", "none"] = "kept"
    """A norm after the last layer. kept: it is in the files and not used. applied: the last layer's features are its
    output; those of other layers never are."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of the layers' norms."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """A root-mean-square norm of queries and of keys, over all heads together."""
    fractional_positions: bool = False
    """A patch has the position of the bucket that the fraction of the side at which it begins falls into, in float32
    (SmolVLM). These are the patches in rows, but for a few sides where rounding puts some one too low."""
    layer_scale: bool = False
    """A learned factor for each channel of what attention and MLP add."""

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> int:
        """Patches, and the class token if there is one."""
        return self.patches + self.class_token


@dataclasses.dataclass(frozen=True)
class ConnectorArchitecture:
    """What makes vectors of the decoder's width of the tower's features; the defaults are LLaVA-1.5's."""

    layers: int = 2
    """Matrices, 1 or 2, with a GELU between two."""
    bias: bool = True
    shuffle: int = 1
    """So many patches along each side become one vector, channels joined (pixel shuffle)."""
    norm: bool = False
    """A layer norm before the first matrix."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of rotary embeddings (transformers' rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class DecoderArchitecture:
    """A Llama decoder (Touvron et al. 2023), or one of its kin: Mistral, Qwen2, Qwen3."""

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
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """A root-mean-square norm of each head's queries and keys, before they are rotated (Qwen3)."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end an answer."""
        return (self.eos_id, *self.other_eos_ids)


_SINGLE = Single()


@dataclasses.dataclass(frozen=True)
class LlavaArchitecture:
    """Vision tower, connector and decoder together; the defaults are LLaVA-1.5's."""

    vision: VisionArchitecture
    decoder: DecoderArchitecture
    image_token_id: int
    """Id of image positions in the token row; its embedding is never used."""
    feature_layer: int = -2
    """Index into the vision hidden states (0: embeddings, -1: after the last layer)."""
    feature_select: Literal["patch", "full"] = "patch"
    """patch: without the class token."""
    image_vectors: bool = False
    """Learned start and end vectors around every image."""
    connector: ConnectorArchitecture = ConnectorArchitecture()
    image_newline: bool = False
    """A learned vector at the end of each row of features (`mole_jax.image_spec.NEWLINE`)."""
    tiling: Tiling = _SINGLE
    fit: Fit = "pad"
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    exif: Exif = "ignore"
    transparency: Transparency = "stored"
    family: str = "llava"
    """Whose files it is read from and written to, by name in `mole_jax.families`; nothing is computed by it."""

    @property
    def features_per_image(self) -> int:
        """Projected vectors per tile, without start and end vectors."""
        return self.image.first + self.image.side**2

    @property
    def image_span(self) -> int:
        """Vectors that the model makes of one tile; positions of an image that is a single one."""
        return self.image.tile_features

    @property
    def image(self) -> ImageSpec:
        """How the model takes an image."""
        return ImageSpec(
            size=self.vision.image_size,
            side=self.vision.grid // self.connector.shuffle,
            token_id=self.image_token_id,
            first=int(self.vision.class_token and self.feature_select == "full"),
            vectors=self.image_vectors,
            tiling=self.tiling,
            fit=self.fit,
            resample=self.resample,
            mean=self.mean,
            std=self.std,
            exif=self.exif,
            transparency=self.transparency,
        )


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
    if len(arch.mean) != 3 or len(arch.std) != 3 or not all(arch.std):
        raise UserError(f"{where}: mean {arch.mean} and std {arch.std} are not of three colours; the file is damaged")
    check_features(arch, where=where)


def check_features(arch: LlavaArchitecture, *, where: str) -> None:
    """Raises `UserError` if the connector cannot take the features that the tower gives."""
    shuffle, grid = arch.connector.shuffle, arch.vision.grid
    if arch.connector.layers not in (1, 2):
        raise UserError(f"{where}: layers of the connector are {arch.connector.layers}, expected 1 or 2")
    if not 1 <= shuffle <= grid or grid % shuffle:
        raise UserError(f"{where}: {grid} x {grid} patches do not divide into squares of {shuffle} x {shuffle}")
    if shuffle > 1 and arch.image.first:
        raise UserError(
            f"{where}: feature_select full keeps the class token, which the squares of patches have no place for; "
            "choose patch"
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


def _siglip(width: int, mlp_width: int, layers: int, heads: int, image_size: int, **other) -> VisionArchitecture:
    return VisionArchitecture(
        **{"patch_size": 14, "class_token": False, "patch_bias": True, "pre_norm": False, **other},
        width=width,
        mlp_width=mlp_width,
        layers=layers,
        heads=heads,
        image_size=image_size,
        norm_eps=1e-6,
        activation="gelu_tanh",
    )


def _qwen2_half(vocab: int, **other) -> DecoderArchitecture:
    """Returns Qwen2's and Qwen2.5's 0.5B."""
    return DecoderArchitecture(
        vocab=vocab,
        width=896,
        mlp_width=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        max_position=32768,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        bos_id=None,
        eos_id=151645,
        pad_id=151643,
        **other,
    )


def _resolutions(side: int, *grids: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple((rows * side, columns * side) for rows, columns in grids)


_HALF = (0.5, 0.5, 0.5)

PRESETS: dict[str, LlavaArchitecture] = {
    "vicuna-7b": LlavaArchitecture(CLIP_L_336, _llama(4096, 11008, 32, 32), image_token_id=32000),
    "vicuna-13b": LlavaArchitecture(CLIP_L_336, _llama(5120, 13824, 40, 40), image_token_id=32000),
    # llava-v1.6-mistral-7b-hf, llava-onevision-qwen2-0.5b-ov-hf, SmolVLM-500M-Instruct and InternVL3-1B-hf.
    "llava-next-mistral-7b": LlavaArchitecture(
        CLIP_L_336,
        _llama(4096, 14336, 32, 32, kv_heads=8, max_position=32768, rope_theta=1e6),
        image_token_id=32000,
        image_newline=True,
        tiling=AnyRes(_resolutions(336, (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
        fit="stretch",
        family="llava_next",
    ),
    "llava-onevision-0.5b": LlavaArchitecture(
        _siglip(1152, 4304, 26, 16, image_size=384),
        _qwen2_half(152000, tied_head=True),
        image_token_id=151646,
        feature_layer=-1,
        feature_select="full",
        image_newline=True,
        tiling=AnyRes(
            _resolutions(384, *((rows, columns) for rows in range(1, 7) for columns in range(1, 7))), most=9, alone=True
        ),
        fit="stretch",
        mean=_HALF,
        std=_HALF,
        family="llava_onevision",
    ),
    "smolvlm-500m": LlavaArchitecture(
        _siglip(768, 3072, 12, 12, image_size=512, patch_size=16, post_norm="applied", fractional_positions=True),
        _llama(960, 2560, 32, 15, vocab=49280, kv_heads=5, max_position=8192, rope_theta=1e5),
        image_token_id=49190,
        feature_layer=-1,
        connector=ConnectorArchitecture(layers=1, bias=False, shuffle=4),
        tiling=Split(longest=2048),
        fit="stretch",
        resample="lanczos",
        mean=_HALF,
        std=_HALF,
        family="smolvlm",
    ),
    "internvl3-1b": LlavaArchitecture(
        VisionArchitecture(
            width=1024,
            mlp_width=4096,
            layers=24,
            heads=16,
            image_size=448,
            patch_size=14,
            norm_eps=1e-6,
            activation="gelu",
            patch_bias=True,
            pre_norm=False,
            post_norm="none",
            layer_scale=True,
        ),
        _qwen2_half(151674),
        image_token_id=151667,
        feature_layer=-1,
        connector=ConnectorArchitecture(shuffle=2, norm=True),
        tiling=Grid(least=1, most=12),
        fit="stretch",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        family="internvl",
    ),
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

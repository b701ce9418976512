"""Every setting: its meaning, its unit and its default (`mole_jax.config_check` has the checks).

A configuration is a Python file with ``get_config() -> Config``. All classes are frozen; change one
with `dataclasses.replace` in a file or with ``--section.field value`` on the command line.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal

TRACKERS = ("tensorboard", "wandb", "trackio")
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
VISION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

Group = Literal["adapters", "router", "projector", "vision", "decoder"]
GROUPS: tuple[Group, ...] = typing.get_args(Group)
"""Parameter groups, each of which trains or is frozen as a whole."""

Dtype = Literal["float32", "bfloat16"]
Quantisation = Literal["int8", "nf4"]
QUANTISATIONS: tuple[Quantisation, ...] = typing.get_args(Quantisation)
Remat = Literal["none", "most", "attention", "full"]
AttentionKernel = Literal["auto", "xla", "blocks", "splash", "triton", "mosaic"]
RouterGradient = Literal["none", "straight_through", "gate_scaled", "dense"]
Movement = Literal["gather", "all_to_all"]
PromptName = Literal["v1", "llava_mole", "no_system", "plain", "checkpoint"]
ImageAspect = Literal["pad", "crop", "stretch"]
LayoutName = Literal[
    "ureader",
    "llava",
    "sharegpt",
    "messages",
    "prompt_completion",
    "alpaca",
    "m3it",
    "query_response",
    "chartqa",
    "pmc_vqa",
    "vqa_rad",
    "slake",
    "path_vqa",
    "question_answer",
    "caption",
]
LossAverage = Literal["token", "example"]
Ability = Literal[
    "visual_perception",
    "visual_knowledge_acquisition",
    "visual_reasoning",
    "visual_commonsense",
    "object_hallucination",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is finetuned and how its arrays are held."""

    base: str | None = None
    """Pretrained weights: a HF LLaVA folder, a run folder, or a hub name. None: random weights of `preset`."""
    preset: str | None = None
    """Architecture for random weights (vicuna-7b, vicuna-13b, quickstart, small, study, tiny). Only read without
    `base`."""
    tokenizer: str | None = None
    """Folder or file with tokenizer.model or tokenizer.json. None: the one in `base`."""
    feature_layer: int | None = None
    """Vision hidden state that feeds the projector (-2: LLaVA-1.5, -1: released LLaVA-MoLE). None: as `base` says."""
    feature_select: Literal["patch", "full"] | None = None
    """Drop the class token (patch) or keep it (full). None: as `base` says."""
    image_vectors: bool = False
    """Learned vectors before and after every image's tokens (released LLaVA-MoLE)."""
    frozen_dtype: Literal[Dtype, Quantisation] = "bfloat16"
    """Type in which frozen weights are stored. Trainable weights are always float32. int8 and nf4 quantise the
    projections of the decoder's layers as they are loaded; what else is frozen is then of `compute_dtype`."""
    compute_dtype: Dtype = "bfloat16"
    """Type of activations and matrix products. Router, norms, softmax and loss are float32 regardless."""
    remat: Remat = "full"
    """What a layer's backward pass computes again. none: nothing. most: all but attention, its queries, keys and
    values, and the outputs of o, gate and up. attention: all but the first four. full: everything."""
    attention: AttentionKernel = "auto"
    """How attention is computed. auto: splash on TPUs, mosaic on Hopper GPUs and triton on others (all three by
    tokamax), else blocks. blocks: plain JAX, block by block. xla: S x S scores, as defined."""

    @property
    def quantised(self) -> Quantisation | None:
        """How the projections of the decoder's layers are quantised, if they are."""
        return next((kind for kind in QUANTISATIONS if kind == self.frozen_dtype), None)

    @property
    def float_dtype(self) -> str:
        """Type of the frozen weights that are not quantised."""
        return self.frozen_dtype if self.quantised is None else self.compute_dtype


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapters of the decoder (arXiv 2401.16160)."""

    kind: Literal["none", "lora", "mole"] = "mole"
    """none: no adapters. lora: one LoRA per target. mole: LoRA on attention, routed LoRA experts on the MLP."""
    rank: int = 32
    """Rank r of every LoRA and expert."""
    alpha: float = 64.0
    """LoRA scale numerator (`scale`)."""
    scale: Literal["standard", "rslora"] = "standard"
    """standard: the delta is (alpha / rank) B A x. rslora: (alpha / sqrt(rank)) B A x, PEFT's use_rslora, with which
    higher ranks do not learn slower (arXiv 2312.03732)."""
    dropout: float = 0.05
    """Probability that an input of a LoRA is zeroed in training."""
    targets: tuple[str, ...] = ATTENTION_TARGETS + MLP_TARGETS
    """Projections that carry an adapter."""
    experts: int = 3
    """Experts E per MLP (kind mole)."""
    shared_rank: int = 0
    """Rank of a LoRA beside the routed experts that every token uses too (kind mole). 0: none."""
    route_by: Literal["token", "instance", "domain"] = "token"
    """What chooses the expert: the token; the mean embedding of the example before its first answer; or, as a bound
    that no served model reaches, the number of the example's domain, modulo E, without a router."""
    shared_router: bool = False
    """One router for all layers. Off: one per layer."""
    router_input: Literal["plain", "standardised"] = "plain"
    """What a router reads. standardised (route_by instance): each dimension less its mean and over its deviation, which
    are measured on the first examples and kept with the weights."""
    router_bias: bool = False
    """Give the router a bias. Off: the trained model is exactly a Mixtral layer of merged experts."""
    router_gradient: RouterGradient = "straight_through"
    """How the language-model loss reaches the router; dense mixes all experts, the others take the top one."""
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    """Balance loss per layer and then averaged, or pooled over all layers (released code)."""
    balance_weight: float = 1e-2
    """Weight of the balance loss in the total loss."""
    domain_weight: float = 0.0
    """Weight of a loss that teaches the routers the domains of the training data: expert i for domain i, modulo E. 0:
    they find out by themselves what is worth a separate expert. Answering needs no domain either way."""
    expert_path: Literal["auto", "masked", "grouped"] = "auto"
    """masked: all experts on every token, then zeroed. grouped: tokens sorted by expert. Same values, other speed."""
    expert_sharding: Literal["auto", Movement] = "auto"
    """Over mesh.expert move the experts to the tokens (gather) or the tokens to the experts; auto: the fewer bytes."""
    vision_targets: tuple[str, ...] = ()
    """Projections of the vision tower that carry a plain LoRA of the same rank, without dropout."""

    @property
    def factor(self) -> float:
        """What the product B A x is multiplied by."""
        return self.alpha / (self.rank if self.scale == "standard" else math.sqrt(self.rank))


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    """One pile of instruction data."""

    name: str
    """Name in metrics and reports."""
    path: str
    """Where its records lie, in any container and layout of docs/data.md: a file, a folder, a pattern, hf:NAME:SPLIT or
    tfds:NAME:SPLIT."""
    image_root: str | None = None
    """Folder that image paths are relative to and must stay inside. None: the folder of `path`."""
    weight: float = 1.0
    """Share of this domain (data.mix = weight)."""
    cap: int | None = None
    """Use at most this many records, chosen by seed. None: all."""
    repeat: float = 1.0
    """Times the (capped) domain counts in its size, for the epoch's length and for mixing by size."""
    layout: LayoutName | None = None
    """Which fields of a record hold what. None: told by the keys of its first records."""
    columns: tuple[str, ...] = ()
    """Names of fields, each as ours=theirs: question=Frage reads their field Frage as the layout's question."""
    where: tuple[str, ...] = ()
    """Keep the records that have these values, each as field=value: q_lang=en. Fields have the names in the file."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture and how it becomes batches."""

    domains: tuple[DomainConfig, ...] = ()
    """The domains of the training mixture."""
    mix: Literal["weight", "size", "temperature"] = "weight"
    """Sampling: by the domains' weights, by their size, or by size ** (1 / temperature)."""
    temperature: float = 2.0
    """Temperature of the size-based mixture (data.mix = temperature); 1 is by size, large is uniform."""
    prompt: PromptName | None = None
    """Prompt preset, or checkpoint: the chat template beside the base's tokenizer, read by transformers; stored in the
    checkpoint. no_system: v1's roles without its first sentence. None: v1 for LLaVA-1.5, checkpoint for any other base
    with a chat template."""
    sequence_length: int = 2048
    """Tokens per row S, image tokens included."""
    examples_per_row: int = 16
    """Most examples packed into one row; 1 turns packing off."""
    tiles_per_row: int = 4
    """Most tiles of images in one row; an image is one, or several where the base cuts it. 0: records have none, and no
    row holds place for them."""
    max_tiles: int | None = None
    """Most tiles of one image: those of more are made smaller by the base's own settings for it (fewer resolutions, a
    smaller grid, a shorter longest side). None: as the base does."""
    packing_bins: int = 64
    """Rows open at a time while packing, over all shards; more fill better and mix further."""
    shards: int | None = None
    """Streams that the examples are dealt to and packed in; each fills as many rows of every batch, and a host reads
    those of its own rows. Batches depend on it and not on the hosts. None: the largest divisor of `train.batch_rows`
    up to 16."""
    image_aspect: ImageAspect | None = None
    """Make images square by padding with the mean colour, cropping the centre, or giving up the aspect ratio; for bases
    that see an image as one square. None: as the base does, padded for LLaVA-1.5."""
    exif: Literal["ignore", "apply"] | None = None
    """Read images as they are stored (ignore), as LLaVA does, or turn them as their EXIF orientation says (apply), as
    viewers and transformers' load_image do; stored in the checkpoint. None: as the base was trained, else ignore."""
    transparency: Literal["stored", "white"] | None = None
    """Where an image is transparent, the colour stored beneath (LLaVA) or white (transformers' processors that convert
    to RGB); stored in the checkpoint. None: as the base was trained, else stored."""
    max_image_pixels: int = 50_000_000
    """Images with more pixels are refused as decompression bombs."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A broken image, missing file, malformed record and so on: stop with an error, or skip and count."""
    on_too_long: Literal["error", "skip"] = "skip"
    """An example over `sequence_length` or `tiles_per_row`: stop with an error, or skip and count."""
    most_skipped: float | None = None
    """Largest share of a domain's records that may be skipped; above it training stops. None: no limit, since skipping
    was asked for and how much of it is right is for the data's owner to say; the counts are told at start and end."""
    workers: int = 0
    """Worker processes that read and decode; 0 does it in the training process. Never changes the batches."""
    images_per_row: dataclasses.InitVar[int | None] = None
    """What earlier versions called `tiles_per_row`."""

    def __post_init__(self, images_per_row: int | None) -> None:
        if images_per_row is not None:
            object.__setattr__(self, "tiles_per_row", images_per_row)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay."""

    learning_rate: float = 2e-4
    """Peak learning rate of the adapters, and of every group without its own."""
    router_learning_rate: float | None = None
    """Peak learning rate of the routers."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector and the image vectors."""
    base_learning_rate: float | None = None
    """Peak learning rate of vision tower and decoder where they are trained."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear end at 0."""
    warmup_fraction: float = 0.03
    """Share of all steps spent warming up linearly from 0."""
    b1: float = 0.9
    """AdamW first-moment decay."""
    b2: float = 0.999
    """AdamW second-moment decay."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms, biases and vectors never decay."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm. None: no clipping."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = None
    """Passes over the mixture's epoch. Give this or `steps`."""
    batch_rows: int = 64
    """Rows per optimizer step over all devices."""
    accumulation: int = 1
    """Pieces that a batch is cut into, one after the other, to save memory. Same update, but for dropout."""
    loss_average: LossAverage = "token"
    """What has the same weight in the loss. token: each supervised token, so long answers have most of it. example:
    each example, by the mean over its tokens. Balance and domain losses are of examples, held-out losses of tokens."""
    trainable: tuple[str, ...] = ("adapters", "router", "projector")
    """Parameter groups that train: adapters, router, projector (with image vectors), vision, decoder."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    max_bad_steps: int = 3
    """Steps in a row with a NaN or Inf (never applied) after which the run stops."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out; the product of the axes is the number of devices used."""

    data: int = -1
    """Copies of the model that split the batch; -1: all devices that are left."""
    fsdp: int = 1
    """Devices that split parameters and optimizer state, and the batch too."""
    expert: int = 1
    """Devices that split the experts, and the batch too."""
    tensor: int = 1
    """Devices that split every large matrix, the heads and the vocabulary, and work on the same rows."""
    slices: int = 1
    """TPU slices, or groups of GPUs joined by NVLink, that the data axis reaches over."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a run saves."""

    every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints of lowest held-out loss kept besides, among steps that are both evaluated and saved."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How answers are decoded. The settings mean, and apply in the order of, transformers' of the same names."""

    max_new_tokens: int = 32
    """Longest answer, in tokens; at least 1."""
    temperature: float = 0.0
    """What logits are divided by before a token is drawn, not negative; 0 takes the most probable token (greedy)."""
    top_k: int | None = None
    """Draw among this many most probable tokens. None or 0: all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens that have this probability together, over 0; 1: all."""
    repetition_penalty: float = 1.0
    """Over 1 makes every text token of the prompt and of the answer so far less probable, between 0 and 1 more; 1: no
    penalty. Image positions hold no text and never count."""
    stop: tuple[str, ...] = ()
    """Text that ends an answer and is not part of it, besides end of sequence and the prompt preset's own."""
    seed: int = 0
    """Seed of the draws, from 0 to 2**32 - 1. A prompt's draws depend on it and on the prompt's place in the list, not
    on the batch."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A held-out set and how it is scored."""

    name: str
    """Name in reports; by custom the domain's."""
    path: str
    """As of a `DomainConfig`. The last assistant turn is the reference answer, unless the record has `answers`: a
    list of texts, or of objects with an `answer` (VQAv2's annotations); then those are the references."""
    image_root: str | None = None
    """Folder of the images. None: the folder of `path`."""
    suffix: str = ""
    """Text put after each question, as it stands; such as "\\nAnswer the question using a single word or phrase."."""
    decoding: DecodingConfig = DecodingConfig()
    """How its answers are decoded."""
    metric: Literal[
        "exact_match",
        "contains",
        "vqa_accuracy",
        "anls",
        "relaxed_accuracy",
        "yes_no",
        "llava_med_closed",
        "closed_strict",
        "open_recall",
        "science_qa",
        "cider",
        "rouge_l",
        "bleu",
    ] = "exact_match"
    """exact_match: equal without case and full stop. contains: the answer's words stand in the output (Tiny LVLM-eHub).
    vqa_accuracy: VQAv2. anls: DocVQA. relaxed_accuracy: ChartQA, within 5 %. yes_no: POPE. science_qa: the letter.
    llava_med_closed and open_recall: as LLaVA-Med; closed_strict: closed questions by whole words. cider, rouge_l and
    bleu: captions, as for COCO (needs the extra `caption`)."""
    ability: Ability | None = None
    """Which ability of Tiny LVLM-eHub its questions test, with metric contains; a report sums them up. None: no sum."""
    limit: int | None = None
    """Score only the first so many records. None: all."""
    layout: LayoutName | None = None
    """As a domain's."""
    columns: tuple[str, ...] = ()
    """As a domain's."""
    where: tuple[str, ...] = ()
    """As a domain's; `limit` counts what is kept."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores before, during and after training."""

    tasks: tuple[TaskConfig, ...] = ()
    """Held-out sets; none turns evaluation off."""
    at_start: bool = True
    """Evaluate before the first step, so that the report can compare."""
    every: int | None = None
    """Steps between evaluations of the held-out loss. None: only at the start and the end."""
    generate: bool = True
    """Also answer the questions and score, at the start and the end."""
    batch_size: int = 32
    """Questions decoded at a time."""


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Where a run is shown while it trains: losses, speed, routing, held-out results and example answers."""

    to: tuple[str, ...] = ("tensorboard",)
    """tensorboard: events in the run's folder. wandb (Weights & Biases) and trackio need the extra `track` and send
    where their environment variables say: WANDB_MODE=offline (the run's folder), TRACKIO_DIR, TRACKIO_SPACE_ID, …"""
    project: str = "mole-jax"
    """Project on wandb and trackio."""
    examples: int = 8
    """Answers of each task that are shown beside their questions and references, where questions are answered."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "run"
    """Name in the report."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    track: TrackConfig = TrackConfig()


@dataclasses.dataclass(frozen=True)
class GenerateConfig(DecodingConfig):
    """Settings of `mole_jax.generate`, which has no config file: how it decodes, and on which devices."""

    max_new_tokens: int = 256
    """Longest answer, in tokens; at least 1."""
    mesh: MeshConfig = MeshConfig(data=1)

    @property
    def decoding(self) -> DecodingConfig:
        """These settings without the mesh, on which answers do not depend."""
        values = dataclasses.asdict(self)
        del values["mesh"]
        return DecodingConfig(**values)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Settings of `mole_jax.serve`: what it has room for, and how it decodes where a request does not say."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of the machine's."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    slots: int = 8
    """Answers under way at a time; more take more memory."""
    context: int = 2048
    """Tokens of a prompt and its answer together, pictures' too, at most the model's positions; a slot takes the
    memory of all of them, whatever is in it."""
    queue: int = 64
    """Requests that may wait for a slot; those beyond are refused (429)."""
    timeout: float = 300.0
    """Seconds that a request may take from its coming to the end of its answer (504 after that)."""
    pictures: int = 8
    """Most pictures of a request."""
    body_mb: int = 32
    """Largest request, and largest picture from the web, in MiB (413)."""
    allow_remote: bool = False
    """Fetch pictures from the addresses that requests name, in the server's own network too."""
    max_new_tokens: int = 512
    """Longest answer of a request that names no max_tokens, in tokens."""
    temperature: float = 0.0
    """As in `DecodingConfig`, of a request that names none; OpenAI's is 1."""
    top_p: float = 1.0
    """As in `DecodingConfig`, of a request that names none."""
    mesh: MeshConfig = MeshConfig(data=1)

    @property
    def decoding(self) -> DecodingConfig:
        """How a request is answered that says nothing about it."""
        return DecodingConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)

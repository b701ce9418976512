"""Every setting: its meaning, its unit, its default and its check.

A configuration is a Python file with ``get_config() -> Config``. All classes are frozen; change one
with `dataclasses.replace` in a file or with ``--section.field value`` on the command line.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mole_jax.errors import UserError, nearest

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
GROUPS = ("adapters", "router", "projector", "vision", "decoder")

Dtype = Literal["float32", "bfloat16"]
RouterGradient = Literal["none", "straight_through", "gate_scaled", "dense"]
PromptName = Literal["v1", "llava_mole", "plain"]
ImageAspect = Literal["pad", "crop"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is finetuned and how its arrays are held."""

    base: str | None = None
    """Pretrained weights: a HF LLaVA folder, a run folder, or a hub name. None: random weights of `preset`."""
    preset: str | None = None
    """Architecture for random weights (vicuna-7b, vicuna-13b, quickstart, small, tiny). Only read without `base`."""
    tokenizer: str | None = None
    """Folder or file with tokenizer.model or tokenizer.json. None: the one in `base`."""
    feature_layer: int | None = None
    """Vision hidden state that feeds the projector (-2: LLaVA-1.5, -1: released LLaVA-MoLE). None: as `base` says."""
    feature_select: Literal["patch", "full"] | None = None
    """Drop the class token (patch) or keep it (full). None: as `base` says."""
    image_vectors: bool = False
    """Learned vectors before and after every image's tokens (released LLaVA-MoLE)."""
    frozen_dtype: Dtype = "bfloat16"
    """Type in which frozen weights are stored. Trainable weights are always float32."""
    compute_dtype: Dtype = "bfloat16"
    """Type of activations and matrix products. Router, norms, softmax and loss are float32 regardless."""
    remat: Literal["none", "dots", "full"] = "full"
    """What a layer's backward pass recomputes: nothing, all but matrix products, everything."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapters of the decoder (arXiv 2401.16160)."""

    kind: Literal["none", "lora", "mole"] = "mole"
    """none: no adapters. lora: one LoRA per target. mole: LoRA on attention, routed LoRA experts on the MLP."""
    rank: int = 32
    """Rank r of every LoRA and expert."""
    alpha: float = 64.0
    """LoRA scale numerator: the delta is (alpha / rank) B A x."""
    dropout: float = 0.05
    """Probability that an input of a LoRA is zeroed in training."""
    targets: tuple[str, ...] = ATTENTION_TARGETS + MLP_TARGETS
    """Projections that carry an adapter."""
    experts: int = 3
    """Experts E per MLP (kind mole)."""
    router_bias: bool = False
    """Give the router a bias. Off: the trained model is exactly a Mixtral layer of merged experts."""
    router_gradient: RouterGradient = "straight_through"
    """How the language-model loss reaches the router; dense mixes all experts, the others take the top one."""
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    """Balance loss per layer and then averaged, or pooled over all layers (released code)."""
    balance_weight: float = 1e-2
    """Weight of the balance loss in the total loss."""


@dataclasses.dataclass(frozen=True)
class DomainConfig:
    """One pile of instruction data."""

    name: str
    """Name in metrics and reports."""
    path: str
    """LLaVA JSON or JSONL file, or tfds:NAME:SPLIT for a prepared tensorflow-datasets set."""
    image_root: str | None = None
    """Folder that image paths are relative to and must stay inside. None: the folder of `path`."""
    weight: float = 1.0
    """Share of this domain (data.mix = weight)."""
    cap: int | None = None
    """Use at most this many records, chosen by seed. None: all."""
    repeat: float = 1.0
    """Times the (capped) domain counts in its size, for the epoch's length and for mixing by size."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture and how it becomes batches."""

    domains: tuple[DomainConfig, ...] = ()
    """The domains of the training mixture."""
    mix: Literal["weight", "size", "temperature"] = "weight"
    """Sampling: by the domains' weights, by their size, or by size ** (1 / temperature)."""
    temperature: float = 2.0
    """Temperature of the size-based mixture (data.mix = temperature); 1 is by size, large is uniform."""
    prompt: PromptName = "v1"
    """Prompt preset; stored in the checkpoint."""
    sequence_length: int = 2048
    """Tokens per row S, image tokens included."""
    examples_per_row: int = 16
    """Most examples packed into one row; 1 turns packing off."""
    images_per_row: int = 4
    """Most images in one row."""
    packing_bins: int = 64
    """Rows open at a time while packing; more fill better and mix further."""
    image_aspect: ImageAspect = "pad"
    """Make images square by padding with the mean colour, or by cropping the centre."""
    max_image_pixels: int = 50_000_000
    """Images with more pixels are refused as decompression bombs."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A broken image, missing file, malformed record and so on: stop with an error, or skip and count."""
    on_too_long: Literal["error", "skip"] = "skip"
    """An example over `sequence_length` or `images_per_row`: stop with an error, or skip and count."""
    workers: int = 0
    """Worker processes that read and decode; 0 does it in the training process. Never changes the batches."""


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
class TaskConfig:
    """A held-out set and how it is scored."""

    name: str
    """Name in reports; by custom the domain's."""
    path: str
    """LLaVA JSON or JSONL file; the last assistant turn is the reference answer."""
    image_root: str | None = None
    """Folder of the images. None: the folder of `path`."""
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
    ] = "exact_match"
    """exact_match: equal without case and full stop. contains: the answer's words stand in the output (Tiny LVLM-eHub).
    vqa_accuracy: VQAv2. anls: DocVQA. relaxed_accuracy: ChartQA, within 5 %. yes_no: POPE. science_qa: the letter.
    llava_med_closed and open_recall: as LLaVA-Med; closed_strict: closed questions by whole words."""
    limit: int | None = None
    """Score only the first so many records. None: all."""


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
    """Also decode greedily and score, at the start and the end."""
    batch_size: int = 32
    """Questions decoded at a time."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""


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


def check(config: Config) -> Config:
    """Returns `config` if its values make sense together; raises `UserError` naming the field if not."""
    model, adapter, data, train = config.model, config.adapter, config.data, config.train

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"config: {message}")

    def one_of(field: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
        for value in values:
            need(
                value in allowed,
                f"{field} has '{value}'{nearest(value, allowed) or ', expected some of ' + ', '.join(allowed)}",
            )

    need((model.base is None) != (model.preset is None), "give exactly one of model.base and model.preset")
    one_of("adapter.targets", adapter.targets, ATTENTION_TARGETS + MLP_TARGETS)
    one_of("train.trainable", train.trainable, GROUPS)
    need(bool(train.trainable), "train.trainable is empty, so nothing would train; name at least one group")
    need(adapter.rank >= 1, f"adapter.rank is {adapter.rank}, it must be at least 1")
    need(0 <= adapter.dropout < 1, f"adapter.dropout is {adapter.dropout}, it must be in [0, 1)")
    if adapter.kind == "mole":
        need(adapter.experts >= 1, f"adapter.experts is {adapter.experts}, it must be at least 1")
        need(
            any(target in MLP_TARGETS for target in adapter.targets),
            f"adapter.kind is mole but adapter.targets has none of {', '.join(MLP_TARGETS)}; add one or use kind lora",
        )
    need(
        adapter.kind != "none" or not {"adapters", "router"} & set(train.trainable),
        "adapter.kind is none but train.trainable names adapters or router; take them out or choose lora or mole",
    )
    need(
        adapter.kind == "mole" or "router" not in train.trainable,
        "train.trainable names router but adapter.kind is not mole; take router out",
    )
    need(bool(data.domains), "data.domains is empty; add a DomainConfig(name, path)")
    names = [domain.name for domain in data.domains]
    need(len(set(names)) == len(names), f"data.domains has two domains of one name among {', '.join(names)}")
    for domain in data.domains:
        need(domain.weight >= 0, f"data.domains: {domain.name} has weight {domain.weight}, it must not be negative")
        need(domain.repeat > 0, f"data.domains: {domain.name} has repeat {domain.repeat}, it must be over 0")
        need(
            domain.cap is None or domain.cap >= 1,
            f"data.domains: {domain.name} has cap {domain.cap}, it must be at least 1",
        )
    need(any(d.weight > 0 for d in data.domains), "data.domains: every weight is 0; give one a weight over 0")
    need(data.temperature > 0, f"data.temperature is {data.temperature}, it must be over 0")
    for field in ("sequence_length", "examples_per_row", "images_per_row", "packing_bins", "max_image_pixels"):
        need(getattr(data, field) >= 1, f"data.{field} is {getattr(data, field)}, it must be at least 1")
    need(data.workers >= 0, f"data.workers is {data.workers}, it must not be negative")
    need((train.steps is None) != (train.epochs is None), "give exactly one of train.steps and train.epochs")
    need(train.steps is None or train.steps >= 1, f"train.steps is {train.steps}, it must be at least 1")
    need(train.epochs is None or train.epochs > 0, f"train.epochs is {train.epochs}, it must be over 0")
    for field in ("batch_rows", "accumulation", "log_every", "max_bad_steps"):
        need(getattr(train, field) >= 1, f"train.{field} is {getattr(train, field)}, it must be at least 1")
    need(
        train.batch_rows % train.accumulation == 0,
        f"train.batch_rows {train.batch_rows} does not divide into train.accumulation {train.accumulation} pieces",
    )
    need(
        0 <= config.optimizer.warmup_fraction < 1,
        f"optimizer.warmup_fraction is {config.optimizer.warmup_fraction}, it must be in [0, 1)",
    )
    need(config.mesh.data == -1 or config.mesh.data >= 1, f"mesh.data is {config.mesh.data}, it must be -1 or over 0")
    need(config.mesh.fsdp >= 1, f"mesh.fsdp is {config.mesh.fsdp}, it must be at least 1")
    need(config.checkpoint.every >= 1, f"checkpoint.every is {config.checkpoint.every}, it must be at least 1")
    need(
        config.checkpoint.keep_last >= 1,
        f"checkpoint.keep_last is {config.checkpoint.keep_last}, it must be at least 1",
    )
    need(
        config.checkpoint.keep_best >= 0,
        f"checkpoint.keep_best is {config.checkpoint.keep_best}, it must not be negative",
    )
    evaluation = config.evaluation
    tasks = [task.name for task in evaluation.tasks]
    need(len(set(tasks)) == len(tasks), f"evaluation.tasks has two tasks of one name among {', '.join(tasks)}")
    need(
        evaluation.every is None or evaluation.every >= 1,
        f"evaluation.every is {evaluation.every}, it must be at least 1",
    )
    for field in ("batch_size", "max_new_tokens"):
        need(
            getattr(evaluation, field) >= 1,
            f"evaluation.{field} is {getattr(evaluation, field)}, it must be at least 1",
        )
    for task in evaluation.tasks:
        need(
            task.limit is None or task.limit >= 1,
            f"evaluation.tasks: {task.name} has limit {task.limit}, it must be at least 1",
        )
    optimizer = config.optimizer
    for field in ("learning_rate", "router_learning_rate", "projector_learning_rate", "base_learning_rate"):
        rate = getattr(optimizer, field)
        need(rate is None or rate >= 0, f"optimizer.{field} is {rate}, it must not be negative")
    for field in ("b1", "b2"):
        need(0 <= getattr(optimizer, field) < 1, f"optimizer.{field} is {getattr(optimizer, field)}, must be in [0, 1)")
    need(optimizer.weight_decay >= 0, f"optimizer.weight_decay is {optimizer.weight_decay}, must not be negative")
    need(
        optimizer.clip_norm is None or optimizer.clip_norm > 0,
        f"optimizer.clip_norm is {optimizer.clip_norm}, it must be over 0, or None for no clipping",
    )
    return config

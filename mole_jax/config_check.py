"""Whether the settings make sense together: a table of rules for each section of the config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from mole_jax.config import (
    ATTENTION_TARGETS,
    GROUPS,
    MLP_TARGETS,
    TRACKERS,
    VISION_TARGETS,
    AdapterConfig,
    Config,
    DecodingConfig,
    DomainConfig,
    MeshConfig,
    ServeConfig,
    TaskConfig,
)
from mole_jax.errors import UserError, nearest
from mole_jax.terminal import escaped, shortened

MOST_NAME_BYTES = 200
"""Of a domain's or task's name: files are called after tasks, and a file's name has at most 255 bytes."""

Rows = Iterator[tuple[bool, str]]
"""What must hold, and what to say if it does not. A row may rely on those before it: the first that fails ends it."""


def check(config: Config) -> Config:
    """Returns `config` if its values make sense together; raises `UserError` naming the field if not."""
    for section in SECTIONS:
        for holds, message in section(config):
            if not holds:
                raise UserError(f"config: {message}")
    return config


def check_tasks(config: Config) -> None:
    """Raises `UserError` if a config names no tasks, for commands that have nothing to do without."""
    if not config.evaluation.tasks:
        raise UserError("config: evaluation.tasks is empty; add a TaskConfig(name, path)")


def check_mesh(mesh: MeshConfig) -> MeshConfig:
    """Returns `mesh` if its values make sense; raises `UserError` naming the value as ``mesh.name`` if not."""
    for holds, message in _axes(mesh):
        if not holds:
            raise UserError(message)
    return mesh


def check_decoding(decoding: DecodingConfig, field: str) -> DecodingConfig:
    """Returns `decoding` if its values make sense; raises `UserError` naming the value as ``field.name`` if not."""
    for holds, message in _decoding(decoding, field):
        if not holds:
            raise UserError(message)
    return decoding


def check_serve(settings: ServeConfig) -> ServeConfig:
    """Returns `settings` if their values make sense; raises `UserError` naming the flag if not."""
    for holds, message in _serve(settings):
        if not holds:
            raise UserError(message)
    check_decoding(settings.decoding, "decoding")
    check_mesh(settings.mesh)
    return settings


def _serve(s: ServeConfig) -> Rows:
    yield 0 <= s.port < 2**16, f"--port is {s.port}, it must be in [0, 65536)"
    for flag, value in (("slots", s.slots), ("context", s.context), ("body-mb", s.body_mb)):
        yield value >= 1, f"--{flag} is {value}, it must be at least 1"
    for flag, value in (("queue", s.queue), ("pictures", s.pictures)):
        yield value >= 0, f"--{flag} is {value}, it must not be negative"
    yield 0 < s.timeout < math.inf, f"--timeout is {s.timeout}, it must be over 0 seconds"


def _decoding(d: DecodingConfig, field: str) -> Rows:
    yield d.max_new_tokens >= 1, f"{field}.max_new_tokens is {d.max_new_tokens}, it must be at least 1"
    finite = 0 <= d.temperature < math.inf
    yield finite, f"{field}.temperature is {d.temperature}, it must not be negative; 0 is greedy"
    yield d.top_k is None or d.top_k >= 0, f"{field}.top_k is {d.top_k}, it must not be negative; 0 is all tokens"
    yield 0 < d.top_p <= 1, f"{field}.top_p is {d.top_p}, it must be over 0 and at most 1"
    finite = 0 < d.repetition_penalty < math.inf
    yield finite, f"{field}.repetition_penalty is {d.repetition_penalty}, it must be over 0; 1 is no penalty"
    yield all(d.stop), f"{field}.stop is {d.stop}, none may be empty; take the empty one out"
    yield 0 <= d.seed < 2**32, f"{field}.seed is {d.seed}, it must be in [0, 2**32)"


def _model(config: Config) -> Rows:
    model = config.model
    yield (model.base is None) != (model.preset is None), "give exactly one of model.base and model.preset"


def _adapter(config: Config) -> Rows:
    adapter = config.adapter
    yield from _some_of("adapter.targets", adapter.targets, ATTENTION_TARGETS + MLP_TARGETS)
    yield from _some_of("adapter.vision_targets", adapter.vision_targets, VISION_TARGETS)
    yield (
        not adapter.vision_targets or adapter.kind != "none",
        "adapter.kind is none but adapter.vision_targets names projections; take them out or choose lora or mole",
    )
    yield from _at_least_1("adapter", adapter, "rank")
    yield 0 <= adapter.dropout < 1, f"adapter.dropout is {adapter.dropout}, it must be in [0, 1)"
    if adapter.kind == "mole":
        yield from _experts(config, adapter)
        yield from _routing(config, adapter)


def _experts(config: Config, adapter: AdapterConfig) -> Rows:
    grouped = adapter.expert_path == "grouped"
    yield from _at_least_1("adapter", adapter, "experts")
    yield (
        any(target in MLP_TARGETS for target in adapter.targets),
        f"adapter.kind is mole but adapter.targets has none of {', '.join(MLP_TARGETS)}; add one or use kind lora",
    )
    yield (
        not grouped or adapter.router_gradient != "dense",
        "adapter.expert_path grouped sorts tokens by their one expert, router_gradient dense uses all; take masked",
    )
    yield (
        not grouped or adapter.expert_sharding != "all_to_all" or config.mesh.expert == 1,
        "adapter.expert_path grouped needs the experts where the tokens are; set adapter.expert_sharding to gather",
    )
    yield from _not_negative("adapter", adapter, "shared_rank")


def _routing(config: Config, adapter: AdapterConfig) -> Rows:
    domains, evaluation = len(config.data.domains), config.evaluation
    yield (
        not (adapter.shared_router and adapter.router_bias),
        "adapter.shared_router has no bias; set adapter.router_bias False",
    )
    yield (
        adapter.router_input == "plain" or (adapter.route_by == "instance" and "router" in config.train.trainable),
        "adapter.router_input standardised reads the mean embedding of an example; set adapter.route_by instance, and "
        "train the router",
    )
    yield from _not_negative("adapter", adapter, "balance_weight", "domain_weight")
    yield (
        adapter.domain_weight == 0 or adapter.route_by != "domain",
        "adapter.route_by domain has no router that adapter.domain_weight could teach; set the weight to 0",
    )
    yield (
        adapter.domain_weight == 0 or adapter.experts <= domains,
        f"adapter.domain_weight teaches an expert for each of {domains} domains and leaves the rest of "
        f"adapter.experts {adapter.experts} idle; set adapter.experts {domains}, or the weight to 0",
    )
    yield (
        adapter.route_by != "domain" or not (evaluation.tasks and evaluation.generate),
        "adapter.route_by domain cannot answer questions, whose domain no one knows; set evaluation.generate False",
    )


def _trainable(config: Config) -> Rows:
    kind, trainable = config.adapter.kind, config.train.trainable
    yield from _some_of("train.trainable", trainable, GROUPS)
    yield bool(trainable), "train.trainable is empty, so nothing would train; name at least one group"
    yield (
        kind != "none" or not {"adapters", "router"} & set(trainable),
        "adapter.kind is none but train.trainable names adapters or router; take them out or choose lora or mole",
    )
    yield (
        kind == "mole" or "router" not in trainable,
        "train.trainable names router but adapter.kind is not mole; take router out",
    )
    yield (
        config.model.quantised is None or "decoder" not in trainable,
        f"train.trainable names decoder, which model.frozen_dtype {config.model.frozen_dtype} quantises and so "
        "freezes; take decoder out or set model.frozen_dtype bfloat16",
    )


def _data(config: Config) -> Rows:
    data = config.data
    yield bool(data.domains), "data.domains is empty; add a DomainConfig(name, path)"
    yield from _different("data.domains has two domains", [domain.name for domain in data.domains])
    for domain in data.domains:
        yield from _domain(domain)
    yield any(d.weight > 0 for d in data.domains), "data.domains: every weight is 0; give one a weight over 0"
    yield data.temperature > 0, f"data.temperature is {data.temperature}, it must be over 0"
    counts = ("sequence_length", "examples_per_row", "packing_bins", "max_image_pixels", "shards")
    yield from _at_least_1("data", data, *counts)
    yield (
        data.most_skipped is None or 0 <= data.most_skipped <= 1,
        f"data.most_skipped is {data.most_skipped}, it is a share: from 0 to 1, or None for no limit",
    )
    yield from _not_negative("data", data, "tiles_per_row", "workers")
    yield data.max_tiles is None or data.max_tiles >= 1, f"data.max_tiles is {data.max_tiles}, it must be at least 1"


def _name(name: str, field: str) -> Rows:
    fits = name and escaped(name) == name and "/" not in name and len(name.encode()) <= MOST_NAME_BYTES
    yield (
        bool(fits),
        f"{field} has a name '{shortened(name)}'; a name is 1 to {MOST_NAME_BYTES} bytes without '/' and control "
        "characters, since files are called after it",
    )


def _domain(domain: DomainConfig) -> Rows:
    yield from _name(domain.name, "data.domains")
    where = f"data.domains: {domain.name} has"
    yield domain.weight >= 0, f"{where} weight {domain.weight}, it must not be negative"
    yield domain.repeat > 0, f"{where} repeat {domain.repeat}, it must be over 0"
    yield domain.cap is None or domain.cap >= 1, f"{where} cap {domain.cap}, it must be at least 1"
    yield from _pairs(domain, where)


def _pairs(pile: DomainConfig | TaskConfig, where: str) -> Rows:
    for field, form in (("columns", "ours=theirs"), ("where", "field=value")):
        for pair in getattr(pile, field):
            first, mark, second = pair.partition("=")
            yield bool(first and mark and second), f"{where} '{shortened(pair)}' in {field}, expected {form}"
    yield from _different(f"{where} columns that name twice", [pair.partition("=")[0] for pair in pile.columns])


def _train(config: Config) -> Rows:
    train = config.train
    yield (train.steps is None) != (train.epochs is None), "give exactly one of train.steps and train.epochs"
    yield from _at_least_1("train", train, "steps")
    yield train.epochs is None or train.epochs > 0, f"train.epochs is {train.epochs}, it must be over 0"
    yield from _at_least_1("train", train, "batch_rows", "accumulation", "log_every", "max_bad_steps")
    yield (
        train.batch_rows % train.accumulation == 0,
        f"train.batch_rows {train.batch_rows} does not divide into train.accumulation {train.accumulation} pieces",
    )


def _optimizer(config: Config) -> Rows:
    opt = config.optimizer
    warmup, clip = opt.warmup_fraction, opt.clip_norm
    yield 0 <= warmup < 1, f"optimizer.warmup_fraction is {warmup}, it must be in [0, 1)"
    rates = ("learning_rate", "router_learning_rate", "projector_learning_rate", "base_learning_rate")
    yield from _not_negative("optimizer", opt, *rates)
    yield 0 <= opt.b1 < 1, f"optimizer.b1 is {opt.b1}, must be in [0, 1)"
    yield 0 <= opt.b2 < 1, f"optimizer.b2 is {opt.b2}, must be in [0, 1)"
    yield opt.weight_decay >= 0, f"optimizer.weight_decay is {opt.weight_decay}, must not be negative"
    yield clip is None or clip > 0, f"optimizer.clip_norm is {clip}, it must be over 0, or None for no clipping"


def _mesh(config: Config) -> Rows:
    mesh, kind = config.mesh, config.adapter.kind
    yield from _axes(mesh)
    yield (
        mesh.expert == 1 or kind == "mole",
        f"mesh.expert is {mesh.expert} but adapter.kind {kind} has no experts to split; set it to 1",
    )


def _axes(mesh: MeshConfig) -> Rows:
    yield mesh.data == -1 or mesh.data >= 1, f"mesh.data is {mesh.data}, it must be -1 or over 0"
    yield from _at_least_1("mesh", mesh, "fsdp", "expert", "tensor", "slices")


def _checkpoint(config: Config) -> Rows:
    yield from _at_least_1("checkpoint", config.checkpoint, "every", "keep_last")
    yield from _not_negative("checkpoint", config.checkpoint, "keep_best")


def _evaluation(config: Config) -> Rows:
    evaluation = config.evaluation
    yield from _different("evaluation.tasks has two tasks", [task.name for task in evaluation.tasks])
    yield from _at_least_1("evaluation", evaluation, "every", "batch_size")
    for task in evaluation.tasks:
        yield from _name(task.name, "evaluation.tasks")
        where = f"evaluation.tasks: {task.name}"
        yield from _decoding(task.decoding, f"{where}.decoding")
        yield (
            task.ability is None or task.metric == "contains",
            f"{where} has ability {task.ability} with metric {task.metric}; "
            "Tiny LVLM-eHub scores by containment, so choose metric contains or leave ability out",
        )
        yield task.limit is None or task.limit >= 1, f"{where} has limit {task.limit}, it must be at least 1"
        yield from _pairs(task, f"{where} has")


def _track(config: Config) -> Rows:
    track = config.track
    yield from _some_of("track.to", track.to, TRACKERS)
    yield from _different("track.to has two trackers", list(track.to))
    yield bool(track.project.strip()), "track.project is empty; name one"
    yield from _not_negative("track", track, "examples")


SECTIONS: tuple[Callable[[Config], Rows], ...] = (
    _model,
    _adapter,
    _trainable,
    _data,
    _train,
    _optimizer,
    _mesh,
    _checkpoint,
    _evaluation,
    _track,
)


def _at_least_1(section: str, values: Any, *names: str) -> Rows:
    for name, value in ((name, getattr(values, name)) for name in names):
        yield value is None or value >= 1, f"{section}.{name} is {value}, it must be at least 1"


def _not_negative(section: str, values: Any, *names: str) -> Rows:
    for name, value in ((name, getattr(values, name)) for name in names):
        yield value is None or value >= 0, f"{section}.{name} is {value}, it must not be negative"


def _different(what: str, names: list[str]) -> Rows:
    yield len(set(names)) == len(names), f"{what} of one name among {', '.join(names)}"


def _some_of(field: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> Rows:
    for value in values:
        hint = nearest(value, allowed) or f", expected some of {', '.join(allowed)}"
        yield value in allowed, f"{field} has '{value}'{hint}"

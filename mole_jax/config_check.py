"""Whether the settings make sense together."""

from __future__ import annotations

import math

from mole_jax.config import ATTENTION_TARGETS, GROUPS, MLP_TARGETS, Config, DecodingConfig
from mole_jax.errors import UserError, nearest
from mole_jax.terminal import escaped, shortened

MOST_NAME_BYTES = 200
"""Of a domain's or task's name: files are called after tasks, and a file's name has at most 255 bytes."""


def check_decoding(decoding: DecodingConfig, field: str) -> DecodingConfig:
    """Returns `decoding` if its values make sense; raises `UserError` naming the value as ``field.name`` if not."""
    d = decoding
    for name, ok, rule in (
        ("max_new_tokens", d.max_new_tokens >= 1, "it must be at least 1"),
        ("temperature", 0 <= d.temperature < math.inf, "it must not be negative; 0 is greedy"),
        ("top_k", d.top_k is None or d.top_k >= 0, "it must not be negative; 0 is all tokens"),
        ("top_p", 0 < d.top_p <= 1, "it must be over 0 and at most 1"),
        ("repetition_penalty", 0 < d.repetition_penalty < math.inf, "it must be over 0; 1 is no penalty"),
        ("stop", all(d.stop), "none may be empty; take the empty one out"),
        ("seed", 0 <= d.seed < 2**32, "it must be in [0, 2**32)"),
    ):
        if not ok:
            raise UserError(f"{field}.{name} is {getattr(d, name)}, {rule}")
    return decoding


def check_name(name: str, field: str) -> None:
    """Raises `UserError` where the name of a domain or a task cannot stand in tables and in names of files."""
    if not name or escaped(name) != name or "/" in name or len(name.encode()) > MOST_NAME_BYTES:
        raise UserError(
            f"config: {field} has a name '{shortened(name)}'; a name is 1 to {MOST_NAME_BYTES} bytes without '/' and "
            "control characters, since files are called after it"
        )


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
            adapter.expert_path != "grouped" or adapter.router_gradient != "dense",
            "adapter.expert_path grouped sorts tokens by their one expert, router_gradient dense uses all; take masked",
        )
        need(
            adapter.expert_path != "grouped" or adapter.expert_sharding != "all_to_all" or config.mesh.expert == 1,
            "adapter.expert_path grouped needs the experts where the tokens are; set adapter.expert_sharding to gather",
        )
        need(adapter.shared_rank >= 0, f"adapter.shared_rank is {adapter.shared_rank}, it must not be negative")
        need(
            not (adapter.shared_router and adapter.router_bias),
            "adapter.shared_router has no bias; set adapter.router_bias False",
        )
        for weight in ("balance_weight", "domain_weight"):
            value = getattr(adapter, weight)
            need(value >= 0, f"adapter.{weight} is {value}, it must not be negative")
        need(
            adapter.domain_weight == 0 or adapter.route_by != "domain",
            "adapter.route_by domain has no router that adapter.domain_weight could teach; set the weight to 0",
        )
        need(
            adapter.domain_weight == 0 or adapter.experts <= len(data.domains),
            f"adapter.domain_weight teaches an expert for each of {len(data.domains)} domains and leaves the rest of "
            f"adapter.experts {adapter.experts} idle; set adapter.experts {len(data.domains)}, or the weight to 0",
        )
        need(
            adapter.route_by != "domain" or not (config.evaluation.tasks and config.evaluation.generate),
            "adapter.route_by domain cannot answer questions, whose domain no one knows; set evaluation.generate False",
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
        check_name(domain.name, "data.domains")
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
    need(data.shards is None or data.shards >= 1, f"data.shards is {data.shards}, it must be at least 1")
    need(
        data.most_skipped is None or 0 <= data.most_skipped <= 1,
        f"data.most_skipped is {data.most_skipped}, it is a share: from 0 to 1, or None for no limit",
    )
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
    for field in ("fsdp", "expert", "tensor", "slices"):
        need(getattr(config.mesh, field) >= 1, f"mesh.{field} is {getattr(config.mesh, field)}, it must be at least 1")
    need(
        config.mesh.expert == 1 or adapter.kind == "mole",
        f"mesh.expert is {config.mesh.expert} but adapter.kind {adapter.kind} has no experts to split; set it to 1",
    )
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
    need(evaluation.batch_size >= 1, f"evaluation.batch_size is {evaluation.batch_size}, it must be at least 1")
    for task in evaluation.tasks:
        check_name(task.name, "evaluation.tasks")
        check_decoding(task.decoding, f"config: evaluation.tasks: {task.name}.decoding")
        need(
            task.ability is None or task.metric == "contains",
            f"evaluation.tasks: {task.name} has ability {task.ability} with metric {task.metric}; "
            "Tiny LVLM-eHub scores by containment, so choose metric contains or leave ability out",
        )
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

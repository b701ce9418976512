"""Everything a run needs, opened and checked before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from mole_jax import config_json
from mole_jax.config import Config
from mole_jax.data.load import check_room, settled, taken
from mole_jax.data.mixture import Mixture
from mole_jax.errors import UserError
from mole_jax.files import made, read_json, write_json
from mole_jax.model import attention
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.objective import Forward
from mole_jax.model.quantised import Quantised
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel import hosts
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import check_rows, reader, replicated
from mole_jax.parameters import Tree, flatten, split_trainable
from mole_jax.tokenizer import Tokenizer
from mole_jax.training import inputs
from mole_jax.training.optimizer import make_tx, schedule
from mole_jax.training.router_input import standardised
from mole_jax.training.step import TrainState, TrainStep
from mole_jax.training.summary import trainable_table
from mole_jax.training.trackers.open import check_installed
from mole_jax.weights.open import OpenModel, check_image_token, open_model, open_source
from mole_jax.weights.run import Meta, latest_step, write_params
from mole_jax.weights.sources import locate

LEFT_TO_BASE = ("data.prompt", "data.image_aspect")
"""Settings that the base decides where the config does not: a run's folder says how."""
CHANGEABLE = (
    "name",
    "mesh",
    "adapter.expert_path",
    "adapter.expert_sharding",
    "checkpoint",
    "data.workers",
    "data.most_skipped",
    "data.on_bad_record",
    "data.on_too_long",
    "train.log_every",
    "train.max_bad_steps",
    "model.remat",
    "model.attention",
    "track",
)
"""Config fields that may differ when a run is resumed: they change how it runs, not what it computes."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready to step."""

    config: Config
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    spec: ModelSpec
    meta: Meta
    tokenizer: Tokenizer
    mixture: Mixture
    total_steps: int
    frozen: Tree
    state: TrainState
    """At step 0. Donated by the first step."""
    train_step: TrainStep
    """What `step` is made of."""
    step: jax.stages.Wrapped
    """Of a state (donated), the frozen arrays and a batch's arrays: the next state and metrics."""
    evaluation_step: Callable[[Tree, Tree, Mapping[str, Any]], Any]
    unchecked: tuple[str, ...] = ()
    """What to say of the run that is resumed, where not all that it was given is known."""


def set_up(config: Config, workdir: epath.Path, *, lap: Callable[[str], None] = lambda part: None) -> Run:
    """Opens base, tokenizer and data, places the model on the mesh and compiles nothing of the step yet.

    Args:
        config: the run's.
        workdir: its folder.
        lap: is told each part that is done.

    Raises:
        UserError: whatever of config, data, base, mesh or workdir does not fit.
    """
    check_installed(config.track)
    hosts.agree("config", _dotted(config_json.to_json(config)) | {"version of jax": jax.__version__})
    # Before the base, which may be a long download away.
    mesh = make_mesh(config.mesh)
    lap("devices")
    check_rows(config.train.batch_rows, config.train.accumulation, mesh)
    attention.check(config.model.attention, mesh.devices.flat[0].device_kind.split()[0])
    unchecked = [hosts.first("workdir", lambda: check_same_run(workdir, config))]
    opened = open_model(config)
    source, tokenizer, mesh, spec = opened.source, opened.tokenizer, opened.mesh, opened.spec
    arch = source.architecture
    check_image_token(tokenizer, arch.image_token_id)
    config, arch = of_base(config, opened)
    check_room(config.data, arch.image, positions=arch.decoder.max_position)
    given = inputs.look(config, tokenizer, source)
    unchecked.append(hosts.first("inputs", lambda: inputs.check(workdir, given)))
    part, parts = reader(mesh)
    mixture = Mixture.build(
        config.data,
        seed=config.seed,
        tokenizer=tokenizer,
        image=arch.image,
        rows=config.train.batch_rows,
        epochs=config.train.epochs,
        part=part,
        parts=parts,
    )
    hosts.agree("data", mixture.get_state()["mixture"])
    total_steps = count_steps(config, mixture, workdir)
    lap("data")
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(source.content_hash)  # reads what is loaded meanwhile
        trainable, frozen = split_trainable(opened.place(), spec.declarations, config.train.trainable)
    if config.adapter.router_input == "standardised" and hosts.first("new", lambda: latest_step(workdir) is None):
        trainable = standardised(config, spec, mesh, trainable, frozen, mixture)
    train_step, state = prepare(config, spec, mesh, trainable, total_steps)
    if config.model.base is not None:
        base, base_hash = locate(config.model.base), hashed.result()
    elif frozen:
        base, base_hash = keep_random_base(workdir, opened, flatten(frozen))
    else:
        base, base_hash = None, hashed.result()
    meta = Meta(
        architecture=arch,
        adapter=config.adapter,
        trained=config.train.trainable,
        prompt=config.data.prompt,
        image_aspect=config.data.image_aspect,
        base=base,
        base_hash=base_hash,
        seed=config.seed,
        masks="words",
        quantised=config.model.quantised,
    )
    if hosts.is_first():
        # Last, when nothing is left to refuse: a mistake must not tie the folder to a config that never ran.
        write_json(workdir / "config.json", config_json.to_json(config))
        inputs.write(workdir, given)
        tokenizer.save(str(workdir))
        write_json(workdir / "trainable.json", trainable_table(spec.declarations, config.train.trainable))
    hosts.barrier("start")
    lap("weights")
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        spec=spec,
        meta=meta,
        tokenizer=tokenizer,
        mixture=mixture,
        total_steps=total_steps,
        frozen=frozen,
        state=state,
        train_step=train_step,
        step=compiled_step(train_step, state, mesh),
        evaluation_step=jax.jit(train_step.forward.evaluation_step, out_shardings=replicated(mesh)),
        unchecked=tuple(filter(None, unchecked)),
    )


def of_base(config: Config, opened: OpenModel) -> tuple[Config, LlavaArchitecture]:
    """Returns the config with what it leaves to the base, and the architecture with what it says of pictures."""
    arch = opened.source.architecture
    config = dataclasses.replace(config, data=settled(config.data, opened.tokenizer, arch.image))
    # Whoever opens the run turns and cuts pictures as it was trained on them.
    image = taken(config.data, arch.image)
    return config, dataclasses.replace(arch, tiling=image.tiling, exif=image.exif, transparency=image.transparency)


def prepare(
    config: Config, spec: ModelSpec, mesh: jax.sharding.Mesh, trainable: Tree, total_steps: int
) -> tuple[TrainStep, TrainState]:
    """Returns the step and the state at step 0; where `trainable` is abstract, so is the state.

    The optimizer's moments lie where their parameters lie.
    """
    tx = make_tx(config.optimizer, spec.declarations)
    train_step = TrainStep(
        config=config,
        forward=Forward(config, spec.graph, len(config.data.domains)),
        declarations=spec.declarations,
        tx=tx,
        factor=schedule(config.optimizer, total_steps),
    )
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
    )
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    if isinstance(jax.tree.leaves(trainable)[0], jax.ShapeDtypeStruct):
        return train_step, TrainState(step=zero, applied=zero, params=trainable, opt_state=opt_state)
    opt_state = jax.jit(tx.init, out_shardings=shardings_of(opt_state))(trainable)
    step, applied = (jax.device_put(jnp.zeros((), jnp.int32), everywhere) for _ in range(2))
    return train_step, TrainState(step=step, applied=applied, params=trainable, opt_state=opt_state)


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of every array of `tree`."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def compiled_step(train_step: TrainStep, state: TrainState, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """Returns the jitted training step; it donates the state it is given."""
    # Without out_shardings donation silently does not happen on a mesh.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))


def check_same_run(workdir: epath.Path, config: Config) -> str | None:
    """Makes the workdir; in one where a run has begun (evaluated or saved), checks that it is this run.

    Returns:
        What to say of a run whose config is gone; otherwise None.

    Raises:
        UserError: the workdir holds a run of another config; the message names the first field that differs.
    """
    file = made(workdir) / "config.json"
    if not ((workdir / "eval").exists() or latest_step(workdir) is not None):
        return None
    if not file.exists():
        return f"{file}: is gone; whether that run was begun with this config is not known"
    # Through a config, so that a field that came later counts as the default that it then had.
    stored = read_json(file, remedy="put the run's own back, or choose another --workdir")
    before = _dotted(config_json.to_json(config_json.from_json(stored, where=str(file))))
    now = _dotted(config_json.to_json(config))
    for field in sorted(before.keys() | now.keys()):
        of_base = field in LEFT_TO_BASE and now.get(field) is None
        changeable = of_base or any((field + ".").startswith(f"{c}.") for c in CHANGEABLE)
        if before.get(field) != now.get(field) and not changeable:
            raise UserError(
                f"{file}: holds a run whose {field} is {before.get(field)!r}, the config has {now.get(field)!r}; "
                "put it back to resume that run, or choose another --workdir"
            )
    return None


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens dicts and lists: {"data.domains.0.name": …}."""
    if not isinstance(value, dict | list):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    dot = prefix and prefix + "."
    return {path: leaf for name, one in items for path, leaf in _dotted(one, f"{dot}{name}").items()}


def keep_random_base(
    workdir: epath.Path, opened: OpenModel, frozen: dict[str, jax.Array | Quantised]
) -> tuple[str, str]:
    """Writes frozen weights that no file holds into the run's folder, once; returns their name within it and hash.

    Quantised ones are written as the floats that they were made of.
    """
    folder, source = workdir / "base", opened.source
    if hosts.first("base", lambda: latest_step(folder)) is None:
        floats = {
            path: jax.ShapeDtypeStruct(opened.spec.declarations[path].shape, "float32", sharding=leaf.values.sharding)
            for path, leaf in frozen.items()
            if isinstance(leaf, Quantised)
        }
        meta = Meta(
            architecture=source.architecture,
            adapter=source.adapter,
            trained=(),
            prompt=None,
            image_aspect=None,
            base=None,
            base_hash=source.content_hash(),
            seed=source.seed,
        )
        whole = frozen | opened.spec.initial(floats, opened.seed)
        write_params(folder, {path: leaf for path, leaf in whole.items() if not isinstance(leaf, Quantised)}, meta)
    return folder.name, open_source(str(folder)).content_hash()


def count_steps(config: Config, mixture: Mixture, workdir: epath.Path) -> int:
    """Returns the steps of the run; epochs are packed once to be counted, and the count is kept in the workdir.

    Raises:
        UserError: the epochs have no example.
    """
    if config.train.steps is not None:
        return config.train.steps
    file = workdir / "epoch.json"
    counted = {
        "epochs": config.train.epochs,
        "batch_rows": config.train.batch_rows,
        "seed": config.seed,
        "data": config_json.to_json(config.data),
        "content": mixture.content,
    }

    def known() -> int | None:
        if not file.exists():
            return None
        before = read_json(file, {"steps": int}, remedy="remove it, and the steps are counted again")
        return before["steps"] if {name: before.get(name) for name in counted} == counted else None

    steps = hosts.first("epoch", known)
    if steps is None:
        found = hosts.gathered("epoch", mixture.count_batches())
        steps = hosts.first("epoch", lambda: max(found or ()))
        if hosts.is_first():
            write_json(file, {"steps": steps, **counted})
    if steps == 0:
        raise UserError(f"config: train.epochs {config.train.epochs} makes no example; raise it")
    return steps

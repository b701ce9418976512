"""Where a checkpoint's routers send the tokens of its held-out sets, and what each expert is worth."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float

from mole_jax.config import Config, TaskConfig
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import Placed, place_checkpoint
from mole_jax.evaluation.routing_report import RESULT, write_routing
from mole_jax.evaluation.routing_statistics import Routed
from mole_jax.evaluation.runner import no_example, open_held_out, skipped_records
from mole_jax.model.llava import Llava
from mole_jax.model.loss import token_losses
from mole_jax.model.objective import Arrays, hints
from mole_jax.parallel import hosts
from mole_jax.parallel.sharding import put_batch, replicated
from mole_jax.parameters import Tree, flatten, unflatten
from mole_jax.weights.open import open_source


class Sums(NamedTuple):
    """What the tokens of one batch add up to; the modalities K are those of `modality_classes`."""

    loss: Float[Array, ""]
    """Negative log-likelihood of the answer tokens, in nats."""
    answer_tokens: Float[Array, ""]
    tokens: Float[Array, "K L E"]
    """Tokens whose most probable expert is this one."""
    probabilities: Float[Array, "K L E"]
    """Sum of the router's probabilities."""
    entropy: Float[Array, "K L"]
    """Sum of their entropies, in nats."""


def modality_classes(batch: Arrays, image_token_id: int) -> Float[Array, "B S 3"]:
    """Returns to which modality each token belongs, one-hot over image, prompt, answer; padding is zero everywhere.

    An answer token is one that is itself supervised; whatever is neither image nor answer is prompt.
    """
    real = batch["segment_ids"] > 0
    image = real & (batch["tokens"] == image_token_id)
    # The mask stands where the token is predicted, one place before the token.
    answer = jnp.pad(batch["loss_mask"][:, :-1], ((0, 0), (1, 0))) > 0
    return jnp.stack([image, real & ~image & ~answer, answer], axis=-1).astype(jnp.float32)


def keep_experts(params: Tree, kept: Float[Array, "L E"]) -> Tree:
    """Returns `params` with the delta of every expert zero where `kept` is 0: rows e*R:(e+1)*R of its matrices B.

    Router and shared expert stay as they are: tokens sent to an expert without a delta go without it.
    """

    def masked(path: str, leaf: Array) -> Array:
        if not (path.startswith("decoder/layers/mlp/") and path.endswith("/adapter/b")):
            return leaf
        rows = jnp.repeat(kept > 0, leaf.shape[1] // kept.shape[1], axis=1)
        return jnp.where(rows[..., None], leaf, 0)

    return unflatten({path: masked(path, leaf) for path, leaf in flatten(params).items()})


@dataclasses.dataclass(frozen=True)
class RoutingForward:
    """One forward pass that looks at the routers; a pure function, jitted by the caller."""

    config: Config
    graph: nnx.GraphDef

    def step(self, params: Tree, batch: Arrays, kept: Float[Array, "L E"]) -> Sums:
        """Returns the sums of a batch with the experts that are `kept` (`keep_experts`)."""
        model: Llava = nnx.merge(self.graph, keep_experts(params, kept))
        hidden, use = model.hidden(
            batch["tokens"],
            batch["images"],
            batch["positions"],
            batch["segment_ids"],
            dtype=jnp.dtype(self.config.model.compute_dtype),
            classes=modality_classes(batch, model.arch.image_token_id),
            hints=hints(batch),
        )
        assert use is not None, "only a model without routers has no use"
        losses, _ = token_losses(model.decoder, hidden, batch["targets"])
        return Sums(
            loss=jnp.where(batch["loss_mask"] > 0, losses, 0.0).sum(),
            answer_tokens=batch["loss_mask"].sum().astype(jnp.float32),
            tokens=jnp.einsum("lbke->kle", use.choices),
            probabilities=jnp.einsum("lbke->kle", use.probs),
            entropy=jnp.einsum("lbk->kl", use.entropy),
        )


def routing_of_checkpoint(
    config: Config, checkpoint: str, workdir: epath.Path, *, base: str | None = None, by_layer: bool = False
) -> Routed:
    """Measures a checkpoint's routing on the tasks of `config`, each a domain, and writes the report into `workdir`.

    On several hosts every process calls it alike, with a `workdir` that they share; the first one writes.

    Args:
        config: the tasks; the checkpoint's own prompt and image preparation are used.
        checkpoint, base: as in `mole_jax.weights.open.open_source`.
        workdir: gets routing.json, routing.md and the figures.
        by_layer: knock out the experts of each layer by themselves too, one more pass for each.

    Raises:
        UserError: the checkpoint has no routed experts; or it, its tokenizer or a task cannot be read; or `workdir`
            has a routing report already.
    """
    source = open_source(checkpoint, base=base)
    if source.adapter.kind != "mole":
        raise UserError(
            f"{checkpoint}: has no routed experts (its adapters are of kind {source.adapter.kind}); name a checkpoint "
            "trained with adapter.kind mole"
        )
    if hosts.first("routing", (workdir / RESULT).exists):
        raise UserError(f"{workdir / RESULT}: a routing report is there already; choose another --workdir")
    routed = measure(place_checkpoint(config, source), checkpoint=checkpoint, step=source.step or 0, by_layer=by_layer)
    if hosts.is_first():
        write_routing(workdir, routed)
    return routed


def measure(placed: Placed, *, checkpoint: str, step: int, by_layer: bool) -> Routed:
    """Runs the held-out sets through the model, once as it is and once for each knock-out; see `Routed`."""
    adapter, layers = placed.config.adapter, placed.spec.arch.decoder.layers
    kept = knock_outs(layers, adapter.experts, by_layer=by_layer)
    run = jax.jit(RoutingForward(placed.config, placed.spec.graph).step, out_shardings=replicated(placed.mesh))
    tasks = placed.config.evaluation.tasks
    whole, losses, skipped = [], [], []
    for task in tasks:
        found, loss, left_out = _task(placed, task, run, kept)
        whole.append(found)
        losses.append(loss)
        skipped.append(left_out)
    answers = np.array([sums.answer_tokens for sums in whole])
    # Variants first, then domains.
    per_token = np.array(losses).T / answers
    deltas = per_token[1:] - per_token[0]
    return Routed(
        checkpoint=checkpoint,
        step=step,
        router_gradient=adapter.router_gradient,
        domains=[task.name for task in tasks],
        tokens=np.stack([sums.tokens for sums in whole]),
        probabilities=np.stack([sums.probabilities for sums in whole]),
        entropy=np.stack([sums.entropy for sums in whole]),
        losses=per_token[0],
        answer_tokens=answers,
        skipped=skipped,
        knock_out=deltas[: adapter.experts],
        knock_out_by_layer=deltas[adapter.experts :].reshape(layers, adapter.experts, -1) if by_layer else None,
    )


def knock_outs(layers: int, experts: int, *, by_layer: bool) -> list[Float[np.ndarray, "L E"]]:
    """Returns what to keep in each pass: everything; all but one expert; with `by_layer`, all but one of one layer."""
    one = np.eye(experts, dtype=np.float32)
    passes = [np.ones((layers, experts), np.float32), *(np.broadcast_to(1 - row, (layers, experts)) for row in one)]
    if by_layer:
        cells = np.eye(layers * experts, dtype=np.float32).reshape(-1, layers, experts)
        passes += list(1 - cells)
    return passes


def _task(placed: Placed, task: TaskConfig, run: Any, kept: list) -> tuple[Sums, list[float], dict[str, int]]:
    """Returns the sums of a task as it is, its loss in each pass, and how many records were skipped by reason."""
    batches = open_held_out(task, placed.config, placed.spec.arch, placed.tokenizer, placed.mesh)
    whole: Sums | None = None
    losses = np.zeros(len(kept))
    with jax.set_mesh(placed.mesh):
        for batch in batches:
            arrays = put_batch(batch.arrays(), placed.mesh)
            first, *others = jax.device_get([run(placed.params, arrays, one) for one in kept])
            losses += [float(sums.loss) for sums in (first, *others)]
            first = jax.tree.map(lambda leaf: leaf.astype(np.float64), first)
            whole = first if whole is None else jax.tree.map(np.add, whole, first)
    if whole is None or not whole.answer_tokens:
        raise no_example(task, placed.config.data)
    return whole, losses.tolist(), skipped_records(batches)

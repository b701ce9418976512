"""What routers by instance read, standardised by the first examples: against numpy, resumed, and never trained."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.files import absolute
from mole_jax.parameters import flatten
from mole_jax.training import router_input
from mole_jax.training.loop import train
from mole_jax.training.setup import set_up
from mole_jax.training.telemetry import read_metrics
from mole_jax.weights.open import open_source
from tests import tiny

ADAPTER = {
    "route_by": "instance",
    "shared_router": True,
    "router_input": "standardised",
    "router_gradient": "dense",
    "balance_weight": 0.0,
}
EXAMPLES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(router_input, "EXAMPLES", EXAMPLES)


def config(data, **train):
    return tiny.config(data, adapter=ADAPTER, train={"steps": 4, **train}, evaluation={"tasks": ()})


def _unit(x):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)


def test_mean_and_deviation_are_those_of_the_first_examples(data, tmp_path):
    """Each example's prompt is pooled by itself here, one after the other, in numpy."""
    run = set_up(config(data), absolute(str(tmp_path / "run")))
    begin = run.mixture.get_state()
    model, read = nnx.merge(run.spec.graph, run.state.params, run.frozen), []
    while len(read) < EXAMPLES:
        batch = next(run.mixture).arrays()
        x = np.asarray(model.embed(batch["tokens"], batch["images"], jnp.float32), np.float64)
        for row in range(len(x)):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                (places,) = np.nonzero(batch["segment_ids"][row] == segment)
                # The mask stands where an answer's token is predicted: the place before it is the last of the prompt.
                (supervised,) = np.nonzero(batch["loss_mask"][row][places])
                read.append(_unit(_unit(x[row, places[: supervised[0] + 1]]).mean(0)))
    leaves = flatten(run.state.params)
    np.testing.assert_allclose(leaves["decoder/router/mean"], np.mean(read, 0), atol=1e-5)
    np.testing.assert_allclose(leaves["decoder/router/deviation"], np.std(read, 0), atol=1e-5)
    run.mixture.set_state(begin)
    again = set_up(config(data), absolute(str(tmp_path / "other")))
    assert again.mixture.get_state() == begin, "the run begins with its first example"


@pytest.mark.slow
def test_they_are_saved_never_trained_and_a_resumed_run_keeps_them(data, tmp_path):
    whole, cut = (absolute(str(tmp_path / name)) for name in ("whole", "cut"))
    train(config(data), whole)
    started = flatten(set_up(config(data), absolute(str(tmp_path / "fresh"))).state.params)
    source = open_source(str(whole))
    stored = {path: np.asarray(leaf) for path, leaf in source.leaves(source.own.paths).items()}
    for name in ("mean", "deviation"):
        np.testing.assert_array_equal(stored[f"decoder/router/{name}"], started[f"decoder/router/{name}"])
    assert np.abs(stored["decoder/router/kernel"] - started["decoder/router/kernel"]).max() > 0
    train(config(data), cut)
    (cut / "checkpoints" / "4").rmtree()
    router_input.EXAMPLES = 1  # a run that goes on does not measure again
    train(config(data), cut)
    assert [line["loss"] for line in read_metrics(cut)] == [line["loss"] for line in read_metrics(whole)]

"""`train.loss_average example`: every example weighs 1, however examples are packed, cut into pieces or spread."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from mole_jax.data.mixture import Mixture
from mole_jax.tokenizer import Tokenizer
from mole_jax.training.summary import step_metrics
from mole_jax.weights.open import open_base
from tests import tiny
from tests.training.test_step import Trainer

LONG = {"sequence_length": 192}
"""Room for two examples a row."""
OF_POSITIONS = ("tokens", "targets", "loss_mask", "positions", "segment_ids", "domain_ids")
UNROUTED = {"kind": "lora"}
"""Without a balance loss the total is the loss of the tokens alone."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def image(data):
    return open_base(tiny.config(data).model, 0).architecture.image


@pytest.fixture(scope="module")
def batch(data, image):
    """Eight rows of up to two examples each, with an example without an answer and an empty row among them."""
    tokenizer = Tokenizer.load(tiny.TOKENIZER)
    mixture = Mixture.build(replace(tiny.config(data).data, **LONG), seed=0, tokenizer=tokenizer, image=image, rows=8)
    arrays = {name: array.copy() for name, array in next(mixture).arrays().items()}
    mixture.close()
    assert (arrays["segment_ids"].max(axis=1) == 2).sum() > 2
    arrays["loss_mask"][0][arrays["segment_ids"][0] == 2] = 0
    for name in OF_POSITIONS:
        arrays[name][3] = 0
    return arrays


def unpacked(batch, image):
    """The same examples, one a row, and empty rows up to sixteen."""
    alone = {name: np.zeros((16, *array.shape[1:]), array.dtype) for name, array in batch.items()}
    row = 0
    for b in range(8):
        tiles = 0
        for k in range(1, batch["segment_ids"][b].max() + 1):
            where = np.flatnonzero(batch["segment_ids"][b] == k)
            for name in OF_POSITIONS:
                alone[name][row, : len(where)] = batch[name][b, where]
            alone["segment_ids"][row, : len(where)] = 1
            own = np.count_nonzero(batch["tokens"][b, where] == image.token_id) // image.tile_features
            alone["images"][row, :own] = batch["images"][b, tiles : tiles + own]
            tiles, row = tiles + own, row + 1
    return alone


def trained(data, batch, *, average="example", rows=8, accumulation=1, **sections):
    """The output of the first step and its gradients."""
    train = {"loss_average": average, "accumulation": accumulation, "batch_rows": rows}
    trainer = Trainer(tiny.config(data, adapter=UNROUTED, train=train, **sections))
    return trainer(batch), trainer.gradients()


@pytest.fixture(scope="module")
def whole(data, batch):
    """On one device, undivided."""
    return trained(data, batch)


def same(found, expected):
    np.testing.assert_allclose(found[0]["total_loss"], expected[0]["total_loss"], rtol=1e-5)
    np.testing.assert_array_equal(found[0]["sums"].units, expected[0]["sums"].units)
    for path, leaf in found[1].items():
        scale = np.abs(expected[1][path]).max()
        np.testing.assert_allclose(leaf, expected[1][path], atol=1e-5 * scale, rtol=1e-5, err_msg=path)


def losses_by_hand(data, batch) -> list[tuple[int, np.ndarray]]:
    """Domain and losses of the supervised tokens of each example, from the model's logits, in numpy."""
    trainer = Trainer(tiny.config(data, adapter=UNROUTED))
    with jax.set_mesh(trainer.mesh):
        model = nnx.merge(trainer.spec.graph, trainer.state.params, trainer.frozen)
        places = (batch[name] for name in ("tokens", "images", "positions", "segment_ids"))
        hidden, _ = model.hidden(*places, dtype=np.dtype("float32"), segments=2)
        logits = np.asarray(model.decoder.logits(hidden, model.decoder.head_matrix(hidden.dtype)), np.float64)
    likelihood = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = []
    for b in range(8):
        for k in (1, 2):
            where = np.flatnonzero((batch["segment_ids"][b] == k) & (batch["loss_mask"][b] > 0))
            if len(where):
                found.append((batch["domain_ids"][b, where[0]], -likelihood[b, where, batch["targets"][b, where]]))
    return found


def test_the_loss_is_the_mean_over_examples_of_their_means(data, batch, whole):
    by_hand = losses_by_hand(data, batch)
    assert len({len(losses) for _, losses in by_hand}) > 2  # of one length both averages would be the same
    of_examples = np.mean([losses.mean() for _, losses in by_hand])
    of_tokens = np.concatenate([losses for _, losses in by_hand]).mean()
    assert abs(of_examples - of_tokens) > 1e-3
    np.testing.assert_allclose(whole[0]["total_loss"], of_examples, rtol=1e-5)
    by_token, _ = trained(data, batch, average="token")
    np.testing.assert_allclose(by_token["total_loss"], of_tokens, rtol=1e-5)
    metrics = step_metrics(whole[0], ["a", "b", "c"])
    assert metrics["loss"] == pytest.approx(of_examples, rel=1e-5)
    assert metrics["supervised_tokens"] == sum(len(losses) for _, losses in by_hand)
    for i, name in enumerate("abc"):
        expected = np.mean([losses.mean() for domain, losses in by_hand if domain == i])
        assert metrics[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
    assert whole[0]["sums"].units.tolist() == [sum(domain == i for domain, _ in by_hand) for i in range(3)]


def test_packed_is_unpacked(data, batch, image, whole):
    same(trained(data, unpacked(batch, image), rows=16), whole)


@pytest.mark.parametrize(
    ("mesh", "pieces"),
    [
        ({"data": 4}, 2),
        pytest.param({"data": 8}, 1, marks=pytest.mark.slow),
        pytest.param({"data": 1}, 2, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_and_pieces_do_not_matter(data, batch, whole, mesh, pieces):
    same(trained(data, batch, mesh=mesh, accumulation=pieces), whole)

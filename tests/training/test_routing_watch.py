"""The routers while a run trains: the warning of a collapse, the numbers by layer, and the image in TensorBoard."""

from __future__ import annotations

import io
import json
import math
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from mole_jax.files import absolute
from mole_jax.model.objective import Sums
from mole_jax.training.loop import train
from mole_jax.training.routing_watch import EVENTS_FILE, WINDOW, RoutingWatch
from mole_jax.training.summary import step_metrics
from mole_jax.training.telemetry import MetricsWriter, read_metrics, record_events
from mole_jax.training.trackers.tensorboard import TensorBoard
from tests import tiny

DOMAINS = ["general", "document", "biomedical"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


class Watched:
    """A watch, what it said, and the steps it has seen."""

    def __init__(self, workdir, **sections):
        self.said: list[str] = []
        self.step, self.folder = 0, absolute(str(workdir))
        self.watch = RoutingWatch(tiny.config(workdir, **sections), self.folder, self.said.append)

    def take(self, steps, *counts):
        """Shows it `steps` steps in which each layer sent its experts so many tokens of every domain."""
        for _ in range(steps):
            self.step += 1
            self.watch.add(self.step, np.tile(np.float32(counts), (3, 1, 1)))

    def events(self):
        lines = (self.folder / EVENTS_FILE).read_text().splitlines()
        return [(event["step"], event["event"], event["layer"], event["expert"]) for event in map(json.loads, lines)]


FAIR, COLLAPSED, HALF_WAY = [30, 30, 40], [1, 98, 1], [8, 92, 0]


def test_a_collapse_is_told_once_and_again_after_a_recovery(tmp_path):
    run = Watched(tmp_path)
    run.take(WINDOW - 1, FAIR, COLLAPSED)
    assert run.said == [], "a few steps say nothing yet"
    run.take(3 * WINDOW, FAIR, COLLAPSED)
    (line,) = run.said
    assert line == (
        f"step {WINDOW}: layer 1: expert 1 takes 98 % of the tokens over the last {WINDOW} steps; "
        "raise adapter.balance_weight (0.01) or lower optimizer.router_learning_rate (0.01)"
    )
    run.take(2 * WINDOW, FAIR, HALF_WAY)
    run.take(2 * WINDOW, FAIR, COLLAPSED)
    assert len(run.said) == 1, "92 % is no recovery"
    # After n fair steps of 20 the expert has (98 (20 - n) + 30 n) / 20 %: 90 % or less from n = 3 on.
    run.take(WINDOW, FAIR, FAIR)
    # Back again: over 95 % from n = 19 collapsed ones on, (98 * 19 + 30) / 20 = 94.6 %, so at n = 20.
    run.take(WINDOW, FAIR, COLLAPSED)
    end = 8 * WINDOW - 1
    assert run.events() == [
        (WINDOW, "collapsed", 1, 1),
        (end + 3, "recovered", 1, 1),
        (end + 2 * WINDOW, "collapsed", 1, 1),
    ]
    assert len(run.said) == 3
    assert "has recovered" in run.said[1]


def test_every_layer_is_told_by_itself(tmp_path):
    run = Watched(tmp_path, adapter={"balance_loss": "pooled"})
    run.take(WINDOW, COLLAPSED, FAIR, [0, 0, 5])
    assert run.events() == [(WINDOW, "collapsed", 0, 1), (WINDOW, "collapsed", 2, 2)]
    assert "set adapter.balance_loss to per_layer" in run.said[0]


def test_fair_routers_leave_no_file(tmp_path):
    run = Watched(tmp_path)
    run.take(2 * WINDOW, FAIR, HALF_WAY)
    assert not run.said
    assert not (tmp_path / EVENTS_FILE).exists()


def test_events_of_steps_taken_again_go(tmp_path):
    file = absolute(str(tmp_path / "events.jsonl"))
    record_events(file, 3, [{"what": "first"}, {"what": "second"}])
    record_events(file, 9, [{"what": "lost to a kill"}])
    record_events(file, 8, [{"what": "after it"}])
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(event["step"], event["what"]) for event in found] == [(3, "first"), (3, "second"), (8, "after it")]


def test_metrics_by_layer():
    """Layer 0 gives each domain an expert of its own, layer 1 treats all alike, in layer 2 all go to one expert."""
    use = np.zeros((3, 3, 3))
    use[:, 0] = np.diag([10, 10, 10])
    use[:, 1], use[:, 2, 0] = 10 / 3, 10
    sums = Sums(*[np.zeros(())] * len(Sums._fields))._replace(
        losses=np.ones(3), units=np.ones(3), tokens=np.ones(3), entropy=np.array([6.0, 9.0, 12.0]), use=use
    )
    output = {"sums": sums} | dict.fromkeys(("balance_loss", "grad_norm", "learning_rate"), 0.0)
    found = step_metrics(output, DOMAINS)
    most = math.log(3)
    # Of 30 tokens.
    assert [found[f"router/entropy/layer{layer}"] for layer in range(3)] == pytest.approx([0.2, 0.3, 0.4])
    assert found["router/entropy"] == pytest.approx(0.3)
    for name, expected in (("specialisation", [most, 0, 0]), ("load_entropy", [most, most, 0])):
        assert [found[f"router/{name}/layer{layer}"] for layer in range(3)] == pytest.approx(expected, abs=1e-12)
    alone = step_metrics({**output, "sums": sums._replace(use=use * [[[1]], [[0]], [[0]]])}, DOMAINS)
    assert not any(name.startswith("router/specialisation") for name in alone), "one domain alone tells nothing"


def test_the_image_has_each_domain(tmp_path):
    run = Watched(tmp_path)
    with MetricsWriter(tmp_path, None, [TensorBoard(run.folder, 0)]) as writer:
        run.watch.draw(1, writer)
        run.take(3, FAIR, COLLAPSED)
        run.watch.draw(3, writer)
        use = np.zeros((3, 2, 3))
        use[0] = 7
        only = RoutingWatch(tiny.config(tmp_path), run.folder, print)
        only.add(4, use)
        only.draw(4, writer)
    (_, three), (_, one) = images(tmp_path)
    assert three.width > 1.5 * one.width, "domains without a token are left out"
    assert [step for step, _ in images(tmp_path)] == [3, 4], "nothing seen, nothing drawn"


def test_a_run_shows_its_routers(data, tmp_path):
    """Three steps, logged every second one, a checkpoint due at each: images at the logged step and the last."""
    config = tiny.config(
        data, train={"steps": 3, "batch_rows": 4, "log_every": 2}, checkpoint={"every": 1}, evaluation={"tasks": ()}
    )
    train(config, absolute(str(tmp_path)))
    assert [step for step, _ in images(tmp_path)] == [2, 3]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        for layer in range(2):
            assert 0 <= line[f"router/specialisation/layer{layer}"] <= math.log(3)
            assert 0 < line[f"router/load_entropy/layer{layer}"] <= math.log(3)


def images(workdir):
    """Returns (step, image) of every router/use in TensorBoard's events."""
    (file,) = (workdir / "tensorboard").iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        # A record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum.
        (size,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            if value.tag == "router/use" and value.HasField("image"):
                found.append((event.step, Image.open(io.BytesIO(value.image.encoded_image_string))))
    return found

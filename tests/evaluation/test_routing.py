"""The routing report: its numbers against other ways to them, and the command as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from mole_jax.config import MeshConfig
from mole_jax.data.batch import single_row, stack
from mole_jax.errors import UserError
from mole_jax.evaluation import routing, routing_report
from mole_jax.evaluation import routing_statistics as statistics
from mole_jax.evaluation.checkpoint import place_checkpoint
from mole_jax.evaluation.runner import open_held_out
from mole_jax.files import absolute
from mole_jax.model.objective import Forward
from mole_jax.parallel.sharding import put_batch, replicated
from mole_jax.parameters import flatten, unflatten
from mole_jax.weights.open import open_source
from tests import tiny
from tests.evaluation import checkpoints
from tests.evaluation.test_evaluate import free_port

# One worker takes them all: they share the compiled programs and the checkpoints.
pytestmark = pytest.mark.xdist_group("routing")
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": tiny.CHILD_FLAGS}
EXPERTS, RANK, LAYERS = 3, 2, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints.write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def mole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mole") / "run"
    return checkpoints.write_run(folder, base, rank=RANK, experts=EXPERTS, router_bias=True)


def two_domains(data):
    """Returns a config with eight records of each, six at a time, so that the last batch has empty rows."""
    tasks = [{"name": name, "path": str(data / name / "test.json"), "limit": 8} for name in ("document", "general")]
    return checkpoints.config(data, *tasks, evaluation={"batch_size": 6})


@pytest.fixture(scope="module")
def config(data):
    return two_domains(data)


@pytest.fixture(scope="module")
def placed(config, mole):
    return place_checkpoint(config, open_source(str(mole)))


@pytest.fixture(scope="module")
def routed(placed):
    return routing.measure(placed, checkpoint="a run", step=0, by_layer=True)


@pytest.fixture(scope="module")
def evaluated(placed):
    """Returns what the evaluation step finds, as a function of task and parameters: loss per answer token, and use."""
    forward = Forward(placed.config, placed.spec.graph, len(placed.config.data.domains))
    step = jax.jit(forward.evaluation_step, out_shardings=replicated(placed.mesh))

    def run(task, params):
        batches = open_held_out(task, placed.config, placed.spec.arch, placed.tokenizer, placed.mesh)
        sums = [jax.device_get(step(params, {}, put_batch(batch.arrays(), placed.mesh))) for batch in batches]
        loss, tokens = (sum(getattr(one, name).sum() for one in sums) for name in ("losses", "tokens"))
        return loss / tokens, sum(one.use.sum(axis=0) for one in sums)

    return run


def test_modalities_of_a_row():
    """Two turns: an image, a question, an answer, another question, another answer; two places of padding."""
    tokens = np.array([1, 9, 9, 5, 6, 7, 5, 6, 7, 2])
    supervised = np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1])
    image = np.zeros((1, 2, 2, 3), np.uint8)
    row = single_row(tokens, supervised, image, record_id="a", domain_id=0, length=12, image_slots=1, pad_id=9)
    classes = np.array(routing.modality_classes(stack([row]).arrays(), 9))[0]
    named = ["".join(letter for letter, one in zip("ipa", token, strict=True) if one) for token in classes]
    assert named == [*"piippappaa", "", ""]


def test_counts_are_those_of_the_batches(routed, placed):
    """Tokens of each modality, counted from the batches; each token is counted once in every layer."""
    for number, task in enumerate(placed.config.evaluation.tasks):
        expected = np.zeros(3)
        for batch in open_held_out(task, placed.config, placed.spec.arch, placed.tokenizer, placed.mesh):
            images = batch.tokens == placed.spec.arch.image_token_id
            real, answers = np.count_nonzero(batch.segment_ids), batch.loss_mask.sum()
            expected += [np.count_nonzero(images), real - np.count_nonzero(images) - answers, answers]
        assert (expected > 0).all()
        for counts in (routed.tokens[number], routed.probabilities[number]):
            np.testing.assert_allclose(counts.sum(axis=-1), np.tile(expected[:, None], LAYERS), rtol=1e-6)
        assert routed.answer_tokens[number] == expected[2]
    assert routed.tokens.shape == (2, 3, LAYERS, EXPERTS)
    assert (routed.router_entropy > 0).all()
    assert (routed.router_entropy <= math.log(EXPERTS)).all()


def test_loss_and_use_are_those_of_the_evaluation(routed, placed, evaluated):
    for number, task in enumerate(placed.config.evaluation.tasks):
        loss, use = evaluated(task, placed.params)
        assert routed.losses[number] == pytest.approx(loss, rel=1e-6)
        np.testing.assert_array_equal(routed.tokens[number].sum(axis=0), use)


@pytest.mark.parametrize("layer", [None, 1])
def test_a_knock_out_is_a_model_whose_expert_is_zero(routed, placed, evaluated, layer):
    expert, leaves = 2, flatten(placed.params)
    changed = []
    for path in leaves:
        if "/mlp/" in path and path.endswith("adapter/b"):
            matrix = np.array(leaves[path])
            matrix[slice(None) if layer is None else layer, expert * RANK : (expert + 1) * RANK] = 0
            leaves[path], changed = jax.device_put(matrix, leaves[path].sharding), [*changed, path]
    assert len(changed) == 3, "gate, up and down"
    found = routed.knock_out[expert] if layer is None else routed.knock_out_by_layer[layer, expert]
    for number, task in enumerate(placed.config.evaluation.tasks):
        loss, _ = evaluated(task, unflatten(leaves))
        assert found[number] == pytest.approx(loss - routed.losses[number], abs=1e-6)
        assert abs(found[number]) > 1e-4, "the expert matters, so that the comparison says something"


def test_nothing_is_missed_of_an_expert_that_no_token_goes_to(placed):
    """All tokens to expert 1: without the others the loss is the same to the last bit, and both are named dead."""
    leaves = flatten(placed.params)
    path = "decoder/layers/mlp/router/bias"
    leaves[path] = jax.device_put(np.tile(np.float32([0, 1e9, 0]), (LAYERS, 1)), leaves[path].sharding)
    forced = dataclasses.replace(placed, params=unflatten(leaves))
    found = routing.measure(forced, checkpoint="a run", step=0, by_layer=False)
    np.testing.assert_array_equal(found.knock_out[[0, 2]], 0)
    assert (np.abs(found.knock_out[1]) > 1e-4).all()
    plain = routing_report.as_json(found)
    assert plain["collapsed"] == [{"layer": layer, "expert": 1} for layer in range(LAYERS)]
    assert plain["dead"] == [{"layer": layer, "expert": expert} for layer in range(LAYERS) for expert in (0, 2)]
    assert "layer 1 has collapsed: expert 1 gets 100.0 % of the tokens" in routing_report.text(found)
    assert [one["domain_information"] for one in plain["layers"]] == [0] * LAYERS


def test_six_devices_find_what_one_finds(routed, config, mole):
    """Rows over two devices times three, the experts over three of them."""
    spread = dataclasses.replace(config, mesh=MeshConfig(data=2, expert=3))
    found = routing.measure(place_checkpoint(spread, open_source(str(mole))), checkpoint="a run", step=0, by_layer=True)
    np.testing.assert_array_equal(found.tokens, routed.tokens)
    np.testing.assert_allclose(found.probabilities, routed.probabilities, rtol=1e-5)
    np.testing.assert_allclose(found.losses, routed.losses, rtol=1e-5)
    np.testing.assert_allclose(found.knock_out_by_layer, routed.knock_out_by_layer, atol=1e-5)


def test_one_expert_and_one_domain_have_nothing_to_share(tmp_path):
    counts = np.full((1, 3, 2, 1), 5.0)
    alone = statistics.Routed(
        checkpoint="a run",
        step=0,
        router_gradient="none",
        domains=["general"],
        tokens=counts,
        probabilities=counts,
        entropy=np.zeros((1, 3, 2)),
        losses=np.ones(1),
        answer_tokens=np.full(1, 5.0),
        skipped=[{"too long": 2}],
        knock_out=np.zeros((1, 1)),
        knock_out_by_layer=None,
    )
    rows = routing_report.layer_rows(alone)
    assert rows[1] == ["0", "100.0 %", "0.000 (-)", "0.000 (-)", "0.000 (-)"]
    routing_report.write_routing(absolute(str(tmp_path)), alone)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"use", "layers", "knock_out"}
    assert routing_report.findings(alone)[-1] == "general: 2 records were skipped: too long"


def test_a_checkpoint_without_routed_experts_is_refused(config, base, tmp_path):
    with pytest.raises(UserError, match=r"base: has no routed experts \(its adapters are of kind none\)"):
        routing.routing_of_checkpoint(config, str(base), absolute(str(tmp_path)))


def commands():
    """Returns the commands of docs/routing.md."""
    blocks = (tiny.ROOT / "docs" / "routing.md").read_text().split("```bash\n")[1:]
    return [shlex.split(block.partition("```")[0]) for block in blocks]


def door(argv):
    return subprocess.run(argv, env=ENVIRONMENT, cwd=tiny.ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def config_file(data):
    file = data / "routing.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT)!r})\nfrom pathlib import Path\n"
        "from tests.evaluation.test_routing import two_domains\n\n"
        f"def get_config():\n    return two_domains(Path({str(data)!r}))\n"
    )
    return file


def documented(config_file, mole, workdir):
    """Returns the documented command with a knock-out by layer, with these paths."""
    (line,) = [line for line in commands() if "layers" in line]
    paths = {"configs/quickstart.py": config_file, "runs/quickstart/mole": mole}
    paths[line[line.index("--workdir") + 1]] = workdir
    return [sys.executable, *(str(paths.get(word, word)) for word in line[1:])]


def test_the_documented_command(config_file, config, mole, tmp_path, routed):
    """The one with a knock-out by layer; what it writes is what was measured here, and it is never written over."""
    done = door(documented(config_file, mole, tmp_path))
    assert done.returncode == 0, done.stderr
    figures = {"use", "layers", "knock_out", "knock_out_by_layer"}
    assert {path.stem for path in tmp_path.glob("*.png")} == figures
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in figures)
    page = (tmp_path / "routing.md").read_text()
    assert all(f"![]({name}.png)" in page for name in figures)
    found = json.loads((tmp_path / "routing.json").read_text())
    assert found["tokens"] == routed.tokens.tolist()
    np.testing.assert_allclose(found["knock_out_by_layer"], routed.knock_out_by_layer, atol=1e-5)
    assert f"{found['held_out']['document']['loss']:.3f}" in done.stdout
    with pytest.raises(UserError, match=r"routing\.json: a routing report is there already; choose another --workdir"):
        routing.routing_of_checkpoint(config, str(mole), absolute(str(tmp_path)))


def test_a_mistake_is_one_line_and_status_2():
    done = door([sys.executable, *commands()[-1][1:-1], "layer"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--knock-out: invalid choice: 'layer'" in done.stderr


@pytest.mark.slow
def test_two_processes_find_what_one_finds(config_file, mole, tmp_path, routed):
    """Each as on a host of its own: they share the rows of every batch, and the first one writes and speaks."""
    line = [*documented(config_file, mole, tmp_path), "--mesh.data", "2", "--processes", "2"]
    line += ["--coordinator", f"localhost:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*line, "--process", str(i)], env=ENVIRONMENT, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert ["report:" in text for text in printed] == [True, False]
    found = json.loads((tmp_path / "routing.json").read_text())
    assert found["tokens"] == routed.tokens.tolist()
    np.testing.assert_allclose(found["knock_out"], routed.knock_out, atol=1e-5)

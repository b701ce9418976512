"""The sampler on tiny LLaVA-MoLEs with random adapters, against the forward pass that training uses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.adapters.mixture import Hints
from mole_jax.config import AdapterConfig, DecodingConfig, MeshConfig
from mole_jax.model.architecture import PRESETS
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import parameter_sharding
from mole_jax.parameters import AdapterParam, RouterParam, unflatten
from mole_jax.serving.decode import programs
from mole_jax.serving.sampler import CHUNK, Prompt, Sampler, bucket, pad
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.open import open_source, place
from mole_jax.weights.sources import RandomSource
from tests.tiny import TOKENIZER

ARCH = PRESETS["tiny"]
EOS = 2
GREEDY = DecodingConfig(max_new_tokens=40)


def mole(gradient="straight_through", mesh=MeshConfig(data=1), **adapter):  # noqa: B008  a frozen dataclass
    """Returns (spec, mesh, arrays on it) of a model whose adapters and routers are random and strong."""
    spec = ModelSpec.of(ARCH, AdapterConfig(rank=2, alpha=4.0, experts=4, router_gradient=gradient, **adapter))
    devices = make_mesh(mesh)
    leaves = place(spec, RandomSource(ARCH, 0), devices, ("adapters", "router"), "float32", 0)
    for i, (path, one) in enumerate(spec.declarations.items()):
        if isinstance(one, AdapterParam | RouterParam):
            random = 0.5 * jax.random.normal(jax.random.fold_in(jax.random.key(5), i), one.shape)
            leaves[path] = jax.device_put(random, parameter_sharding(path, one, devices))
    return spec, devices, unflatten(leaves)


def sampler(spec, mesh, decoding=GREEDY, *, batch_size=8, **other) -> Sampler:
    dtype = jnp.dtype("float32")
    return Sampler(spec.graph, mesh, batch_size=batch_size, eos_ids=(EOS,), dtype=dtype, decoding=decoding, **other)


def prompt(text: int, images: int = 0, seed: int = 0) -> Prompt:
    """`text` random tokens with the images after the first, one after the other."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 500, text).astype(np.int32)
    span = np.full(images * ARCH.image_span, ARCH.image_token_id, np.int32)
    side = ARCH.vision.image_size
    pixels = random.integers(0, 256, (images, side, side, 3)).astype(np.uint8)
    return Prompt(np.concatenate([tokens[:1], span, tokens[1:]]), pixels)


PROMPTS = [prompt(6, 1, seed=1), prompt(23, seed=2), prompt(9, 2, seed=3), prompt(1, seed=4), prompt(15, 1, seed=5)]


@pytest.fixture(scope="module")
def trained():
    return mole()


@pytest.mark.parametrize(
    ("gradient", "adapter"),
    [
        ("straight_through", {}),
        ("dense", {}),
        ("straight_through", {"route_by": "instance", "shared_router": True, "shared_rank": 2}),
        ("dense", {"route_by": "instance", "shared_router": True, "router_input": "standardised"}),
        *(pytest.param(one, {}, marks=pytest.mark.slow) for one in ("none", "gate_scaled")),
    ],
)
def test_greedy_answers_are_the_argmax_of_the_training_forward(gradient, adapter):
    """At every position, for unequal prompts with and without images, in batches of different rows and padding."""
    spec, mesh, params = mole(gradient, **adapter)
    answers = sampler(spec, mesh)(params, {}, PROMPTS)
    rows = [np.concatenate([one.tokens, answer]) for one, answer in zip(PROMPTS, answers, strict=True)]
    shape = (len(rows), max(map(len, rows)))
    tokens, segments, images = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros((5, 2, 28, 28, 3), "uint8"),
    )
    for i, (row, one) in enumerate(zip(rows, PROMPTS, strict=True)):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        images[i, : len(one.images)] = one.images

    @jax.jit
    def best(params):
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        asked = positions < jnp.asarray([[len(one.tokens)] for one in PROMPTS])
        told = Hints(asked, jnp.zeros(shape, jnp.int32))
        return jnp.argmax(nnx.merge(spec.graph, params)(tokens, images, positions, segments, told), axis=-1)

    for one, answer, expected in zip(PROMPTS, answers, np.asarray(best(params)), strict=True):
        ended = [EOS] if len(answer) < GREEDY.max_new_tokens else []
        start = len(one.tokens) - 1
        assert [*answer, *ended] == expected[start : start + len(answer) + len(ended)].tolist()
    assert sum(map(len, answers)) > 3 * GREEDY.max_new_tokens  # most answers are long
    assert len({tuple(answer[:3]) for answer in answers}) == len(answers)


def test_any_of_several_ends_closes_an_answer(trained):
    spec, mesh, params = trained
    alone = sampler(spec, mesh)(params, {}, PROMPTS)
    ends = (EOS, alone[0][4], alone[1][7])
    several = dataclasses.replace(sampler(spec, mesh), eos_ids=ends)
    for got, whole in zip(several(params, {}, PROMPTS), alone, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole))
        assert got == whole[:first]
    assert len(several(params, {}, PROMPTS)[0]) <= 4
    streamed = dict.fromkeys(range(len(PROMPTS)), "")
    worded = dataclasses.replace(several, tokenizer=Tokenizer.load(TOKENIZER))
    for row, piece in worded.stream(params, {}, PROMPTS, every=3):
        streamed[row] += piece
    assert list(streamed.values()) == worded.answers(params, {}, PROMPTS)


def test_the_ends_of_a_model_and_its_tokenizer():
    words = Tokenizer.load(TOKENIZER)
    decoder = ARCH.decoder
    assert words.ending_ids(decoder.eos_ids) == (words.eos_id,) == (2,)
    assert words.ending_ids((300, 2, 301)) == (2, 300, 301)
    # None of them is the tokenizer's: they are of another vocabulary, where only what is special here can be meant.
    assert words.ending_ids((300, 1, 301)) == (2, 1)


def test_the_router_setting_matters(trained):
    """Otherwise the test above would not see a wrong one."""
    spec, mesh, params = trained
    dense = ModelSpec.of(ARCH, dataclasses.replace(spec.adapter, router_gradient="dense"))
    assert sampler(spec, mesh)(params, {}, PROMPTS) != sampler(dense, mesh)(params, {}, PROMPTS)


@pytest.mark.parametrize(
    "layout",
    [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), pytest.param(MeshConfig(data=2, fsdp=4), marks=pytest.mark.slow)],
    ids=["fsdp2_expert2_tensor2", "data2_fsdp4"],
)
def test_eight_devices_answer_as_one(trained, layout):
    drawn = dataclasses.replace(GREEDY, temperature=0.8, top_p=0.9, seed=7)
    spec, mesh, params = trained
    many, devices, parts = mole(mesh=layout)
    for decoding in (GREEDY, drawn):
        alone = sampler(spec, mesh, decoding)(params, {}, PROMPTS)
        assert sampler(many, devices, decoding)(parts, {}, PROMPTS) == alone


def test_other_requests_compile_nothing(trained):
    spec, mesh, params = trained
    run = programs(mesh)
    sampler(spec, mesh)(params, {}, PROMPTS)
    compiled = run.prefill._cache_size(), run.extend._cache_size()
    others = [prompt(20, seed=6), prompt(4, 3, seed=7), prompt(2, seed=8), prompt(11, seed=9), prompt(7, seed=10)]
    settings = dataclasses.replace(GREEDY, temperature=1.0, top_k=5, top_p=0.8, repetition_penalty=1.2, seed=3)
    sampler(spec, mesh, settings)(params, {}, others)
    sampler(spec, mesh, dataclasses.replace(GREEDY, max_new_tokens=35))(params, {}, [*others, PROMPTS[3]])
    for _ in sampler(spec, mesh).stream(params, {}, others):
        pass
    assert (run.prefill._cache_size(), run.extend._cache_size()) == compiled
    # It counts: more positions than the bucket has are another shape.
    sampler(spec, mesh)(params, {}, [prompt(25), *others])
    assert (run.prefill._cache_size(), run.extend._cache_size()) == (compiled[0] + 1, compiled[1] + 1)


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 16)
    assert len(set(sizes)) == 17


def test_padding_runs_no_vision_for_text_and_little_for_the_rest():
    arrays = pad([prompt(5), prompt(17)], shards=1)
    assert (arrays["tokens"].shape, arrays["images"].shape) == ((2, 24), (0, 28, 28, 3))
    arrays = pad([prompt(5, 1), prompt(5), prompt(5, 2)], shards=2)
    assert (arrays["tokens"].shape[0], arrays["images"].shape[0]) == (4, 4)
    assert arrays["images"][:3].any(axis=(1, 2, 3)).all()


def test_draws_depend_on_the_number_and_not_on_the_row(trained):
    spec, mesh, params = trained
    drawn = dataclasses.replace(GREEDY, temperature=1.0)
    whole = sampler(spec, mesh, drawn)(params, {}, PROMPTS)
    numbered = [dataclasses.replace(one, number=number) for number, one in enumerate(PROMPTS)]
    assert sampler(spec, mesh, drawn)(params, {}, numbered[::-1]) == whole[::-1]
    assert sampler(spec, mesh, drawn)(params, {}, PROMPTS[::-1]) != whole[::-1]
    assert sampler(spec, mesh, dataclasses.replace(drawn, seed=1))(params, {}, PROMPTS) != whole


def test_greedy_under_a_repetition_penalty_is_that_of_transformers(goldens):
    """The prompt has image positions, which must not count as text."""
    folder = goldens / "tiny_llava"
    source = open_source(str(folder))
    spec, mesh = ModelSpec.of(source.architecture, source.adapter), make_mesh(MeshConfig(data=1))
    params = unflatten(place(spec, source, mesh, (), "float32", 0))
    given = dict(np.load(folder / "expected.npz"))
    asked = Prompt(given["generate_prompt"][0].astype(np.int32), given["pixel_values"][:1].transpose(0, 2, 3, 1))
    decoding = DecodingConfig(max_new_tokens=16, repetition_penalty=1.5)
    expected = np.load(goldens / "decoding" / "expected.npz")["penalised_answer"].tolist()
    assert sampler(spec, mesh, decoding)(params, {}, [asked]) == [expected]
    assert expected != given["generated"][0, len(asked.tokens) :].tolist()


def test_stream_joins_to_the_answers_and_stop_texts_end_them(trained):
    spec, mesh, params = trained
    words = Tokenizer.load(TOKENIZER)
    whole = sampler(spec, mesh, tokenizer=words).answers(params, {}, PROMPTS)
    first = max(whole, key=len)
    stop = first[len(first) // 3 :][:4]
    cut = dataclasses.replace(GREEDY, stop=(stop,))
    model = sampler(spec, mesh, cut, tokenizer=words)
    answers = model.answers(params, {}, PROMPTS)
    assert answers == [text.split(stop)[0].rstrip() for text in whole]
    assert answers != whole
    pieces = [""] * len(PROMPTS)
    told = 0
    for place_, piece in model.stream(params, {}, PROMPTS, every=3):
        assert piece
        assert jax.sharding.get_abstract_mesh().empty  # what the caller does meanwhile is not bound to the mesh
        pieces[place_] += piece
        told += 1
    assert pieces == answers
    assert told > 2 * len(PROMPTS)
    # Generation stopped there: the tokens go on at most to the end of their chunk.
    tokens = model(params, {}, PROMPTS)[whole.index(first)]
    assert len(tokens) <= 2 * CHUNK < GREEDY.max_new_tokens

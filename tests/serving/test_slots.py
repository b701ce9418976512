"""The slots themselves: whoever else is in them, and however the devices share them, an answer is the sampler's."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from mole_jax.config import MeshConfig
from mole_jax.serving.slots import Slots
from tests.serving.test_sampler import EOS, GREEDY, PROMPTS, mole, sampler

pytestmark = pytest.mark.slow  # test_serve.py has the answers of one model on one device
DRAWN = dataclasses.replace(GREEDY, temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=7)
COUNT = 3
"""Slots; fewer than prompts."""


def sampled(spec, mesh, params) -> list[list[int]]:
    """Every other answer greedy, the rest drawn."""
    prompts = [dataclasses.replace(one, number=0) for one in PROMPTS]
    greedy, drawn = (sampler(spec, mesh, how)(params, {}, prompts) for how in (GREEDY, DRAWN))
    return [(drawn if number % 2 else greedy)[number] for number in range(len(prompts))]


def together(slots: Slots) -> list[list[int]]:
    """The same with a prompt joining whenever a slot is free, and at most one between two steps."""
    answers: list[list[int]] = [[] for _ in PROMPTS]
    at: list[int | None] = [None] * COUNT
    line = list(range(len(PROMPTS)))

    def push(number: int, token: int, slot: int) -> None:
        if token == EOS:
            at[slot] = None
            return
        answers[number].append(token)
        if len(answers[number]) == GREEDY.max_new_tokens:
            at[slot] = None

    while line or any(one is not None for one in at):
        if line and None in at:
            slot, number = at.index(None), line.pop(0)
            at[slot] = number
            first = slots.fill(slot, PROMPTS[number], DRAWN if number % 2 else GREEDY)
            push(number, int(first.tokens[0]), slot)
        active = np.asarray([one is not None for one in at] + [False] * (slots.count - COUNT))
        tokens = jax.device_get(slots.step(active).tokens)
        for slot, number in enumerate(list(at)):
            if number is not None:
                push(number, int(tokens[slot]), slot)
    return answers


@pytest.mark.parametrize("adapter", [{}, {"route_by": "instance", "shared_router": True, "shared_rank": 2}])
def test_answers_do_not_depend_on_who_else_is_there(adapter):
    spec, mesh, params = mole(**adapter)
    one = sampler(spec, mesh)
    slots = Slots(one, one.weights(params, {}), COUNT, 96)
    expected = sampled(spec, mesh, params)
    assert together(slots) == expected
    with jax.no_tracing():  # and what the first ones left behind is not seen
        assert together(slots) == expected
    assert len({tuple(answer[:3]) for answer in expected}) == len(expected)


def test_eight_devices_answer_as_one():
    spec, mesh, params = mole()
    expected = sampled(spec, mesh, params)
    spec, mesh, params = mole(mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    one = sampler(spec, mesh)
    slots = Slots(one, one.weights(params, {}), COUNT, 96)
    assert slots.count == 4
    assert together(slots) == expected

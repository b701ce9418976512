"""Which settings work: the choice of the defaults, on seeds and data that the study (configs/study.py) never sees.

python -m mole_jax.study --config configs/study_choice.py --workdir runs/study/choice
"""

import dataclasses

from configs.study import DEGREE, FAST_ROUTER, MIX, MOLE, TAUGHT, bases, data, setting
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import preset
from mole_jax.study.config import Section, Study, equal_parameters, plain

SEEDS = (0, 1, 2)
DATA_SEED = 1
GRADIENTS = ("none", "gate_scaled", "dense")
"""Beside the default, straight_through."""


def changed(**fields) -> AdapterConfig:
    return dataclasses.replace(MOLE, **fields)


def get_study() -> Study:
    lora, equal = plain(MOLE), equal_parameters(MOLE, preset("study").decoder)
    sections = {
        "main": {f"LoRA r={lora.rank}": lora, f"LoRA r={equal.rank}": equal, "MoLE": MOLE},
        "router gradient": {f"MoLE {one}": changed(router_gradient=one) for one in GRADIENTS},
        "routed by": {
            "MoLE by instance": changed(route_by="instance"),
            "MoLE by instance weight 0": changed(route_by="instance", balance_weight=0.0),
            "MoLE by instance taught": TAUGHT,
            "MoLE by domain": changed(route_by="domain"),
            "MoLE one router": changed(shared_router=True),
            "MoLE and shared expert": changed(shared_rank=MOLE.rank),
        },
        "balance loss": {
            **{f"MoLE weight {weight:g}": changed(balance_weight=weight) for weight in (0.0, 1e-3, 1e-1)},
            **{
                f"MoLE pooled weight {weight:g}": changed(balance_loss="pooled", balance_weight=weight)
                for weight in (1e-2, 1e-1)
            },
        },
        "experts": {f"MoLE E={experts}": changed(experts=experts) for experts in (1, 2, 4, 8)},
        "rank": {f"MoLE r={rank}": changed(rank=rank, alpha=2.0 * rank) for rank in (2, 8)},
    }
    faster = {
        "MoLE faster router": MOLE,
        "MoLE by instance weight 0 faster router": changed(route_by="instance", balance_weight=0.0),
        "MoLE taught faster router": changed(balance_weight=0.0, domain_weight=1.0),
        "MoLE by instance taught faster router": TAUGHT,
        "MoLE by instance taught faster router and shared expert": dataclasses.replace(TAUGHT, shared_rank=MOLE.rank),
    }
    slow, fast = (setting(DEGREE, DATA_SEED, *rate) for rate in ((), (FAST_ROUTER,)))
    return Study(
        name="choice of the defaults",
        run=slow,
        unit_steps=500,
        seeds=SEEDS,
        sections=(
            *(Section(name, {"mix": MIX}, adapters) for name, adapters in sections.items()),
            Section("router ten times as fast", {"mix": MIX}, faster, run=fast),
        ),
        baseline=f"LoRA r={lora.rank}",
        together=3,
        data=data((DEGREE,), DATA_SEED),
        bases=bases(),
    )

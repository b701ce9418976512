"""One MoLE block, routed LoRA experts over a frozen SwiGLU, in plain PyTorch and by us. Needs torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig
from mole_jax.model.architecture import DecoderArchitecture
from mole_jax.model.decoder import Mlp
from mole_jax.parameters import AdapterParam, Declare, DecoderParam, declared, streams, unflatten

NAMES = ("gate", "up", "down")
Outcome = tuple[np.ndarray, dict[str, np.ndarray]]
"""The block's output (T, D), and gradients of its squares' mean by name: of x (T, D), A (I, E*R) and B (E*R, O)."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The block's arrays as numpy, in our layouts: kernels (I, O), A (I, E*R), B (E*R, O), router (D, E)."""

    x: np.ndarray
    arrays: dict[str, np.ndarray]
    experts: int
    scale: float
    dtype: str

    @classmethod
    def random(cls, arch: DecoderArchitecture, adapter: AdapterConfig, tokens: int, dtype: str) -> Block:
        """Draws a block of the decoder's sizes, and its input."""
        rng, d, f, ranks = np.random.default_rng(0), arch.width, arch.mlp_width, adapter.experts * adapter.rank
        arrays = {"router": rng.normal(0, d**-0.5, (d, adapter.experts))}
        for name, (d_in, d_out) in zip(NAMES, ((d, f), (d, f), (f, d)), strict=True):
            arrays[f"{name}/kernel"] = rng.normal(0, d_in**-0.5, (d_in, d_out))
            arrays[f"{name}/a"] = rng.normal(0, d_in**-0.5, (d_in, ranks))
            arrays[f"{name}/b"] = rng.normal(0, 0.02, (ranks, d_out))
        arrays = {name: one.astype(np.float32) for name, one in arrays.items()}
        x = rng.normal(size=(tokens, d)).astype(np.float32)
        return cls(x, arrays, adapter.experts, adapter.alpha / adapter.rank, dtype)


class OurBlock:
    """Our MLP; the router learns from nothing here, as in the released block, so that the plain ones do the same."""

    def __init__(self, block: Block, arch: DecoderArchitecture, adapter: AdapterConfig):
        config = dataclasses.replace(adapter, router_gradient="none")
        made = nnx.eval_shape(lambda: Mlp(Declare(DecoderParam, streams(0)), arch, Adapters(config)))
        graph, declarations = nnx.graphdef(made), declared(made)
        paths = {"router": "router/kernel"} | {
            f"{name}/{part}": f"{name}_proj/{'' if part == 'kernel' else 'adapter/'}{part}"
            for name in NAMES
            for part in ("kernel", "a", "b")
        }
        trained, frozen = {}, {}
        for name, path in paths.items():
            is_adapter = isinstance(declarations[path], AdapterParam)
            kept = jnp.float32 if is_adapter or name == "router" else jnp.dtype(block.dtype)
            (trained if is_adapter else frozen)[path] = jnp.asarray(block.arrays[name], kept)
        x = jnp.asarray(block.x[None], jnp.dtype(block.dtype))

        def loss(trained: dict, x: jax.Array, frozen: dict) -> tuple[jax.Array, jax.Array]:
            y, _ = nnx.merge(graph, unflatten(trained | frozen))(x, {})
            return jnp.square(y.astype(jnp.float32)).mean(), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        self.call = lambda: jax.block_until_ready(step(trained, x, frozen))
        self.names = {path: name for name, path in paths.items()}

    def outcome(self) -> Outcome:
        (_, y), (gradient, dx) = self.call()
        found = {self.names[path]: np.asarray(one, np.float32) for path, one in gradient.items()}
        return np.asarray(y[0], np.float32), found | {"x": np.asarray(dx[0], np.float32)}


class PlainBlock:
    """What one writes in PyTorch: for each expert the tokens gathered, or all experts on all tokens."""

    def __init__(self, block: Block, device: str, *, gathers: bool):
        self.block, self.device, self.gathers = block, device, gathers
        dtype = getattr(torch, block.dtype)
        self.x = torch.from_numpy(block.x).to(device, dtype).requires_grad_()
        self.trained, self.frozen = {}, {}
        for name, one in block.arrays.items():
            if name.endswith(("/a", "/b")):
                self.trained[name] = torch.from_numpy(one).to(device).requires_grad_()
            else:
                self.frozen[name] = torch.from_numpy(one).to(device, torch.float32 if name == "router" else dtype)

    def _projected(self, x: torch.Tensor, name: str, choice: torch.Tensor, places: list[torch.Tensor]) -> torch.Tensor:
        """Returns x W plus the chosen expert's delta of each token."""
        y, experts, scale = x @ self.frozen[f"{name}/kernel"], self.block.experts, self.block.scale
        each_a = self.trained[f"{name}/a"].to(x.dtype).chunk(experts, dim=1)
        each_b = self.trained[f"{name}/b"].to(x.dtype).chunk(experts, dim=0)
        for expert, (a, b) in enumerate(zip(each_a, each_b, strict=True)):
            if self.gathers:
                y = y.index_add(0, places[expert], x[places[expert]] @ a @ b, alpha=scale)
            else:
                y = y + (choice == expert).to(x.dtype)[:, None] * (x @ a @ b) * scale
        return y

    def _run(self) -> torch.Tensor:
        with torch.no_grad():
            choice = (self.x.float() @ self.frozen["router"]).argmax(dim=-1)
            places = (
                [(choice == expert).nonzero()[:, 0] for expert in range(self.block.experts)] if self.gathers else []
            )
        gate, up = (self._projected(self.x, name, choice, places) for name in NAMES[:2])
        y = self._projected(torch.nn.functional.silu(gate) * up, "down", choice, places)
        y.float().square().mean().backward()
        return y

    def call(self) -> None:
        """Runs forward and backward once and waits."""
        self._run()
        for one in (self.x, *self.trained.values()):
            one.grad = None
        if self.device == "cuda":
            torch.cuda.synchronize()

    def outcome(self) -> Outcome:
        y = self._run()
        found = {name: one.grad.float().cpu().numpy() for name, one in ({"x": self.x} | self.trained).items()}
        for one in (self.x, *self.trained.values()):
            one.grad = None
        return y.detach().float().cpu().numpy(), found

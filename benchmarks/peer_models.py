"""The same LLaVA by transformers with PEFT and by us: one set of weights, adapters and batches.

Needs torch, transformers and peft.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.peer_cases import Arrays, Case
from mole_jax.config import (
    AdapterConfig,
    Config,
    DataConfig,
    DecodingConfig,
    DomainConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from mole_jax.families import write_architecture
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.model.vision import normalise
from mole_jax.parallel.mesh import make_mesh
from mole_jax.parallel.sharding import put_batch
from mole_jax.parameters import Tree, flatten, split_trainable
from mole_jax.serving.sampler import Prompt, Sampler
from mole_jax.training.flops import step_flops
from mole_jax.training.setup import compiled_step, prepare
from mole_jax.weights.formats.peft import written_names
from mole_jax.weights.open import open_source
from mole_jax.weights.peft_config import peft_config

TRAINABLE = {"lora": ("adapters",), "mole": ("adapters", "router")}


def write_base(case: Case, folder: Path, device: str) -> None:
    """Writes a random LLaVA as transformers does."""
    torch.manual_seed(0)
    config = LlavaConfig(**write_architecture(case.arch, case.dtype))
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(getattr(torch, case.dtype))
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # Two libraries share a GPU's memory.


class Ours:
    """Our LLaVA with one kind of adapters."""

    def __init__(self, case: Case, kind: str, folder: Path, batch: Arrays, base: dict[str, jax.Array]):
        """Takes the frozen arrays from `base`; where that is empty, opens `folder` and fills it."""
        trainable = TRAINABLE[kind]
        self.config = Config(
            model=ModelConfig(frozen_dtype=case.dtype, compute_dtype=case.dtype, remat=case.remat),
            adapter=case.adapter(kind),
            data=DataConfig(
                domains=(DomainConfig("all", "-"),),
                sequence_length=case.length,
                examples_per_row=int(batch["segment_ids"].max()),
                tiles_per_row=batch["images"].shape[1],
            ),
            train=TrainConfig(steps=10_000, batch_rows=case.rows, trainable=trainable),
            mesh=MeshConfig(data=1),
        )
        self.case, self.mesh = case, make_mesh(self.config.mesh)
        self.spec = ModelSpec.of(case.arch, self.config.adapter)
        abstract = self.spec.abstract(self.mesh, trainable, case.dtype)
        if not base:
            base.update(open_source(str(folder)).load(abstract))
        made = self.spec.initial({path: leaf for path, leaf in abstract.items() if path not in base}, 0)
        # B starts at zero, under which A has no gradient to compare.
        rng = np.random.default_rng(1)
        for path in [path for path in made if path.endswith("adapter/b")]:
            made[path] = jax.device_put(rng.normal(0, 0.02, made[path].shape).astype(np.float32), made[path].sharding)
        self.params, self.frozen = split_trainable(base | made, self.spec.declarations, trainable)
        self.batch = put_batch(batch, self.mesh)
        self.train_step, self.state = prepare(
            self.config, self.spec, self.mesh, jax.tree.map(jnp.copy, self.params), 10_000
        )
        self.step = compiled_step(self.train_step, self.state, self.mesh)

    @property
    def flops(self) -> float:
        """Of a training step, recomputation not counted."""
        return step_flops(self.config, self.spec.arch, self.spec.declarations, self.config.train.trainable)

    @property
    def weight_bytes(self) -> int:
        """Of the weights that the decoding of a token reads."""
        held = flatten(self.params) | flatten(self.frozen)
        read = [leaf for path, leaf in held.items() if path.startswith("decoder/") and path != "decoder/embedding"]
        return sum(leaf.size for leaf in read) * jnp.dtype(self.case.dtype).itemsize

    def cache_bytes(self, prompts: list[Prompt], tokens: int) -> float:
        """Of the cache that the decoding of a token reads, halfway through answers of so many tokens."""
        decoder, places = self.case.arch.decoder, sum(len(one.tokens) + tokens / 2 for one in prompts)
        numbers = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * places
        return numbers * jnp.dtype(self.case.dtype).itemsize

    def logits(self) -> np.ndarray:
        """Returns the batch's logits (B, S, V), float32."""

        def run(params: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> jax.Array:
            model = nnx.merge(self.spec.graph, params, frozen)
            given = (batch[name] for name in ("tokens", "images", "positions", "segment_ids"))
            return model.decoder.logits(model.hidden(*given, dtype=jnp.dtype(self.case.dtype))[0])

        with jax.set_mesh(self.mesh):
            return np.asarray(jax.jit(run)(self.params, self.frozen, self.batch))

    def loss_and_gradient(self) -> tuple[float, Arrays]:
        """Returns the mean loss in nats, and its gradient by PEFT's names; of a plain LoRA."""

        def loss(params: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> jax.Array:
            sums = self.train_step.forward.sums(params, frozen, batch, None)
            return sums.losses.sum() / sums.tokens.sum()

        with jax.set_mesh(self.mesh):
            value, gradient = jax.jit(jax.value_and_grad(loss))(self.params, self.frozen, self.batch)
        return float(value), as_peft(self.config.adapter, self.case.arch, flatten(gradient))

    def train(self) -> None:
        """Takes one training step."""
        with jax.set_mesh(self.mesh):
            self.state, output = self.step(self.state, self.frozen, self.batch)
        if not bool(jax.device_get(output["finite"])):
            raise RuntimeError("the step gave a NaN")

    def generate(self, prompts: list[Prompt], tokens: int) -> list[list[int]]:
        """Returns the greedy answers, none of which ends before `tokens` tokens."""
        sampler = Sampler(
            self.spec.graph,
            self.mesh,
            batch_size=len(prompts),
            eos_ids=(-1,),
            dtype=jnp.dtype(self.case.dtype),
            decoding=DecodingConfig(max_new_tokens=tokens),
        )
        return sampler(self.params, self.frozen, prompts)


def as_peft(adapter: AdapterConfig, arch: LlavaArchitecture, leaves: dict[str, jax.Array]) -> Arrays:
    """Returns a plain LoRA's arrays under PEFT's names and in its layouts."""
    return {
        name: np.array(leaves[path][layer].T)
        for path, names in written_names(arch).of(adapter, arch).items()
        for layer, name in enumerate(names)
    }


class Theirs:
    """The same LLaVA by transformers, with the same plain LoRA by PEFT, run as it comes: eager, scaled_dot_product."""

    def __init__(self, case: Case, folder: Path, batch: Arrays, lora: Ours, device: str):
        self.case, self.device, self.dtype = case, device, getattr(torch, case.dtype)
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=self.dtype, attn_implementation="sdpa")
        model = model.to(device)
        if case.remat != "none":
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        adapter = lora.config.adapter
        self.model = get_peft_model(model, LoraConfig(**peft_config(adapter, None, False) | {"inference_mode": False}))
        self._load(lora)
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, weight_decay=0.0, fused=True)
        mask = np.pad(batch["loss_mask"][:, :-1], ((0, 0), (1, 0)))
        images = batch["images"].reshape(-1, *batch["images"].shape[2:])
        counts = (batch["tokens"] == case.arch.image_token_id).sum(axis=1) // case.arch.image_span
        used = np.arange(batch["images"].shape[1]) < counts[:, None]
        self.batch = {
            "input_ids": self._tensor(batch["tokens"]).long(),
            "position_ids": self._tensor(batch["positions"]).long(),
            "pixel_values": self._pixels(images[used.reshape(-1)]),
            "labels": self._tensor(np.where(mask > 0, batch["tokens"], -100)).long(),
        }

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        pixels = np.asarray(normalise(jnp.asarray(images), jnp.float32))
        return self._tensor(pixels.transpose(0, 3, 1, 2)).to(self.dtype)

    def _mixed(self) -> torch.autocast:
        """PEFT keeps adapters in float32; as in `Trainer`, products are in the model's type."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def logits(self) -> np.ndarray:
        """Returns the batch's logits (B, S, V)."""
        given = {name: one for name, one in self.batch.items() if name != "labels"}
        with torch.no_grad(), self._mixed():
            return self.model.eval()(**given, use_cache=False).logits.float().cpu().numpy()

    def loss_and_gradient(self) -> tuple[float, Arrays]:
        """Returns the mean loss in nats, and its gradient by PEFT's names."""
        loss = self._backward()
        gradient = {
            name.replace(".default", ""): one.grad.float().cpu().numpy()
            for name, one in self.model.named_parameters()
            if one.grad is not None
        }
        self.optimizer.zero_grad()
        return float(loss), gradient

    def _backward(self) -> torch.Tensor:
        with self._mixed():
            loss = self.model.train()(**self.batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def train(self) -> None:
        """Takes one training step."""
        loss = self._backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not bool(torch.isfinite(loss)):
            raise RuntimeError("the peer's step gave a NaN")

    def _load(self, lora: Ours) -> None:
        arrays = as_peft(lora.config.adapter, self.case.arch, flatten(lora.params))
        found = set_peft_model_state_dict(self.model, {name: torch.from_numpy(one) for name, one in arrays.items()})
        if found.unexpected_keys:
            raise RuntimeError(f"PEFT does not know {found.unexpected_keys[0]}")

    def end_training(self, lora: Ours) -> None:
        """Takes the adapters as `lora` began, in the model's type."""
        self._load(lora)
        self.model.to(self.dtype).eval()

    def generate(self, prompts: list[Prompt], tokens: int) -> list[list[int]]:
        """Returns the greedy answers, none of which ends before `tokens` tokens."""
        given = self._tensor(np.stack([one.tokens for one in prompts])).long()
        settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                pixel_values=self._pixels(np.concatenate([one.images for one in prompts])),
                generation_config=settings,
            )
        return made[:, given.shape[1] :].cpu().tolist()

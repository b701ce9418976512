"""A checkpoint as a chat model of lmms-eval 0.7: ``lmms-eval --model mole_jax --model_args pretrained=PATH --tasks …``.

lmms-eval finds it by the entry point `lmms_eval.models` and is needed to import this module; see docs/evaluation.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from mole_jax.api import load
from mole_jax.config import Dtype, ImageAspect, MeshConfig, PromptName
from mole_jax.lmms.chat import conversation, decoding
from mole_jax.serving.assistant import Assistant

MANIFEST = ModelManifest("mole_jax", chat_class_path="mole_jax.lmms.model.MoleJax")
"""What the entry point names."""


class MoleJax(lmms):
    """Whatever `mole_jax.load` opens, on all devices that JAX finds."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        tokenizer: str | None = None,
        dtype: Dtype = "bfloat16",
        prompt: PromptName | None = None,
        image_aspect: ImageAspect | None = None,
        fsdp: int = 1,
        batch_size: int | str = 1,
        **harness: Any,
    ):
        """Loads the weights.

        Args:
            pretrained: a run's folder, a HF LLaVA folder, a hub name, an adapter's folder or a LLaVA-MoLE file.
            base, tokenizer, dtype, prompt, image_aspect: as in `mole_jax.load`.
            fsdp: devices that split the weights; the others split the batch.
            batch_size: requests at a time.
            harness: what lmms-eval says to every model (device, max_batch_size). JAX has its own devices.

        Raises:
            UserError: as `mole_jax.load`.
            TypeError: an unknown argument.
        """
        super().__init__()
        if unknown := set(harness) - {"device", "max_batch_size"}:
            raise TypeError(f"mole_jax takes no model argument {', '.join(sorted(unknown))}")
        mesh = MeshConfig(fsdp=int(fsdp))
        self._model, self._processor = load(
            pretrained, base=base, tokenizer=tokenizer, dtype=dtype, prompt=prompt, image_aspect=image_aspect, mesh=mesh
        )
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers each request; those of the same settings in batches."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True), []).append(number)
        for settings, numbers in alike.items():
            assistant = self._assistant(json.loads(settings))
            for batch in itertools.batched(numbers, self._batch_size):
                prompts = []
                for number in batch:
                    _, to_messages, _, document, task, split = requests[number].args
                    prompts.append(assistant.prompt(*conversation(to_messages(self.task_dict[task][split][document]))))
                texts |= zip(batch, assistant.answers(prompts), strict=True)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answers each request round by round, asking the task what comes next, until it says that it was the last."""
        return [self._rounds(request) for request in requests]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval asks chat models to generate only."""
        raise NotImplementedError("mole_jax is a chat model, of which lmms-eval wants no log-likelihoods")

    def _rounds(self, request: Instance) -> list[str]:
        _, to_messages, settings, document, task, split = request.args
        document, assistant = self.task_dict[task][split][document], self._assistant(settings)
        said: list[str] = []
        messages, info = to_messages(document), None
        while True:
            said += assistant.answers([assistant.prompt(*conversation(messages))])
            # One after the first the task says more than messages: whether it is over, and what it wants to know again.
            found = to_messages(document, round_idx=len(said), previous_output=list(said), previous_round_info=info)
            if not isinstance(found, tuple):
                return said
            messages, over, _, info = found
            if over:
                return said

    def _assistant(self, settings: dict[str, Any]) -> Assistant:
        return Assistant.of(self._model, self._processor, decoding(settings), self._batch_size)

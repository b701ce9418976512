"""What stands beside the tensors in a Hugging Face folder: config, tokenizer, and how images are prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from mole_jax.config import ImageAspect, PromptName
from mole_jax.families import family_of
from mole_jax.families.shared.decoders import eos_to_hf
from mole_jax.files import PathLike, made, write_json
from mole_jax.image_spec import Single
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.foreign import HEADER, of_pixels
from mole_jax.weights.hf_config import CONFIG, GENERATION, PREPROCESSOR, PROCESSOR
from mole_jax.weights.hf_tokenizer import HfTokenizer, with_rows
from mole_jax.weights.leaf import Leaf, Leaves
from mole_jax.weights.safetensors_io import write_tensors


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a folder holds beside its tensors and their config."""

    architecture: LlavaArchitecture
    """The model, with the rows and the ids that its tokenizer asks for."""
    tokenizer: HfTokenizer | None
    prompt: PromptName | None
    image_aspect: ImageAspect | None

    @classmethod
    def of(
        cls,
        arch: LlavaArchitecture,
        *,
        tokenizer: PathLike | None = None,
        prompt: PromptName | None = None,
        image_aspect: ImageAspect | None = None,
        grows: bool = True,
    ) -> Beside:
        """Brings a model and its tokenizer together.

        Args:
            arch: the model.
            tokenizer: folder of its tokenizer. None: there is none.
            prompt: preset that it was trained with. None: it does not say.
            image_aspect: how images became square. None: it does not say; as LLaVA-1.5's, padded.
            grows: its embedding may get rows for tokens that have none.

        Raises:
            UserError: there is no tokenizer, or it does not fit the model.
        """
        if tokenizer is None:
            return cls(arch, None, prompt, image_aspect)
        words = HfTokenizer.of(tokenizer, image_id=arch.image_token_id, vocab=arch.decoder.vocab, grows=grows)
        first, *others = words.tokenizer.ending_ids(arch.decoder.eos_ids)
        decoder = dataclasses.replace(
            arch.decoder, vocab=words.vocab, pad_id=words.pad.id, eos_id=first, other_eos_ids=tuple(others)
        )
        return cls(dataclasses.replace(arch, decoder=decoder), words, prompt, image_aspect)

    def leaves(self, leaves: Leaves) -> Leaves:
        """Returns the arrays with as many rows as the tokenizer asks for."""
        return leaves if self.tokenizer is None else with_rows(leaves, self.architecture.decoder.vocab)

    @property
    def own(self) -> dict[str, Any]:
        """What a run says that no field of Hugging Face's holds, by its key in config.json; nothing if it says none."""
        said = {"prompt": self.prompt, "image_aspect": self.image_aspect} | of_pixels(self.architecture)
        said = {name: value for name, value in said.items() if value is not None}
        return {HEADER: said} if said else {}

    def write(self, folder: PathLike) -> None:
        """Writes tokenizer, chat template, the ids that end an answer, and how images are prepared.

        Raises:
            UserError: as `HfTokenizer.write`.
        """
        folder, arch = made(epath.Path(folder)), self.architecture
        write_json(folder / GENERATION, _generation(arch), indent=2)
        family = family_of(arch)
        if isinstance(arch.tiling, Single):
            # Of more tiles than one, the family's processor alone knows how a picture fits them.
            arch = dataclasses.replace(arch, fit=self.image_aspect or arch.fit)
        image = self.tokenizer.image.text if self.tokenizer is not None else family.mark
        preprocessor, processor = family.processor(arch, image)
        if self.tokenizer is not None:
            self.tokenizer.write(folder, self.prompt, processor["processor_class"])
        write_json(folder / PREPROCESSOR, preprocessor, indent=2)
        write_json(folder / PROCESSOR, processor, indent=2)


def write_folder(
    folder: PathLike,
    config: Mapping[str, Any],
    beside: Beside,
    tensors: Mapping[str, Leaf],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors (`write_tensors`) and all the small files that stand beside them.

    Raises:
        UserError: as `Beside.write`.
    """
    folder = epath.Path(folder)
    beside.write(folder)  # first: what does not fit is told before gigabytes are written
    write_tensors(folder, tensors, max_shard_bytes)
    write_json(folder / CONFIG, {**config, **beside.own}, indent=2)  # last: a folder without it is unfinished


def _generation(arch: LlavaArchitecture) -> dict:
    decoder = arch.decoder
    return {"bos_token_id": decoder.bos_id, "eos_token_id": eos_to_hf(decoder), "pad_token_id": decoder.pad_id}

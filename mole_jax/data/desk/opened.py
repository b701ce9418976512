"""The mixture of a config, opened as training opens it."""

from __future__ import annotations

from mole_jax.config import Config, DataConfig
from mole_jax.data.load import Layout, Loader, RecordSource, check_room
from mole_jax.data.mixture import shard_count
from mole_jax.image_spec import ImageSpec
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.open import check_vocabulary, open_base, tokenizer_path


def opened(config: Config) -> Loader:
    """Opens the domains of a config and, behind them, its held-out tasks.

    Raises:
        UserError: one cannot be opened; or what training would refuse before it reads a record.
    """
    source = open_base(config.model, config.seed)
    image, decoder = source.architecture.image, source.architecture.decoder
    tokenizer = Tokenizer.load(tokenizer_path(config.model, source))
    check_vocabulary(tokenizer, decoder.vocab)
    check_room(config.data, image, positions=decoder.max_position)
    shard_count(config.data, config.train.batch_rows)
    tasks = [RecordSource.open(task) for task in config.evaluation.tasks]
    loader = open_loader(config.data, tokenizer, image)
    return Loader((*loader.sources, *tasks), tokenizer, loader.layout)


def open_loader(data: DataConfig, tokenizer: Tokenizer, image: ImageSpec) -> Loader:
    """Opens the domains of `data`; raises `UserError` if one cannot be opened."""
    sources = tuple(RecordSource.open(domain) for domain in data.domains)
    return Loader(sources, tokenizer, Layout.of(data, image, tokenizer))

"""``python -m mole_jax.serve``: a checkpoint behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import typing
from pathlib import Path

from mole_jax import cli
from mole_jax.config import Dtype, ImageAspect, PromptName, ServeConfig
from mole_jax.config_check import check_serve
from mole_jax.errors import UserError, run_door
from mole_jax.parallel import compiled
from mole_jax.terminal import escaped, warning

if typing.TYPE_CHECKING:
    from mole_jax.model.llava import Llava
    from mole_jax.serving.assistant import Processor
    from mole_jax.serving.service import Service

KEY = "MOLE_JAX_API_KEY"
"""Environment variable with the key that clients must send."""


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's folder, a HF folder, a hub name, adapters or a LLaVA-MoLE file")
    add("--model-name", help="what clients call the model; default: the last part of --checkpoint")
    add("--base", help="model that adapters stand on; default: the one that they name")
    add("--alpha", type=float, help="scale times rank of a LLaVA-MoLE file; default: as it says, else twice the rank")
    add("--tokenizer", help="folder with tokenizer.model or tokenizer.json; default: the checkpoint's")
    add("--prompt", choices=typing.get_args(PromptName), help="prompt preset; default: as trained")
    add("--image-aspect", choices=typing.get_args(ImageAspect), help="how images become square; default: as trained")
    compiled.add_flag(parser)
    add("--dtype", choices=typing.get_args(Dtype), help="of weights and activations; default: bfloat16 but on CPU")


def main() -> None:
    settings, flags = cli.parse_settings(
        "serve", f"Serve a checkpoint as OpenAI does. {KEY} sets a key.", ServeConfig(), extra=_flags
    )
    check_serve(settings)
    try:
        from mole_jax.serving.server import serve
        from mole_jax.serving.service import Service
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'mole-jax[serve]'") from None
    key = os.environ.get(KEY) or None
    with _bound(settings.host, settings.port) as listener:
        service = Service.of(*_loaded(settings, flags), settings, flags.model_name or Path(flags.checkpoint).name)
        listener.listen()
        print(escaped(_told(service, listener)), flush=True)
        if key is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            line = f"anyone who reaches {settings.host} may ask; set {KEY} to a key, or leave --host out"
            print(warning(f"warning: {line}", sys.stderr), file=sys.stderr)
        serve(service, listener, key)


def _loaded(settings: ServeConfig, flags: argparse.Namespace) -> tuple[Llava, Processor]:
    import jax

    compiled.keep(flags)
    from mole_jax.api import load

    return load(
        flags.checkpoint,
        base=flags.base,
        alpha=flags.alpha,
        tokenizer=flags.tokenizer,
        dtype=flags.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        prompt=flags.prompt,
        image_aspect=flags.image_aspect,
        mesh=settings.mesh,
    )


def _told(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    slots = service.scheduler.slots
    room = f"{slots.count} slots of {slots.places:,} tokens, {slots.nbytes >> 20:,} MiB of cache"
    return f"model {service.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 ({room})"


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket that holds the address, where nothing is let in yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose others") from None
    return listener


if __name__ == "__main__":
    run_door(main)

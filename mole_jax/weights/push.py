"""A folder sent to the hub: asked for first, sent in one commit, and never into what is there already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mole_jax.errors import UserError
from mole_jax.files import PathLike, local

OWN = (".gitattributes",)
"""Files that the hub itself puts into a new repository."""


def check_folder(folder: PathLike) -> None:
    """Raises `UserError` if a folder that is to be written and sent is not on a disk, or holds anything yet."""
    path = local(folder)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{folder}: is not empty, and --push sends all that is in --output; name a new folder there")


def check_name(name: str) -> None:
    """Raises `UserError` if `name` cannot be one of a repository; the hub is not asked."""
    from huggingface_hub.utils import validate_repo_id  # a second to import

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push {name}: is no name on the hub; give it as OWNER/NAME")
    with _told(name):
        validate_repo_id(name)


def check_repository(name: str, *, public: bool) -> None:
    """Asks the hub whether a folder can go to `name`, before anything is made that takes long.

    Raises:
        UserError: there is no token or a wrong one, the hub is not reached, or the repository is there and holds files
            or is seen by others than asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise UserError(f"--push {name}: there is no token of the hub; set HF_TOKEN, or log in with hf auth login")
    api = HfApi()
    with _told(name):
        api.whoami()  # or a wrong token would look like a repository that is not there
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return
    files = [one.rfilename for one in found.siblings or () if one.rfilename not in OWN]
    if files:
        raise UserError(
            f"--push {name}: is there and holds {len(files)} files ({files[0]}, …), into which nothing is sent; choose "
            "another name or empty it first"
        )
    if bool(found.private) == public:
        is_seen, remedy = ("public", "add --public") if not public else ("private", "leave out --public")
        raise UserError(f"--push {name}: is there and is {is_seen}; {remedy}, or choose another name")


def files_of(folder: PathLike) -> dict[str, int]:
    """Returns the files of a folder that are sent, by name within it, with their bytes."""
    top = Path(folder)
    return {file.relative_to(top).as_posix(): file.stat().st_size for file in sorted(top.rglob("*")) if file.is_file()}


def push(folder: PathLike, name: str, *, public: bool) -> str:
    """Sends a folder to a repository of the hub, which is made if it is not there, and returns its address.

    Raises:
        UserError: it could not be sent; the message says how to send the folder without making it anew.
    """
    from huggingface_hub import HfApi

    api, seen = HfApi(), "" if public else " --private"
    with _told(name, f"; {folder} is whole, hf upload {name} {folder}{seen} sends it once that is mended"):
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=local(folder), commit_message="Written by mole_jax")
    return str(address)


@contextmanager
def _told(name: str, more: str = "") -> Iterator[None]:
    """Turns what the hub's library raises, of its own kinds and of its client's, into a line."""
    try:
        yield
    except Exception as error:  # the block is calls of the library alone
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--push {name}: the hub refuses or is not reached ({why}); look at the name, the rights of the token and "
            f"the network{more}"
        ) from None

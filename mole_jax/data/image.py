"""From an image file to the square uint8 arrays that the vision tower reads."""

from __future__ import annotations

import io
import pathlib
import re
import warnings
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, features

from mole_jax.config import ImageAspect
from mole_jax.data.colour import ON_ITS_SIDE, TRANSPARENT, TURNED, remarks, to_rgb, turn_of
from mole_jax.data.tiling.anyres import is_whole
from mole_jax.data.tiling.pictures import cut
from mole_jax.data.urls import is_url, url_content
from mole_jax.errors import UserError
from mole_jax.files import is_remote
from mole_jax.image_spec import AnyRes, ImageSpec
from mole_jax.terminal import shortened

OPTIONAL_FORMATS = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats that not every build of Pillow can decode, and what it calls them."""
MISSING_FORMATS = tuple(name for name, feature in OPTIONAL_FORMATS.items() if not features.check(feature))
# Formats that only decode pixels; EPS, for example, would start Ghostscript.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"),
    *(name for name in OPTIONAL_FORMATS if name not in MISSING_FORMATS),
)
# A long thin image grows when it is made square; how far beyond `max_pixels` that may go.
SQUARE_GROWTH = 4
_PAGED: Any = re.compile(r"(?P<file>.+\.tiff?)\.(?P<page>\d{1,6})", re.IGNORECASE)
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4096
"""Of one name in a path and of all of it, on every usual file system."""


def load_tiles(
    image: str | bytes, root: str | pathlib.Path | None, spec: ImageSpec, *, pictures: int = 1, max_pixels: int
) -> UInt8[np.ndarray, "N H W 3"]:
    """Reads and decodes an image and cuts it as its model wants it (`mole_jax.data.tiling`).

    Every mode becomes RGB by `mole_jax.data.colour.to_rgb`. The EXIF orientation is ignored, as in LLaVA, or applied,
    as `spec` says (Pillow applies a TIFF's).

    Args:
      image: path relative to `root`, a `data:` URL in base64, or the content of an image file. ``NAME.tif.N`` is page N
        of a TIFF, from 0, if there is no file of that name.
      root: folder that the path must stay inside; symbolic links are followed before this is checked.
      spec: how the model takes images; H and W are its size, N those of the image's layout.
      pictures: how many images the example has.
      max_pixels: largest width times height that is decoded.

    Raises:
      UserError: missing, broken or too large image, one too thin to be cut, a path that leaves `root`, or a URL of the
        web.
    """
    name = _name(image)
    with _open(image, root, name) as opened:
        size = _checked_size(opened, name, spec, pictures, max_pixels)
        try:
            turn = turn_of(opened) if spec.exif == "apply" else None
            rgb = to_rgb(opened, spec.transparency)
            rgb = rgb if turn is None else rgb.transpose(turn)
        except MemoryError:
            raise
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        except Exception as error:  # decoders raise whatever a broken file makes them trip over
            raise UserError(f"{name} is broken ({_reason(error)}); replace it or take the record out") from None
    if rgb.size != size:  # its layout was made from the other one
        raise UserError(f"{name} says {size[0]} x {size[1]} pixels and has {rgb.size[0]} x {rgb.size[1]}; replace it")
    try:
        return cut(rgb, spec, pictures)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def load_image(
    image: str | bytes, root: str | pathlib.Path | None, *, size: int, aspect: ImageAspect, max_pixels: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Reads, decodes and squares an image as LLaVA does: one tile of `size` pixels a side, bicubic, CLIP's mean colour.

    Args:
      image, root, max_pixels: as `load_tiles` takes them.
      size: side of the result H = W, in pixels.
      aspect: how the image becomes square.

    Raises:
      UserError: as `load_tiles`.
    """
    return load_tiles(image, root, square_spec(size, aspect), max_pixels=max_pixels)[0]


def check_image(
    image: str | bytes, root: str | pathlib.Path | None, *, size: int, aspect: ImageAspect, max_pixels: int
) -> None:
    """Checks what `load_image` checks, except that pixels are not decoded; raises the same `UserError`."""
    image_size(image, root, square_spec(size, aspect), max_pixels=max_pixels)


def square_spec(size: int, aspect: ImageAspect) -> ImageSpec:
    """Returns how pixels of one square tile are made, as in LLaVA-1.5; nothing of its features is meant."""
    return ImageSpec(size, 1, 0, fit=aspect)


def image_size(
    image: str | bytes, root: str | pathlib.Path | None, spec: ImageSpec, *, pictures: int = 1, max_pixels: int
) -> tuple[int, int]:
    """Returns width and height, after the checks of `load_tiles` that need no pixels; raises the same `UserError`."""
    name = _name(image)
    with _open(image, root, name) as opened:
        return _checked_size(opened, name, spec, pictures, max_pixels)


def image_bytes(image: str | bytes, root: str | pathlib.Path | None) -> bytes:
    """Returns the content of an image file as it lies, whatever it is; of a page of a TIFF that page as a TIFF.

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(image, bytes):
        return image
    name = _name(image)
    if is_url(image):
        return url_content(image, name)
    file, page = _file_and_page(image, root, name)
    if page:
        written = io.BytesIO()
        with _open(image, root, name) as opened:
            opened.save(written, "TIFF")
        return written.getvalue()
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name} does not exist in {root}; check the path or set image_root") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read ({_reason(error)}); replace it or take the record out") from None


def image_remarks(image: str | bytes, root: str | pathlib.Path | None, spec: ImageSpec) -> list[str]:
    """Returns what a user should know of an image that can be read: keys of `mole_jax.data.colour.REMARKS`.

    Nothing of what `spec` takes care of.
    """
    cared_for = (TURNED,) * (spec.exif == "apply") + (TRANSPARENT,) * (spec.transparency == "white")
    with warnings.catch_warnings(action="ignore"), _open(image, root, _name(image)) as opened:
        try:
            return [one for one in remarks(opened) if one not in cared_for]
        except Exception:  # such as a broken EXIF block, which decoding the pixels does not need
            return []


def _name(image: str | bytes) -> str:
    if isinstance(image, bytes):
        return f"embedded image of {len(image)} bytes"
    return f"image '{shortened(image, 40 if is_url(image) else 100)}'"


def _open(image: str | bytes, root: str | pathlib.Path | None, name: str) -> Image.Image:
    page = 0
    if isinstance(image, str) and is_url(image):
        image = url_content(image, name)
    if isinstance(image, bytes):
        source = io.BytesIO(image)
    else:
        source, page = _file_and_page(image, root, name)
    try:
        if is_remote(root or "") and isinstance(source, epath.Path):
            source = io.BytesIO(source.read_bytes())
        opened = Image.open(source, formats=FORMATS)
        if page:
            pages = getattr(opened, "n_frames", 1)
            if page >= pages:
                opened.close()
                raise UserError(f"{name} is page {page} of a file of {pages} page(s), counted from 0; correct it")
            opened.seek(page)
        return opened
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist in {root}; check the path or set image_root") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({_reason(error)}); scale it down") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them trip over
        lacking = f" (this Pillow was built without {', '.join(MISSING_FORMATS)})" if MISSING_FORMATS else ""
        raise UserError(
            f"{name} cannot be read as one of {', '.join(FORMATS)} ({type(error).__name__}); "
            f"replace it or take the record out{lacking}"
        ) from None


def _file_and_page(path: str, root: str | pathlib.Path | None, name: str) -> tuple[pathlib.Path | epath.Path, int]:
    """Returns the file of an image, and which page of it; as UReader names them, if there is no file of that name."""
    paged = _PAGED.fullmatch(path)
    if paged is None:
        return _inside(path, root, name), 0
    try:
        whole = _inside(path, root, name)
        if not is_remote(root or "") or whole.exists():
            return whole, 0
    except UserError:
        pass  # there is no such file; whatever else is wrong is wrong with the TIFF too
    return _inside(paged["file"], root, name), int(paged["page"])


def _inside(path: str, root: str | pathlib.Path | None, name: str) -> pathlib.Path | epath.Path:
    if root is None:
        raise UserError(f"{name} is a path but no image folder is known; set image_root")
    relative = pathlib.PurePath(path)
    if not path or "\0" in path:
        raise UserError(f"{name} is not a path; write one relative to {root}")
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in relative.parts), default=0)
    if longest > MOST_NAME_BYTES or len(path) > MOST_PATH_BYTES:
        raise UserError(
            f"{name} is no path, a name in one has at most {MOST_NAME_BYTES} bytes and all of it {MOST_PATH_BYTES}; if "
            "it is the image itself (base64), write data:;base64, before it"
        )
    if is_remote(root):
        # A bucket has no symbolic links, and whether the object is there shows when it is read.
        if ".." in relative.parts or relative.is_absolute() or "://" in path:
            raise UserError(f"{name} leaves its folder {root}; write it relative to that folder, without '..'")
        return epath.Path(root) / path
    folder = pathlib.Path(root).resolve()
    # An absolute path that stays inside its folder is as good as a relative one.
    inside = not relative.is_absolute() or any(map(relative.is_relative_to, (folder, pathlib.Path(root).absolute())))
    if ".." in relative.parts or not inside:
        raise UserError(f"{name} leaves its folder {root}; write it relative to that folder, without '..'")
    try:
        file = (folder / relative).resolve()
        if not file.is_relative_to(folder):
            raise UserError(f"{name} leaves its folder {root} through a symbolic link; copy it there or set image_root")
        if not file.is_file():
            raise UserError(f"{name} does not exist in {root}; check the path or set image_root")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name} cannot be followed in {root} ({_reason(error)}); replace it") from None
    return file


def _checked_size(opened: Image.Image, name: str, spec: ImageSpec, pictures: int, max_pixels: int) -> tuple[int, int]:
    width, height = opened.size
    if spec.exif == "apply" and turn_of(opened) in ON_ITS_SIDE:
        width, height = height, width
    if width < 1 or height < 1:
        raise UserError(f"{name} has no pixels ({width} x {height}); replace it or take the record out")
    if width * height > max_pixels:
        raise UserError(
            f"{name} has {width} x {height} pixels, over data.max_image_pixels {max_pixels}; "
            "scale it down or raise that"
        )
    grown = _grown(width, height, spec, pictures)
    if grown > SQUARE_GROWTH * max_pixels and grown > spec.size**2:
        raise UserError(
            f"{name} has {width} x {height} pixels, too long and thin to be made square; cut it or take the record out"
        )
    return width, height


def _grown(width: int, height: int, spec: ImageSpec, pictures: int) -> int:
    """Returns the pixels of the square that an image is made on its way; 0 where none grows with its length."""
    long, short = max(width, height), min(width, height)
    whole = isinstance(spec.tiling, AnyRes) and is_whole(spec.tiling, pictures)
    if whole or spec.fit == "pad":
        return long * long
    return spec.size**2 * long // short if spec.fit == "crop" else 0


def _reason(error: Exception) -> str:
    return shortened(next(iter(str(error).splitlines()), type(error).__name__))

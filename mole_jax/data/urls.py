"""Images that are named by a URL: `data:` holds one, the web's are refused."""

from __future__ import annotations

import base64
import binascii
import re

from mole_jax.errors import UserError

MOST_CHARACTERS = 100_000_000
"""Of a `data:` URL; an image of 75 MB."""
_DATA, _WEB = "data:", ("http://", "https://")
_SPACE = re.compile(r"\s+")


def is_url(image: str) -> bool:
    """Returns whether `image` is a `data:` or `http(s)` URL, and so no path."""
    return image[:8].lower().startswith((_DATA, *_WEB))


def url_content(url: str, name: str) -> bytes:
    """Returns the bytes that a ``data:[TYPE];base64,TEXT`` URL holds (RFC 2397); line breaks in it are allowed.

    Args:
      url: one of which `is_url` holds.
      name: what messages call it.

    Raises:
      UserError: it is too long, not base64 or has nothing in it; or it points to the web, which is never read here.
    """
    if not url[: len(_DATA)].lower() == _DATA:
        raise UserError(
            f"{name} is on the web, from where nothing is read in training; download it first (wget -x, say), and give "
            "the path of the file"
        )
    if len(url) > MOST_CHARACTERS:
        raise UserError(f"{name} has {len(url):,} characters, over {MOST_CHARACTERS:,}; write the image to a file")
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{name} is no data:TYPE;base64,TEXT; write it so, or give the path of a file")
    try:
        content = base64.b64decode(_SPACE.sub("", body), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is not base64 (cut off?); encode the image again or take the record out") from None
    if not content:
        raise UserError(f"{name} holds nothing; encode the image again or take the record out")
    return content

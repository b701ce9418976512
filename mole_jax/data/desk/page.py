"""Examples as the model sees them, as one page of HTML with their pictures inside."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable

from PIL import Image

from mole_jax import page
from mole_jax.data.colour import to_rgb
from mole_jax.data.desk.show import Shown, pieces
from mole_jax.data.image import image_bytes
from mole_jax.data.load import Loader
from mole_jax.errors import UserError
from mole_jax.terminal import escaped

SIDE = 320
"""Longest side of a picture on the page, in pixels."""
STYLE = """
:root { --answer: #d9f2dd; --image: #e1e8fb; --over: #fbdada; }
@media (prefers-color-scheme: dark) { :root { --answer: #174a22; --image: #23315c; --over: #5e1f1f; } }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin: 1.2rem 0; }
article h2 { margin: 0; border: 0; font-size: 1.05rem; } article p { margin: .3rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; }
.pictures figure { margin: 0; max-width: 100%; }
.pictures img { max-height: 14rem; border-radius: .3rem; display: block; }
figcaption { font-size: .8rem; color: var(--quiet); }
.text { white-space: pre-wrap; margin: .6rem 0 0; }
mark { color: inherit; background: var(--answer); border-radius: .2rem; padding: .05rem .1rem; }
.image { background: var(--image); border-radius: .2rem; padding: .05rem .3rem; font-size: .85rem; }
.over { background: var(--over); text-decoration: line-through; }
"""


def write_page(name: str, shown: Iterable[Shown], loader: Loader) -> str:
    """Returns a page of records that training would draw, in their order."""
    cards = [card(one, loader) for one in shown]
    most = loader.layout.sequence_length
    legend = (
        '<p class="quiet"><mark>Supervised text</mark> counts in the loss. '
        '<span class="image">image</span> stands for the positions of a picture. '
        f'<span class="over">Struck out</span> is what lies beyond data.sequence_length {most:,}: such a record is '
        "left out as a whole.</p>"
    )
    title = f"{name}: {len(cards)} examples"
    return page.document(title, [f"<h1>{html.escape(title)}</h1>", legend, *cards], STYLE)


def card(shown: Shown, loader: Loader) -> str:
    """Returns what is to be seen of one record."""
    loaded, problem = shown
    domain, _, identity = (loaded.record_id if loaded else problem.record_id if problem else "").partition("/")
    parts = [f'<h2>{_safe(identity)} <span class="quiet">{_safe(domain)}</span></h2>']
    if problem is not None:
        parts.append(f'<p class="warning">{_safe(f"{problem.reason}: {problem}")}</p>')
    if loaded is not None:
        tiles = f", {len(loaded.images)} tiles" if len(loaded.images) != len(loaded.example.images) else ""
        parts.append(
            f'<p class="quiet">{len(loaded.tokens):,} tokens, {int(loaded.supervised.sum()):,} supervised, '
            f"{len(loaded.example.images)} image(s){tiles}</p>"
        )
        names = [source.name for source in loader.sources]
        root = loader.sources[names.index(loaded.example.domain)].image_root
        pictures = [_figure(one, root) for one in loaded.example.images]
        parts.append(f'<div class="pictures">{"".join(pictures)}</div>' if pictures else "")
        parts.append(f'<p class="text">{"".join(_piece(*one) for one in pieces(loaded, loader))}</p>')
    return f"<article>{''.join(parts)}</article>"


def _figure(image: str | bytes, root: str | None) -> str:
    """Returns a picture scaled down, with its size and name."""
    name = image if isinstance(image, str) and not image.startswith("data:") else "inside the record"
    try:
        opened = Image.open(io.BytesIO(image_bytes(image, root)))
        wide, high = opened.size
        small = to_rgb(opened)
    except UserError as error:
        return f'<figure><p class="warning">{_safe(str(error))}</p></figure>'
    small.thumbnail((SIDE, SIDE))
    small.save(content := io.BytesIO(), "JPEG", quality=85)
    caption = f"{wide} x {high} {name}"
    return f"<figure>{page.picture(content.getvalue(), name, 'jpeg')}<figcaption>{_safe(caption)}</figcaption></figure>"


def _piece(kind: str, text: str, over: bool) -> str:
    inside = _safe(text)
    if over:
        inside = f'<span class="over">{inside}</span>'
    if kind == "image":
        return f'<span class="image">image: {inside}</span>'
    return f"<mark>{inside}</mark>" if kind == "answer" else inside


def _safe(text: str) -> str:
    """Returns text of a record as HTML in which nothing acts."""
    return html.escape(escaped(text, keep="\n\t"))

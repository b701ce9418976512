"""Pages of HTML that are one file: their look, tables, pictures inside; for wide and narrow screens, light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #6a6a6a; --line: #ddd; --paper: #fff; --warn: #8a4b00;
  --warned: #fff3d6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --quiet: #a0a0a0; --line: #3a3a3a; --paper: #161616; --warn: #ffc766; --warned: #3a2c0c; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { margin-bottom: 0; line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; width: max-content; }
td, th { max-width: 32rem; padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; } img { max-width: 100%; background: #fff; }
.quiet { color: var(--quiet); } summary { cursor: pointer; color: var(--quiet); margin: .5rem 0; }
.warning { color: var(--warn); background: var(--warned); padding: .3rem .6rem; border-radius: .3rem; }
"""


def render(template: str, title: str, style: str = "", **values: Any) -> str:
    """Returns a page of one of the package's templates, which extends `page.html.j2`; texts in it are escaped."""
    import jinja2  # a tenth of a second, and few commands write a page

    files = jinja2.Environment(
        loader=jinja2.PackageLoader("mole_jax", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return files.get_template(template).render(title=title, style=Markup(STYLE + style), **values)


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """Returns a page of the parts of `body`, which are HTML, and with more of a style."""
    return render("page.html.j2", title, style, body=Markup("\n".join(filter(None, body))))


def table(rows: Sequence[Sequence[str]]) -> Markup:
    """Returns a table of texts; the first row is the heading, left out where it is empty."""
    heading = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = [f"<tr>{heading}</tr>"] if any(rows[0]) else []
    for row in rows[1:]:
        lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
    return Markup(f'<div class="wide"><table>{"".join(lines)}</table></div>')


def picture(content: bytes, alt: str, kind: str = "png") -> Markup:
    """Returns an image of a page that holds the content of an image file of such a kind."""
    return Markup(f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">')

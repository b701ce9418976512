"""A hook of mkdocs: pages link to sources by their path in the repository, and the site brings those along."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files, config):
    """Adds every file of the repository that a page links to."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({found[1] for text in pages for found in _LINK.finditer(text)}):
        if (ROOT / path).is_file():
            content = (ROOT / path).read_text()
            files.append(File.generated(config, f"{path}.txt", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns those links to the copies."""
    return _LINK.sub(lambda found: f"]({found[1]}.txt)" if (ROOT / found[1]).is_file() else found[0], markdown)

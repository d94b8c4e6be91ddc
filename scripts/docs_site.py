"""What mkdocs.yml hooks into the build of the site: the reference, and links to files outside of docs/.

A picture outside is shown from a copy in the site. Any other link outside becomes its text, because the site has only
the documentation; what it names has to be there as for every other link.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import docs_reference
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (".png", ".svg")
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Any, config: Any) -> Any:
    """Add the reference, and copies of the pictures that pages show out of other folders."""
    files.append(File.generated(config, "reference.md", content=docs_reference.page()))
    shown = {
        found[4]
        for page in files.documentation_pages()
        for found in _OUTSIDE.finditer(page.content_string)
        if found[4].endswith(PICTURES) and (ROOT / found[4]).is_file()
    }
    for name in sorted(shown):
        files.append(File.generated(config, f"outside/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead every link that leaves docs/ to a copy, or take it away."""

    def within(found: re.Match[str]) -> str:
        sign, text, _, name, _ = found.groups()
        if not (ROOT / name).exists():
            _log.warning("%s links to %s, which the repository does not have", page.file.src_path, name)
        return f"{sign}[{text}](outside/{name})" if name.endswith(PICTURES) else text

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _OUTSIDE.sub(within, part) for part in parts)

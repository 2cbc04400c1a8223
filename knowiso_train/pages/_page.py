"""A page as one HTML file with its styles and script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files

from knowiso_train.pages.elements import Html, join

# Nothing is loaded: a page works from disk and sends nothing, whatever text it holds
CONTENT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
# Spaces that must not become line breaks: "5 %", "KL 0.1"
NUMBER_SPACE = re.compile(r"(?<=\d) (?=(?:%|px|s|min|h|points?)(?!\w))|(?<=\bKL) (?=\d)")
MIN_LISTED_SECTIONS = 3  # pages with fewer sections have no list of contents


@dataclass(frozen=True)
class Section:
    """Section of a page.

    Attributes:
        title: Heading.
        content: Elements of the section.
    """

    title: str
    content: Html


def render_page(title: str, sections: Sequence[Section], *, subtitle: str = "", appendix: Html | None = None) -> str:
    """Return a page as one HTML file: it opens from disk, follows the light or dark theme, and loads nothing.

    Args:
        title: Heading of the page.
        sections: Sections from top to bottom.
        subtitle: Text below the heading. Empty: none.
        appendix: Folded details at the end. None: none.

    Examples:
        >>> from knowiso_train.pages import paragraph
        >>> page = render_page("Two networks", [Section("Layers", paragraph("One layer."))])
        >>> page[:15], "<h2>Layers</h2>" in page
        ('<!doctype html>', True)
    """
    body = "".join(
        f'<section id="section-{i}"><h2>{escape(section.title)}</h2>{section.content}</section>'
        for i, section in enumerate(sections)
    )
    lead = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    end = f'<section class="appendix">{appendix}</section>' if appendix else ""
    content = NUMBER_SPACE.sub("\N{NO-BREAK SPACE}", body + end)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>\n"
        f'<body><svg width="0" height="0" aria-hidden="true" class="patterns">{_hatch_pattern()}</svg>'
        f'<header><h1>{escape(title)}</h1><button type="button" id="theme" hidden></button>{lead}</header>'
        f"<main>{_contents(sections)}{content}</main>\n<script>{_asset('page.js')}</script></body></html>\n"
    )
    # Names from file systems can hold characters that no text file can
    return page.encode("utf-8", "replace").decode("utf-8")


def _contents(sections: Sequence[Section]) -> Html:
    """Return links to the sections of a long page."""
    if len(sections) < MIN_LISTED_SECTIONS:
        return Html("")
    items = join(
        Html(f'<li><a href="#section-{i}">{escape(section.title)}</a></li>') for i, section in enumerate(sections)
    )
    return Html(f'<nav aria-label="Contents"><ol>{items}</ol></nav>')


def _hatch_pattern() -> Html:
    return Html(
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" class="hatch-ground"/><rect width="1.2" height="6" class="hatch-line"/></pattern>'
    )


@cache
def _asset(name: str) -> str:
    return files("knowiso_train.pages").joinpath(name).read_text(encoding="utf-8").strip()

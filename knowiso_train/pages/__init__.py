"""Self-contained HTML pages: tables, bars, heat maps and image grids in one file that needs no network access."""

from knowiso_train.pages._images import Tile, heat_image, heat_scale, image_grid, thumbnail
from knowiso_train.pages._page import Section, render_page
from knowiso_train.pages.charts import Bar, LegendEntry, Mark, Segment, difference_bars, legend, matrix, stacked_bars
from knowiso_train.pages.elements import (
    Cell,
    Column,
    Html,
    folded,
    heading,
    join,
    note,
    paragraph,
    picture,
    side_by_side,
    table,
    term,
)

__all__ = [
    "Bar",
    "Cell",
    "Column",
    "Html",
    "LegendEntry",
    "Mark",
    "Section",
    "Segment",
    "Tile",
    "difference_bars",
    "folded",
    "heading",
    "heat_image",
    "heat_scale",
    "image_grid",
    "join",
    "legend",
    "matrix",
    "note",
    "paragraph",
    "picture",
    "render_page",
    "side_by_side",
    "stacked_bars",
    "table",
    "term",
    "thumbnail",
]

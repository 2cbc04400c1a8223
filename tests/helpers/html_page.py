"""Parsing of the pages of `knowiso_train.pages`: nesting of tags, tables and addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "br", "wbr", "input", "link", "hr"}
ADDRESS_ATTRIBUTES = {"src", "href", "action", "data", "srcset", "poster", "xlink:href"}


@dataclass
class Table:
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)  # with the head
    values: list[list[str | None]] = field(default_factory=list)  # data-value of the cells


class PageParser(HTMLParser):
    """Parser that refuses wrong nesting, and collects tables, tags, text and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[Table] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []  # attributes like onclick
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [values[name] or "" for name in ADDRESS_ATTRIBUTES & set(values)]
        self.handlers += [name for name in values if name.startswith("on")]
        if tag == "table":
            self.tables.append(Table())
        if tag == "tr":
            self.tables[-1].rows.append([])
            self.tables[-1].values.append([])
        if tag in ("td", "th"):
            self.tables[-1].rows[-1].append("")
            self.tables[-1].values[-1].append(values.get("data-value"))
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1:] == [tag], f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text.append(data)
        if "caption" in self._open:
            self.tables[-1].caption += data
        elif {"td", "th"} & set(self._open):
            self.tables[-1].rows[-1][-1] += data

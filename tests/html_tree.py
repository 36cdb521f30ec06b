"""A page as a tree of its elements, to ask what it says and of what it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "link", "input", "br", "img")


@dataclass
class Node:
    """An element of a page; `parts`: its text and its elements in order."""

    tag: str
    attributes: dict[str, str]
    parts: list[str | Node] = field(default_factory=list)

    def every(self, tag: str = "", **attributes: str) -> list[Node]:
        """Elements below, in order, of a tag and with attributes (`class_` a word of the class)."""
        found = []
        for part in self.parts:
            if isinstance(part, Node):
                style = attributes.get("class_")
                others = {key: value for key, value in attributes.items() if key != "class_"}
                fits = tag in ("", part.tag) and others.items() <= part.attributes.items()
                if fits and (style is None or style in part.attributes.get("class", "").split()):
                    found.append(part)
                found += part.every(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].parts.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def parse(html: str) -> Node:
    """The root of a page; fails where an element is not closed, or closed out of turn."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    root, *left = builder.open
    assert not left, f"never closed: {[node.tag for node in left]}"
    return root

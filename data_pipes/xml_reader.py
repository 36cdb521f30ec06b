"""XML from outside, by the standard library's expat: names without their namespaces, no entities of its own."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from .limits import Rejected

__all__ = ["parse", "tree"]


def parse(
    data: bytes,
    start: Callable[[str, dict[str, str]], object],
    end: Callable[[str], object] | None = None,
    text: Callable[[str], object] | None = None,
) -> None:
    """Calls `start(tag, attributes)`, `end(tag)` and `text(characters)` in the order of the document.

    Raises: Rejected if it is not XML, or defines entities (by which a small file grows without bound).
    """

    def refuse(*_: object) -> None:
        raise Rejected("its XML defines entities, which may grow without bound", "leave it out")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda tag, attributes: start(
        _local(tag), {_local(name): value for name, value in attributes.items()}
    )
    if end is not None:
        ended = end
        parser.EndElementHandler = lambda tag: ended(_local(tag))
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise Rejected(f"its XML is broken ({error})", "copy or download it again") from None


def tree(data: bytes) -> Element:
    """The document's root element. Raises: Rejected as `parse`."""
    builder = TreeBuilder()
    parse(data, builder.start, builder.end, builder.data)
    return builder.close()


def _local(name: str) -> str:
    return name.rpartition("}")[2]

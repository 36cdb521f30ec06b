"""Sections, cards and tables of the pages, as HTML; and the table of reconstruction scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["card", "reconstruction", "section", "table"]


def section(title: str, about: str, *content: str, anchor: str = "") -> str:
    """A heading, a line on how to read what follows, and that; nothing at all without content. anchor: to link to."""
    content = tuple(filter(None, content))
    if not content:
        return ""
    told = f'<p class="about">{about}</p>' if about else ""
    named = f' id="{anchor}"' if anchor else ""
    return f"<section{named}><h2>{title}</h2>{told}{''.join(content)}</section>"


def card(content: str) -> str:
    return f'<div class="card">{content}</div>' if content else ""


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str = "") -> str:
    """A card with a table of cells that are HTML already, the first of each row its heading.

    Args:
        rows: attributes of the <tr>, and the cells.
        caption: HTML too.
    """
    top = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head)
    lines = [
        f'<tr {attributes}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for attributes, (first, *cells) in rows
    ]
    named = f"<caption>{caption}</caption>" if caption else ""
    return card(f"<table>{named}<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def reconstruction(rebuilt: Mapping[str, Any] | None) -> str:
    """Scores of the autoencoder with their definitions."""
    if not rebuilt:
        return ""
    told = rebuilt["definitions"]
    rows = [
        (
            "",
            [
                escape(name),
                f"<b>{score['mean']:.4f}</b>",
                f"{score['lo']:.4f}–{score['hi']:.4f}",
                f'<span class="words">{escape(told.get(name, told["f_score"]))}</span>',
            ],
        )
        for name, score in rebuilt["scores"].items()
    ]
    settings = rebuilt["settings"]
    of = (
        f"held-out assets ({settings['split']})"
        if "split" in settings
        else f"references, alignment {settings['align']}"
    )
    about = f"{settings['count']} {escape(of)}, {rebuilt['empty']} without a surface."
    return section("Reconstruction", about, table(["", "mean", "95 % interval", ""], rows))

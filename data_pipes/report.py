"""One HTML page about a folder of raw shards: `shapeloom data report`.

The json members are read once (survey.py), pictures only for what the page shows. The page loads nothing, needs no
JavaScript, and every word that comes from the data is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import write_atomic
from .caption_twins import Group, bag, bag_hash, odd_word, text_hash
from .limits import ANIMATED
from .raw_sample import decode_webp
from .remote_shards import is_remote, open_shards
from .render import composite
from .report_pieces import LISTED, bars, bytes_said, counts_table, fact, finding, histogram, plot, safe, section, table
from .shard_folder import ShardFolder
from .survey import (
    NONE_GIVEN,
    Doubles,
    Rejections,
    Survey,
    particulars,
    read_duplicates,
    read_rejections,
    strings,
    survey,
)

__all__ = ["write_report"]

THUMBNAIL = 144  # pixels; shown at up to this size, so sharp on a dense phone screen too, where it is shown smaller
WORDS = 40
MOST_PIXELS = 1 << 24  # of a picture beside the shards
MOST_KINDS = 40  # kinds of warnings and rejections told apart on the page
# What is known of a mesh: how it is called, and whether it is a count (shares are the others).
MESH_PLOTS = {
    "vertices": ("Vertices", True),
    "faces": ("Faces", True),
    "materials": ("Materials", True),
    "textures": ("Textures", True),
    "components": ("Unconnected parts", True),
    "open_edge_share": ("Open edges", False),
    "flipped_share": ("Faces wound the wrong way", False),
    "hidden_share": ("Surface hidden inside", False),
    "sheet_share": ("Surface of thin sheets", False),
}


# --------------------------------------------------------------------------------------------------------- the page


def write_report(raw: str | Path, out: str | Path | None = None, *, count: int = 48) -> str:
    """Write the page about a folder of raw shards, and say in a few lines what is on it.

    Args:
        out: the HTML file; report.html in `raw` by default, of a URL in the working folder.
        count: assets on the contact sheet, evenly spread over the set.
    Raises: UserError if `raw` is no finished folder of raw shards, or where it is damaged.
    """
    shards = open_shards(raw)
    out = Path(out if out is not None else "report.html" if is_remote(raw) else Path(raw) / "report.html")
    if out.suffix.lower() not in (".html", ".htm") and not out.is_dir():
        raise UserError(f"the page must be named .html, got {out}")
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of the page, such as {out / 'report.html'}")
    rejections, doubles = read_rejections(shards), read_duplicates(shards)
    pairs = [entry for kind in (doubles or {}).values() for entry in kind.first]
    found = survey(shards, {entry[key] for entry in pairs for key in ("file", "of")})
    write_atomic(out, _page(shards, found, rejections, doubles, count))
    rejected = sum(kind.count for kind in rejections.values())
    return (
        f"{out}: {len(shards)} assets, {rejected} rejected files, {found.with_warnings} assets with warnings, "
        f"{len(found.duplicates())} captions that stand more than once"
    )


def _page(
    shards: ShardFolder,
    found: Survey,
    rejections: Mapping[str, Rejections],
    doubles: Mapping[str, Doubles] | None,
    count: int,
) -> str:
    title = safe(shards.title)
    css = Path(__file__).with_suffix(".css").read_text("utf-8")
    sections = [
        _contact_sheet(shards, count),
        _rejected(shards, rejections),
        _warned(shards, found),
        _animated(shards, found),
        _doubled(shards, found, doubles),
        _captions(shards, found),
        _sizes(found),
        _provenance(found),
        _settings(shards),
    ]
    anchors = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', "".join(sections))
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in anchors)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: data report</title><style>{css}</style></head>\n<body><main>"
        f'<header><p class="kind">Data report</p><h1>{title}</h1>{_overview(shards, found, rejections, doubles)}'
        f"<nav>{links}</nav></header>\n{''.join(sections)}</main></body></html>\n"
    )


def _overview(
    shards: ShardFolder, found: Survey, rejections: Mapping[str, Rejections], doubles: Mapping[str, Doubles] | None
) -> str:
    n, rejected = len(shards), sum(kind.count for kind in rejections.values())
    n_bytes = sum(shard["bytes"] for shard in shards.manifest["shards"])
    tiles = [
        (f"{n:,}", "assets"),
        (f"{rejected:,}", "files rejected"),
        (f"{found.with_warnings:,}", "assets with warnings"),
        *([(f"{sum(kind.count for kind in doubles.values()):,}", "doubles of another")] if doubles is not None else []),
        (f"{found.captions:,}", "captions"),
        (f"{len(shards.manifest['shards']):,}", "shards"),
        (bytes_said(n_bytes), f"{bytes_said(n_bytes / max(n, 1))} an asset"),
    ]
    cells = "".join(f'<div class="tile"><b>{number}</b><span>{name}</span></div>' for number, name in tiles)
    return f'<div class="tiles">{cells}</div>{_split_bar(found.splits)}'


def _split_bar(splits: Counter[str]) -> str:
    total = max(1, splits.total())
    names = sorted(splits, key=lambda name: -splits[name])
    parts = "".join(
        f'<i class="c{k % 6}" style="flex:{splits[name]}" title="{safe(name)} {splits[name]:,}"></i>'
        for k, name in enumerate(names)
    )
    legend = "".join(
        f'<li><i class="c{k % 6}"></i>{safe(name)} <b>{splits[name]:,}</b> '
        f"<small>{splits[name] / total:.1%}</small></li>"
        for k, name in enumerate(names)
    )
    return f'<div class="splits"><div class="bar">{parts}</div><ul>{legend}</ul></div>'


def _contact_sheet(shards: ShardFolder, count: int) -> str:
    picks = np.unique(np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)).tolist()
    if not picks:
        return ""
    about = f"{len(picks)} of {len(shards):,} assets, evenly spread over the set."
    figures = []
    for index in picks:
        meta, uid = shards.read_json(index), shards.uid(index)
        captions = strings(meta.get("captions"))
        more = f" · {len(captions)} captions" if len(captions) > 1 else ""
        figures.append(
            f'<figure title="{safe(" / ".join([uid, *captions]), 600)}">{_thumbnail(shards, index)}<figcaption>'
            f"<bdi>{safe(captions[0] if captions else 'no caption', 120)}</bdi>"
            f'<small>{safe(shards.splits(index))}{more}</small><small class="uid">{safe(_short(uid))}</small>'
            "</figcaption></figure>"
        )
    return section("assets", "Assets", about, f'<div class="sheet">{"".join(figures)}</div>')


def _thumbnail(shards: ShardFolder, index: int) -> str:
    """The first view on white as an <img> that holds its bytes; a box that says so where no view is stored."""
    members = shards.suffixes(index)
    name = next((name for name in ("lit_00.webp", "view_00.webp") if name in members), None)
    if name is None:
        return '<div class="blank">no view is stored</div>'
    return _img(decode_webp(shards.read(index, [name])[name], f"{shards.uid(index)}.{name}"))


def _picture(shards: ShardFolder, name: str) -> str:
    """A picture that lies beside the shards as an <img>; nothing where there is none, or its name leads elsewhere."""
    if not name:
        return ""
    try:
        with Image.open(shards.local(name), formats=["WEBP", "PNG", "JPEG"]) as image:
            return _img(np.asarray(image.convert("RGBA"))) if image.width * image.height <= MOST_PIXELS else ""
    except (OSError, ValueError, SyntaxError, UserError):
        return ""


def _img(rgba_HW4: np.ndarray) -> str:
    image = Image.fromarray(composite(rgba_HW4))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/webp;base64,{data}">'


def _rejected(shards: ShardFolder, rejections: Mapping[str, Rejections]) -> str:
    total = sum(kind.count for kind in rejections.values())
    if not total:
        return section("rejected", "Rejected files", "", '<p class="fine">No file was rejected.</p>')
    cards = [
        finding(kind.count, "file", _of_all(form, kind.reasons()), _rejected_of_a_kind(shards, kind))
        for form, kind in list(rejections.items())[:MOST_KINDS]
    ]
    about = f"{total:,} files could not be used; rejected.jsonl lists them all."
    return section(
        "rejected", "Rejected files", about, f'<div class="pairs">{"".join(cards)}</div>', _left_out(len(rejections))
    )


def _rejected_of_a_kind(shards: ShardFolder, kind: Rejections) -> str:
    """The hint, pictures of some files, names of others, and how many more there are."""
    pictures = [(entry, picture) for entry in kind.pictured if (picture := _picture(shards, entry["picture"]))]
    named = [entry for entry in kind.first if all(entry is not pictured for pictured, _ in pictures)]
    reasons = kind.reasons()
    figures = "".join(_figure(picture, e["file"], e["reason"], reasons) for e, picture in pictures)
    files = "".join(
        f"<li><code>{safe(entry['file'], 160)}</code>{_told_apart(entry['reason'], reasons)}</li>" for entry in named
    )
    left = kind.count - len(pictures) - len(named)
    more = f"<li>and {left:,} more</li>" if left else ""
    return (
        (f'<p class="hint">{safe(kind.first[0]["hint"])}</p>' if kind.first[0]["hint"] else "")
        + (f'<div class="sheet few">{figures}</div>' if figures else "")
        + (f"<ul>{files}{more}</ul>" if files or more else "")
    )


def _warned(shards: ShardFolder, found: Survey) -> str:
    kinds = [(kind, n) for kind, n in found.warnings.most_common() if kind != ANIMATED]
    if not kinds:
        other = "another" if found.warnings else "a"
        return section("warnings", "Warnings", "", f'<p class="fine">No asset has {other} warning.</p>')
    cards = [
        finding(
            n,
            "asset",
            _of_all(kind, [sentence for _, sentence in found.warned[kind]]),
            f'<div class="sheet few">{_figures(shards, found.warned[kind])}</div>',
        )
        for kind, n in kinds[:MOST_KINDS]
    ]
    share = found.with_warnings / max(1, len(shards))
    about = f"{found.with_warnings:,} of {len(shards):,} assets ({share:.1%}) have a warning; each kind with examples."
    return section("warnings", "Warnings", about, f'<div class="pairs">{"".join(cards)}</div>', _left_out(len(kinds)))


def _animated(shards: ShardFolder, found: Survey) -> str:
    """Those that were taken at rest; no section where there is none."""
    if not found.warnings[ANIMATED]:
        return ""
    some = found.warned[ANIMATED]
    sentences = [sentence for _, sentence in some]
    card = finding(
        found.warnings[ANIMATED],
        "asset",
        _of_all("They are animated", sentences),
        f'<div class="sheet few">{_figures(shards, some)}</div>',
    )
    return section("animated", "Animated assets", "", card)


def _figures(shards: ShardFolder, examples: Sequence[tuple[int, str]]) -> str:
    """Pictures of assets, each with its warning."""
    sentences = [sentence for _, sentence in examples]
    return "".join(
        _figure(_thumbnail(shards, index), shards.uid(index), sentence, sentences) for index, sentence in examples
    )


def _figure(picture: str, name: str, sentence: str = "", sentences: Sequence[str] = ()) -> str:
    """A small picture with its name, and with what tells its sentence from the others'."""
    told = f"{name}: {sentence}" if sentence else name
    apart = f"<small><bdi>{safe(particulars(sentence), 60)}</bdi></small>" if len(set(sentences)) > 1 else ""
    return (
        f'<figure title="{safe(told, 600)}">{picture}<figcaption>{apart}<small class="uid">{safe(_short(name))}</small>'
        "</figcaption></figure>"
    )


def _short(name: str) -> str:
    """The end of a long name, since files of one pack begin alike."""
    return name if len(name) <= 28 else f"…{name[-24:]}"


def _doubled(shards: ShardFolder, found: Survey, doubles: Mapping[str, Doubles] | None) -> str:
    """Pairs side by side; no section where it is not known which files are doubles."""
    if doubles is None:
        return ""
    if not doubles:
        return section("doubles", "Doubles", "", '<p class="fine">No file is a double of another.</p>')

    def side(file: str, picture: str = "") -> str:
        """One of a pair, from the shards or from the picture beside them."""
        there = found.places.get(file)
        shown = _thumbnail(shards, there) if there is not None else _picture(shards, picture)
        shown = shown or '<div class="blank">not in the shards</div>'
        return _figure(shown, file)

    cards = []
    for same, kind in list(doubles.items())[:MOST_KINDS]:
        pairs = "".join(
            f'<div class="pair">{side(entry["of"])}{side(entry["file"], entry["picture"])}</div>'
            for entry in kind.first
        )
        cards.append(finding(kind.count, "file", f"the same {safe(same)}", f'<div class="doubles">{pairs}</div>'))
    about = "Files that are like one before them, beside which they are shown; duplicates.jsonl lists them all."
    return section("doubles", "Doubles", about, *cards, _left_out(len(doubles)))


def _captions(shards: ShardFolder, found: Survey) -> str:
    repeated = found.duplicates()
    same, near = found.twins.same_words(), found.twins.one_word_apart()
    facts = [
        fact(f"{found.captions / max(1, len(shards)):.2f}", "captions an asset"),
        fact(f"{_mean(found.words_per_caption):.1f}", "words a caption"),
        fact(f"{found.from_names:,}", "assets captioned by file name"),
        fact(f"{sum(n - 1 for n, _ in repeated):,}", "captions that repeat another"),
        fact(f"{len(same):,}", "sets of the same words"),
        fact(f"{len(near):,}", "sets one word apart"),
    ]
    plots = [
        bars("Captions an asset", found.captions_per_asset, "assets"),
        bars("Words a caption", found.words_per_caption, "captions"),
    ]
    most = max(found.words.values(), default=1)
    words = "".join(
        f'<li style="--s:{0.8 + 0.9 * (n / most) ** 0.5:.2f}" title="{n:,} times"><bdi>{safe(word, 40)}</bdi></li>'
        for word, n in found.words.most_common(WORDS)
    )
    parts = [f'<div class="tiles small">{"".join(facts)}</div>', f'<div class="plots">{"".join(plots)}</div>']
    if words:
        parts.append(f'<div class="card"><h3>Most frequent words</h3><ul class="words">{words}</ul></div>')
    if repeated:
        rows = [(f"<bdi>{safe(text, 200)}</bdi>", f"{n:,}") for n, text in repeated[:LISTED]]
        parts.append(table(("Same caption", "times"), rows, len(repeated) - LISTED))
    if same:
        rows = [(_wordings(shards, group), f"{len(group.owners):,}") for group in same[:LISTED]]
        title = "The same words: order, articles and plurals aside"
        parts.append(table((title, "wordings"), rows, len(same) - LISTED))
    if near:
        rows = [(_but_for_a_word(shards, group), f"{len(group.owners):,}") for group in near[:LISTED]]
        parts.append(table(("The same but for one word", "captions"), rows, len(near) - LISTED))
    return section("captions", "Captions", "", *parts)


def _captions_of(shards: ShardFolder, owners: Sequence[int]) -> dict[int, str]:
    """Captions of a few assets, by the hash of their text."""
    metas = map(shards.read_json, dict.fromkeys(owners))
    return {text_hash(caption): caption for meta in metas for caption in strings(meta.get("captions"))}


def _wordings(shards: ShardFolder, group: Group) -> str:
    """Up to three captions of the same words."""
    captions = _captions_of(shards, group.owners[:3]).values()
    alike = [caption for caption in captions if bag_hash(bag(caption)) == group.key]
    return "<br>".join(f"<bdi>{safe(caption, 200)}</bdi>" for caption in alike[:3])


def _but_for_a_word(shards: ShardFolder, group: Group) -> str:
    """One of the captions with its word marked, and the words that others have there."""
    odd: dict[str, str] = {}  # word -> a caption with it
    whole = ""
    for caption in _captions_of(shards, group.owners[:LISTED]).values():
        words = bag(caption)
        if word := odd_word(words, group.key):
            odd.setdefault(word, caption)
        elif bag_hash(words) == group.key:
            whole = caption
    others = [*(["none"] if whole else []), *odd]
    for word, caption in odd.items():
        if marked := _marked(caption, word):
            others.remove(word)
            more = ", …" if len(group.owners) > LISTED else ""
            return f"<bdi>{marked}</bdi><br><small>or {safe(', '.join(others), 200)}{more}</small>"
    return f"<bdi>{safe(whole, 200)}</bdi>"


def _marked(caption: str, word: str) -> str:
    """The caption with the first place of a word of its bag marked; nothing where it is not found."""
    for match in re.finditer(r"\w+(?:['’-]\w+)*", caption[:200]):
        if bag(match[0]) == [word]:
            before, after = caption[: match.start()], caption[match.end() :]
            return f"{safe(before)}<mark>{safe(match[0])}</mark>{safe(after, 200)}"
    return ""


def _sizes(found: Survey) -> str:
    if not found.mesh:
        about = "The assets record no mesh statistics, as those of a procedural set do not."
        return section("sizes", "Sizes", about, "")
    plots = [histogram(name, found.mesh[key], log) for key, (name, log) in MESH_PLOTS.items() if key in found.mesh]
    if "texture_side" in found.mesh:
        plots.insert(4, _texture_sizes(found.mesh["texture_side"]))
    return section("sizes", "Sizes", "The median is marked.", f'<div class="plots">{"".join(plots)}</div>')


def _texture_sizes(sides: Sequence[float]) -> str:
    """The larger side of each asset's largest texture, in powers of two."""
    powers = Counter(int(np.ceil(np.log2(side))) if side >= 1 else -1 for side in sides)  # -1: it has no texture
    present = [power for power in powers if power >= 0]
    if not present:
        return ""
    classes = [*([-1] if -1 in powers else []), *range(min(present), max(present) + 1)]
    names = ["no texture" if power < 0 else f"{2**power:,}" for power in classes]
    tips = [
        f"{name if power < 0 else f'up to {name} pixels'}: {powers[power]:,} assets"
        for name, power in zip(names, classes)
    ]
    return plot("Largest texture, pixels", [powers[power] for power in classes], tips, (names[0], names[-1]))


def _provenance(found: Survey) -> str:
    licences: Counter[str] = Counter()
    authors: Counter[str] = Counter()
    for (licence, author), n in found.licences.items():
        licences[licence] += n
        authors[author] += n
    tables = [
        counts_table(("Licence", "assets"), licences),
        counts_table(("Author", "assets"), authors),
        counts_table(("Category", "assets"), found.categories),
    ]
    unknown = licences[NONE_GIVEN]
    about = f"{unknown:,} assets name no licence." if unknown else "Every asset names a licence."
    return section("origin", "Licences, authors, categories", about, f'<div class="columns">{"".join(tables)}</div>')


def _settings(shards: ShardFolder) -> str:
    rows = "".join(f"<dt>{safe(key)}</dt><dd>{safe(value)}</dd>" for key, value in _flat(shards.manifest["settings"]))
    return section("settings", "Built with", "", f'<div class="card"><dl>{rows}</dl></div>')


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings as they are written on the command line: a.b and its value."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_all(form: str, sentences: Sequence[str]) -> str:
    """The sentence where all are one, otherwise what they have in common."""
    return safe(sentences[0] if len(set(sentences)) == 1 else form)


def _told_apart(sentence: str, sentences: Sequence[str]) -> str:
    return f" {safe(sentence, 160)}" if len(set(sentences)) > 1 else ""


def _left_out(n_kinds: int) -> str:
    return f'<p class="about">and {n_kinds - MOST_KINDS:,} more kinds</p>' if n_kinds > MOST_KINDS else ""


def _mean(counts: Counter[int]) -> float:
    return sum(value * n for value, n in counts.items()) / max(1, counts.total())

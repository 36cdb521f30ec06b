"""`report.html`, the page of an R-precision run: one file that needs no other and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...files import write_atomic
from ..benchmark.schema import Results, read_results
from .confusions import ranks_and_confusions, statistics
from .objects import objects, page_data, read_objects, read_pictures
from .parts import card, section, table
from .plots import interval_bar, time_bars
from .scores import binding, scores
from .views import mark, selectors, text

__all__ = ["write_report"]

HERE = Path(__file__).parent
MOST_FAILURES = 50

# The policy lets run what its hashes name and nothing else: a caption that slipped through as markup stays dead.
FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src {style_hash}; \
script-src {script_hash}">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main>
{sprite}
<script type="application/json" id="data">{data}</script>
<script>{script}</script></body></html>
"""
LINKS = {
    "scores": "Scores",
    "binding": "Binding and order",
    "objects": "Objects",
    "confusions": "Ranks and confusions",
    "failures": "Failures",
    "statistics": "Statistics",
    "inputs": "Inputs and settings",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of an R-precision run, from what stands in it.

    Reads results.json, per_prompt.csv and, where there is one, thumbnails.npz: uint8 arrays "ROW/ID/SEED" of the bytes
    of a small WebP picture each, ROW being "generated" or "true renders" (of seed 0).

    Returns: the path of the page.
    Raises: UserError for a file that is missing, damaged or of another format.
    """
    folder = Path(folder)
    results = read_results(folder)
    every = read_objects(folder / "per_prompt.csv")
    pictures = read_pictures(folder / "thumbnails.npz")
    offered = selectors(results)
    first = {key: names[0] if names else "" for key, names in offered.items()}
    sections = {
        "scores": scores(results, first),
        "binding": binding(results, first),
        "objects": objects(every, first, pictures),
        "confusions": ranks_and_confusions(results, first, pictures),
        "failures": _failures(results),
        "statistics": statistics(results, first),
        "inputs": _inputs(results),
    }
    links = [anchor for anchor, content in sections.items() if content]
    style = "".join((HERE / name).read_text("utf-8") for name in ("page.css", "benchmark.css"))
    script = (HERE / "benchmark.js").read_text("utf-8")
    page = FRAME.format(
        title=escape(_title(results)),
        style=style,
        style_hash=_policy_hash(style),
        script=script,
        script_hash=_policy_hash(script),
        body="\n".join([_header(results, links), _selectors(results, offered), *filter(None, sections.values())]),
        sprite=pictures.sprite(),
        data=_inert(page_data(every, pictures)),
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _policy_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(value: Any) -> str:
    """JSON that HTML cannot mistake for markup: no text of others can end the element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _title(results: Results) -> str:
    one, protocol = results.headline.r_at_1, results.protocol.get("name", "")
    number = f"R@1 {100 * one.mean:.1f} %" if one else "No headline R@1"
    return f"{'Partial: ' if results.partial else ''}{number}, {protocol}, Shapeloom R-precision"


def _header(results: Results, anchors: Sequence[str]) -> str:
    """Title, banner, the number to quote, and links to the sections that follow."""
    banner = (
        '<p class="banner" role="note"><b>Partial run, not comparable.</b> Only some of the prompts were scored '
        "(<code>--limit</code>); no number on this page may be compared or quoted.</p>"
    )
    about = "Does a generated object look like its prompt? A CLIP picks the caption of each rendered picture."
    links = "".join(f'<a href="#{anchor}">{LINKS[anchor]}</a>' for anchor in anchors)
    return (
        f'<header><h1>CLIP R-precision</h1><p class="lead">{about}</p>{banner if results.partial else ""}'
        f'{_headline(results)}<nav aria-label="Sections">{links}</nav></header>'
    )


def _headline(results: Results) -> str:
    """The number with its interval, in digits and drawn, or why there is none; and what it stands under."""
    one, reason = results.headline.r_at_1, escape(results.headline.reason)
    facts = f'<dl class="facts">{_facts(results)}</dl>'
    if one is None:
        told = f'<p class="big">No headline number</p><p class="reason">{reason or "No reason was given."}</p>'
        return f'<div class="card headline none">{told}{facts}</div>'
    notes = "".join(f'<p class="about">{note}</p>' for note in (_beside(results), reason) if note)
    return (
        f'<div class="card headline"><div class="number"><p class="big">{100 * one.mean:.1f}<small> %</small></p>'
        f"<p><b>R@1</b>, 95 % interval {100 * one.lo:.1f}–{100 * one.hi:.1f}</p>"
        f"{interval_bar(one.mean, one.lo, one.hi)}{notes}</div>{facts}</div>"
    )


def _beside(results: Results) -> str:
    """What the headline is to be held against."""
    headline, told = results.headline, []
    for row in ("true renders", "chance"):
        for score in results.scores:
            where = (score.row, score.evaluator, score.shading, score.gallery, score.group)
            if where == (row, headline.evaluator, headline.shading, headline.gallery, "all"):
                told.append(f"{row} {100 * score.metrics['r@1'].mean:.1f} %")
    return ", ".join(told)


def _facts(results: Results) -> str:
    """What decided the headline's number."""
    headline, protocol = results.headline, results.protocol
    if headline.r_at_1:
        counts = f"{headline.r_at_1.prompts} × {headline.r_at_1.seeds}"
    else:
        prompts, seeds = results.prompts.get("count", "?"), results.inputs.get("seeds", "?")
        counts = f"{_plain(prompts)} × {_plain(len(seeds) if isinstance(seeds, list) else seeds)}"
    facts = {"Prompts × seeds": counts}
    for gallery in results.galleries:
        if gallery.name == headline.gallery:
            own = {
                True: ' <span class="pill none">the protocol\'s own</span>',
                False: ' <span class="pill warn">not the protocol\'s own</span>',
                None: "",
            }[gallery.of_protocol]
            facts["Gallery"] = f"{escape(gallery.name)}, {gallery.size} captions {_hash(gallery.hash)}{own}"
    for evaluator in results.evaluators:
        if evaluator.name == headline.evaluator:
            facts["Evaluator"] = f"{escape(evaluator.name)} {_hash(evaluator.hash)}{mark(results, evaluator.name)}"
    if headline.shading:
        facts["Shading"] = escape(headline.shading)
    facts["Protocol"] = f"{_plain(protocol.get('name', 'unnamed'))} {_hash(str(protocol.get('hash', '')))}"
    facts["Date"] = f"<time>{escape(results.date.replace('T', ' ', 1))}</time>"
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())


def _hash(digest: str) -> str:
    """Short to the eye; a click selects, and copying gives, all of it."""
    if not digest:
        return ""
    head, tail = escape(digest[:10]), escape(digest[10:])
    return f'<code class="hash" title="{escape(digest)}">{head}<span>{tail}</span></code>'


def _selectors(results: Results, offered: Mapping[str, Sequence[str]]) -> str:
    """The form that says which block of each section is shown; of use to the script alone."""
    independence = {record.name: record.independence for record in results.evaluators}

    def label(key: str, name: str) -> str:
        if key == "group" and name == "all":
            return "all prompts"
        if key == "evaluator" and independence[name] not in ("independent", "unknown"):
            return f"{name} ({independence[name]} as the conditioner)"
        return name

    fields = []
    for key, names in offered.items():
        options = "".join(f'<option value="{escape(name)}">{escape(label(key, name))}</option>' for name in names)
        fields.append(f'<label>{key.capitalize()} <select name="{key}">{options}</select></label>')
    return f'<form id="choose" hidden aria-label="What all tables and plots show">{"".join(fields)}</form>'


def _failures(results: Results) -> str:
    """Every object that counts as a miss because there was nothing to score."""
    failures, n_objects = results.failures, results.inputs.get("objects")
    if not failures:
        return section(
            "Failures: none", "Every object was there, could be read and was scored.", " ", anchor="failures"
        )
    cells = [[f"<code>{escape(x.id)}</code>", str(x.seed), escape(x.kind), text(x.reason)] for x in failures]
    lines = [("", row) for row in cells]
    head = ["id", "seed", "kind", text("reason")]
    content = table(head, lines[:MOST_FAILURES])
    if rest := lines[MOST_FAILURES:]:
        content += f"<details><summary>{len(rest)} more</summary>{table(head, rest)}</details>"
    kinds = [one.kind for one in failures]
    counted = ", ".join(f"{kinds.count(kind)} {escape(kind)}" for kind in dict.fromkeys(kinds))
    of = f" of {_plain(n_objects)} objects" if n_objects is not None else ""
    about = f"They count as misses in every score. {counted}."
    return section(f"Failures: {len(failures)}{of}", about, content, anchor="failures")


def _inputs(results: Results) -> str:
    """What was scored, by whom, how long it took, and every setting."""
    inputs = dict(results.inputs)
    extra, duplicates = inputs.pop("extra", None), inputs.pop("duplicates", None)
    facts = {name: _plain(value) for name, value in inputs.items()}
    facts |= {f"prompts, {name}": _plain(value) for name, value in results.prompts.items()}
    facts["ids without a prompt"] = _counted(extra)
    facts["objects of the same bytes"] = _counted(duplicates)
    for evaluator in results.evaluators:
        if evaluator.truncated:
            facts[f"prompts of more than {evaluator.context_length} tokens, cut by {evaluator.name}"] = _counted(
                evaluator.truncated
            )
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    timings = {name: seconds for name, seconds in results.timings_s.items() if name != "all"}
    return section(
        "Inputs and settings",
        "",
        card(_listed(facts)),
        f'<h3>Notes</h3><ul class="notes">{notes}</ul>' if notes else "",
        f"<h3>Evaluators</h3>{_evaluators(results)}",
        f"<h3>Time of this run (what a cache held took none)</h3>{card(time_bars(timings))}" if timings else "",
        _fold("Protocol settings", results.protocol),
        _fold("Galleries", {record.name: f"{record.size} captions, {record.hash}" for record in results.galleries}),
        _fold("Environment", results.environment),
        anchor="inputs",
    )


def _evaluators(results: Results) -> str:
    lines = []
    for one in results.evaluators:
        notes = "".join(map(text, one.notes))
        lines.append(
            (
                "",
                [
                    f"{escape(one.name)}{mark(results, one.name)}{notes}",
                    f"{escape(one.architecture)}, {escape(one.pretraining or 'pre-training unknown')}",
                    f"{escape(one.weights)} {_hash(one.hash)}",
                    f"{one.image_size} px",
                    str(one.context_length),
                ],
            )
        )
    return table(["evaluator", "architecture", "weights", "picture", "tokens"], lines)


def _fold(title: str, facts: Mapping[str, Any]) -> str:
    listed = _listed({name: _plain(value) for name, value in facts.items()})
    return f"<details><summary>{title}</summary>{card(listed)}</details>" if facts else ""


def _listed(facts: Mapping[str, str]) -> str:
    """Names that are text, values that are HTML already."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{value}</dd>' for name, value in facts.items())}</dl>"


def _counted(values: Any) -> str:
    """How many a list has, with all of them named in a fold; "none" of an empty one."""
    if not isinstance(values, list) or not values:
        return _plain(values) if values else "none"
    named = ", ".join(_plain(value) for value in values)
    return f"<details><summary>{len(values)}</summary>{named}</details>"


def _plain(value: Any) -> str:
    """A value out of JSON as escaped text."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list) and not any(isinstance(one, (list, dict)) for one in value):
        return ", ".join(_plain(one) for one in value)
    return escape(f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False))

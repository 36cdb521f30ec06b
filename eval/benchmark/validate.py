"""`eval validate`: everything that can be known of a run's inputs without a model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...data_pipes.limits import Rejected
from ...data_pipes.shard_folder import ShardFolder
from ...data_pipes.shards import MANIFEST
from ...data_pipes.workers import Failed, isolated_map
from ...errors import UserError
from ...files import sha256_json
from ...progress import Bar
from ..evaluators.registry import open_evaluator
from .inputs import find_objects
from .prompts import TEST_SPLITS, PromptSet, galleries, read_prompts
from .protocol import Protocol, load_protocol
from .renders import Limits
from .sources import MeshFile, Picture, Reading, Source

__all__ = ["validate"]

LISTED = 10


def validate(
    prompts: str | Path,
    generated: str | Path | None,
    protocol: str,
    seeds: Sequence[int] | None,
    evaluators: Sequence[str],
    workers: int,
    trained_on: str | Path | None = None,
) -> int:
    """Print what was found. Returns 1 where objects are missing or broken, else 0.

    Args:
        trained_on: captions that the system saw in training, in any form of prompts; of raw shards, all that are not
            in a test split.
    Raises: UserError as `read_prompts` and `find_objects` do.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    rules, found = load_protocol(protocol), read_prompts(prompts)
    _tell_prompts(console, found, rules)
    _tell_tokens(console, found, rules, evaluators)
    if trained_on is not None:
        _tell_overlap(console, found, Path(trained_on))
    wrong = _tell_controls(console, found, workers)
    if generated is not None:
        wrong |= _tell_objects(console, found, rules, Path(generated), seeds, workers)
    console.print("not all is well: see above" if wrong else "all is well")
    return int(wrong)


def _tell_prompts(console: Console, found: PromptSet, protocol: Protocol) -> None:
    prompts = found.prompts
    console.print(f"{len(prompts)} prompts in {found.source}, ids {prompts[0].id} to {prompts[-1].id}")
    for group, count in Counter(name for prompt in prompts for name in prompt.groups).items():
        console.print(f"  group {group}: {count}")
    for gallery in galleries(prompts):
        console.print(f"  gallery '{gallery.name}': {len(gallery.captions)} captions, hash {gallery.hash[:16]}")
        rule = protocol.gallery
        if gallery.name == "prompts" and rule.captions_sha256 not in (None, gallery.hash):
            console.print(
                f"    this is not the gallery of {protocol.name}: scores will not be comparable with its others"
            )
        elif gallery.name == "prompts" and rule.size not in (None, len(gallery.captions)):
            console.print(
                f"    {protocol.name} asks for {rule.size} captions: scores will not be comparable with its others"
            )
    by_meaning = defaultdict(list)
    for prompt in prompts:
        by_meaning[prompt.meaning].append(prompt.id)
    equal = [ids for ids in by_meaning.values() if len(ids) > 1]
    _list(console, [", ".join(ids) for ids in equal], "captions that say the same (each is a hit for the others)")
    by_words = defaultdict(list)
    for prompt in prompts:
        by_words[_words(prompt.text)].append(prompt)
    near = [same for same in by_words.values() if len({prompt.meaning for prompt in same}) > 1]
    told = ["; ".join(f"{prompt.id}: {prompt.text}" for prompt in same) for same in near]
    _list(console, told, "groups of captions of the same words; give equivalent_ids where they say the same")


def _tell_tokens(console: Console, found: PromptSet, protocol: Protocol, evaluators: Sequence[str]) -> None:
    texts = [protocol.caption(prompt.text) for prompt in found.prompts]
    for name in evaluators or ("",):
        counts, length = _count_tokens(name, texts)
        long = [
            f"{prompt.id} ({count} tokens): {prompt.text[:80]}"
            for prompt, count in zip(found.prompts, counts)
            if count > length
        ]
        _list(
            console, long, f"captions longer than the {length} tokens that {name or 'a CLIP'} reads; their end is cut"
        )


def _tell_overlap(console: Console, found: PromptSet, trained_on: Path) -> None:
    seen = _training_captions(trained_on)
    exact = {" ".join(text.lower().split()).rstrip(" .") for text in seen}
    words = {_words(text) for text in seen}
    same = [p for p in found.prompts if " ".join(p.text.lower().split()).rstrip(" .") in exact]
    console.print(f"{len(seen)} captions in {trained_on}: {len(same)} prompts are among them")
    _list(console, [f"{prompt.id}: {prompt.text}" for prompt in same], "prompts that were trained on")
    near = [prompt for prompt in found.prompts if prompt not in same and _words(prompt.text) in words]
    _list(
        console, [f"{prompt.id}: {prompt.text}" for prompt in near], "prompts whose words were trained on in some order"
    )


def _training_captions(source: Path) -> list[str]:
    if not (source / MANIFEST).exists():
        return [prompt.text for prompt in read_prompts(source).prompts]
    folder = ShardFolder(source)
    tests = set(folder.where(TEST_SPLITS).tolist())
    return [text for i in range(len(folder)) if i not in tests for text in folder.read_json(i).get("captions", ())]


def _words(text: str) -> tuple[str, ...]:
    """A caption's words without articles, sorted."""
    return tuple(sorted(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")))


def _count_tokens(evaluator: str, texts: Sequence[str]) -> tuple[list[int], int]:
    """Of each text, by an evaluator's tokenizer or by CLIP's own; and how many it reads."""
    if evaluator:
        opened = open_evaluator(evaluator)
        return opened.count_tokens(texts), opened.facts.context_length
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return [len(tokenizer.encode(text)) + 2 for text in texts], tokenizer.context_length


def _tell_objects(
    console: Console, found: PromptSet, protocol: Protocol, folder: Path, seeds: Sequence[int] | None, workers: int
) -> bool:
    """Returns whether anything is wrong."""
    objects = find_objects(folder, found.prompts, protocol, seeds)
    units = [
        (f"{prompt.id}/{seed}", source)
        for prompt, row in zip(found.prompts, objects.sources_PS)
        for seed, source in zip(objects.seeds, row)
    ]
    there = [(name, source) for name, source in units if source is not None]
    console.print(
        f"{len(there)} of {len(units)} objects in {folder} ({objects.kind}), seeds "
        f"{', '.join(map(str, objects.seeds[:8]))}{' …' if len(objects.seeds) > 8 else ''}"
    )
    _list(console, [name for name, source in units if source is None], "missing")
    broken = _read_all(console, there, workers)
    _list(console, objects.extra, "objects without a prompt; they are not scored")
    _list(console, objects.unplaced, "files whose name is no seed; name them 0.glb, 1.glb …")
    return broken or bool(objects.missing)


def _tell_controls(console: Console, found: PromptSet, workers: int) -> bool:
    """References and pictures of the prompts. Returns whether anything is wrong."""
    named: list[tuple[str, Source]] = [
        (f"reference of {p.id}", p.reference) for p in found.prompts if isinstance(p.reference, MeshFile)
    ]
    named += [(f"image of {p.id}", p.image) for p in found.prompts if isinstance(p.image, Picture)]
    if named:
        console.print(f"{len(named)} references and pictures of prompts")
    return _read_all(console, named, workers)


def _read_all(console: Console, there: Sequence[tuple[str, Source]], workers: int) -> bool:
    """Read every object in worker processes and tell what is wrong. Returns whether anything is broken."""
    if not there:
        return False
    broken, warned, by_content = [], [], defaultdict(list)
    checked = isolated_map(
        _check,
        [source for _, source in there],
        workers=workers,
        cpu_s=Limits().cpu_s,
        wall_s=Limits().wall_s,
        memory_bytes=Limits().memory_bytes,
    )
    with Bar(len(there), "reading") as bar:
        for (name, _), result in zip(there, checked):
            content, reason, warnings = ("", result.reason, []) if isinstance(result, Failed) else result
            by_content[content].append(name)
            if reason:
                broken.append(f"{name}: {reason}")
            if warnings:
                warned.append(f"{name}: {warnings[0]}")
            bar.update(1)
    _list(console, broken, "empty or broken; they will count as misses")
    _list(console, warned, "read without a part of what they name")
    twins = [", ".join(names) for content, names in by_content.items() if content and len(names) > 1]
    _list(console, twins, "objects of equal bytes")
    return bool(broken)


def _check(source: Source) -> tuple[str, str, list[str]]:
    """Runs in a worker: a hash of the object's bytes, what is wrong with it, and what was left out of it."""
    content = ""
    reading = Reading()
    try:
        content = sha256_json(source.key())
        source.load(reading)
    except Rejected as rejected:
        return content, rejected.reason, []
    except UserError as error:
        return content, str(error), []
    except OSError as error:
        return content, f"it cannot be read ({error.strerror or error})", []
    return content, "", reading.warnings


def _list(console: Console, entries: Sequence[str], what: str) -> None:
    """A count and the first few; nothing where there are none."""
    if not entries:
        return
    console.print(f"{len(entries)} {what}:")
    for entry in entries[:LISTED]:
        console.print(f"  {entry}")
    if len(entries) > LISTED:
        console.print(f"  … and {len(entries) - LISTED} more")

"""Prompt sets and galleries: what is read, what is refused in one sentence, and what stands in a gallery."""

from __future__ import annotations

import json

import pytest

from shapeloom.data_pipes import grammar
from shapeloom.errors import UserError
from shapeloom.eval.benchmark.prompts import choose, galleries, groups, read_prompts

COCO_153 = "f0fb740e8dded740d1b8a54ba09c81080499c99e6db11a3a3133c0e3842d9747"  # reference: sha256 of the 153 lines


@pytest.fixture
def written(tmp_path):
    def write(*lines, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
        return path

    return write


def test_lines_of_text_have_their_place_as_id(written):
    found = read_prompts(written("# a comment\n", "a red  cube\n", "\n", "a ball: blue\n", name="p.txt"))
    assert [(p.id, p.text) for p in found.prompts] == [("000", "a red  cube"), ("001", "a ball: blue")]


def test_the_published_prompts_give_the_published_gallery_hash(repo_root):
    path = repo_root.parent / "shared" / "prompts" / "object_centric_153.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = read_prompts(path)
    assert len(found.prompts) == 153
    assert galleries(found.prompts)[0].hash == COCO_153


def test_lines_end_at_line_feeds_alone(written):
    text = "a chair\u2028with arms\r\na\x0cball\r\na table\x85round\n"
    found = read_prompts(written(text, name="p.txt"))
    assert [p.text for p in found.prompts] == ["a chair with arms", "a ball", "a table round"]
    line = '{"id": "a", "text": "a chair\u2028with arms"}\n'
    assert read_prompts(written(line)).prompts[0].text == "a chair with arms"


def test_json_lines_keep_what_they_say(written):
    found = read_prompts(
        written(
            {"id": "chair-1", "text": "ein Stuhl:\nrot – schön", "group": ["seats", "red things"]},
            {"id": "b", "text": "a red cube left of a blue ball", "group": "pairs"},
        )
    )
    first, second = found.prompts
    assert first.text == "ein Stuhl: rot – schön" and first.groups == ("seats", "red things")
    assert {swap.kind for swap in second.swaps} == {"parts", "colors", "shapes", "relation"}
    masks = groups(found.prompts)
    assert list(masks) == ["all", "seats", "pairs", "red things"] and masks["pairs"].tolist() == [False, True]


def test_references_and_pictures_lie_beside_the_file(written, tmp_path):
    (tmp_path / "true.glb").write_bytes(b"x")
    (tmp_path / "p.png").write_bytes(b"x")
    (prompt,) = read_prompts(written({"id": "a", "text": "x", "reference": "true.glb", "image": "p.png"})).prompts
    assert prompt.reference.path == str(tmp_path / "true.glb") and prompt.image.path == str(tmp_path / "p.png")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": "a", "txt": "x"}, "unknown key 'txt'; did you mean 'text'?"),
        ({"id": "a", "text": "x", "colour": 1}, "unknown key 'colour'; known are id, text"),
        ({"id": "a:b", "text": "x"}, "'a:b' cannot name a file"),
        ({"id": "a\nb", "text": "x"}, r"'a\nb' cannot name a file"),
        ({"id": "stühle", "text": "x"}, "'stühle' cannot name a file"),
        ({"id": "../a", "text": "x"}, "'../a' cannot name a file"),
        ({"id": "a/b", "text": "x"}, "'a/b' cannot name a file"),
        ({"id": 7, "text": "x"}, "7 cannot name a file"),
        ({"id": "a"}, "the caption is missing or empty"),
        ({"id": "a", "text": "  "}, "the caption is missing or empty"),
        ({"id": "a", "text": "x" * 3000}, "3000 characters"),
        ({"id": "a", "text": "x", "reference": "no.glb"}, "reference 'no.glb' is not a file"),
        ({"id": "a", "text": "x", "equivalent_ids": ["b"]}, "'b', which no line has as its id"),
        ({"id": "a", "text": "x", "group": [1]}, "group must be a text or a list of texts"),
        ({"id": "a", "text": "x", "group": "all"}, "may not be called 'all'"),
        ({"id": "a", "text": "x", "swaps": ["y"]}, "swaps must be a list of"),
        ({"id": "a", "text": "x \ud83d"}, "half of a character"),
        (
            {"id": "a", "text": "x", "reference": "prompts.jsonl", "reference_up": "up"},
            "reference_up must be 'y' or 'z'",
        ),
        ('{"id": "a"\n', "is not a JSON object"),
        ("[1]\n", "is not a JSON object"),
    ],
)
def test_a_wrong_line_is_one_sentence_with_its_place(written, line, says):
    with pytest.raises(UserError) as caught:
        read_prompts(written({"id": "first", "text": "fine"}, line))
    assert says in str(caught.value) and "line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_files_are_one_sentence(written, tmp_path):
    with pytest.raises(UserError, match="the id 'a' was given before"):
        read_prompts(written({"id": "a", "text": "x"}, {"id": "a", "text": "y"}))
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="must be a .txt, a .jsonl or a folder"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("müde".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(written("# nothing\n", name="empty.txt"))


def test_equal_captions_are_hits_and_never_distractors(written):
    found = read_prompts(
        written(
            {"id": "a", "text": "a red cube left of a blue ball"},
            {"id": "b", "text": "a blue sphere right of a red block"},  # the grammar knows that they say the same
            {"id": "c", "text": "a sofa", "equivalent_ids": ["d"]},
            {"id": "d", "text": "a couch"},
            {"id": "e", "text": "A sofa."},
        )
    ).prompts
    own, hard = galleries(found)
    assert own.captions == tuple(prompt.text for prompt in found)
    hits = own.hits(found)
    assert hits[0].tolist() == hits[1].tolist() == [True, True, False, False, False]
    assert hits[2].tolist() == hits[3].tolist() == hits[4].tolist() == [False, False, True, True, True]
    assert len(hard.captions) == len(own.captions) + 3  # parts (= relation), colours and shapes exchanged, once
    assert len(set(hard.meanings)) == 2 + 3


def test_a_swap_that_is_another_prompt_is_no_distractor(written):
    left, right = "a red cube left of a blue ball", "a blue ball left of a red cube"
    prompts = read_prompts(written({"id": "a", "text": left}, {"id": "b", "text": right})).prompts
    hard = galleries(prompts)[-1]
    assert hard.name == "hard" and len(set(hard.meanings)) == len(hard.captions)
    assert (hard.hits(prompts).sum(axis=1) == 1).all()


def test_swaps_of_the_file_take_the_place_of_the_grammars(written):
    line = {"id": "a", "text": "a cat on a mat", "swaps": [{"kind": "parts", "text": "a mat on a cat"}]}
    (prompt,) = read_prompts(written(line)).prompts
    assert [(swap.kind, swap.text) for swap in prompt.swaps] == [("parts", "a mat on a cat")]
    (bare,) = read_prompts(written({**line, "swaps": []})).prompts
    assert bare.swaps == ()


def test_fewer_prompts_are_taken_from_all_groups(written):
    lines = [{"id": f"p{i}", "text": f"thing {i}", "group": "abc"[i % 3]} for i in range(30)]
    prompts = read_prompts(written(*lines)).prompts
    some = choose(prompts, 7)
    assert len(some) == 7 and {prompt.groups for prompt in some} == {("a",), ("b",), ("c",)}
    assert choose(prompts, None) == choose(prompts, 99) == list(prompts)
    assert [prompt.id for prompt in some] == sorted((p.id for p in some), key=lambda name: int(name[1:]))


def test_a_raw_folder_gives_its_test_captions_with_their_samples(tmp_path):
    from shapeloom.data_pipes.procedural import ProceduralSettings, generate

    settings = ProceduralSettings(count=60, n_surface=16, n_near=0, n_uniform=0, n_views=2, image_size=16)
    generate(tmp_path / "raw", settings)
    found = read_prompts(tmp_path / "raw")
    assert {split for prompt in found.prompts for split in prompt.groups} >= {"seen", "unseen combinations", "pairs"}
    for prompt in found.prompts:
        assert prompt.meaning == grammar.canonical_caption(grammar.parse(prompt.text))
        assert prompt.reference.exact and prompt.image is not None
    assert len(prompt.reference.load().mesh.faces) > 0
    generate(
        tmp_path / "train", ProceduralSettings(count=6, holdout=False, n_views=0, n_surface=0, n_near=0, n_uniform=0)
    )
    with pytest.raises(UserError, match="no sample in a test split"):
        read_prompts(tmp_path / "train")

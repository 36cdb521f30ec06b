"""Captions by a model: tiny ones of each kind against their own classes, resume, wrong input, and the way back."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from typer.testing import CliRunner

from shapeloom.data_pipes import image_to_text
from shapeloom.data_pipes.build import BuildSettings, build
from shapeloom.data_pipes.captioning import CaptionSettings, caption, clean
from shapeloom.data_pipes.image_to_text import ImageToText
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.data_pipes.shard_folder import ShardFolder
from shapeloom.errors import UserError
from shapeloom.launch.cli import app

SIZE = 32
WORDS = re.findall(r"\S+", "a the red blue green chair table box cup on of with picture what is it ?")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>"]
TEXT = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": SIZE, "patch_size": 8}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}it is{% endif %}"
)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which frames a text by [CLS] and [SEP] as BERT's does."""
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", additional_special_tokens=["<image>"], **names
    )


def lively(model: Any) -> Any:
    """Weights so large that pictures and beams matter to what is said."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return model.eval()


def make(kind: str, folder: Path) -> Path:
    """A tiny model of a kind with random weights, saved as transformers saves it."""
    torch.manual_seed(1)
    square = {"height": SIZE, "width": SIZE}
    clip = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square)
    if kind == "blip":
        lively(BlipForConditionalGeneration(BlipConfig(text_config=TEXT | ENDS, vision_config=VISION))).save_pretrained(
            folder
        )
        BlipProcessor(BlipImageProcessor(size=square), words()).save_pretrained(folder)
    elif kind == "git":
        lively(GitForCausalLM(GitConfig(vision_config=VISION, **TEXT, **ENDS))).save_pretrained(folder)
        GitProcessor(clip, words()).save_pretrained(folder)
    elif kind == "vit-bert":
        decoder = BertLMHeadModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
        model = VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VISION)), decoder=decoder)
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
        for name in ("pad_token_id", "eos_token_id"):
            setattr(model.config, name, ENDS[name])
            setattr(model.generation_config, name, ENDS[name])
        lively(model).save_pretrained(folder)
        ViTImageProcessor(size=square).save_pretrained(folder)
        words().save_pretrained(folder)
    else:
        text = LlamaConfig(**TEXT, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=4, vision_feature_layer=-1
        )
        lively(LlavaForConditionalGeneration(config)).save_pretrained(folder)
        LlavaProcessor(clip, words(), patch_size=8, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", chat_template=TEMPLATE).save_pretrained(folder)  # fmt: skip
    return folder


KINDS = ("blip", "git", "vit-bert", "llava")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp("models") / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six assets of four views, the first with words of its own."""
    folder = tmp_path_factory.mktemp("raw") / "models"
    (folder / "sub").mkdir(parents=True)
    for k in range(6):
        mesh = trimesh.creation.box((1, 1 + k, 1)) if k % 2 else trimesh.creation.cone(1, 1 + k)
        mesh.visual.face_colors = [40 * k, 255 - 40 * k, 90, 255]
        mesh.export(folder / ("sub" if k > 3 else "") / f"m{k}.ply")
    captions = folder.parent / "captions.csv"
    captions.write_text("file,caption,category,licence,author,source\nm0.ply,My own,toy,CC0-1.0,Ann,http://a\n")
    build(folder, folder.parent / "raw", captions, settings(4))
    return folder.parent / "raw"


def settings(n_views: int) -> BuildSettings:
    return BuildSettings(n_surface=16, n_near=4, n_uniform=4, n_views=n_views, image_size=40, shard_size=4)


def pictures_of(raw: Path, index: int, count: int) -> list[Image.Image]:
    """The first shaded views on white, by Pillow."""
    shards, found = ShardFolder(raw), []
    for v in range(count):
        name = f"lit_{v:02d}.webp"
        view = Image.open(io.BytesIO(shards.read(index, [name])[name])).convert("RGBA")
        found.append(Image.alpha_composite(Image.new("RGBA", view.size, "white"), view).convert("RGB"))
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Parrot:
    """In a model's place: counts pictures, and says how bright they are."""

    def __init__(self, model: object, **options: object) -> None:
        self.seen: list[int] = []
        Parrot.last = self

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        self.seen.append(len(pictures))
        return [f"a 3D model of a  thing {np.asarray(picture).sum()}." for picture in pictures]


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> type[Parrot]:
    monkeypatch.setattr(image_to_text, "ImageToText", Parrot)
    return Parrot


# ------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("beams", [1, 3])
def test_every_kind_says_what_its_own_classes_say(tiny: dict[str, Path], raw: Path, beams: int) -> None:
    pictures = [picture for index in range(3) for picture in pictures_of(raw, index, 2)]
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8}
    for kind, model, processor in (
        ("blip", BlipForConditionalGeneration, BlipProcessor),
        ("git", GitForCausalLM, GitProcessor),
        ("vit-bert", VisionEncoderDecoderModel, ViTImageProcessor),
    ):
        captioner = ImageToText(tiny[kind], beams=beams, max_tokens=8, device="cpu")
        theirs, prepare = model.from_pretrained(tiny[kind]).eval(), processor.from_pretrained(tiny[kind])
        ids = [theirs.generate(**prepare(images=one, return_tensors="pt"), **options)[0] for one in pictures]
        said = captioner(pictures)
        assert said == [" ".join(words().decode(one, skip_special_tokens=True).split()) for one in ids], kind
        assert len(set(said)) > 1, f"{kind} says the same of all pictures, so that nothing is compared"


def test_a_chat_model_is_asked_by_its_template_and_only_its_answer_is_taken(tiny: dict[str, Path], raw: Path) -> None:
    captioner = ImageToText(tiny["llava"], prompt="what is it ?", max_tokens=6, device="cpu")
    pictures = pictures_of(raw, 1, 3)
    theirs = LlavaForConditionalGeneration.from_pretrained(tiny["llava"]).eval()
    processor = LlavaProcessor.from_pretrained(tiny["llava"])
    expected = []
    for picture in pictures:
        given = processor(images=picture, text="<image> what is it ? it is", return_tensors="pt")
        ids = theirs.generate(**given, do_sample=False, max_new_tokens=6)[0, given["input_ids"].shape[1] :]
        expected.append(words().decode(ids, skip_special_tokens=True))
    assert captioner(pictures) == expected and len(set(expected)) > 1


def test_a_prompt_leads_a_caption_and_is_not_in_it(tiny: dict[str, Path], raw: Path) -> None:
    pictures = pictures_of(raw, 2, 2)
    begin = torch.tensor([[2, *words()("a picture of", add_special_tokens=False).input_ids]])
    blip = BlipForConditionalGeneration.from_pretrained(tiny["blip"]).eval()
    git = GitForCausalLM.from_pretrained(tiny["git"]).eval()
    for kind, model, processor in (("blip", blip, BlipProcessor), ("git", git, GitProcessor)):
        said = ImageToText(tiny[kind], prompt=" a picture  of", max_tokens=6, device="cpu")(pictures)
        for picture, text in zip(pictures, said):
            pixels = processor.from_pretrained(tiny[kind])(images=picture, return_tensors="pt").pixel_values
            ids = begin if kind == "git" else torch.cat([begin, torch.tensor([[3]])], 1)  # BLIP takes off the last
            full = model.generate(pixel_values=pixels, input_ids=ids, do_sample=False, max_new_tokens=6)[0]
            decoded = words().decode(full, skip_special_tokens=True)
            assert decoded.startswith("a picture of") and text == decoded.removeprefix("a picture of").strip()
    with pytest.raises(UserError, match="takes no --prompt"):
        ImageToText(tiny["vit-bert"], prompt="a picture of", device="cpu")


def test_dtype_and_device_are_as_asked(tiny: dict[str, Path]) -> None:
    captioner = ImageToText(tiny["blip"], dtype="bfloat16", device="cpu", max_tokens=4)
    assert captioner.model.dtype == torch.bfloat16 and len(captioner([Image.new("RGB", (9, 7))])) == 1
    assert ImageToText(tiny["blip"], device="cpu").model.dtype == torch.float32
    with pytest.raises(UserError, match="--device kuda cannot be used"):
        ImageToText(tiny["blip"], device="kuda")
    with pytest.raises(UserError, match="--dtype must be float32, float16, bfloat16"):
        ImageToText(tiny["blip"], dtype="int8")


def test_a_wrong_model_gets_one_sentence(tiny: dict[str, Path], tmp_path: Path) -> None:
    def damaged(name: str, kind: str = "blip") -> Path:
        return Path(shutil.copytree(tiny[kind], tmp_path / name))

    empty, pickled, short, other, torn, lone = map(damaged, ("empty", "pickled", "short", "other", "torn", "lone"))
    blind = damaged("blind", "vit-bert")
    (blind / "preprocessor_config.json").unlink()
    (empty / "config.json").unlink()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    from safetensors.torch import load_file, save_file

    weights = load_file(short / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, short / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text(json.dumps(BertConfig(**TEXT).to_dict() | {"model_type": "bert"}))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:999])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (lone / name).unlink()
    for model, said in (
        (tmp_path / "nowhere", "model folder .*nowhere does not exist"),
        ("./nowhere", "model folder ./nowhere does not exist"),
        ("somebody/captioner", "no folder, and no model of that name is on this machine.*--allow-download"),
        (empty, "has no config.json"),
        (empty / "model.safetensors", "is a file: give the folder"),
        (pickled, "no safetensors: pickled weights could run code"),
        (short, "1 of its weights are missing, such as vision_model.post_layernorm.weight"),
        (other, "is not a model that makes text of pictures"),
        (torn, "cannot be read as a model"),
        (lone, "has no tokenizer"),
        (blind, "its processor cannot be read"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            ImageToText(model, device="cpu")
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- the run


def test_the_verb_captions_the_first_views_and_a_build_takes_the_file(
    tiny: dict[str, Path], raw: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    options = ("--views", 2, "--beams", 1, "--max-tokens", 8, "--batch", 4, "--keep", "--device", "cpu")
    given = ["data", "caption", raw, "--model", tiny["blip"], "--out", out, *options]
    done = CliRunner().invoke(app, list(map(str, given)))
    assert done.exit_code == 0, done.output
    captioner = ImageToText(tiny["blip"], max_tokens=8, device="cpu")
    rows = rows_of(out)
    assert [row["file"] for row in rows] == ["m0.ply", "m1.ply", "m2.ply", "m3.ply", "sub/m4.ply", "sub/m5.ply"]
    for index, row in enumerate(rows):
        own = ["My own"] if index == 0 else []
        assert row["captions"] == list(dict.fromkeys([*own, *map(clean, captioner(pictures_of(raw, index, 2)))]))
    told = {"category": "toy", "licence": "CC0-1.0", "author": "Ann", "source": "http://a"}
    assert rows[0] == {"file": "m0.ply", "captions": rows[0]["captions"], **told}
    assert rows[1].keys() == {"file", "captions"}, "what is not known is left out"
    assert f"{sum(len(row['captions']) for row in rows)} captions of 6 assets" in done.output
    build(raw.parent / "models", tmp_path / "again", out, settings(0))
    again = ShardFolder(tmp_path / "again")
    for row, meta in zip(rows, map(again.read_json, range(6))):
        assert (meta["file"], meta["captions"], meta["caption_from_name"]) == (row["file"], row["captions"], False)
    assert again.read_json("m0")["source"] == "http://a" and again.read_json("m1")["source"] == "m1.ply"


def test_a_run_that_ended_goes_on_at_its_batch_to_the_same_file(
    raw: Path, tmp_path: Path, parrot: type[Parrot], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = CaptionSettings(views=2, batch=4)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert caption(raw, "parrot", whole, some).captions == 12 and parrot.last.seen == [4, 4, 4]
    unfinished = tmp_path / "cut.jsonl.unfinished"
    written = _killed_after(raw, cut, some, monkeypatch, batches=2)
    lines = written.splitlines(keepends=True)
    first = len(lines[0])
    for left, kept in (
        (b"", 0),  # killed before its first line
        (lines[0][:10], 0),
        (lines[0], 0),
        (b"".join(lines[:2]), 0),  # half of a batch
        (b"".join(lines[:4]), 2),
        (written[:-1], 2),  # all but the end of a line
        (written, 4),
    ):
        unfinished.write_bytes(left)
        done = caption(raw, "parrot", cut, some)
        assert done.from_before == kept and len(parrot.last.seen) == 3 - kept // 2
        assert cut.read_bytes() == whole.read_bytes() and not unfinished.exists()
        cut.unlink()
    assert first > 50
    unfinished.write_bytes(written)
    for others in (CaptionSettings(views=1, batch=4), CaptionSettings(views=2, batch=4, prompt="a")):
        with pytest.raises(UserError, match="was begun with another model, other data or other settings"):
            caption(raw, "parrot", cut, others)
    with pytest.raises(UserError, match="was begun with another model"):
        caption(raw, "other", cut, some)
    assert unfinished.read_bytes() == written, "a refused run leaves the other's work"


def _killed_after(raw: Path, out: Path, some: CaptionSettings, monkeypatch: pytest.MonkeyPatch, batches: int) -> bytes:
    """What a run leaves that is interrupted in its next batch."""

    class Interrupted(Parrot):
        def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
            if len(self.seen) == batches:
                raise KeyboardInterrupt
            return super().__call__(pictures)

    with monkeypatch.context() as patched:
        patched.setattr(image_to_text, "ImageToText", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            caption(raw, "parrot", out, some)
    assert not out.exists()
    return out.with_name(out.name + ".unfinished").read_bytes()


def test_captions_of_shards_at_a_url(raw: Path, tmp_path: Path, parrot: type[Parrot]) -> None:
    for data, name in ((raw, "here"), (f"pipe:cat {raw}/{{name}}", "there")):
        caption(data, "none", tmp_path / f"{name}.jsonl", CaptionSettings(views=2))
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()


def test_more_views_than_stored_and_than_a_batch(raw: Path, tmp_path: Path, parrot: type[Parrot]) -> None:
    done = caption(raw, "parrot", tmp_path / "c.jsonl", CaptionSettings(views=9, batch=3))
    assert done.assets == 6 and parrot.last.seen == [3, 1] * 6
    expected = [f"a thing {np.asarray(picture).sum()}" for picture in pictures_of(raw, 3, 4)]
    assert rows_of(tmp_path / "c.jsonl")[3]["captions"] == expected


def test_one_bad_asset_is_told_and_the_others_are_captioned(raw: Path, tmp_path: Path, parrot: type[Parrot]) -> None:
    bad = Path(shutil.copytree(raw, tmp_path / "bad"))
    shards = ShardFolder(bad)
    path = next(bad.glob("shard-00000.tar"))
    data = path.read_bytes()
    stored = shards.read(2, ["lit_01.webp"])["lit_01.webp"]
    assert data.count(stored) == 1
    path.write_bytes(data.replace(stored, bytes(len(stored))))
    done = caption(bad, "parrot", tmp_path / "c.jsonl", CaptionSettings(views=2))
    assert [row["file"] for row in rows_of(tmp_path / "c.jsonl")] == ["m0.ply", "m1.ply", "m3.ply"] + [
        "sub/m4.ply",
        "sub/m5.ply",
    ]
    assert [name for name, _ in done.failed] == ["m2"] and "m2.lit_01.webp is not a WebP image" in str(done)


def test_wrong_input_gets_one_sentence_before_a_model_is_loaded(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.jsonl"
    build(raw.parent / "models", tmp_path / "blind", None, settings(0))
    with pytest.raises(UserError, match="has no views to caption: build it with n_views of 4"):
        caption(tmp_path / "blind", "model", out)
    with pytest.raises(UserError, match="does not exist"):
        caption(tmp_path / "nowhere", "model", out)
    with pytest.raises(UserError, match=r"--out must end in .jsonl"):
        caption(raw, "model", tmp_path / "c.csv")
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        caption(raw, "model", out)
    assert out.read_text() == "mine"
    out.unlink()
    few = ProceduralSettings(count=2, n_surface=0, n_near=0, n_uniform=0, n_views=1, image_size=16)
    generate(tmp_path / "made", few)
    monkeypatch.setattr(image_to_text, "ImageToText", Parrot)
    with pytest.raises(UserError, match="none of the 2 assets.*names no file, as that of a procedural set"):
        caption(tmp_path / "made", "parrot", out)
    assert not list(tmp_path.glob("c.jsonl*"))


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        ("a red chair", "a red chair"),
        ('"A 3D model of a  red\tchair on a white background."', "a red chair"),
        ("this is an image of the 3d model of a cup", "a cup"),
        ("a cup with an image of a dog", "a cup with an image of a dog"),
        ("a 3 d rendering of two cups, on a plain white background", "two cups"),
        ("3d render of a house", "a house"),
        ("a computer generated image of an old car with white backdrop", "an old car"),
        ("a model of a ship", "a model of a ship"),  # may be one
        ("a photo of a dog in a frame", "a photo of a dog in a frame"),
        ("a white background", "a white background"),
        ("a white chair with a white backrest", "a white chair with a white backrest"),
        ("a 3d model of", "a 3d model of"),
        ("a 3D model of ...", "a 3D model of"),
        ("ein  roter Stuhl\x00\u2028", "ein roter Stuhl"),
        ("the children's chair", "the children's chair"),
        ("", ""),
    ],
)
def test_only_what_is_surely_not_of_the_object_is_taken_off(said: str, cleaned: str) -> None:
    assert clean(said) == cleaned


def test_captions_of_the_same_givenare_one_and_silence_fails(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {0: ["A cup.", "a cup", "a blue cup", "..."], 1: ["", "…", " ", "!"]}
    calls = iter([*said.values(), *[["a box"] * 4] * 4])

    class Saying(Parrot):
        def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
            return next(calls)

    monkeypatch.setattr(image_to_text, "ImageToText", Saying)
    done = caption(raw, "saying", tmp_path / "c.jsonl", CaptionSettings(views=4, batch=4))
    assert rows_of(tmp_path / "c.jsonl")[0]["captions"] == ["A cup", "a blue cup"]
    assert done.failed == [("m1.ply", "the model says nothing of it")]

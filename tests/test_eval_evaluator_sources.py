"""Where evaluators come from: names, the hub's cache, what is refused and how; and the one without weights."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_folders import (
    ARCHITECTURE,
    CONFIG,
    cut_off,
    small_vit,
    write_cache,
    write_conditioner,
    write_forms,
    write_open_clip,
    write_weights,
)
from safetensors.torch import load_file, save_file

from shapeloom.data_pipes.scenes import SRGB
from shapeloom.errors import UserError
from shapeloom.eval.evaluators import files as evaluator_files
from shapeloom.eval.evaluators import registry as evaluators
from shapeloom.eval.evaluators.facts import open_clip_architecture
from shapeloom.eval.evaluators.registry import PUBLISHED, describe, independence, list_evaluators, open_evaluator

QUICK = f"{ARCHITECTURE}-quickgelu"
LAION = "laion2b_s34b_b79k"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cut_off(tmp_path / "hub", monkeypatch)
    return tmp_path / "hub"


@pytest.fixture()
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the small architecture that open_clip knows by name, as it knows OpenAI's and LAION's."""
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bicubic"}
    laion = {"hf_hub": "someone/tiny-laion/", **statistics}
    openai = {"hf_hub": "someone/tiny-openai/", "quick_gelu": True, **statistics}
    registry = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(registry, ARCHITECTURE, {LAION: laion, "openai": openai})
    monkeypatch.setitem(registry, QUICK, {"openai": openai})


def refused(source: object, *words: str) -> None:
    """In one sentence with all of these words."""
    with pytest.raises(UserError) as caught:
        open_evaluator(str(source), device="cpu")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert str(word) in message, message


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_that_are_not_here_say_what_is_needed(cache, tmp_path):
    refused(
        "ViT-B-32-quickgelu/openai", "open_clip_model.safetensors", "timm/vit_base_patch32_clip_224.openai",
        cache / "models--timm--vit_base_patch32_clip_224.openai", "--allow-download", "ViT-B-32-quickgelu=FILE",
    )  # fmt: skip
    refused("openai/clip-vit-base-patch32", "config.json", cache / "models--openai--clip-vit", "--allow-download")
    refused("ViT-B-32/nonsense", "no weights nonsense of ViT-B-32", "openai", LAION)
    refused("nonsense", "no evaluator", "tiny-colours")
    refused("ViT-B-32x=a.safetensors", "no architecture ViT-B-32x", "ViT-B-32")
    refused("ViT-B-32=a.safetensors", "a.safetensors does not exist")
    refused(tmp_path, "not a folder of a CLIP")


def test_downloads_are_asked_for_and_their_failure_is_one_sentence(monkeypatch, tmp_path):
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for source in ("ViT-B-32/laion2b_s34b_b79k", "openai/clip-vit-base-patch32"):
        with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\)"):
            describe(source, memo=tmp_path / "m", allow_download=True)
    assert asked[0] == ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors")
    assert ("openai/clip-vit-base-patch32", "config.json") in asked


def test_published_weights_come_from_the_cache(cache, forms, published, tmp_path):
    snapshot = write_cache(cache, "someone/tiny-laion", Path(forms["open_clip"]))
    memo = tmp_path / "memo.json"
    facts = describe(f"{ARCHITECTURE}/{LAION}", memo=memo)
    assert (facts.pretraining, facts.source, facts.mean) == (LAION, f"{ARCHITECTURE}/{LAION}", (0.1, 0.2, 0.3))
    assert facts.weights == describe(forms["open_clip"]).weights and not facts.notes
    # Another version of the name: nothing of the old one has changed but what `main` stands for.
    other = write_open_clip(small_vit(1), tmp_path / "other")
    shutil.copytree(other, snapshot.parent / ("1" * 40))
    (snapshot.parent.parent / "refs" / "main").write_text("1" * 40)
    assert describe(f"{ARCHITECTURE}/{LAION}", memo=memo).weights == describe(str(other)).weights


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_an_id_of_the_hub_comes_from_the_cache(cache, forms, form):
    write_cache(cache, "someone/clip-tiny-laion2B-s34B-b79K", Path(forms[form]))
    facts = describe("someone/clip-tiny-laion2B-s34B-b79K")
    assert (facts.family, facts.pretraining) == (form, LAION)
    assert facts.weights == describe(forms[form]).weights


# --- QuickGELU -------------------------------------------------------------------------------------------------------


def test_published_weights_under_the_wrong_activation_are_refused(cache, forms, published):
    refused("ViT-B-32/openai", "with QuickGELU", "the right architecture is ViT-B-32-quickgelu")
    refused("ViT-L-14/metaclip_400m", "ViT-L-14-quickgelu")
    write_cache(cache, "someone/tiny-openai", Path(forms["open_clip"]))
    refused(f"{ARCHITECTURE}/openai", "with QuickGELU", QUICK)
    assert describe(f"{QUICK}/openai").quick_gelu is True


def test_files_whose_names_tell_are_refused(forms, tmp_path):
    model, quick = small_vit(), small_vit(quick_gelu=True)
    file = write_weights(model, tmp_path / "tiny_OpenAI.safetensors")
    refused(f"{ARCHITECTURE}={file}", "openai weights were trained with QuickGELU", QUICK)
    assert describe(f"{QUICK}={file}").pretraining == "openai"
    file = write_weights(model, tmp_path / f"tiny-{LAION}.safetensors")
    refused(f"{QUICK}={file}", "trained without QuickGELU", f"the right architecture is {ARCHITECTURE}")
    assert describe(f"{ARCHITECTURE}={file}").pretraining == LAION

    refused(write_open_clip(model, tmp_path / "tiny-openai"), '"quick_gelu": true', QUICK)
    refused(write_conditioner(small_vit(name="ViT/openai"), tmp_path / "ours"), '"quick_gelu": true', QUICK)
    refused(write_open_clip(quick, tmp_path / f"tiny-{LAION}"), '"quick_gelu": false', ARCHITECTURE)

    theirs = shutil.copytree(forms["transformers"], tmp_path / "clip-openai")
    refused(theirs, '"hidden_act": "quick_gelu"')
    (theirs / "config.json").write_text((theirs / "config.json").read_text().replace('"gelu"', '"quick_gelu"'))
    facts = describe(str(theirs))
    assert (facts.quick_gelu, facts.pretraining) == (True, "openai")
    assert (
        facts.hash != describe(forms["transformers"]).hash and facts.weights == describe(forms["transformers"]).weights
    )


def test_openais_own_form_tells(tmp_path):
    """Its files carry three numbers beside the weights."""
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    file = write_weights(small_vit(), tmp_path / "x.safetensors", **extras)
    refused(f"{ARCHITECTURE}={file}", "openai weights were trained with QuickGELU", QUICK)
    facts = describe(f"{QUICK}={file}")
    assert facts.pretraining == "openai" and facts.weights == small_vit().weights_hash


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("openai/clip-vit-base-patch32", "openai"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", LAION),
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "laion400m_e32"),
        ("laion2b_s34b_b82k_augreg_soup", "laion2b_s34b_b82k_augreg_soup"),
        ("notopenaibutmine", None),
        ("metadata-v1", None),
    ],
)
def test_what_names_tell(name, tag):
    assert evaluator_files.told_pretraining((name,)) == tag


# --- files that do not fit, or are damaged ---------------------------------------------------------------------------


def test_weights_of_another_architecture(forms, tmp_path):
    deeper = small_vit(vision_cfg={**CONFIG["vision_cfg"], "layers": 3})
    refused(
        f"{ARCHITECTURE}={write_weights(deeper, tmp_path / 'a.safetensors')}", "does not fit", "has no place", "11 more"
    )
    wider = small_vit(embed_dim=16)
    refused(
        f"{ARCHITECTURE}={write_weights(wider, tmp_path / 'b.safetensors')}", "text_projection is [32, 16]", "[32, 24]"
    )
    for form, file in (("open_clip", "open_clip_model.safetensors"), ("transformers", "model.safetensors")):
        folder = shutil.copytree(forms[form], tmp_path / form)
        state = load_file(folder / file)
        gone = state.pop("logit_scale")
        save_file(state, folder / file)
        refused(folder, "logit_scale is missing")
        save_file({**state, "logit_scale": gone, "new": gone.clone()}, folder / file)
        refused(folder, "new has no place")


@pytest.mark.parametrize("form", ["open_clip", "ours", "transformers", "weights"])
def test_a_file_that_is_cut_short(forms, tmp_path, form):
    source = Path(forms[form].split("=")[-1])
    if source.is_dir():
        copy = shutil.copytree(source, tmp_path / "copy")
        (file,) = copy.glob("*.safetensors")
    else:
        copy = file = Path(shutil.copy(source, tmp_path / "copy.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    refused(f"{ARCHITECTURE}={copy}" if form == "weights" else copy, "cannot be read", copy)


def test_configs_that_are_damaged(forms, tmp_path):
    folder = shutil.copytree(forms["open_clip"], tmp_path / "a")
    for content, words in (
        ("{", ["not valid JSON"]),
        ("[]", ["model_cfg"]),
        (json.dumps({"model_cfg": {"embed_dim": 3}}), ["describes no CLIP"]),
        (json.dumps({"model_cfg": {**CONFIG, "nonsense": 1}}), ["describes no CLIP", "nonsense"]),
        (json.dumps({"model_cfg": {**CONFIG, "multimodal_cfg": {}}}), ["own text tower"]),
        (json.dumps({"model_cfg": {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base"}}}), ["own text tower"]),
    ):
        (folder / "open_clip_config.json").write_text(content)
        refused(folder, *words)
    words = write_open_clip(small_vit(text_cfg={**CONFIG["text_cfg"], "vocab_size": 300}), tmp_path / "b")
    refused(words, "has no tokenizer.json", "300 tokens")
    named = {**CONFIG["text_cfg"], "hf_tokenizer_name": "nobody/words"}
    refused(write_open_clip(small_vit(text_cfg=named), tmp_path / "c"), "tokenizer nobody/words", "--allow-download")
    theirs = shutil.copytree(forms["transformers"], tmp_path / "d")
    settings = json.loads((theirs / "preprocessor_config.json").read_text())
    (theirs / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"shortest_edge": 40}}))
    refused(theirs, "unusual way", "32 pixels")
    (theirs / "preprocessor_config.json").unlink()
    refused(theirs, "no preprocessor_config.json")


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(tmp_path, forms):
    file = tmp_path / "x.pt"
    torch.save(small_vit().clip.state_dict(), file)
    assert describe(f"{ARCHITECTURE}={file}").weights == small_vit().weights_hash
    torch.save({"state_dict": {f"module.{k}": v for k, v in small_vit().clip.state_dict().items()}}, file)
    assert describe(f"{ARCHITECTURE}={file}").weights == small_vit().weights_hash

    trap = tmp_path / "sprung"
    torch.save({"a": Trap(trap)}, file)
    refused(f"{ARCHITECTURE}={file}", "holds code")
    (tmp_path / "y.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    refused(f"{ARCHITECTURE}={tmp_path / 'y.safetensors'}", "cannot be read")
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    refused(f"{ARCHITECTURE}={file}", "TorchScript")
    for form, weights in (
        ("open_clip", "open_clip_model"),
        ("transformers", "model"),
        ("ours", "diffusion_pytorch_model"),
    ):
        folder = shutil.copytree(forms[form], tmp_path / form)
        (folder / f"{weights}.safetensors").unlink()
        torch.save({"a": Trap(trap)}, folder / "pytorch_model.bin")
        refused(folder, "is a pickle")
    assert not trap.exists()


def test_other_things_are_no_evaluators(forms, tmp_path):
    file = forms["weights"].split("=")[1]
    refused(file, "is a file", f"ViT-B-32={file}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "is of a bert")
    (tmp_path / "config.json").unlink()
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "is a pipeline", tmp_path / "conditioner")


# --- the bundled ones, and the list ----------------------------------------------------------------------------------


def test_the_judge(forms, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator_files, "BUNDLED_JUDGE", tmp_path)
    monkeypatch.setattr(evaluators, "BUNDLED_JUDGE", tmp_path)
    refused("judge", "comes without its judge", tmp_path)
    row = next(row for row in list_evaluators() if row.name == "judge")
    assert not row.here and str(tmp_path) in row.where
    for module in (evaluator_files, evaluators):
        monkeypatch.setattr(module, "BUNDLED_JUDGE", Path(forms["open_clip"]))
    memo = tmp_path / "memo.json"
    facts = describe("judge", memo=memo)
    assert facts.name == "judge" and facts.weights == describe(forms["open_clip"], memo=memo).weights
    assert len(json.loads(memo.read_text())["evaluators"]) == 1
    row = next(row for row in list_evaluators() if row.name == "judge")
    assert row.here and row.architecture == facts.architecture


def test_the_list(cache, forms):
    rows = {row.name: row for row in list_evaluators([forms["open_clip"], "no/such"])}
    assert [row.here for row in rows.values()] == [True, rows["judge"].here, *[False] * len(PUBLISHED), True, False]
    assert rows[forms["open_clip"]].architecture == "ViT-2x32/8 at 32 + text 2x32 of 20"
    assert "no/such" in rows["no/such"].where
    laion = f"ViT-B-32/{LAION}"
    assert not rows[laion].here and "--allow-download" in rows[laion].where
    snapshot = write_cache(cache, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", Path(forms["open_clip"]))
    row = next(row for row in list_evaluators() if row.name == laion)
    assert row.here and row.where == str(snapshot / "open_clip_model.safetensors")


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.name)
def test_the_published_are_those_open_clip_knows(published):
    name, tag = published.name.split("/")
    known, config = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
    assert known["hf_hub"] == f"{published.repository}/"
    assert open_clip_architecture(config) == published.architecture
    assert bool(known.get("quick_gelu")) == bool(config.get("quick_gelu"))


# --- tiny-colours ----------------------------------------------------------------------------------------------------


def painted(*colours: tuple[float, float, float], background: int = 255) -> np.ndarray:
    """Stripes of equal width on a background, shaded from light to dark; u8 [64, 64, 3]."""
    image = np.full((64, 64, 3), background, dtype=np.uint8)
    width = 60 // len(colours)
    for i, colour in enumerate(colours):
        shade = np.linspace(1, 0.6, 60)[:, None, None]
        image[2:62, 2 + i * width : 2 + (i + 1) * width] = (255 * np.array(colour) * shade).astype(np.uint8)
    return image


def test_tiny_colours_tells_the_colours_of_the_data():
    evaluator = open_evaluator("tiny-colours")
    colours = [name for name in SRGB if name != "brown"]  # of orange's hue
    for background in (255, 0, 127):
        pictures = np.stack([painted(SRGB[name], background=background) for name in colours])
        cosines = evaluator.embed_pictures(pictures) @ evaluator.embed_texts([f"a {name} cube" for name in colours]).T
        seen = [i for i, name in enumerate(colours) if not (background == 127 and name == "gray")]
        assert (cosines.argmax(axis=1) == np.arange(len(colours)))[seen].all()
        assert (cosines[seen, seen] > 0.95).all()


def test_tiny_colours_by_hand():
    evaluator = open_evaluator("tiny-colours")
    red, blue = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    pictures = np.stack([painted(red), painted(red, blue), np.full((64, 64, 3), 200, np.uint8)])  # the last: empty
    texts = ["A red cube.", "a blue ball on a RED block", "a chair", "a grey cube"]
    cosines = evaluator.embed_pictures(pictures) @ evaluator.embed_texts(texts).T
    expected = [[1, 0.5**0.5, 0, 0], [0.5**0.5, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosines, expected, atol=0.06)  # the hash moves it by 0.05 at most


def test_tiny_colours_keeps_the_interface():
    evaluator = open_evaluator("tiny-colours")
    texts = [f"a red cube number {i}" for i in range(50)]
    rows = evaluator.embed_texts(texts)
    assert len(np.unique(rows, axis=0)) == 50 and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rows, open_evaluator("tiny-colours").embed_texts(texts))
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    assert evaluator.embed_pictures(noise).shape == (3, rows.shape[1])
    assert evaluator.embed_pictures(noise[:0]).shape == evaluator.embed_texts([]).shape == (0, rows.shape[1])
    assert evaluator.count_tokens(["a red cube, please", ""]) == [6, 2]
    assert evaluator.facts == describe("tiny-colours")
    assert independence(evaluator.facts, evaluator.facts) == "same weights"

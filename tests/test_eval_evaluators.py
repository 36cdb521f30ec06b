"""Any CLIP as an evaluator: its embeddings against the libraries' own, what tells two apart, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_folders import (
    ARCHITECTURE,
    CONFIG,
    OTHER_MEAN,
    OTHER_STD,
    cut_off,
    small_vit,
    write_conditioner,
    write_forms,
    write_open_clip,
    write_weights,
)
from latent_folders import small_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from shap_e_models import randomised
from transformers import AutoProcessor, CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from shapeloom.checkpoints.folders import publish_model
from shapeloom.checkpoints.transformers_folders import load_transformers_clip
from shapeloom.errors import UserError
from shapeloom.eval.evaluators.facts import open_clip_architecture, transformers_architecture
from shapeloom.eval.evaluators.registry import (
    EvaluatorFacts,
    describe,
    describe_conditioner,
    independence,
    open_evaluator,
)

TEXTS = ["a red cube", "a small Blue sphere on a yellow block", "a chair, made of\n wood!", "word " * 40]


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_forms(tmp_path_factory.mktemp("forms"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cut_off(tmp_path / "hub", monkeypatch)
    return tmp_path / "hub"


def unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=-1).numpy()


# --- embeddings ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_open_clip_folder_embeds_as_open_clip_does(forms, pictures):
    name = f"local-dir:{forms['open_clip']}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    evaluator = open_evaluator(forms["open_clip"], device="cpu")
    ids = open_clip.get_tokenizer(name)(TEXTS)
    np.testing.assert_allclose(evaluator.embed_texts(TEXTS), unit(model.eval().encode_text(ids)), atol=2e-6)
    large = np.random.default_rng(1).integers(0, 256, (3, 75, 75, 3), dtype=np.uint8)
    for images in (pictures, large):
        prepared = torch.stack([preprocess(Image.fromarray(image)) for image in images])
        np.testing.assert_allclose(evaluator.embed_pictures(images), unit(model.encode_image(prepared)), atol=2e-6)


@torch.no_grad()
def test_a_transformers_folder_embeds_as_transformers_does(forms, pictures):
    model, processor = (
        CLIPModel.from_pretrained(forms["transformers"]),
        AutoProcessor.from_pretrained(forms["transformers"]),
    )
    evaluator = open_evaluator(forms["transformers"], device="cpu")
    texts = processor(text=TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    images = processor(images=list(pictures), return_tensors="pt")
    np.testing.assert_allclose(
        evaluator.embed_texts(TEXTS), unit(model.get_text_features(**texts).pooler_output), atol=2e-6
    )
    np.testing.assert_allclose(
        evaluator.embed_pictures(pictures), unit(model.get_image_features(**images).pooler_output), atol=2e-6
    )


@pytest.mark.parametrize("form", ["ours", "transformers", "weights"])
def test_one_clip_in_another_form_gives_the_same_embeddings(forms, pictures, form):
    one, other = (open_evaluator(forms[name], device="cpu") for name in ("open_clip", form))
    np.testing.assert_allclose(other.embed_pictures(pictures), one.embed_pictures(pictures), atol=2e-6)
    np.testing.assert_allclose(other.embed_texts(TEXTS), one.embed_texts(TEXTS), atol=2e-6)
    assert other.count_tokens(TEXTS) == one.count_tokens(TEXTS)


@torch.no_grad()
def test_a_conditioner_with_words_of_its_own_embeds_as_it_does_in_its_pipeline(tmp_path, pictures):
    model = small_clip()
    for source in (write_open_clip(model, tmp_path / "a"), write_conditioner(model, tmp_path / "b")):
        evaluator = open_evaluator(str(source), device="cpu")
        np.testing.assert_allclose(
            evaluator.embed_texts(TEXTS[:2]), unit(model.encode_text(TEXTS[:2]).pooled), atol=2e-6
        )
        np.testing.assert_allclose(
            evaluator.embed_pictures(pictures), unit(model.encode_image(pictures).pooled), atol=2e-6
        )
        assert evaluator.count_tokens(["a red cube"]) == [int((model.tokenize(["a red cube"]) > 0).sum())]


def save_words(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer in transformers' form, of few words."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=small_clip()._tokenize.tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )
    words.save_pretrained(folder)
    return words


@torch.no_grad()
def test_siglip_of_transformers_embeds_as_transformers_does(tmp_path, pictures):
    words = save_words(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**shape, "vocab_size": len(words), "max_position_embeddings": 16, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8})
    model = randomised(SiglipModel(config), 0)
    model.save_pretrained(tmp_path)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    evaluator = open_evaluator(str(tmp_path), device="cpu")
    ids = words(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    np.testing.assert_allclose(
        evaluator.embed_texts(TEXTS), unit(model.get_text_features(ids).pooler_output), atol=2e-6
    )
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(
        evaluator.embed_pictures(pictures), unit(model.get_image_features(pixels).pooler_output), atol=2e-6
    )
    assert evaluator.facts.architecture == "ViT-1x32/8 at 32 + text 1x32 of 16"


@torch.no_grad()
def test_siglip_of_open_clip_embeds_as_open_clip_does(tmp_path, pictures):
    """A text tower of its own class, a timm image tower, a tokenizer of transformers, another resize."""
    words = save_words(tmp_path)
    cfg = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none",
                       "timm_model_pretrained": True},
        "text_cfg": {"context_length": 16, "vocab_size": len(words), "hf_tokenizer_name": "nobody/words", "width": 32,
                     "heads": 4, "layers": 1, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
                     "tokenizer_kwargs": {"clean": "canonicalize"}},
    }  # fmt: skip
    preprocess = {"mean": OTHER_MEAN, "std": OTHER_STD, "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    offline = {**cfg, "vision_cfg": {**cfg["vision_cfg"], "timm_model_pretrained": False}}
    del offline["custom_text"]
    save_file(randomised(open_clip.CustomTextCLIP(**offline), 0).state_dict(), tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    evaluator = open_evaluator(str(tmp_path), device="cpu")
    ids = open_clip.get_tokenizer(name)(TEXTS)
    np.testing.assert_allclose(evaluator.embed_texts(TEXTS), unit(model.eval().encode_text(ids)), atol=2e-6)
    large = np.kron(pictures, np.ones((1, 3, 3, 1), np.uint8))
    prepared = torch.stack([preprocess(Image.fromarray(image)) for image in large])
    np.testing.assert_allclose(evaluator.embed_pictures(large), unit(model.encode_image(prepared)), atol=2e-6)


def test_a_row_does_not_depend_on_its_batch(forms, pictures, monkeypatch):
    evaluator = open_evaluator(forms["open_clip"], device="cpu")
    together_pictures, together_texts = evaluator.embed_pictures(pictures), evaluator.embed_texts(TEXTS)
    for i, picture in enumerate(pictures):
        np.testing.assert_allclose(evaluator.embed_pictures(picture[None])[0], together_pictures[i], atol=1e-6)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(evaluator.embed_texts([text])[0], together_texts[i], atol=1e-6)
    monkeypatch.setattr("shapeloom.eval.evaluators.clip.PICTURES_AT_ONCE", 2)
    monkeypatch.setattr("shapeloom.eval.evaluators.clip.TEXTS_AT_ONCE", 3)
    np.testing.assert_allclose(evaluator.embed_pictures(pictures), together_pictures, atol=1e-6)
    np.testing.assert_allclose(evaluator.embed_texts(TEXTS), together_texts, atol=1e-6)
    assert together_pictures.dtype == together_texts.dtype == np.float32


def test_embedding_leaves_the_process_as_it_was(forms, pictures):
    """Neither its random numbers nor its precision: a memo's answer would else change what is drawn next."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(3)
    state = torch.get_rng_state()
    try:
        evaluator = open_evaluator(forms["open_clip"], device="cpu")
        evaluator.embed_pictures(pictures)
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(state, torch.get_rng_state())
    assert not evaluator.module.training and not any(p.requires_grad for p in evaluator.module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evaluator.embed_pictures(pictures)
    np.testing.assert_array_equal(cast, evaluator.embed_pictures(pictures))


def test_tokens_are_counted_whole(forms):
    evaluator = open_evaluator(forms["open_clip"], device="cpu")
    # "a", "red", "cube" are words of CLIP's; with the start and the end.
    assert evaluator.count_tokens(["a red cube", "word " * 40]) == [5, 42]
    assert evaluator.facts.context_length == 20


@pytest.mark.parametrize("form", ["open_clip", "transformers", "ours"])
def test_a_caption_that_is_too_long_keeps_its_end_token(forms, form):
    """Pooling reads there: without it a score falls from 26 to 17 (torchmetrics #2883)."""
    evaluator = open_evaluator(forms[form], device="cpu")
    ids_1T = next(iter(evaluator.words.tokens(["a very " * 40 + "long caption"]).values()))
    assert ids_1T.shape == (1, 20) and ids_1T[0, -1] == 49407 and ids_1T[0, 0] == 49406
    cut, whole = evaluator.embed_texts(["a " * 18, "a " * 60])  # as many words as are read, and more
    assert cut @ whole > 0.9999


def test_pictures_of_another_kind_are_a_mistake_of_the_caller(forms, pictures):
    evaluator = open_evaluator(forms["open_clip"], device="cpu")
    for wrong in (pictures[:, :20], pictures.astype(np.float32), pictures[..., :1]):
        with pytest.raises(ValueError, match="u8"):
            evaluator.embed_pictures(wrong)


def test_weights_that_are_not_finite_are_named(tmp_path, forms, pictures):
    folder = shutil.copytree(forms["open_clip"], tmp_path / "broken")
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, folder / "open_clip_model.safetensors")
    evaluator = open_evaluator(str(folder), device="cpu")
    assert np.isfinite(evaluator.embed_texts(TEXTS)).all()
    with pytest.raises(UserError, match=f"evaluator {folder} gives 5 of 5 pictures .* not finite"):
        evaluator.embed_pictures(pictures)


# --- facts -----------------------------------------------------------------------------------------------------------


def test_facts(forms):
    facts = {form: describe(source) for form, source in forms.items()}
    for form, one in facts.items():
        assert one.architecture == "ViT-2x32/8 at 32 + text 2x32 of 20"
        assert (one.image_size, one.context_length, one.quick_gelu, one.pretraining) == (32, 20, False, None)
        assert one.name == forms[form] and one.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
        assert one.logit_scale == pytest.approx(float(small_vit().clip.logit_scale.detach().exp()))
        assert len({one.hash, one.weights, *one.towers}) == 4
        assert EvaluatorFacts.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert [one.family for one in facts.values()] == ["open_clip", "ours", "transformers", "open_clip"]
    assert "QuickGELU" in facts["weights"].notes[0]


def test_the_weights_hash_is_the_conditioners(forms, tmp_path):
    assert describe(forms["open_clip"]).weights == describe(forms["ours"]).weights == small_vit().weights_hash
    assert describe(forms["weights"]).weights == small_vit().weights_hash
    conditioner = load_transformers_clip(Path(forms["transformers"]))
    publish_model(conditioner, tmp_path / "ours")
    assert (
        describe(forms["transformers"]).weights == conditioner.weights_hash == describe(str(tmp_path / "ours")).weights
    )


def test_the_hash_is_of_what_embeddings_depend_on(forms, tmp_path):
    """Not of where the files lie: the same for each of the three forms that open_clip's model comes in."""
    same = {describe(forms[form]).hash for form in ("open_clip", "ours", "weights")}
    same.add(describe(str(shutil.copytree(forms["open_clip"], tmp_path / "elsewhere"))).hash)
    assert len(same) == 1
    others = [
        small_vit(1),
        small_vit(mean=OTHER_MEAN),
        small_vit(std=OTHER_STD),
        small_vit(quick_gelu=True),
        small_vit(vision_cfg={**CONFIG["vision_cfg"], "head_width": 16}),
    ]
    hashes = {describe(str(write_open_clip(model, tmp_path / str(i)))).hash for i, model in enumerate(others)}
    assert len(hashes | same) == len(others) + 1
    words = small_clip()
    before = describe(str(write_open_clip(words, tmp_path / "words"))).hash
    file = tmp_path / "words" / "tokenizer.json"
    file.write_text(file.read_text().replace('"Lowercase"', '"NFC"'))
    assert describe(str(tmp_path / "words")).hash != before


def test_architectures_of_both_libraries_read_alike():
    def of(name: str) -> str:
        return open_clip_architecture(open_clip.get_model_config(name))

    assert of("ViT-B-32") == of("ViT-B-32-quickgelu") == "ViT-B/32 at 224 + text 12x512 of 77"
    assert of("ViT-L-14-336") == "ViT-L/14 at 336 + text 12x768 of 77"
    assert of("RN50") == "ResNet-3-4-6-3x64 at 224 + text 12x512 of 77"
    config = CLIPConfig()  # openai/clip-vit-base-patch32
    assert transformers_architecture(config.text_config.to_dict(), config.vision_config.to_dict()) == of("ViT-B-32")


def test_the_memo_spares_torch_and_sees_changes(forms, tmp_path):
    folder, memo = shutil.copytree(forms["open_clip"], tmp_path / "clip"), tmp_path / "memo" / "facts.json"
    first = describe(str(folder), memo=memo)
    code = (
        "import sys, pathlib; from shapeloom.eval.evaluators.registry import describe, list_evaluators\n"
        "facts = describe(sys.argv[1], memo=pathlib.Path(sys.argv[2])); list_evaluators()\n"
        "print(facts.hash, [name for name in ('torch', 'open_clip', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, memo], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [first.hash, "[]\n"]

    write_weights(small_vit(1), folder / "open_clip_model.safetensors")  # of the same size, to the byte
    second = describe(str(folder), memo=memo)
    assert second == replace(describe(str(folder)), name=str(folder)) and second.weights != first.weights
    weights = tmp_path / "w.safetensors"
    write_weights(small_vit(), weights)
    assert describe(f"{ARCHITECTURE}={weights}", memo=memo).weights == first.weights
    write_weights(small_vit(1), weights)
    assert describe(f"{ARCHITECTURE}={weights}", memo=memo).weights == second.weights
    assert len(json.loads(memo.read_text())["evaluators"]) == 2
    for damaged in ("{", '{"format": 1}', json.dumps({**json.loads(memo.read_text()), "evaluators": {str(folder): 3}})):
        memo.write_text(damaged)
        assert describe(str(folder), memo=memo) == second


def test_a_memo_is_used(forms, tmp_path, monkeypatch):
    memo = tmp_path / "facts.json"
    first = describe(forms["open_clip"], memo=memo)
    monkeypatch.setattr(
        "shapeloom.eval.evaluators.open_clip_towers.load_evaluator", lambda *a, **k: pytest.fail("read again")
    )
    monkeypatch.chdir(Path(forms["open_clip"]).parent)
    assert describe("published", memo=memo) == replace(first, name="published")


# --- independence ----------------------------------------------------------------------------------------------------


def test_independence_of_files(forms, tmp_path):
    facts = {form: describe(source) for form, source in forms.items()}
    for one, other in itertools.product(facts.values(), repeat=2):
        assert independence(one, other) == "same weights"
    other_seed = describe(str(write_open_clip(small_vit(1), tmp_path / "other")))
    assert independence(other_seed, facts["ours"]) == "same architecture"
    deeper = small_vit(1, vision_cfg={**CONFIG["vision_cfg"], "layers": 3})
    assert independence(describe(str(write_open_clip(deeper, tmp_path / "deeper"))), other_seed) == "independent"
    assert independence(other_seed, None) == "unknown"
    half = small_vit(2)  # LiT: a new text tower on a frozen image tower
    half.clip.visual.load_state_dict(small_vit().clip.visual.state_dict())
    assert independence(describe(str(write_open_clip(half, tmp_path / "lit"))), facts["ours"]) == "same weights"


def test_independence_by_what_names_tell(forms, tmp_path):
    """Two files of other weights (a fine-tuned copy, or in half precision), of one pre-training."""
    quick = f"{ARCHITECTURE}-quickgelu"
    a, b, c = (
        describe(f"{arch}={write_weights(small_vit(seed), tmp_path / f'{seed}-{tag}.safetensors')}")
        for seed, arch, tag in ((1, quick, "OpenAI"), (2, quick, "openai-ft"), (3, ARCHITECTURE, "laion2B-s34B-b79K"))
    )
    assert (a.pretraining, c.pretraining) == ("openai", "laion2b_s34b_b79k")
    assert independence(a, b) == "same pre-training"
    assert independence(a, c) == "same architecture"


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_conditioner_of_one_tower(forms, tmp_path, kind):
    """Shap-E's: its tower, of a CLIP that may also be asked to judge, without logit scale or image projection."""
    whole = load_transformers_clip(Path(forms["transformers"]))
    part = "text_config" if kind == "text" else "vision_config"
    rest = {key: whole.config[key] for key in ("mean", "std", "tokenizer_json")}
    one = type(whole)(**{part: whole.config[part]}, **rest)
    if kind == "text":
        one.text.load_state_dict(whole.text.state_dict())
    else:  # the same tensors in the same order; transformers 4 and 5 differ in their names
        tensors = [value for key, value in whole.vision.state_dict().items() if "visual_projection" not in key]
        one.vision.load_state_dict(dict(zip(one.vision.state_dict(), tensors, strict=True)))
    publish_model(one, tmp_path / "pipeline" / "conditioner")
    facts = describe_conditioner(tmp_path / "pipeline", memo=tmp_path / "memo.json")
    assert facts == describe_conditioner(tmp_path / "pipeline", memo=tmp_path / "memo.json")
    assert facts.weights == one.weights_hash and facts.family == "ours"
    assert (facts.image_size, facts.context_length) == ((0, 20) if kind == "text" else (32, 0))
    for form in ("open_clip", "transformers"):
        assert independence(describe(forms[form]), facts) == "same weights"
    assert independence(describe(str(write_open_clip(small_vit(1), tmp_path / "o"))), facts) == "same architecture"
    with pytest.raises(UserError, match="embeds no pictures" if kind == "text" else "embeds no texts"):
        open_evaluator(str(tmp_path / "pipeline" / "conditioner"))
    with pytest.raises(UserError, match="no folder conditioner"):
        describe_conditioner(tmp_path)

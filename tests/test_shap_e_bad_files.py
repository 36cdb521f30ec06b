"""Weight files that are not what they should be: one sentence, nothing of them is run, nothing is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from shap_e_models import pipeline, released

from shapeloom.checkpoints.shap_e import import_shap_e
from shapeloom.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(denoiser, decoder) tensors, and a folder of diffusers whose CLIP serves."""
    at = tmp_path_factory.mktemp("released")
    theirs = pipeline("text")
    theirs.save_pretrained(at / "theirs")
    return *released("text", theirs), at / "theirs"


@pytest.fixture
def bring_in(files, tmp_path):
    """Writes the two files with changes, imports them, returns what was said."""

    def run(denoiser=None, decoder=None, damage=None) -> str:
        good_denoiser, good_decoder, clip = files
        source = tmp_path / "source"
        source.mkdir()
        torch.save(good_denoiser if denoiser is None else denoiser, source / "text_cond.pt")
        torch.save(good_decoder if decoder is None else decoder, source / "vector_decoder.pt")
        if damage:
            damage(source)
        with pytest.raises(UserError) as error:
            import_shap_e(source, tmp_path / "out", clip=str(clip))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    return run


def test_missing_and_extra_tensors_are_listed_with_the_nearest_model(bring_in, files):
    denoiser = {k: v for k, v in files[0].items() if "ln_post" not in k} | {"wrapped.more": torch.zeros(1)}
    said = bring_in(denoiser=denoiser)
    assert "text_cond.pt" in said and "2 tensors missing (wrapped.ln_post.bias, wrapped.ln_post.weight)" in said
    assert "1 tensor not known (wrapped.more)" in said and "nearest is text300M" in said


def test_another_architecture(bring_in):
    said = bring_in(denoiser={"conv_in.weight": torch.zeros(3), "conv_in.bias": torch.zeros(3)})
    assert "text_cond.pt is of another architecture than Shap-E" in said and "conv_in.bias" in said


def test_a_wrong_shape(bring_in, files):
    name = "wrapped.backbone.resblocks.1.mlp.c_fc.weight"
    said = bring_in(denoiser={**files[0], name: files[0][name][:-1]})
    assert "blocks.1.mlp.0.weight is [255, 64], expected [256, 64]" in said


def test_cut_short(bring_in):
    def cut(source: Path) -> None:
        path = source / "text_cond.pt"
        path.write_bytes(path.read_bytes()[:-5000])

    said = bring_in(damage=cut)
    assert "text_cond.pt" in said and "download it again" in said


def test_a_pickle_with_code_is_not_run(bring_in, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it_ran",))

    def put(source: Path) -> None:
        (source / "text_cond.pt").write_bytes(pickle.dumps({"wrapped.pos_emb": Code()}, protocol=2))

    said = bring_in(damage=put)
    assert "holds code" in said and "nothing of it was run" in said and not (tmp_path / "it_ran").exists()


def test_a_zip_of_torch_with_code_is_not_run(bring_in, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it_ran",))

    def put(source: Path) -> None:
        torch.save({"wrapped.pos_emb": Code()}, source / "text_cond.pt")

    said = bring_in(damage=put)
    assert "holds code" in said and not (tmp_path / "it_ran").exists()


def test_no_files_and_no_decoder(bring_in, tmp_path):
    said = bring_in(damage=lambda source: (source / "vector_decoder.pt").unlink())
    assert "no transmitter and no decoder" in said and "it holds text" in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a model_index.json"):
        import_shap_e(tmp_path / "empty", tmp_path / "out")


def test_the_command(call, files, tmp_path):
    """Both denoisers need a choice; a CLIP that lacks the tower is refused; the right one goes through."""
    torch.save(files[0], tmp_path / "a.pt")
    torch.save(files[1], tmp_path / "b.pt")
    torch.save(released("image", pipeline("image"))[0], tmp_path / "c.pt")
    words = ["import", "shap-e", "--source", tmp_path, "--out", tmp_path / "out", "--clip", files[2]]
    for more, said in ([], "--condition text or image"), (["--condition", "image"], "text alone"):
        done = call(*words, *more)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = call(*words, "--condition", "text")
    assert done.returncode == 0 and "text-conditioned Shap-E" in done.stdout, done.stderr

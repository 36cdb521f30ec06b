"""The denoiser's objectives, and fine-tuning of a pipeline folder: all of it, or adapters, by the real command."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from latent_folders import (
    CAPTIONS,
    C,
    L,
    four_latents,
    shapeloom,
    small_autoencoder,
    small_clip,
    succeed,
    write_latents,
    write_pipeline,
)
from PIL import Image
from safetensors.torch import load_file

from shapeloom.checkpoints.pipeline import load
from shapeloom.data_pipes.latents import LatentDataset
from shapeloom.data_pipes.loader import sample_rng
from shapeloom.data_pipes.procedural import ProceduralSettings, generate
from shapeloom.errors import UserError
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.denoiser import Condition, Denoiser
from shapeloom.models.guidance import shap_e_scheduler
from shapeloom.models.transformers_clip import TransformersConditioner
from shapeloom.training.conditioning import first_conditions
from shapeloom.training.config import RunConfig
from shapeloom.training.denoiser import DenoiserModelConfig, DenoiserRun, build
from shapeloom.training.ema import Ema, skeleton
from shapeloom.training.finetune import LoraConfig, add_lora, merged
from shapeloom.training.loop import Stage, prepare_blocks
from shapeloom.training.objectives import diffusion, prediction_loss
from shapeloom.training.parallel import Parallel

TEXT_ALONE = "conditioning={text: 1, image: 0, both: 0, nothing: 0}"
QUICK = ["eval_every=0", "save_every=1000", "log_every=1", "sheet_samples=0", "eval_samples=4"]
LEARN = ["steps=200", "batch_size=16", "optim.lr=5e-3", "optim.warmup_steps=20", TEXT_ALONE, *QUICK]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """Latents of four objects, the same ones in another order, and two pipelines to start from: flow/ and sample/."""
    folder = tmp_path_factory.mktemp("finetune")
    autoencoder, clip = small_autoencoder(), small_clip()
    write_latents(folder / "latents", autoencoder, clip, four_latents())
    write_latents(folder / "reversed", autoencoder, clip, four_latents()[::-1])
    for prediction in ("flow", "sample"):
        write_pipeline(folder / prediction, prediction, autoencoder, clip)
    return folder


@pytest.fixture(scope="module")
def learned(at, tmp_path_factory):
    """A run from the pipeline `flow` or `sample` on the four objects, made once: what was said, and its folder."""
    runs: dict[str, tuple[str, Path]] = {}

    def run(prediction):
        if prediction not in runs:
            out = tmp_path_factory.mktemp(prediction) / "run"
            words = ["--init", at / prediction, "--data", at / "latents", "--out", out]
            runs[prediction] = (succeed("train", "denoiser", *words, *LEARN), out)
        return runs[prediction]

    return run


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    return load_file(pipeline / "denoiser" / "diffusion_pytorch_model.safetensors")


def settings(pipeline: Path, part: str, name: str = "config.json") -> dict:
    fields = json.loads((pipeline / part / name).read_text())
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def distances(pipeline: Path, truth: np.ndarray, **options) -> torch.Tensor:
    """[4, 4], of each caption's sample (row) to each true latent."""
    latents = load(pipeline).generate_latents(CAPTIONS, None, [0, 1, 2, 3], text_guidance=1.0, steps=16, **options)
    return torch.cdist(latents.flatten(1), torch.from_numpy(truth.astype(np.float32)).flatten(1))


def assert_each_its_own(distance_44: torch.Tensor) -> None:
    assert distance_44.argmin(1).tolist() == [0, 1, 2, 3]
    # Nearest is not enough: a sample is its object, and not merely less far from it than from the others.
    others = distance_44 + torch.diag(torch.full((4,), torch.inf))
    assert (distance_44.diag() < 0.3 * others.amin(1)).all(), distance_44


# --- objectives ------------------------------------------------------------------------------------------------------


def sample_loss(model, batch):
    return prediction_loss(model, batch, prediction="sample")


class Perfect(torch.nn.Module):
    """Knows the data; keeps what it was shown."""

    def __init__(self, data_BLC):
        super().__init__()
        self.data, self.offset = data_BLC, 0.0

    def forward(self, x_BLC, t_B, condition):
        self.x, self.level = x_BLC, t_B
        return self.data + self.offset


def data_batch(count=64, steps=None):
    """A batch of unit-variance latents at drawn (or given) steps."""
    rng = np.random.default_rng(0)
    objective = diffusion(shap_e_scheduler())
    drawn = [objective.draw(sample_rng(0, i)) for i in range(count)]
    if steps is not None:
        powers = shap_e_scheduler().alphas_cumprod
        drawn = [{"time": step / 1024, "signal_power": float(powers[step])} for step in steps]
    empty = {name: torch.zeros(len(drawn), 1) for name in Condition.__dataclass_fields__}
    latent, noise = (torch.from_numpy(rng.standard_normal((len(drawn), 32, 16), np.float32)) for _ in range(2))
    levels = {name: torch.tensor([level[name] for level in drawn]) for name in ("time", "signal_power")}
    return {"latent": latent, "noise": noise, **levels, **empty}


def test_a_perfect_data_predictor_has_no_loss_and_another_its_mean_square():
    batch = data_batch()
    model = Perfect(batch["latent"])
    loss_B, _ = sample_loss(model, batch)
    assert loss_B.shape == (64,) and (loss_B == 0).all()
    model.offset = 0.3
    torch.testing.assert_close(sample_loss(model, batch)[0], torch.full((64,), 0.09))


def test_the_data_objective_is_noised_by_the_schedule_it_samples_with():
    steps = [0, 300, 1023]
    batch = data_batch(steps=steps)
    model = Perfect(batch["latent"])
    sample_loss(model, batch)
    scheduler = shap_e_scheduler()
    shares = scheduler.alphas_cumprod[steps]
    torch.testing.assert_close(
        shares[1], torch.tensor(np.exp(-12 * 301 / 1024), dtype=torch.float32), rtol=1e-4, atol=0
    )
    expected = scheduler.alphas_cumprod[steps].sqrt()[:, None, None] * batch["latent"]
    expected += (1 - shares).sqrt()[:, None, None] * batch["noise"]
    torch.testing.assert_close(model.x, expected)
    assert torch.equal(model.level * 1024, torch.tensor(steps, dtype=torch.float32))
    # What the solver hands the network at its first call has the same scale and level.
    scheduler.set_timesteps(8)
    noise = batch["noise"][2:]
    x = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
    assert float(scheduler.timesteps[0]) == pytest.approx(1023, abs=0.01)
    torch.testing.assert_close(x, noise, rtol=1e-4, atol=1e-4)


def test_noisy_data_have_unit_variance_at_every_drawn_step():
    batch = data_batch(2000)
    model = Perfect(batch["latent"])
    sample_loss(model, batch)
    variance_B = model.x.var((1, 2))
    assert abs(float(variance_B.mean()) - 1) < 0.01
    steps = (batch["time"] * 1024).numpy()
    assert np.array_equal(steps, steps.round()) and steps.min() < 10 and steps.max() > 1013
    assert abs(steps.mean() - 511.5) < 30  # ± 6.6 by chance
    assert torch.equal(batch["signal_power"], shap_e_scheduler().alphas_cumprod[steps.astype(int)])


# --- a pipeline learns four captions by heart ------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["flow", "sample"])
def test_four_captions_are_learned_by_heart(at, learned, prediction):
    said, out = learned(prediction)
    assert re.search(r"denoiser: training ([\d,]+) of \1 parameters \(100.0%\)", said)
    curve = losses(out)
    start, end = np.mean(curve[:3]), np.mean(curve[-20:])
    assert end < start / 15, (start, end)
    assert_each_its_own(distances(out / "pipeline", four_latents()))
    if prediction == "sample":
        assert_each_its_own(distances(out / "pipeline", four_latents(), solver="dpm++"))


def test_an_untrained_pipeline_knows_no_caption(at):
    """What the test above would see if training did nothing."""
    with pytest.raises(AssertionError):
        assert_each_its_own(distances(at / "flow", four_latents()))


@pytest.mark.parametrize("prediction", ["flow", "sample"])
def test_architecture_statistics_and_schedule_stay_the_folders(at, learned, prediction):
    _, out = learned(prediction)
    for part, name in (("denoiser", "config.json"), ("scheduler", "scheduler_config.json")):
        assert settings(out / "pipeline", part, name) == settings(at / prediction, part, name)
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["prediction"] == prediction and config["model"]["width"] == 48
    assert config["standardise"] is (prediction == "flow")


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_alone_turn_what_was_learned(at, learned, tmp_path):
    """From a pipeline that knows the four objects to one in which the captions have changed places."""
    _, before = learned("flow")
    words = ["--init", before / "pipeline", "--data", at / "reversed", "--out", tmp_path / "run"]
    said = succeed("train", "denoiser", *words, *LEARN, "lora.rank=8", "optim.lr=2e-2")
    trained, whole = (int(n.replace(",", "")) for n in re.search(r"training ([\d,]+) of ([\d,]+)", said).groups())
    old, new = weights(before / "pipeline"), weights(tmp_path / "run" / "pipeline")
    targets = ("attention.query", "attention.key_value", "attention.out", "mlp.0", "mlp.2")
    adapted = {f"blocks.{i}.{target}.weight" for i in range(2) for target in targets}
    assert trained == sum(8 * sum(old[name].shape) for name in adapted)
    assert trained + sum(value.numel() for value in old.values()) == whole and trained < whole / 5
    # Ordinary weights under their ordinary names; only the adapted ones moved, each by a matrix of rank 8.
    assert old.keys() == new.keys()
    assert {name for name in old if not torch.equal(old[name], new[name])} == adapted
    assert all(torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-4) <= 8 for name in adapted)
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-20:]) < np.mean(curve[:3]) / 5
    assert_each_its_own(distances(tmp_path / "run" / "pipeline", four_latents()[::-1]))


def test_merged_is_the_same_function(at):
    torch.manual_seed(0)
    model = load(at / "flow").denoiser
    add_lora(
        model, LoraConfig(rank=4, alpha=10.0, targets=("mlp.0", "text_tokens.1"), train=("latent_out", "positions"))
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"latent_out.weight", "latent_out.bias", "positions"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.normal_(std=0.1)
    dataset = LatentDataset(at / "latents")
    condition = first_conditions([dataset[i] for i in range(4)], model)
    x_BLC, t_B = torch.randn(4, L, C), torch.rand(4)
    plain = merged(model)
    assert type(plain) is Denoiser and not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        expected = model(x_BLC, t_B, condition)
        assert not torch.allclose(expected, load(at / "flow").denoiser(x_BLC, t_B, condition), atol=1e-2)
        torch.testing.assert_close(plain(x_BLC, t_B, condition), expected, atol=1e-5, rtol=1e-4)
    untouched = load(at / "flow").denoiser
    assert merged(untouched) is untouched


def test_the_average_follows_what_trains_and_shares_what_is_frozen(at):
    model = load(at / "flow").denoiser
    add_lora(model, LoraConfig(rank=2))
    shell = skeleton(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    ema = Ema(Parallel(Accelerator(cpu=True), model, optimiser), shell, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1.0)
    before = {name: value.clone() for name, value in ema.module().named_parameters()}
    ema.update(step=1000)
    for (name, mine), theirs in zip(ema.module().named_parameters(), model.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(mine, (before[name] + 1) / 2)
            assert mine is not theirs
        else:
            assert mine is theirs


def short_run(at: Path, out: Path, *more: str) -> list[str]:
    """Words of a run of 12 steps with adapters, and dropout in them."""
    words = ["--init", at / "flow", "--data", at / "latents", "--out", out, "steps=12", "batch_size=4", *QUICK]
    return ["train", "denoiser", *map(str, words), "save_every=3", "lora.rank=2", "lora.dropout=0.1", *more]


@pytest.fixture(scope="module")
def whole(at, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(*short_run(at, out))
    return out


def test_a_killed_run_with_adapters_goes_on_bit_for_bit(at, whole, tmp_path):
    out, words = tmp_path / "run", short_run(at, tmp_path / "run")
    command = [sys.executable, "-m", "shapeloom", *words]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "state" / "latest").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(losses(out)) < 12
    succeed(*words)
    assert losses(out) == losses(whole) and len(losses(out)) == 12
    for name in (
        "state/00000012/part-00000-of-00001.safetensors",
        "pipeline/denoiser/diffusion_pytorch_model.safetensors",
    ):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_gradient_checkpointing_changes_no_loss(at, whole, tmp_path):
    succeed(*short_run(at, tmp_path / "run", "gradient_checkpointing=true"))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-6)


def test_gradient_checkpointing_is_done_where_it_can_be(at):
    calls = []
    stage = build(DenoiserRun(data=str(at / "latents"), init=str(at / "sample"), gradient_checkpointing=True))
    block = stage.model.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = stage.batches(0, 1).batch(0)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            prepare_blocks(RunConfig(gradient_checkpointing=True), stage)
        stage.model.zero_grad()
        loss = stage.loss(stage.model, batch)[0].mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in stage.model.named_parameters()})
    assert len(calls) == 1 + 2  # the second time the block ran again in the backward pass
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-8) for name in gradients[0])
    plain = Stage("clip", torch.nn.Linear(2, 2), stage.loss, stage.batches, stage.evaluate, stage.publish)
    with pytest.raises(UserError, match="^gradient_checkpointing: the model of clip"):
        prepare_blocks(RunConfig(gradient_checkpointing=True), plain)


# --- the way from an imported Shap-E: one tower, no statistics -------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_folder_with_one_tower_is_encoded_for_and_tuned(tmp_path, kind):
    raw = ProceduralSettings(count=6, n_surface=64, n_near=64, n_uniform=64, n_views=2, image_size=32)
    generate(tmp_path / "raw", raw)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "text":
        tokenizer = small_clip().config.tokenizer_json
        text = {**shape, "projection_dim": 24, "vocab_size": 300, "max_position_embeddings": 32, "eos_token_id": 299}
        conditioner = TransformersConditioner(text_config=text, tokenizer_json=tokenizer).eval()
        condition = {"conditions": ["text_pooled"]}
    else:
        conditioner = TransformersConditioner(vision_config={**shape, "image_size": 32, "patch_size": 8}).eval()
        condition = {"conditions": ["image_tokens"], "image_width": 32}
    reads = {"point_features": "nerf", "n_centres": 16, "patch_size": 8, "norm_in": True, "field": "nerstf"}
    autoencoder = Autoencoder(n_latents=L, channels=C, width=32, heads=2, hidden=16, **reads).eval()
    folder = write_pipeline(tmp_path / "shap-e", "sample", autoencoder, conditioner, **condition)

    models = [f"autoencoder={folder / 'autoencoder'}", f"clip={folder / 'conditioner'}"]
    succeed("encode", "--data", tmp_path / "raw", "--out", tmp_path / "latents", *models)
    first = LatentDataset(tmp_path / "latents")[0]
    assert (first.has_text, first.has_image) == (kind == "text", kind == "image")
    words = ["--init", folder, "--data", tmp_path / "latents", "--out", tmp_path / "run", "steps=2", "batch_size=4"]
    said = succeed("train", "denoiser", *words, "log_every=1", "sheet_samples=2", "sample_steps=2")
    assert f"the model reads {kind} alone, in 90% of the samples" in said and "failed" not in said
    Image.open(tmp_path / "run" / "samples" / "00000002.png").verify()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    given = ["--text", "a red cube"] if kind == "text" else ["--image", tmp_path / "picture.png"]
    succeed("sample", tmp_path / "run" / "pipeline", *given, "--seeds", "0", "--steps", "2", "--out", tmp_path / "out")


def test_the_settings_start_as_the_models_own():
    arguments = inspect.signature(Denoiser.__init__).parameters
    fields = DenoiserModelConfig().model_dump()
    assert {name: arguments[name].default for name in fields} == fields
    of_the_data = {"n_latents", "channels", "text_width", "image_width", "pooled_width"}
    of_the_data |= {"latent_mean", "latent_std", "autoencoder_hash", "conditioner_hash"}
    assert set(arguments) - {"self"} - of_the_data == set(fields)


def test_a_model_of_one_kind_sees_it_in_all_samples_but_the_dropped(at):
    conditions = ["image_pooled", "image_tokens"]
    config = DenoiserRun.model_validate(
        {"data": str(at / "latents"), "batch_size": 400, "model": {"conditions": conditions, "width": 24, "layers": 1}}
    )
    batch = build(config).batches(0, 1).batch(0)
    assert not batch["has_text"].any()
    assert abs(float(batch["has_image"].float().mean()) - 0.9) < 0.06  # 4 standard deviations


# --- what cannot be is one sentence ----------------------------------------------------------------------------------


def refused(*words: object) -> str:
    """The one sentence that the command ends with."""
    code, _, errors = shapeloom(*words)
    assert code == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors.removeprefix("error: ").strip()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Latent folders that are not of `at`'s autoencoder, conditioner, or shape; and without text."""
    folder = tmp_path_factory.mktemp("others")
    autoencoder, clip, latents = small_autoencoder(), small_clip(), four_latents()
    write_latents(folder / "autoencoder", small_autoencoder(seed=1), clip, latents)
    write_latents(folder / "conditioner", autoencoder, small_clip(seed=1), latents)
    write_latents(folder / "shape", small_autoencoder(16, 4), clip, four_latents((16, 4)))
    write_latents(folder / "no_text", autoencoder, clip, latents, text=False)
    return folder


def test_latents_of_another_folder_are_refused(at, others, tmp_path):
    words = ["train", "denoiser", "--init", at / "flow", "--out", tmp_path / "run", "--data"]
    remedy = f"encode with {at}/flow/autoencoder and {at}/flow/conditioner"
    for part in ("autoencoder", "conditioner"):
        said = refused(*words, others / part)
        assert f"{others / part} was encoded with another {part} (hash " in said and said.endswith(remedy)
    said = refused(*words, others / "shape")
    assert "are 16 x 4" in said and "makes 16 x 8" in said and said.endswith(remedy)
    said = refused(*words, others / "no_text")
    assert "has no text features" in said and "model.conditions=[image_pooled, image_tokens]" in said
    assert not (tmp_path / "run").exists()


def test_a_wrong_start_is_refused(at, whole, tmp_path):
    words = ["train", "denoiser", "--data", at / "latents", "--out", tmp_path / "run", "--init"]
    assert "is not a pipeline folder: it has no denoiser" in refused(*words, tmp_path / "nowhere")
    assert refused(*words, whole).endswith(f"did you mean {whole / 'pipeline'}?")
    mixed = Path(shutil.copytree(at / "sample", tmp_path / "mixed"))
    shutil.copytree(at / "flow" / "scheduler", mixed / "scheduler", dirs_exist_ok=True)
    assert "FlowMatchEulerDiscreteScheduler for a denoiser that predicts the data" in refused(*words, mixed)
    weights_file = mixed / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    assert "the weights cannot be read" in refused(*words, mixed)


def test_adapters_that_fit_nowhere_are_refused(at, tmp_path):
    words = ["train", "denoiser", "--data", at / "latents", "--out", tmp_path / "run"]
    start = ["--init", at / "flow", "lora.rank=4"]
    said = refused(*words, *start, "lora.targets=[attention.quary]")
    assert said.startswith("lora.targets: no linear layer is called 'attention.quary'") and "attention.query" in said
    assert "attention.key_value" in refused(*words, *start, "lora.targets=[to_q]")
    assert "cannot take an adapter" in refused(*words, *start, "lora.targets=[latent_out]")
    assert "'positons'; the nearest are positions" in refused(*words, *start, "lora.train=[positons]")
    assert "none of the" in refused(*words, *start, "lora.targets=[]")
    assert refused(*words, "lora.rank=4").startswith("lora.rank needs init=FOLDER")


def test_settings_that_cannot_be_are_refused(at, tmp_path):
    words = ["train", "denoiser", "--data", at / "latents", "--out", tmp_path / "run"]
    assert refused(*words, "model.prediction=x0") == (
        "key 'model.prediction' should be 'flow', 'sample', 'v' or 'epsilon', got 'x0'"
    )
    assert "text_pooled" in refused(*words, "model.conditions=[text]")
    assert refused(*words, "model.heads=7") == "model: width 192 does not divide into 7 heads"
    assert "add to 1" in refused(*words, "conditioning.text=0.9")


def test_what_the_folder_replaces_is_said(at, tmp_path):
    words = ["--data", at / "latents", "--out", tmp_path, "--init", at / "sample", "model.width=96", "standardise=true"]
    _, said, _ = shapeloom("train", "denoiser", *words, "lora.rank=1", "lora.targets=[]")
    assert f"as in {at / 'sample'}, without model.width=96 (there 48), standardise=True (there False)" in said


def test_an_autoencoder_without_encoder_cannot_encode(at, tmp_path):
    generate(
        tmp_path / "raw", ProceduralSettings(count=2, n_surface=64, n_near=64, n_uniform=64, n_views=1, image_size=32)
    )
    Autoencoder(L, C, width=32, heads=2, hidden=16, with_encoder=False).save_pretrained(tmp_path / "decoder")
    words = ["encode", "--data", tmp_path / "raw", "--out", tmp_path / "latents", f"clip={at / 'flow' / 'conditioner'}"]
    assert "came without an encoder" in refused(*words, f"autoencoder={tmp_path / 'decoder'}")
    reads = {"n_latents": L, "point_features": "nerf", "width": 32, "heads": 2, "hidden": 16}
    Autoencoder(n_centres=100, **reads).save_pretrained(tmp_path / "centres")
    assert "neighbourhoods of 100 surface points, and there are 64" in refused(
        *words, f"autoencoder={tmp_path / 'centres'}"
    )
    Autoencoder(patch_size=5, **reads).save_pretrained(tmp_path / "patches")
    assert "32 x 32 pixels do not divide" in refused(*words, f"autoencoder={tmp_path / 'patches'}")
    assert not (tmp_path / "latents").exists()

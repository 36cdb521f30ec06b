"""Flow, data, noise and v: against diffusers' schedulers and closed forms, in training and in sampling."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
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
)

from shapeloom.checkpoints.pipeline import load
from shapeloom.data_pipes.loader import sample_rng
from shapeloom.errors import UserError
from shapeloom.models.denoiser import Condition, Denoiser
from shapeloom.models.guidance import diffusion_scheduler, shap_e_scheduler, shifted
from shapeloom.models.pipeline import ShapeloomPipeline
from shapeloom.training.objectives import diffusion, loss_weight, prediction_loss, rectified_flow, target

PREDICTIONS = ("flow", "sample", "v", "epsilon")
DIFFUSIONS = PREDICTIONS[1:]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Answers(torch.nn.Module):
    """Keeps what it is shown and answers with what it was given."""

    def __init__(self, answer_BLC):
        super().__init__()
        self.answer = answer_BLC

    def forward(self, x_BLC, t_B, condition):
        self.x = x_BLC
        return self.answer


def batch_at(**levels: torch.Tensor) -> dict[str, torch.Tensor]:
    count = len(levels["time"])
    empty = {name: torch.zeros(count, 1) for name in Condition.__dataclass_fields__}
    return {"latent": normal(count, 4, 3), "noise": normal(count, 4, 3, seed=1), **levels, **empty}


@pytest.mark.parametrize("prediction", DIFFUSIONS)
def test_noising_and_targets_are_diffusers(prediction):
    scheduler = diffusion_scheduler(prediction)
    ours, steps = diffusion(scheduler, prediction), torch.tensor([0, 200, 700, 1023])
    batch = batch_at(time=steps / 1024, signal_power=scheduler.alphas_cumprod[steps])
    theirs = DDPMScheduler(1024, trained_betas=scheduler.betas.numpy())
    z, noise = batch["latent"], batch["noise"]
    wanted = {"sample": z, "epsilon": noise, "v": theirs.get_velocity(z, noise, steps)}[prediction]
    model = Answers(wanted)
    loss_B, _ = ours.loss(model, batch)
    torch.testing.assert_close(model.x, theirs.add_noise(z, noise, steps), rtol=1e-4, atol=1e-5)
    assert loss_B.shape == (4,) and loss_B.max() < 1e-9
    model.answer = wanted + 0.5
    torch.testing.assert_close(ours.loss(model, batch)[0], torch.full((4,), 0.25), rtol=1e-4, atol=0)


def test_a_flow_is_noised_as_its_scheduler_does():
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    levels = scheduler.sigmas[[10, 400, 900]]
    batch = batch_at(time=levels)
    model = Answers(batch["noise"] - batch["latent"])
    assert rectified_flow(scheduler).loss(model, batch)[0].max() == 0
    expected = [
        scheduler.scale_noise(z[None], level[None] * 1000, noise[None])[0]
        for z, level, noise in zip(batch["latent"], levels, batch["noise"])
    ]
    torch.testing.assert_close(model.x, torch.stack(expected))


def test_uniform_levels_and_logit_normal_ones_are_what_they_are_called():
    draws = {
        name: np.array([rectified_flow(None, **settings).draw(sample_rng(0, i))["time"] for i in range(4000)])
        for name, settings in {
            "uniform": {"sampling": "uniform"},
            "normal": {"mean": 0.4, "std": 0.7},
            "shifted": {"mean": 0.4, "std": 0.7, "shift": 3.0},
            "moved": {"mean": 0.4 + np.log(3.0), "std": 0.7},
        }.items()
    }
    assert np.quantile(draws["uniform"], [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    logits = np.log(draws["normal"] / (1 - draws["normal"]))
    assert (logits.mean(), logits.std()) == pytest.approx((0.4, 0.7), abs=0.05)
    # A shift multiplies t / (1 - t), so it moves the logit by its logarithm.
    assert draws["shifted"] == pytest.approx(draws["moved"])


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_shift_is_diffusers_and_multiplies_the_noise_to_signal_ratio(shift):
    plain, theirs = (FlowMatchEulerDiscreteScheduler(1000, shift=s).sigmas.numpy() for s in (1.0, shift))
    assert shifted(plain, shift) == pytest.approx(theirs, rel=1e-5)
    before, after = (diffusion_scheduler("v", shift=s).alphas_cumprod.double() for s in (1.0, shift))
    torch.testing.assert_close((1 / after - 1).sqrt(), shift * (1 / before - 1).sqrt(), rtol=2e-3, atol=0)


def test_shap_es_schedule_is_what_it_was(tmp_path):
    saved = HeunDiscreteScheduler.from_config(shap_e_scheduler().config).config
    assert saved["trained_betas"] is None and saved["prediction_type"] == "sample" and saved["clip_sample"]
    moved = diffusion_scheduler("epsilon", shift=2.0)
    moved.save_pretrained(tmp_path)
    assert torch.equal(HeunDiscreteScheduler.from_pretrained(tmp_path).alphas_cumprod, moved.alphas_cumprod)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_datas_error_alike_whatever_is_predicted(prediction):
    gamma = 5.0
    sigma = torch.tensor([0.02, 0.2, 0.5, 0.9, 0.999])
    signal = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()
    snr = (signal / sigma) ** 2
    capped = snr.clamp(max=gamma)
    papers = {"sample": capped, "epsilon": capped / snr, "v": capped / (snr + 1)}
    weight = loss_weight(prediction, signal, sigma, gamma)
    if prediction in papers:
        torch.testing.assert_close(weight, papers[prediction])
    # The same wrong idea of the data, said in each prediction's terms, costs min(SNR, γ) times its square.
    data, noise, error = normal(5, seed=2), normal(5, seed=3), 0.3
    x = signal * data + sigma * noise
    wrong = data + error
    wrong_noise = (x - signal * wrong) / sigma
    off = target(prediction, wrong, wrong_noise, signal, sigma) - target(prediction, data, noise, signal, sigma)
    torch.testing.assert_close(weight * off**2, capped * error**2, rtol=1e-3, atol=1e-6)


def test_weights_are_finite_at_both_ends_and_reach_the_loss():
    for prediction in PREDICTIONS:
        signal = torch.tensor([1.0, 0.0 if prediction == "flow" else 0.0025])
        assert loss_weight(prediction, signal, 1 - signal).isfinite().all()
    batch = batch_at(time=torch.tensor([0.1, 0.9]))
    model = Answers(batch["noise"] - batch["latent"] + 2.0)
    loss_B, metrics = prediction_loss(model, batch, prediction="flow", weighting="min_snr", gamma=5.0)
    torch.testing.assert_close(loss_B, 4 * torch.tensor([5.0 * 0.1**2, 0.1**2]), rtol=1e-4, atol=0)
    assert float(metrics["unweighted"]) == pytest.approx(4, rel=1e-5)


# --- sampling --------------------------------------------------------------------------------------------------------


class Exact(Denoiser):
    """The exact prediction for data of N(mean, std²) in every number; std 0 is one point."""

    mean, std = 0.3, 0.0
    sigmas_T: np.ndarray | None = None  # noise to signal at each step of a diffusion

    def forward(self, x_BLC, t_B, condition, tokens_BN=None):
        t = t_B[:, None, None].double()
        if self.config.prediction == "flow":
            signal, sigma = 1 - t, t
        else:
            steps = np.arange(len(self.sigmas_T))
            ratio = torch.from_numpy(np.exp(np.interp(t.numpy() * len(steps), steps, np.log(self.sigmas_T))))
            signal, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        variance = signal**2 * self.std**2 + sigma**2
        data = self.mean + signal * self.std**2 / variance * (x_BLC - signal * self.mean)
        noise = (x_BLC - signal * data) / sigma
        return target(self.config.prediction, data, noise, signal, sigma).to(x_BLC)


@pytest.fixture(scope="module")
def parts():
    return small_autoencoder(), small_clip()


@pytest.mark.parametrize("std", [0.0, 0.6], ids=["point", "gaussian"])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_that_answers_exactly_samples_its_data(parts, prediction, shift, std):
    statistics = {"latent_mean": [0.1] * C, "latent_std": [0.5] * C}
    sizes = {"width": 16, "heads": 2, "layers": 1, "text_width": 32, "image_width": 256, "pooled_width": 24}
    model = Exact(L, C, prediction=prediction, **sizes, **statistics)
    model.std = expected = std
    if prediction == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    else:
        scheduler = diffusion_scheduler(prediction, clip_range=2.2, shift=shift)
        model.sigmas_T = np.sqrt(1 / scheduler.alphas_cumprod.double().numpy() - 1)
        # The last step goes from the lowest level to its mean of the data, of deviation s² / √(s² + σ²).
        expected = std and std**2 / np.hypot(std, model.sigmas_T[0])
    pipe = ShapeloomPipeline(parts[0], model, parts[1], scheduler)
    for solver in ("own", "dpm++")[: 1 if prediction == "flow" else 2]:
        steps = 60 if prediction == "flow" else 24
        z = pipe.generate_latents(["a red cube"] * 24, None, list(range(24)), steps=steps, solver=solver)
        # Statistics undone: data of mean .3 and deviation s are latents of mean .1 + .5·.3 and deviation .5·s.
        assert float(z.mean()) == pytest.approx(0.25, abs=0.02 * std + 0.002), solver
        assert float(z.std()) == pytest.approx(0.5 * expected, rel=0.05, abs=0.002), solver


def test_mixed_folders_are_refused(parts):
    sizes = {"width": 16, "heads": 2, "layers": 1, "text_width": 32, "image_width": 256, "pooled_width": 24}
    pipe = ShapeloomPipeline(parts[0], Denoiser(L, C, prediction="v", **sizes), parts[1], shap_e_scheduler())
    with pytest.raises(UserError, match="predicts v, its scheduler is of sample"):
        pipe.generate_latents(["a red cube"], None, [0])


# --- by the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory, parts):
    return write_latents(tmp_path_factory.mktemp("objectives") / "latents", *parts, four_latents())


SMALL = ["model.width=48", "model.heads=2", "model.layers=2", "batch_size=16", "sheet_samples=0", "eval_samples=4"]
SMALL += ["eval_every=0", "optim.lr=5e-3", "optim.warmup_steps=20", "log_every=1"]


@pytest.mark.parametrize(
    ("prediction", "settings"), [("v", ["time_shift=0.2"]), ("epsilon", ["time_shift=0.05", "weighting=min_snr"])]
)
def test_v_and_noise_are_learned_and_sampled_from_the_folder_they_leave(latents, tmp_path, prediction, settings):
    words = ["--data", latents, "--out", tmp_path / "run", f"model.prediction={prediction}", "steps=400", *SMALL]
    succeed("train", "denoiser", *words, "conditioning.drop_image=1", *settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"unweighted" in line for line in lines if "loss" in line} == {"weighting=min_snr" in settings}
    pipe = load(tmp_path / "run" / "pipeline")
    assert pipe.scheduler.config.clip_sample_range > 1
    truth = torch.from_numpy(four_latents().astype(np.float32)).flatten(1)
    for solver in ("own", "dpm++"):
        z = pipe.generate_latents(CAPTIONS, None, [0, 1, 2, 3], text_guidance=1.0, steps=16, solver=solver)
        distance = torch.cdist(z.flatten(1), truth)
        others = distance + torch.diag(torch.full((4,), torch.inf))
        assert (distance.diag() < 0.4 * others.amin(1)).all(), (solver, distance)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.prediction=v", "time_mean=0"], "time_mean is of a flow's noise levels"),
        (["model.prediction=sample", "sampling_shift=2"], "sampling_shift is of a flow's noise levels"),
        (["time_sampling=uniform", "time_std=1"], "time_std is of time_sampling=logit_normal"),
        (["min_snr_gamma=3"], "min_snr_gamma is of weighting=min_snr"),
        (["weighting=p2"], "'weighting' should be 'uniform' or 'min_snr'"),
        (["conditioning.drop_text=0.1", "conditioning.both=0.3"], "not some of each"),
        (["max_views=2"], "keeps 1 views an asset; encode with n_views=2, or set max_views=1"),
        (["max_views=2", "model.conditions=[text_pooled]"], "the model reads no images; set max_views=1"),
        (["curriculum=[[0.5, 3]]"], "3 latent tokens must be a multiple of model.patch=2"),
        (["curriculum=[[0.5, 32]]"], "from 2 to the latents' 16"),
        (["curriculum=[[0.5, 4], [0.3, 8]]"], "the shares rising between 0 and 1"),
        (["attention=xformers"], "set attention=sdpa"),
    ],
)
def test_settings_that_contradict_are_one_sentence(latents, tmp_path, settings, said):
    words = ["--data", latents, "--out", tmp_path / "run", "cpu=true", *settings]
    code, _, errors = shapeloom("train", "denoiser", *words)
    assert code == 1 and said in errors and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()

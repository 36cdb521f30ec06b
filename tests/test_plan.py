"""What `shapeloom plan` counts: against torch's own counting of the same models, and through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from latent_folders import shapeloom, succeed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shapeloom.launch.plan import duration, features_of, make_plan, show
from shapeloom.models import linear
from shapeloom.models.autoencoder import Autoencoder
from shapeloom.models.denoiser import SHAP_E, Condition, Denoiser
from shapeloom.training.arithmetic import denoiser_flops, evaluation_memory, memory_per_rank, sizes_of, step_memory

ACCELERATE = Path(__file__).resolve().parent.parent / "launch" / "accelerate"
SIZES = {"n_latents": 32, "channels": 16, "width": 64, "heads": 4, "layers": 3}
SIZES |= {"text_width": 24, "image_width": 40, "pooled_width": 20}
MODELS = {
    "ours": {**SIZES, "patch": 2},
    "shap-e": {**SHAP_E, **SIZES, "conditions": ["text_pooled"]},
    "shap-e of images": {**SHAP_E, **SIZES, "conditions": ["image_tokens"]},
}
TOKENS = {"text_tokens": 7, "image_tokens": 9}
B = 2


def denoiser(settings: dict, *, checkpointing: bool = False) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(**settings)
    nn.init.normal_(model.latent_out.weight)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def inputs(model: Denoiser) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Latents, noise levels and conditions of B samples, all of which want a gradient."""
    config = model.config
    shapes = {
        "x": (config.n_latents, config.channels),
        "t": (),
        "text_tokens": (TOKENS["text_tokens"], config.text_width),
        "text_pooled": (config.pooled_width,),
        "image_tokens": (TOKENS["image_tokens"], config.image_width),
        "image_pooled": (config.pooled_width,),
    }
    floats = {name: torch.rand(B, *shape, requires_grad=True) for name, shape in shapes.items()}
    there = torch.ones(B, dtype=torch.bool)
    mask = torch.ones(B, TOKENS["text_tokens"], dtype=torch.bool)
    x, t = floats.pop("x"), floats.pop("t")
    return x, t, Condition(**floats, text_mask=mask, has_text=there, has_image=there)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_torch_counts(name, checkpointing):
    model = denoiser(MODELS[name], checkpointing=checkpointing)
    ours = denoiser_flops(model.config, **TOKENS)
    given = inputs(model)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's fused attention
        with FlopCounterMode(display=False) as forward:
            loss = model(*given).square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert B * ours.forward == forward.get_total_flops()
    assert B * ours.training(checkpointing=checkpointing) == forward.get_total_flops() + backward.get_total_flops()


def test_flops_of_fewer_latent_tokens():
    model = denoiser(MODELS["ours"])
    x, t, condition = inputs(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(x[:, :8], t, condition)
    assert B * denoiser_flops(model.config, n_latents=8, **TOKENS).forward == counted.get_total_flops()


def test_counts_of_parameters():
    model = denoiser(MODELS["ours"])
    model.time.requires_grad_(False)
    sizes = sizes_of(model)
    assert sizes.parameters == model.num_parameters()
    assert sizes.trained == model.num_parameters(only_trainable=True) < sizes.parameters
    assert sizes.root + 3 * sizes.block == sizes.parameters
    assert sizes.block == sum(p.numel() for p in model.blocks[0].parameters())


def allocated(call) -> int:
    """The most that torch's CPU allocator had given out at once during `call`, by its own record."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def arguments(model: Denoiser) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, Condition]]:
    """A batch without gradients: latent and noise, and what else the model is called with."""
    with torch.no_grad():
        x, t, condition = inputs(model)
    plain = {name: value.detach() for name, value in vars(condition).items() if value is not None}
    return {"latent": x.detach(), "noise": torch.randn_like(x)}, (t.detach(), Condition(**plain))


def step_on(model: Denoiser, batch: dict[str, torch.Tensor], rest: tuple) -> torch.Tensor:
    """A loss of the flow or of the data, written out."""
    share = rest[0][:, None, None]
    if model.config.prediction == "flow":
        signal, noise, target = 1 - share, share, batch["noise"] - batch["latent"]
    else:
        signal, noise, target = share.sqrt(), (1 - share).sqrt(), batch["latent"]
    predicted = model(signal * batch["latent"] + noise * batch["noise"], *rest)
    return (predicted - target).square().mean()


@pytest.mark.parametrize(
    ("name", "checkpointing", "parts"),
    [("ours", False, 1), ("ours", True, 2), ("shap-e", False, 2), ("shap-e", True, 1), ("shap-e of images", True, 1)],
)
def test_memory_of_a_step_is_what_the_allocator_gives_out(name, checkpointing, parts):
    model = denoiser(MODELS[name], checkpointing=checkpointing)
    batch, rest = arguments(model)

    def step() -> None:
        for _ in range(parts):
            step_on(model, batch, rest).backward()

    options = {"batch": B, "checkpointing": checkpointing, "parts": parts}
    step()  # what torch allocates once in a process is not the step's
    model.zero_grad(set_to_none=True)
    planned = step_memory(MODELS[name], **options, **TOKENS)
    # Checkpointing keeps the state of the random generator, 5 kB a block at work, which is no tensor of the graph.
    assert planned.peak == pytest.approx(allocated(step), abs=16_000)
    assert planned.peak > 500_000


def test_memory_of_a_step_in_bf16():
    model = denoiser(MODELS["ours"])
    batch, rest = arguments(model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_on(model, batch, rest)
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    planned = step_memory(MODELS["ours"], batch=B, precision="bf16", **TOKENS).peak
    assert planned == pytest.approx(allocated(step), rel=0.05)  # what kernels use inside themselves is not seen


def test_memory_of_an_evaluation(monkeypatch):
    monkeypatch.setattr(linear, "_ONEDNN_WORKS", False)  # inside itself it takes room for a layer's weights
    model = denoiser(MODELS["ours"])

    @torch.no_grad()
    def evaluate() -> None:
        step_on(model, *arguments(model))

    evaluate()
    planned = evaluation_memory(MODELS["ours"], samples=B, **TOKENS)
    assert planned == pytest.approx(allocated(evaluate), rel=0.05)


def test_each_layout_spreads_what_it_should():
    step = step_memory(MODELS["ours"], batch=B, **TOKENS)
    spread = step_memory(MODELS["ours"], batch=B, gradients_stay=False, **TOKENS)
    p = 4 * step.sizes.parameters
    one = memory_per_rank(step, "one", 1).device
    assert {name: one[name] for name in ("weights", "gradients", "AdamW", "EMA")} == {
        "weights": p,
        "gradients": p,
        "AdamW": 2 * p,
        "EMA": p,
    }
    assert one["gradients"] + one["activations"] == step.peak
    spreads = {
        "ddp": set(),
        "zero1": {"AdamW"},
        "zero2": {"AdamW", "gradients"},
        "zero3": {"AdamW", "gradients", "weights", "EMA"},
        "fsdp2": {"AdamW", "gradients", "weights", "EMA"},
    }
    for layout, shared in spreads.items():
        memory = memory_per_rank(step if layout in ("ddp", "zero1") else spread, layout, 4)
        for name in ("weights", "gradients", "AdamW", "EMA"):
            assert memory.device[name] == one[name] // (4 if name in shared else 1), (layout, name)
        assert memory.host["saving"] == 5 * p // 4 - p // 4  # weights, EMA and two averages, written by four
    assert memory_per_rank(step, "ddp", 4).device["exchange"] == p
    assert all(memory_per_rank(spread, zero, 4).device["weights for AdamW"] == p // 4 for zero in ("zero2", "zero3"))
    offloaded = memory_per_rank(spread, "zero3", 4, offload_optimiser=True, offload_weights=True)
    assert not {"weights", "gradients", "AdamW", "EMA", "weights for AdamW"} & offloaded.device.keys()
    assert offloaded.host["AdamW"] == 2 * p // 4


# --- the command -----------------------------------------------------------------------------------------------------


def refusal(*words: object, file: object = ACCELERATE / "ddp.yaml", preset: object = "tiny") -> str:
    code, said, errors = shapeloom("plan", "--preset", preset, "--accelerate", file, *words)
    assert code == 1 and not said and "Traceback" not in errors, errors
    [line] = errors.strip().splitlines()
    return line


@pytest.mark.parametrize("file", sorted(path.name for path in ACCELERATE.glob("*.yaml")))
def test_a_plan_for_every_launch_file(file):
    made = make_plan("tiny", ACCELERATE / file, device_tflops=2.0, samples=10**6, overrides=["model.layers=1"])
    facts, said = made.to_dict(), show(made)
    for name in ("weights", "AdamW", "EMA", "activations"):
        assert f"\n  {name}" in said
    assert f"{facts['parameters']:,}" in said and f"{facts['tokens_per_step']:,}" in said
    total = facts["device_total"] + (facts["host_total"] if facts["cpu"] else 0)
    assert f"{total / 1e9:.3f} GB" in said
    flops = facts["flops_per_step"] / facts["batch_size"] * 10**6
    assert facts["total_s"] == pytest.approx(flops / (2e12 * facts["ranks"]))
    assert "time to 1,000,000 samples" in said and duration(facts["total_s"]) in said


def test_durations_in_words():
    assert [duration(s) for s in (2.5, 90, 5400, 129_600)] == ["2.5 s", "1.5 minutes", "1.5 hours", "1.5 days"]


def test_the_plan_is_of_the_preset():
    words = ["--preset", "tiny", "--accelerate", ACCELERATE / "ddp.yaml", "--ranks", 3]
    facts = json.loads(succeed("plan", *words, "--json", "batch_size=48", "model.width=96", "accumulate=2"))
    features = features_of("tiny")
    sizes = {name: getattr(features, name) for name in ("text_width", "image_width", "pooled_width")}
    model = Denoiser(n_latents=32, channels=32, width=96, **sizes)
    assert facts["parameters"] == model.num_parameters()
    assert facts["ranks"] == 3 and facts["batch_per_rank"] == 16
    tokens = 1 + 2 + features.text_tokens + features.image_tokens + 16
    assert facts["tokens_per_step"] == 48 * tokens
    assert facts["state_bytes"] == 16 * facts["parameters"]
    assert facts["step_s"] is None and facts["total_s"] is None


def test_features_are_as_encode_stores_them(tmp_path):
    """Of a preset with its own CLIP, and of the published one."""
    tiny = features_of("tiny")
    assert (tiny.text_tokens, tiny.text_width, tiny.pooled_width) == (20, 128, 128)
    assert (tiny.image_tokens, tiny.image_width) == (4, 256)
    with torch.device("meta"):
        assert tiny.autoencoder == Autoencoder(decoder_layers=0).num_parameters()
    assert 1_000_000 < tiny.clip < 5_000_000
    published = features_of("shap-e")
    assert (published.text_tokens, published.text_width, published.pooled_width) == (77, 768, 768)
    assert (published.image_tokens, published.image_width) == (256, 1024)
    latent, text, image = 1024 * 1024, 4 * (77 * 768 + 768), 4 * (256 * 1024 + 768)
    assert published.stored_bytes == 2 * (latent + text + image)
    computed = tmp_path / "computed.yaml"
    computed.write_text(yaml.safe_dump({"encode": {"features": "computed"}, "autoencoder": {}, "denoiser": {}}))
    assert features_of(str(computed)).stored_bytes == 2 * 32 * 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch_size=12"], ["batch_size 12", "8 processes", "multiple of 8"]),
        (["accumulate=3"], ["3 accumulated", "multiple of 24"]),
        (["processes=4"], ["processes=4", "8"]),
        (["model.patch=3"], ["patch"]),
        (["model.heads=5"], ["heads"]),
        (["curriculum=[[0.5, 7]]"], ["curriculum", "7"]),
        (["lora.rank=4"], ["lora.rank"]),
        (["model.depth=4"], ["model.depth"]),
    ],
)
def test_settings_that_cannot_be(words, said):
    line = refusal(*words)
    assert all(word in line for word in said), line


def test_files_that_cannot_be(tmp_path):
    assert "fsdp2.yaml" in refusal(file=tmp_path / "none.yaml")  # what there is
    assert "unknown preset 'tinny'" in refusal(preset="tinny")
    without = tmp_path / "without.yaml"
    without.write_text("clip: {}\n")
    assert "no section 'denoiser'" in refusal(preset=without)
    assert "one process" in refusal("--ranks", "2", file=ACCELERATE / "gpu.yaml")
    assert "FSDP needs GPUs" in refusal("cpu=true", file=ACCELERATE / "fsdp2.yaml")
    assert "fp16" in refusal("precision=fp16", file=ACCELERATE / "zero2.yaml")
    settings = yaml.safe_load((ACCELERATE / "ddp.yaml").read_text())
    contradicting = tmp_path / "contradicting.yaml"
    contradicting.write_text(yaml.safe_dump(settings | {"mixed_precision": "bf16"}))
    assert "mixed_precision bf16" in refusal(file=contradicting)

"""How much faster a NeRF view is than diffusers' Shap-E renderer, at the same weights, rays and random numbers.

    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.nerf               # 20 views of 64x64, 8 minutes on one core
    OMP_NUM_THREADS=1 python -m shapeloom.launch.bench.nerf --views 2     # 1 minute

Cost model: all but 5 % of the time is the field's MLP, 0.71 MFLOP a point (93x256, 5 of 256x256, 256x12), so time
follows the number of evaluations. Per ray theirs makes 64 + 192, the coarse positions twice. Ours makes 64 + 128, and
only for rays that cross the box (3 of 4): 0.57 of theirs. With empty space skipped what is left is the samples in or
next to something (for the chair 0.17 of theirs), after 1.1 * 64^3 evaluations an object for the grid. The rest
is cost per evaluation: activations of 2,048 points stay in the core's cache, theirs of 786,432 do not.

Views are timed in turns; the orbit is the sum over all views, the grid counted once; a view is the median over views.
Aims on one core: orbit 12x, one view without skipping 3x, memory of one view below 500 MB.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from statistics import median

import torch
from diffusers.pipelines.shap_e.camera import create_pan_cameras
from diffusers.pipelines.shap_e.renderer import ShapERenderer, StratifiedRaySampler

from ...models.decoder import FieldValues, ImplicitField, to_z_up
from ...models.nerf import RayNoise, render_rays
from ...models.occupancy import Occupancy
from .measure import finish, interleaved, peak_rss_mb
from .reference import chair_field, diffusers_renderer

BATCH = 4096  # rays at a time, as theirs; their noise depends on it
IDENTICAL_DB = 200.0  # what two equal images count as


class CountingField:
    """A field that counts the points it is asked for."""

    def __init__(self, field: ImplicitField) -> None:
        self.field, self.device, self.evaluations = field, field.device, 0

    def __len__(self) -> int:
        return len(self.field)

    def __call__(self, points_BP3: torch.Tensor) -> FieldValues:
        self.evaluations += points_BP3.shape[0] * points_BP3.shape[1]
        return self.field(points_BP3)


@dataclass
class View:
    """What was measured on one view; rgb [R, 3] by who rendered it."""

    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    rgb: dict[str, torch.Tensor] = field(default_factory=dict)


def render_theirs(renderer: ShapERenderer, rays_R23: torch.Tensor) -> torch.Tensor:
    """rgb_R3 on black by the body of their `decode_to_image`, which reseeds the global generator for each batch."""
    images = []
    for batch in rays_R23[None].split(BATCH, dim=1):
        _, sampler, coarse = renderer.render_rays(batch, StratifiedRaySampler(), 64)
        images.append(renderer.render_rays(batch, sampler, 128, prev_model_out=coarse)[0][0])
    return torch.cat(images)


def render_ours(field: CountingField, rays_R23: torch.Tensor, occupancy: Occupancy | None) -> torch.Tensor:
    """rgb_R3 on black, with their rays in our frame and the numbers they draw."""
    images = []
    for batch in rays_R23.split(BATCH):
        origins, directions = (batch @ to_z_up(torch.eye(3)).T).unbind(1)
        noise = RayNoise.draw(len(batch), generator=torch.Generator().manual_seed(0))
        images.append(render_rays(field, origins, directions, noise=noise, occupancy=occupancy).rgb)
    return torch.cat(images)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels for images in [0, 1]."""
    error = (a - b).square().mean().item()
    return min(IDENTICAL_DB, -10 * math.log10(error)) if error else IDENTICAL_DB


def measure_view(renderer: ShapERenderer, field: CountingField, rays_R23: torch.Tensor, occupancy: Occupancy) -> View:
    view = View()

    def ours(name: str, grid: Occupancy | None) -> None:
        before = field.evaluations
        view.rgb[name] = render_ours(field, rays_R23, grid)
        view.evaluations[name] = field.evaluations - before

    def theirs() -> None:
        view.rgb["theirs"] = render_theirs(renderer, rays_R23)

    calls = {"theirs": theirs, "plain": lambda: ours("plain", None), "skipping": lambda: ours("skipping", occupancy)}
    view.seconds = interleaved(calls, repeat=1)
    view.evaluations["theirs"] = (64 + 192) * len(rays_R23)
    return view


def summary(views: list[View], grid_s: float, grid_evaluations: int) -> dict:
    total = {name: sum(view.seconds[name] for view in views) for name in views[0].seconds}
    return {
        "views": len(views),
        "orbit_ratio": total["theirs"] / (grid_s + total["skipping"]),
        "orbit_theirs_s": total["theirs"],
        "orbit_ours_s": grid_s + total["skipping"],
        "view_ratio": median(view.seconds["theirs"] / view.seconds["plain"] for view in views),
        "view_theirs_s": median(view.seconds["theirs"] for view in views),
        "view_ours_s": median(view.seconds["plain"] for view in views),
        "skipping_to_plain_psnr_db": min(psnr(view.rgb["skipping"], view.rgb["plain"]) for view in views),
        "plain_to_theirs_psnr_db": min(psnr(view.rgb["plain"], view.rgb["theirs"]) for view in views),
        "grid_s": grid_s,
        "grid_evaluations": grid_evaluations,
        "evaluations_per_view": {
            name: round(sum(view.evaluations[name] for view in views) / len(views)) for name in views[0].evaluations
        },
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=20, help="views of their orbit of 20 to measure")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side")
    options = parser.parse_args()
    field = CountingField(chair_field())
    renderer = diffusers_renderer(field.field)
    rays_VR23 = create_pan_cameras(options.size).camera_rays[0].unflatten(0, (20, -1))[: options.views]

    print("memory of one view", flush=True)
    theirs_mb = peak_rss_mb(lambda: render_theirs(renderer, rays_VR23[0]))
    ours_mb = peak_rss_mb(lambda: render_ours(field, rays_VR23[0], Occupancy.of(field)))
    print(f"  theirs {theirs_mb:.0f} MB, ours with the grid {ours_mb:.0f} MB", flush=True)

    render_theirs(renderer, rays_VR23[0, :64])
    render_ours(field, rays_VR23[0, :64], None)
    before = field.evaluations
    grids: list[Occupancy] = []
    grid_s = interleaved({"grid": lambda: grids.append(Occupancy.of(field))}, repeat=1)["grid"]
    grid_evaluations = field.evaluations - before
    views = []
    for i, rays_R23 in enumerate(rays_VR23):
        views.append(measure_view(renderer, field, rays_R23, grids[0]))
        print(f"view {i}: " + ", ".join(f"{name} {s:.2f} s" for name, s in views[-1].seconds.items()), flush=True)
    finish({"theirs_mb": theirs_mb, "ours_mb": ours_mb} | summary(views, grid_s, grid_evaluations))


if __name__ == "__main__":
    main()

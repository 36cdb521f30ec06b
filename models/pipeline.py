"""The whole for inference: text and/or image → latents → fields, meshes, views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from ..errors import UserError
from .autoencoder import Autoencoder
from .conditioner import Conditioner, ImageFeatures, TextFeatures
from .decoder import ImplicitField
from .denoiser import Condition, Denoiser
from .guidance import PREDICTION_TYPES, fast_solver, guided, sample_latents
from .mesh import ExtractedMesh, extract_mesh
from .transformers_clip import TransformersConditioner

__all__ = ["PipelineOutput", "ShapeloomPipeline", "condition_from"]


@dataclass(frozen=True)
class PipelineOutput:
    """latents: [B, L, C] of the autoencoder; meshes: one an object (empty ones have no faces)."""

    latents: torch.Tensor
    meshes: list[ExtractedMesh]


class ShapeloomPipeline(DiffusionPipeline):
    """Text and/or image to 3D.

    Example:
        pipe = ShapeloomPipeline.from_pretrained("runs/quickstart/pipeline")
        out = pipe(text=["a red cube"], seeds=[0])
        out.meshes[0].vertices
    """

    model_cpu_offload_seq = "conditioner->denoiser->autoencoder"

    def __init__(
        self,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        conditioner: Conditioner | TransformersConditioner,
        scheduler: FlowMatchEulerDiscreteScheduler | HeunDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler)

    def __call__(
        self,
        text: list[str] | None = None,
        image: list[Image.Image] | None = None,
        seeds: list[int] | None = None,
        *,
        images: list[list[Image.Image]] | None = None,
        steps: int = 24,
        text_guidance: float = 3.0,
        image_guidance: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        resolution: int = 64,
        solver: str = "own",
        on_step: Callable[[int], None] | None = None,
    ) -> PipelineOutput:
        """One object for each (text, image, seed) triple, taken side by side.

        Args:
            text, image: B each; either may be None.
            images: B lists of views of one object each, any number of them in any order; instead of `image`.
            seeds: B; an object depends on its own seed and condition only, never on its batch.
            steps: of the solver.
            text_guidance, image_guidance: scales of the two conditions; 1 is no guidance.
            guidance_interval: noise levels in [0, 1] between which there is guidance: a flow's t; in diffusion the step
                over their number.
            guidance_rescale: share by which a prediction's spread is taken back to the unguided one's, 0 to 1.
            resolution: points of the mesh's lattice along each axis.
            solver: own, the pipeline's scheduler, or dpm++ on its noise schedule (data predictions alone).
        Raises: ValueError if there is neither text nor image, their counts differ, the model takes no such condition,
            or the solver does not fit the model.
        """
        latents_BLC = self.generate_latents(
            text,
            image,
            seeds,
            images=images,
            steps=steps,
            text_guidance=text_guidance,
            image_guidance=image_guidance,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            solver=solver,
            on_step=on_step,
        )
        return PipelineOutput(latents_BLC, extract_mesh(self.decode(latents_BLC), resolution))

    @torch.inference_mode()
    def generate_latents(
        self,
        text: list[str] | None,
        image: list[Image.Image] | None,
        seeds: list[int] | None = None,
        *,
        images: list[list[Image.Image]] | None = None,
        steps: int = 24,
        text_guidance: float = 3.0,
        image_guidance: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        solver: str = "own",
        on_step: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """As `__call__`, the latents alone: [B, L, C]."""
        views = _views(image, images)
        count = len(text or views or [])
        if not count:
            raise ValueError("give text, an image, or both: there is nothing to condition on")
        seeds = list(range(count)) if seeds is None else seeds
        if len(seeds) != count or (text and views and len(text) != len(views)):
            raise ValueError(
                f"text, image and seeds go side by side, got {len(text or [])} texts, {len(views or [])} images "
                f"and {len(seeds)} seeds"
            )
        low, high = guidance_interval
        if not (0 <= low <= high <= 1 and 0 <= guidance_rescale <= 1):
            raise ValueError(
                f"guidance_interval is two rising levels in [0, 1] and guidance_rescale a share of 1, got "
                f"{guidance_interval} and {guidance_rescale}"
            )
        for kind, given in (("text", text), ("image", views)):
            if given and not self.denoiser.takes(kind):
                other = "an image" if kind == "text" else "text"
                raise UserError(f"this model was not trained on {kind}: condition it on {other} instead")
        condition = condition_from(
            self.conditioner.encode_text(text) if text else None,
            self._encode_views(views) if views else None,
            self.denoiser,
        )
        predict = guided(
            self.denoiser,
            condition,
            text_scale=text_guidance,
            image_scale=image_guidance,
            interval=guidance_interval,
            rescale=guidance_rescale,
        )
        config = self.denoiser.config
        noise_BLC = torch.stack(
            [torch.randn(config.n_latents, config.channels, generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).to(self.denoiser.device)
        x_BLC = sample_latents(predict, noise_BLC, self._solver(solver), steps=steps, on_step=on_step)
        return self.denoiser.restore(x_BLC)

    def _encode_views(self, views: list[list[Image.Image]]) -> ImageFeatures:
        """Features of each object's views: tokens [B, V, S, E], pooled [B, V, P]; with one view each, without V."""
        features = self.conditioner.encode_image([picture for pictures in views for picture in pictures])
        if all(len(pictures) == 1 for pictures in views):
            return features
        counts = [len(pictures) for pictures in views]
        pad = torch.nn.utils.rnn.pad_sequence
        tokens, pooled = (pad(list(f.split(counts)), batch_first=True) for f in (features.tokens, features.pooled))
        return ImageFeatures(tokens, pooled, _counted(counts, tokens.device))

    def _solver(self, name: str):
        prediction = self.denoiser.config.prediction
        theirs = getattr(self.scheduler.config, "prediction_type", "flow")
        if PREDICTION_TYPES.get(prediction, prediction) != theirs:
            raise UserError(
                f"this model predicts {prediction}, its scheduler is of {theirs}: the folder's parts are mixed"
            )
        if name == "own":
            return self.scheduler
        if name != "dpm++":
            raise UserError(f"solver '{name}' is not known: own or dpm++")
        if prediction == "flow":
            raise UserError("solver dpm++ is for diffusion models; this one predicts a flow: use own")
        return fast_solver(self.scheduler)

    @torch.inference_mode()
    def decode(self, latents_BLC: torch.Tensor) -> ImplicitField:
        """The implicit functions of latents [B, L, C]."""
        return self.autoencoder.decode(latents_BLC.to(self.autoencoder.device))


def _views(image: list[Image.Image] | None, images: list[list[Image.Image]] | None) -> list[list[Image.Image]] | None:
    """Each object's views."""
    if images and image:
        raise ValueError("give image (one view of each object) or images (several), not both")
    if images and not all(images):
        raise ValueError(f"images: object {next(i for i, views in enumerate(images) if not views)} has no view")
    return images or ([[picture] for picture in image] if image else None)


def _counted(counts: list[int], device: torch.device) -> torch.Tensor:
    """[B, V], True at the first counts[b]."""
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]


def condition_from(text: TextFeatures | None, image: ImageFeatures | None, denoiser: Denoiser) -> Condition:
    """A batch's condition from what there is; the missing half is a single masked token of zeros."""
    config = denoiser.config
    present = text or image
    assert present is not None, "a condition is of text, an image, or both"
    some = present.pooled
    count, device = len(some), some.device

    def flag(features: object) -> torch.Tensor:
        return torch.full((count,), features is not None, device=device)

    return Condition(
        text_tokens=text.tokens if text else some.new_zeros(count, 1, config.text_width),
        text_mask=text.mask if text else flag(None)[:, None],
        text_pooled=text.pooled if text else some.new_zeros(count, config.pooled_width),
        has_text=flag(text),
        image_tokens=image.tokens if image else some.new_zeros(count, 1, config.image_width),
        image_pooled=image.pooled if image else some.new_zeros(count, config.pooled_width),
        has_image=flag(image),
        views=image.views if image else None,
    )

"""The latent diffusion transformer (Shap-E §3.2; DiT), under text and image conditioning.

Shapes: B batch, L latent tokens, C latent channels, D width, T text tokens, V views, S image tokens of a view,
E embedding width, P pooled width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from .linear import Linear, linear
from .transformer import Block

__all__ = ["CONDITIONS", "SHAP_E", "Condition", "Denoiser", "PredictionName", "timestep_embedding"]

PredictionName = Literal["flow", "sample", "v", "epsilon"]

CONDITIONS = ("text_pooled", "image_pooled", "text_tokens", "image_tokens")

# The released architecture, but for heads, conditions and widths: text300M has 16 heads and reads the pooled text,
# image300M 8 and the grid of image tokens.
SHAP_E = {
    "n_latents": 1024,
    "channels": 1024,
    "patch": 1,
    "width": 1024,
    "layers": 24,
    "absent": "zeros",
    "token_kinds": False,
    "norm_in": True,
    "time_activation": "gelu",
    "time_scale": 1024.0,
    "learned_variance": True,
    "qk_norm": False,
    "adaln": False,
    "prediction": "sample",
}


@dataclass(frozen=True)
class Condition:
    """What B samples are conditioned on. `has_text_B`, `has_image_B` say for which samples it counts.

    text_tokens_BTE, text_mask_BT (True at words), text_pooled_BP: of the CLIP text tower.
    image_tokens_BSE, image_pooled_BP: of the image tower; or of several views in any order, [B, V, S, E] and [B, V, P],
    where views_BV is True at those there are (None: all). Their tokens stand side by side; their pooled are averaged.
    """

    text_tokens: torch.Tensor
    text_mask: torch.Tensor
    text_pooled: torch.Tensor
    has_text: torch.Tensor
    image_tokens: torch.Tensor
    image_pooled: torch.Tensor
    has_image: torch.Tensor
    views: torch.Tensor | None = None

    def keep(self, *, text: bool, image: bool) -> Condition:
        """The same condition with its text or image taken away."""
        return replace(
            self,
            has_text=self.has_text if text else torch.zeros_like(self.has_text),
            has_image=self.has_image if image else torch.zeros_like(self.has_image),
        )

    @staticmethod
    def cat(conditions: list[Condition]) -> Condition:
        """Of conditions with the same shapes but for B."""
        names = [name for name in Condition.__dataclass_fields__ if getattr(conditions[0], name) is not None]
        return Condition(**{name: torch.cat([getattr(c, name) for c in conditions]) for name in names})


def timestep_embedding(t_B: torch.Tensor, width: int, scale: float = 1000.0) -> torch.Tensor:
    """Sinusoids of scale·t, cosines first, as Shap-E's; t in [0, 1]. Returns [B, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t_B.device) / half)
    angles_BH = scale * t_B[:, None] * frequencies
    return torch.cat([angles_BH.cos(), angles_BH.sin()], dim=-1)


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts the flow velocity of noisy latents, the latents themselves, their noise, or v (`prediction`).

    The noise level and the conditioning tokens stand as a prefix before the latent tokens, as in Shap-E;
    text and image have each their own projection and their own null. With `adaln`, noise level and
    pooled embeddings also modulate every block. `SHAP_E` holds the released settings.

    Args:
        n_latents, channels: L, C.
        patch: neighbouring latent tokens packed into one transformer token.
        width, heads, layers: of the transformer.
        text_width, image_width, pooled_width: of the conditioner's text tokens, image tokens, pooled embeddings.
        max_text_tokens: longest text; its tokens are told their places again, as a small CLIP's last layer blurs them.
        conditions: which of CONDITIONS the prefix holds.
        absent: a condition that is not there is a learned token, or zeros before the projection (Shap-E).
        token_kinds: each prefix token is told what it is.
        norm_in: LayerNorm over the whole sequence before the blocks.
        time_activation, time_scale: of the noise level's MLP; what level 1 is as a time step.
        learned_variance: the last layer's second half, which the release trained for a variance; never evaluated.
        prediction: flow (velocity noise - data), sample (the data), epsilon (the noise) or v (arXiv 2202.00512, §4).
        latent_mean, latent_std: [C], of the training latents; sampling undoes the standardisation with them.
        autoencoder_hash: of the autoencoder whose latents these are; loading refuses another.
        conditioner_hash: of the CLIP whose features these were trained on.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        n_latents: int = 32,
        channels: int = 32,
        patch: int = 2,
        width: int = 192,
        heads: int = 6,
        layers: int = 6,
        text_width: int = 128,
        image_width: int = 512,
        pooled_width: int = 128,
        max_text_tokens: int = 77,
        conditions: list[str] | tuple[str, ...] = CONDITIONS,
        absent: Literal["learned", "zeros"] = "learned",
        token_kinds: bool = True,
        norm_in: bool = False,
        time_activation: Literal["silu", "gelu"] = "silu",
        time_scale: float = 1000.0,
        learned_variance: bool = False,
        prediction: PredictionName = "flow",
        qk_norm: bool = True,
        adaln: bool = True,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        autoencoder_hash: str = "",
        conditioner_hash: str = "",
    ) -> None:
        super().__init__()
        if n_latents % patch:
            raise ValueError(f"patch {patch} does not divide the {n_latents} latent tokens")
        unknown = sorted(set(conditions) - set(CONDITIONS))
        if unknown or not conditions:
            raise ValueError(f"conditions must be some of {', '.join(CONDITIONS)}, got {', '.join(unknown) or 'none'}")
        self.gradient_checkpointing = False
        n_tokens, token_width = n_latents // patch, channels * patch
        activation = nn.SiLU() if time_activation == "silu" else nn.GELU()
        self.time = nn.Sequential(Linear(width, 4 * width), activation, Linear(4 * width, width))
        if "text_tokens" in conditions:
            self.text_tokens = nn.Sequential(nn.LayerNorm(text_width), Linear(text_width, width))
            self.text_positions = nn.Parameter(torch.randn(max_text_tokens, width) / width**0.5)
        if "text_pooled" in conditions:
            self.text_pooled = Linear(pooled_width, width)
        if "image_tokens" in conditions:
            self.image_tokens = nn.Sequential(nn.LayerNorm(image_width), Linear(image_width, width))
        if "image_pooled" in conditions:
            self.image_pooled = Linear(pooled_width, width)
        if absent == "learned":
            pooled = [name for name in conditions if name.endswith("pooled")]
            self.nulls = nn.ParameterDict({name: torch.randn(width) / width**0.5 for name in pooled})
        if token_kinds:
            self.kinds = nn.ParameterDict({name: torch.randn(width) / width**0.5 for name in (*conditions, "time")})
        self.latent_in = Linear(token_width, width)
        self.positions = nn.Parameter(torch.randn(n_tokens, width) / width**0.5)
        self.norm_sequence = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width)) if adaln else None
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm=qk_norm, modulated=adaln) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.latent_out = Linear(width, token_width * (2 if learned_variance else 1))
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    def takes(self, kind: Literal["text", "image"]) -> bool:
        """Whether it reads text, or images."""
        return any(name.startswith(kind) for name in self.config.conditions)

    def bounds(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Least and largest standardised latents there can be: those of the autoencoder lie in (-1, 1)."""
        if self.config.latent_mean is None:
            return -1.0, 1.0
        mean_C, std_C = (torch.tensor(v, device=self.device) for v in (self.config.latent_mean, self.config.latent_std))
        return (-1 - mean_C) / std_C, (1 - mean_C) / std_C

    def restore(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """Standardised latents to the autoencoder's, clamped to its (-1, 1)."""
        if self.config.latent_mean is None:
            return x_BLC.clamp(-1, 1)
        mean_C, std_C = x_BLC.new_tensor(self.config.latent_mean), x_BLC.new_tensor(self.config.latent_std)
        return (x_BLC * std_C + mean_C).clamp(-1, 1)

    def forward(
        self, x_BLC: torch.Tensor, t_B: torch.Tensor, condition: Condition, tokens_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Velocity noise - data of the path x_t = (1 - t)·data + t·noise; or the data, the noise, v (`prediction`).

        Args:
            x_BLC: noisy standardised latents; in diffusion (all but flow) of unit variance. There may be fewer than
                n_latents of them, another number in every call.
            t_B: noise level in [0, 1]; in diffusion, the time step over their number.
            tokens_BN: which transformer tokens (of `patch` latents each) x holds; None: the first ones.
        Returns: [B, L, C].
        Raises: ValueError if x holds more tokens than the model has places for, or does not divide into them.
        """
        config = self.config
        if x_BLC.shape[1] % config.patch or x_BLC.shape[1] > config.n_latents:
            raise ValueError(
                f"latents are at most {config.n_latents} tokens in groups of {config.patch}, got {x_BLC.shape[1]}"
            )
        time_BD = self.time(timestep_embedding(t_B, config.width, config.time_scale).to(x_BLC.dtype))
        prefix_BMD, mask_BM, pooled_BD = self._prefix(condition)
        places = self.positions[: x_BLC.shape[1] // config.patch] if tokens_BN is None else self.positions[tokens_BN]
        latents_BND = self.latent_in(x_BLC.unflatten(1, (-1, config.patch)).flatten(2)) + places
        time_token_BD = time_BD + self.kinds["time"] if config.token_kinds else time_BD
        h_BND = self.norm_sequence(torch.cat([time_token_BD[:, None], prefix_BMD, latents_BND], dim=1))
        mask_BN = None
        if mask_BM is not None:
            mask_BN = nn.functional.pad(mask_BM, (1, latents_BND.shape[1]), value=True)
        modulation = None
        if self.modulation is not None:
            modulation = self.modulation(time_BD + pooled_BD).unflatten(-1, (6, -1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h_BND = checkpoint(block, h_BND, None, mask_BM=mask_BN, modulation_B6D=modulation, use_reentrant=False)
            else:
                h_BND = block(h_BND, mask_BM=mask_BN, modulation_B6D=modulation)
        h_BND = self.norm_out(h_BND[:, -latents_BND.shape[1] :])
        n_out = config.channels * config.patch
        y_BND = linear(h_BND, self.latent_out.weight[:n_out], self.latent_out.bias[:n_out])
        return y_BND.unflatten(-1, (config.patch, -1)).flatten(1, 2)

    def _prefix(self, condition: Condition) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | int]:
        """Conditioning tokens [B, M, D], their mask (None where all are seen), and the sum of the pooled ones [B, D].

        With learned nulls, a sample without text (or image) shows one null token in its pooled place, and its other
        tokens are masked away; with zeros, Shap-E's way, it shows what the projection makes of zeros.
        """
        # Unit vectors to unit variance, as Shap-E scales CLIP's.
        scale = condition.text_pooled.shape[-1] ** 0.5
        tokens, masks, pooled = [], [], 0
        for name in CONDITIONS:
            if name not in self.config.conditions:
                continue
            kind = name.split("_")[0]
            present_B = condition.has_text if kind == "text" else condition.has_image
            value_BMF = self._joined(name, condition)
            if name.endswith("pooled"):
                value_BMF = value_BMF * scale
            token_BMD = self._null_or(name, present_B[:, None, None], value_BMF)
            if name.endswith("pooled"):
                pooled = pooled + token_BMD[:, 0]
            masks.append(self._shown(name, present_B[:, None], condition, token_BMD.shape[1]))
            tokens.append(token_BMD + self.kinds[name] if self.config.token_kinds else token_BMD)
        some_hidden = self.config.absent == "learned" or "text_tokens" in self.config.conditions
        some_hidden |= "image_tokens" in self.config.conditions and condition.image_tokens.ndim == 4
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1) if some_hidden else None, pooled

    def _joined(self, name: str, condition: Condition) -> torch.Tensor:
        """A condition's tokens in a row, [B, M, F], all views'; of a pooled one, a row of one, the views' average."""
        value = getattr(condition, name)
        if name == "image_tokens":
            return value.flatten(1, 2) if value.ndim == 4 else value
        if name == "image_pooled" and value.ndim == 3:
            if condition.views is None:
                return value.mean(1, keepdim=True)
            counted_BV1 = condition.views[:, :, None].to(value)
            return (value * counted_BV1).sum(1, keepdim=True) / counted_BV1.sum(1, keepdim=True).clamp(min=1)
        return value[:, None] if name.endswith("pooled") else value

    def _shown(self, name: str, present_B1: torch.Tensor, condition: Condition, length: int) -> torch.Tensor:
        """Which of a condition's tokens are seen, [B, M]: never padding; nor, with learned nulls, the absent ones."""
        shown_BM = torch.ones_like(present_B1).expand(-1, length)
        if name.endswith("tokens") and self.config.absent == "learned":
            shown_BM = present_B1.expand(-1, length)
        if name == "text_tokens":  # an absent text is one token long, whatever the batch's longest
            first_M = torch.arange(length, device=present_B1.device) == 0
            shown_BM = shown_BM & torch.where(present_B1, condition.text_mask, first_M)
        if name == "image_tokens" and condition.image_tokens.ndim == 4:  # an absent image is one view
            n_views, n_tokens = condition.image_tokens.shape[1:3]
            first_V = torch.arange(n_views, device=present_B1.device) == 0
            there_BV = torch.ones_like(first_V) if condition.views is None else condition.views
            shown_BM = shown_BM & torch.where(present_B1, there_BV, first_V).repeat_interleave(n_tokens, dim=1)
        return shown_BM

    def _null_or(self, name: str, present_B11: torch.Tensor, value_BMF: torch.Tensor) -> torch.Tensor:
        """The projected condition, [B, M, D], or its null where it is absent."""
        if self.config.absent == "zeros":
            return getattr(self, name)(torch.where(present_B11, value_BMF, 0.0))
        projected_BMD = getattr(self, name)(value_BMF)
        if name == "text_tokens":
            projected_BMD = projected_BMD + self.text_positions[: projected_BMD.shape[1]]
        return torch.where(present_B11, projected_BMD, self.nulls[name]) if name in self.nulls else projected_BMD

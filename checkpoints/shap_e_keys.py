"""Where each tensor of Shap-E lies: in the released files, in diffusers' classes, and in our models.

A `Row` says how one of our tensors is made of theirs, and (for diffusers) how theirs are made of ours. Every row is a
copy, but for attention, whose released matrices hold each head's queries, keys and values together; the projection to
the field's weights, one block a row of a generated matrix; and the field's signed distance, positive inside there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "Row",
    "diffusers_prior_rows",
    "diffusers_renderer_rows",
    "export",
    "released_decoder_rows",
    "released_denoiser_rows",
    "released_encoder_rows",
]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """ours = join(*theirs); theirs = split(ours), where a way back is needed."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., torch.Tensor] = lambda tensor: tensor
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = lambda tensor: [tensor]


def copies(ours: str, theirs: str, parts: tuple[str, ...] = ("weight", "bias")) -> list[Row]:
    return [Row(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in parts]


def export(rows: Sequence[Row], ours: Tensors) -> Tensors:
    """Our tensors as theirs."""
    return {name: tensor for row in rows for name, tensor in zip(row.theirs, row.split(ours[row.ours]), strict=True)}


# --- the released denoisers (text300M, image300M) and diffusers' PriorTransformer ------------------------------------


def released_denoiser_rows(kind: str, layers: int, heads: int) -> list[Row]:
    """kind: text or image."""
    at = "wrapped."
    rows = [
        Row("positions", (f"{at}pos_emb",)),
        *copies("time.0", f"{at}time_embed.c_fc"),
        *copies("time.2", f"{at}time_embed.c_proj"),
        *copies("norm_sequence", f"{at}ln_pre"),
        *copies("norm_out", f"{at}ln_post"),
        *copies("latent_in", f"{at}input_proj"),
        *copies("latent_out", f"{at}output_proj"),
    ]
    if kind == "text":
        rows += copies("text_pooled", f"{at}clip_embed")
    else:
        rows += copies("image_tokens.0", f"{at}clip_embed.0") + copies("image_tokens.1", f"{at}clip_embed.1")
    for i in range(layers):
        rows += _released_block(f"blocks.{i}", f"{at}backbone.resblocks.{i}", heads)
    return rows


def diffusers_prior_rows(kind: str, layers: int) -> list[Row]:
    rows = [
        Row("positions", ("positional_embedding",), lambda t: t[0], lambda t: [t[None]]),
        *copies("time.0", "time_embedding.linear_1"),
        *copies("time.2", "time_embedding.linear_2"),
        *copies("norm_sequence", "norm_in"),
        *copies("norm_out", "norm_out"),
        *copies("latent_in", "proj_in"),
        *copies("latent_out", "proj_to_clip_embeddings"),
    ]
    if kind == "text":
        rows += copies("text_pooled", "embedding_proj")
    else:
        rows += copies("image_tokens.0", "embedding_proj_norm") + copies("image_tokens.1", "embedding_proj")
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        rows += copies(f"{ours}.norm_attention", f"{theirs}.norm1")
        rows += copies(f"{ours}.norm_mlp", f"{theirs}.norm3")
        rows += copies(f"{ours}.attention.query", f"{theirs}.attn1.to_q")
        rows += copies(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0")
        rows += copies(f"{ours}.mlp.0", f"{theirs}.ff.net.0.proj")
        rows += copies(f"{ours}.mlp.2", f"{theirs}.ff.net.2")
        for part in ("weight", "bias"):
            both = (f"{theirs}.attn1.to_k.{part}", f"{theirs}.attn1.to_v.{part}")
            rows.append(
                Row(f"{ours}.attention.key_value.{part}", both, lambda k, v: torch.cat([k, v]), lambda t: t.chunk(2))
            )
    return rows


# --- the released transmitter (encoder and decoder) and diffusers' ShapERenderer --------------------------------------


def released_encoder_rows(layers: int, heads: int) -> list[Row]:
    """The half of the transmitter that makes latents; `layers` of self-attention."""
    at = "encoder."
    rows = [
        Row("encoder.queries", (f"{at}output_tokens",)),
        *copies("encoder.embed_points", f"{at}input_proj"),
        *copies("encoder.norm_in", f"{at}ln_pre"),
        *copies("encoder.norm_out", f"{at}ln_post"),
        *copies("encoder.project", f"{at}output_proj"),
        *copies("encoder.embed_views.pixels", f"{at}mv_pcl_embed"),
        *copies("encoder.embed_views.patches", f"{at}patch_emb"),
        Row("encoder.embed_views.background", (f"{at}mv_pcl_embed.unk_token",)),
    ]
    for i, name in enumerate(("first", "second")):
        conv = f"{at}point_conv.mlp_convs.{i}"
        rows.append(Row(f"encoder.point_conv.{name}.weight", (f"{conv}.weight",), lambda t: t[..., 0]))
        rows += copies(f"encoder.point_conv.{name}", conv, ("bias",))
    for i, source in enumerate(("points", "views")):
        theirs, ours = f"{at}encoder.{i}.resblocks.0", f"encoder.read_{source}"
        rows += copies(f"{ours}.norm_attention", f"{theirs}.ln_1")
        rows += copies(f"encoder.norm_{source}", f"{theirs}.ln_2")
        rows += copies(f"{ours}.norm_mlp", f"{theirs}.ln_3")
        rows += copies(f"{ours}.attention.query", f"{theirs}.attn.c_q")
        rows += copies(f"{ours}.attention.out", f"{theirs}.attn.c_proj")
        rows += copies(f"{ours}.mlp.0", f"{theirs}.mlp.c_fc") + copies(f"{ours}.mlp.2", f"{theirs}.mlp.c_proj")
        for part in ("weight", "bias"):
            rows.append(
                Row(f"{ours}.attention.key_value.{part}", (f"{theirs}.attn.c_kv.{part}",), _regroup(heads, 2, [0, 1]))
            )
    for i in range(layers):
        rows += _released_block(f"encoder.blocks.{i}", f"{at}processor.resblocks.{i}", heads)
    return rows


def released_decoder_rows(n_generated: int, columns: Sequence[int], projection: str) -> list[Row]:
    """The half that makes a field. projection: `encoder.params_proj` (transmitter) or `params_proj` (decoder)."""
    return _decoder_rows(n_generated, columns, projection, "renderer.nerstf.mlp", directions=0)


def diffusers_renderer_rows(n_generated: int, columns: Sequence[int], directions: int) -> list[Row]:
    """directions: columns for the viewing direction, which is always zero; written as zeros."""
    return _decoder_rows(n_generated, columns, "params_proj", "mlp.mlp", directions=directions)


def _decoder_rows(n_generated: int, columns: Sequence[int], projection: str, mlp: str, *, directions: int) -> list[Row]:
    rows = []
    for i in range(n_generated):
        theirs = f"{projection}.projections.nerstf__mlp__{i}__weight"
        width = columns[i]
        rows.append(
            Row(
                f"decoder.rows.{i}",
                (f"{theirs}.proj.weight",),
                lambda t, width=width: t.unflatten(0, (-1, width)),
                lambda t: [t.flatten(0, 1)],
            )
        )
        rows.append(
            Row(
                f"decoder.row_biases.{i}",
                (f"{theirs}.proj.bias",),
                lambda t, width=width: t.unflatten(0, (-1, width)),
                lambda t: [t.flatten()],
            )
        )
        rows += copies(f"decoder.row_norms.{i}", f"{theirs}.norm")
        rows.append(Row(f"decoder.head.biases.{i}", (f"{mlp}.{i}.bias",)))
    first, last = n_generated, n_generated + 2
    rows.append(
        Row(
            "decoder.head.out.0.weight",
            (f"{mlp}.{first}.weight",),
            lambda t: t[:, : len(t)],
            lambda t: [torch.cat([t, t.new_zeros(len(t), directions)], dim=1)],
        )
    )
    rows += copies("decoder.head.out.0", f"{mlp}.{first}", ("bias",))
    rows += copies("decoder.head.out.2", f"{mlp}.{first + 1}")
    for part in ("weight", "bias"):
        turn = _turn_distance
        rows.append(Row(f"decoder.head.out.4.{part}", (f"{mlp}.{last}.{part}",), turn, lambda t: [_turn_distance(t)]))
    return rows


def _turn_distance(tensor: torch.Tensor) -> torch.Tensor:
    """Output 0 is the signed distance: positive inside there, negative inside here (tanh is odd, so this is exact)."""
    return torch.cat([-tensor[:1], tensor[1:]])


def _released_block(ours: str, theirs: str, heads: int) -> list[Row]:
    rows = copies(f"{ours}.norm_attention", f"{theirs}.ln_1") + copies(f"{ours}.norm_mlp", f"{theirs}.ln_2")
    rows += copies(f"{ours}.attention.out", f"{theirs}.attn.c_proj")
    rows += copies(f"{ours}.mlp.0", f"{theirs}.mlp.c_fc") + copies(f"{ours}.mlp.2", f"{theirs}.mlp.c_proj")
    for part in ("weight", "bias"):
        source = (f"{theirs}.attn.c_qkv.{part}",)
        rows.append(Row(f"{ours}.attention.query.{part}", source, _regroup(heads, 3, [0])))
        rows.append(Row(f"{ours}.attention.key_value.{part}", source, _regroup(heads, 3, [1, 2])))
    return rows


def _regroup(heads: int, kinds: int, wanted: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows ordered head by head (q, k, v of head 0, then of head 1, …) to all heads' q, all heads' k, …"""

    def join(tensor: torch.Tensor) -> torch.Tensor:
        per_head = tensor.unflatten(0, (heads, kinds, -1))
        return torch.cat([per_head[:, kind].flatten(0, 1) for kind in wanted])

    return join

"""What the demo trains: photos with hidden patches go in, the hidden patches come out.

Every photo is one sample of a packed sequence: a few words, the photo at half resolution, and the
photo. The half-resolution view stands in front, so that a causal layer has seen all of a photo
before its details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from patchpack import PackedGrid, interpolate_tokens, mrope, varlen_attention
from patchpack.models import NativeViT, NativeViTConfig
from patchpack.systems import qwen2_vl
from patchpack.systems.qwen2_vl import IMAGE_PAD, VISION_END, VISION_START

WIDTH = 256
VIT = NativeViTConfig(hidden_size=160, depth=2, num_heads=2, out_size=WIDTH)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 1, 128
MROPE_SECTION = (16, 24, 24)
NUM_BYTES = 256  # the words are bytes; the ids of markup come after them


@dataclass(frozen=True)
class Photo:
    """An image and what becomes of it."""

    name: str
    image: Image.Image
    plan: qwen2_vl.Plan


@dataclass(frozen=True)
class Batch:
    """Photos as one packed sequence of ``T`` patches and one of ``L`` language-model tokens."""

    pixels: Tensor  # [T, P]
    grid: PackedGrid  # of the T patches
    merged: PackedGrid  # of the N = T / m^2 vision tokens
    half: PackedGrid  # of the vision tokens at half resolution
    hidden: Tensor  # [N] bool: whose patches are hidden
    input_ids: Tensor  # [L]
    cu_seqlens: Tensor  # [S + 1]
    position_ids: Tensor  # [3, L]
    half_index: Tensor  # where in the sequence the half-resolution tokens stand
    index: Tensor  # [N] and the others

    def visible(self) -> Tensor:
        """The patches, grey where they are hidden, ``[T, P]``."""
        hidden = self.hidden.repeat_interleave(VIT.spatial_merge_size**2)
        return self.pixels.masked_fill(hidden[:, None], 0)

    def targets(self) -> Tensor:
        """The patches of every token, ``[N, m^2 * 3 * patch_size^2]``; one of two equal frames."""
        frames = self.pixels.unflatten(1, (VIT.in_channels, VIT.temporal_patch_size, -1))
        return frames[:, :, 0].reshape(self.merged.num_tokens, -1)


def pack(photos: Sequence[Photo], seed: int, device: str, dtype: torch.dtype) -> Batch:
    """Preprocess and pack photos, one sample each, and hide half of each one's tokens."""
    pixels, grid = qwen2_vl.preprocess(
        [photo.image for photo in photos], [photo.plan for photo in photos], dtype=dtype
    )
    merged = grid.merged()
    half = merged.resized((merged.grid_thw[:, 1:] + 1) // 2)

    ids: list[int] = []
    views: list[int] = []  # 0 at text, 1 at the half-resolution view, 2 at the other
    ends = [0]
    for photo, num_half in zip(photos, half.grid_thw.prod(dim=1).tolist(), strict=True):
        words = f"Restore {photo.name}.".encode()
        for view, num_tokens in ((1, num_half), (2, photo.plan.llm_tokens)):
            ids += [*words, VISION_START, *[IMAGE_PAD] * num_tokens, VISION_END]
            views += [0] * (len(words) + 1) + [view] * num_tokens + [0]
            words = b""
        ends.append(len(ids))
    input_ids, of_view = torch.tensor(ids), torch.tensor(views)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    position_ids, _ = qwen2_vl.mrope_position_ids(
        input_ids,
        torch.stack([half.grid_thw, merged.grid_thw], dim=1).flatten(0, 1),
        cu_seqlens=cu_seqlens,
        merge_size=1,
    )
    generator = torch.Generator().manual_seed(seed)
    lengths = merged.grid_thw.prod(dim=1).tolist()
    hidden = [torch.randperm(n, generator=generator) < max(1, n // 2) for n in lengths]
    return Batch(
        pixels.to(device),
        grid.to(device),
        merged.to(device),
        half.to(device),
        torch.cat(hidden).to(device),
        input_ids.to(device),
        cu_seqlens.to(device),
        position_ids.to(device),
        (of_view == 1).nonzero().flatten().to(device),
        (of_view == 2).nonzero().flatten().to(device),
    )


class LanguageLayer(nn.Module):
    """One attention layer of Qwen2: causal, several query heads to a key head, M-RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        self.proj = nn.Linear(NUM_HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, batch: Batch, impl: str | None) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(1, (-1, HEAD_DIM))
        q, k, v = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)  # [L, H, D], views
        q, k = mrope(q, k, batch.position_ids, mrope_section=MROPE_SECTION, impl=impl)
        out = varlen_attention(q, k, v, batch.cu_seqlens, causal=True, impl=impl)
        return x + self.proj(out.flatten(1))


class Restorer(nn.Module):
    """A native-resolution encoder, one language-model layer, and a head that draws patches."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl
        self.vit = NativeViT(VIT, impl=impl)
        self.embed = nn.Embedding(NUM_BYTES + IMAGE_PAD - VISION_START + 1, WIDTH)
        self.layer = LanguageLayer()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VIT.spatial_merge_size**2 * 3 * VIT.patch_size**2)

    def forward(self, pixels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is computed on the way to the loss, and the loss, by name."""
        tokens = self.vit(pixels, batch.grid)  # [N, WIDTH]
        half_hw = batch.half.grid_thw[:, 1:]
        half, _ = interpolate_tokens(tokens, batch.merged, half_hw, impl=self.impl)

        ids = batch.input_ids
        x = self.embed(torch.where(ids < VISION_START, ids, ids - VISION_START + NUM_BYTES))
        x = x.index_copy(0, batch.half_index, half).index_copy(0, batch.index, tokens)
        x = self.layer(x, batch, self.impl)  # [L, WIDTH]

        patches = self.head(self.norm(x[batch.index]))
        dtype = torch.promote_types(patches.dtype, torch.float32)
        error = (patches.to(dtype) - batch.targets().to(dtype)).square().mean(dim=1)
        loss = error.where(batch.hidden, 0).sum() / batch.hidden.sum()
        return {
            "vision tokens": tokens,
            "half-resolution tokens": half,
            "language-model layer": x,
            "restored patches": patches,
            "loss": loss,
        }


def differentiate(model: Restorer, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything that ``model`` computes, and the gradient of the loss in every parameter."""
    model.zero_grad()
    outputs = model(batch.visible(), batch)
    outputs["loss"].backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        gradients[f"grad {name}"] = parameter.grad
    return {name: x.detach() for name, x in outputs.items()}, gradients

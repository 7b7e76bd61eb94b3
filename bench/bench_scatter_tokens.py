"""``scatter_tokens``: vision tokens into the embeddings of a language model. Memory-bound."""

from __future__ import annotations

import torch

from _harness import Bench, Provider
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, num_rows, num_images, image_tokens, channels) -> Inputs:
    """Images in the middle of equal stretches of text."""
    stretch = num_rows // num_images
    before = (stretch - image_tokens) // 2
    starts = torch.arange(num_images, device=device) * stretch + before
    index = starts[:, None] + torch.arange(image_tokens, device=device)
    return {
        "embeds": torch.randn(1, num_rows, channels, device=device).to(dtype),
        "tokens": torch.randn(index.numel(), channels, device=device).to(dtype),
        "index": index.flatten(),
        "vectors": None,
        "vector_index": None,
    }


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read every row from where it comes from and write it; the backward pass the other way."""
    embeds, tokens = inputs["embeds"], inputs["tokens"]
    num_values = 2 * embeds.numel()
    if backward:
        num_values += 2 * embeds.numel() + tokens.numel()
    return num_values * embeds.element_size()


def _masked_scatter(inputs: Inputs) -> Provider:
    """As transformers does it: a mask of the placeholder's id, as wide as the embeddings."""
    input_ids = torch.zeros(inputs["embeds"].shape[:2], dtype=torch.int64)
    input_ids = input_ids.to(inputs["embeds"].device)
    input_ids.view(-1)[inputs["index"]] = 1

    def scatter(embeds, tokens, **_):
        mask = (input_ids == 1)[..., None].expand_as(embeds)
        return embeds.masked_scatter(mask, tokens)

    return scatter


def _index_copy(inputs: Inputs) -> Provider:
    def scatter(embeds, tokens, index, **_):
        return embeds.flatten(0, 1).index_copy(0, index, tokens).view(embeds.shape)

    return scatter


BENCH = Bench(
    op="scatter_tokens",
    shapes={
        "8192 rows, 4 images of 1024 tokens, C3584": {
            "num_rows": 8192,
            "num_images": 4,
            "image_tokens": 1024,
            "channels": 3584,
        },
    },
    tiny={"num_rows": 12, "num_images": 2, "image_tokens": 3, "channels": 8},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=lambda inputs, backward: 0,
    bound="copy",
    peers={"masked_scatter": _masked_scatter, "index_copy": _index_copy},
)

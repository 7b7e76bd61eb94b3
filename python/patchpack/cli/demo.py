"""Photos of any size through the fused path and the reference, forward, backward and training.

A NativeViT and one language-model layer restore hidden patches of photos, from the same weights
with fused kernels and with eager references. Every output and gradient may err at most twice as much
as eager does against float64, and the two trainings must stay as close to a third one in float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patchpack.cli import CommandError
from patchpack.testing.compare import Accuracy, measure

if TYPE_CHECKING:
    from patchpack.cli._demo_model import Batch, Restorer

# photographs in the wheel of scikit-image: no download
PHOTOS = (
    "astronaut.png",
    "rocket.jpg",
    "page.png",
    "microaneurysms.png",
    "hubble_deep_field.jpg",
    "text.png",
    "retina.jpg",
    "coffee.png",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# most pixels of a photo; Triton's interpreter needs a second for what a GPU does in a millisecond
MAX_PIXELS = {"cpu": 100 * 28**2, "cuda": 1280 * 28**2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="by default photographs of scikit-image"
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=6, help="of the optimiser")
    parser.add_argument("--max-pixels", type=int, help="largest area of a photo after resizing")
    parser.add_argument("--seed", type=int, default=0, help="of weights and hidden patches")
    parser.add_argument("--device", choices=tuple(MAX_PIXELS), default=device)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")

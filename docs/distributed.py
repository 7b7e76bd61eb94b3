"""Train a small NativeViT on many ranks: ``torchrun --nproc-per-node 2 docs/distributed.py``.

Weights are sharded by FSDP2. Every rank has photos of its own, which are encoded where there is
least to do. On GPUs ranks talk over NCCL, else over gloo. Rank 0 trains a copy alone, on the photos
of all ranks, and prints both losses.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import patchpack
from patchpack.distributed import encode_images
from patchpack.models import NativeViT, NativeViTConfig

CONFIG = NativeViTConfig(
    patch_size=4, hidden_size=64, depth=2, num_heads=4, mlp_ratio=2, out_size=32
)


def photos(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, patchpack.PackedGrid]:
    """Patches of this rank's photos, up to 4 and of any sizes; rank 0 has some."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    count = int(torch.randint(0 if rank else 1, 5, (1,), generator=generator))
    sides = 2 * torch.randint(1, 9, (count, 2), generator=generator)
    grid = patchpack.PackedGrid(sides, CONFIG.spatial_merge_size, device=device)
    pixels = torch.randn(grid.num_tokens, CONFIG.patch_dim, generator=generator)
    return pixels.to(device), grid


def squares(tokens: torch.Tensor) -> torch.Tensor:
    """What is to become small, summed over tokens."""
    return (tokens - 1).square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    model, alone = NativeViT(CONFIG).to(device), NativeViT(CONFIG).to(device)
    alone.load_state_dict(model.state_dict())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, alone)]

    for step in range(steps):
        pixels, grid = photos(step, rank, device)
        tokens = encode_images(model, pixels, grid)
        total = torch.tensor(float(tokens.numel()), device=device)
        dist.all_reduce(total)
        # FSDP takes the mean of the gradients of ranks, and the loss is a mean over all tokens
        loss = squares(tokens) * ranks / total.clamp(min=1)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        loss = loss.detach() / ranks
        dist.all_reduce(loss)

        if rank == 0:
            batch = [photos(step, other, device) for other in range(ranks)]
            sizes = torch.cat([grid.grid_thw for _, grid in batch])
            grid = patchpack.PackedGrid(sizes, CONFIG.spatial_merge_size, device=device)
            want = squares(alone(torch.cat([pixels for pixels, _ in batch]), grid))
            want = want / total.clamp(min=1)
            want.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            print(f"step {step}: loss {loss:.6f} of {ranks} ranks, {want:.6f} of one process")
            assert torch.isclose(loss, want, rtol=1e-4), "the losses differ"

    if rank == 0:
        print(f"the losses of {ranks} ranks are those of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

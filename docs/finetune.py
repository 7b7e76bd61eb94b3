"""Fine-tune a small Qwen2-VL on photos: ``torchrun --nproc-per-node 2 docs/finetune.py``.

The model is made of transformers' own code, of random weights, and learns to name photographs. Its
images are prepared by ``ImageProcessor``, samples are packed without padding, ``collate`` finds in
the data loader what the forward pass needs, ``apply_to`` puts the kernels in, and FSDP2 shards the
weights. A copy that nothing is applied to takes the same steps, and both losses are printed.
"""

import argparse
import os
from functools import partial

import skimage.data
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from patchpack.integrations.transformers import ImageProcessor, apply_to, collate
from patchpack.packing import pack

PHOTOS = {"astronaut": "an astronaut", "chelsea": "a cat", "coffee": "a cup", "rocket": "a rocket"}
TEXT = {  # a token is a byte, or one of these
    "image_token_id": 256,
    "video_token_id": 257,
    "vision_start_token_id": 258,
    "vision_end_token_id": 259,
}
CONFIG = {
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 260,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    **TEXT,
}


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    """Parts of the photos, each of its own size, with a question and its answer."""
    processor = ImageProcessor(min_pixels=28 * 28, max_pixels=160 * 160)
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        name = list(PHOTOS)[i % len(PHOTOS)]
        photo = getattr(skimage.data, name)()
        height, width = (
            int(side * (0.5 + 0.5 * torch.rand((), generator=generator)))
            for side in photo.shape[:2]
        )
        sample = dict(processor(photo[:height, :width], return_tensors="pt"))
        tokens = int(sample["image_grid_thw"].prod()) // 4
        image = [TEXT["image_token_id"]] * tokens
        question = [TEXT["vision_start_token_id"], *image, TEXT["vision_end_token_id"], *b"What? "]
        ids = torch.tensor([*question, *PHOTOS[name].encode()])
        sample["input_ids"], sample["labels"] = ids, ids.clone()
        sample["labels"][: len(question)] = -100
        found.append(sample)
    return found


def shard(model: Qwen2VLForConditionalGeneration) -> torch.optim.Optimizer:
    """Shard every block, and then what is left."""
    for block in (*model.model.visual.blocks, *model.model.language_model.layers):
        fully_shard(block)
    fully_shard(model)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=160, help="of a packed sequence")
    options = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    model, plain = (Qwen2VLForConditionalGeneration(Qwen2VLConfig(**CONFIG)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model, plain = model.to(device), plain.to(device)
    report = apply_to(model)
    if rank == 0:
        print(report)
    optimizers = [shard(model), shard(plain)]

    data = samples(8 * options.steps)
    bins = pack([len(x["input_ids"]) for x in data], max_tokens=options.max_tokens).bins
    bins = bins[: len(bins) // ranks * ranks]  # as many for every rank
    loader = DataLoader(
        [[data[i] for i in each] for each in bins[rank::ranks]],
        batch_size=None,
        collate_fn=partial(collate, config=model.config),
    )
    for step, batch in zip(range(options.steps), loader, strict=False):
        count = (batch["labels"][:, 1:] != -100).sum().to(device)
        dist.all_reduce(count)
        losses = []
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            # FSDP takes the mean of the gradients of ranks, and the loss is a mean over all labels
            batch = batch.to(device)
            loss = net(**batch, num_items_in_batch=count / ranks, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.detach() / ranks
            dist.all_reduce(loss)
            losses.append(loss)
        if rank == 0:
            tokens = batch["input_ids"].shape[1]
            print(f"step {step}: {tokens} tokens, loss {losses[0]:.6f}, unpatched {losses[1]:.6f}")
            assert torch.isclose(*losses, rtol=1e-3), "the losses differ"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

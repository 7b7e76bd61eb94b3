"""Many devices, on ``torch.distributed``: tensors, sequences and images shared among ranks.

- ``DTensor``: importing this package registers how every op may be sharded, see
  ``register_sharding``; ``replicate`` makes grids and layouts of what all devices hold.
- One packed sequence on many ranks: ``sequence_parallel_attention`` between token shards, which
  ``shard_tokens`` and ``gather_tokens`` make and put together.
- Images of all ranks encoded where there is least to do: ``encode_images``.
- ``NativeViT`` needs nothing of this under ``torch.distributed.fsdp.fully_shard``, which is applied
  to each of its ``blocks`` and then to all of it.

Gradients are those of the sum of the losses of all ranks. Where every rank computes the same loss
of what it gathered, that is as many times the loss as there are ranks, which averaging over ranks,
as FSDP and DDP do, divides away.
"""

from patchpack.distributed._images import encode_images
from patchpack.distributed._sequence import (
    even_lengths,
    gather_tokens,
    sequence_parallel_attention,
    shard_tokens,
)
from patchpack.distributed._sharding import register_sharding, replicate

register_sharding()

__all__ = [
    "encode_images",
    "even_lengths",
    "gather_tokens",
    "register_sharding",
    "replicate",
    "sequence_parallel_attention",
    "shard_tokens",
]

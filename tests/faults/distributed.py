"""Faults of many ranks."""

from faults import Fault

RULES = "python/patchpack/distributed/_sharding.py"
COLLECTIVES = "python/patchpack/distributed/_collectives.py"
SEQUENCE = "python/patchpack/distributed/_sequence.py"
IMAGES = "python/patchpack/distributed/_images.py"
TWO = "tests/test_distributed.py -k one_does[2]"
FOUR = "tests/test_distributed.py -k one_does[4]"

FAULTS = [
    Fault(
        "sharding: an operator without a rule",
        RULES,
        '    "merge_tokens_backward": (". . . . . . . -> . . .", ()),\n',
        "",
        "tests/test_distributed.py -k has_a_rule",
    ),
    Fault(
        "sharding: rope_2d reads the grid of tokens of others",
        RULES,
        '"rope_2d": ("thd tkd . -> thd tkd", ("h", "k", "hk"))',
        '"rope_2d": ("thd tkd . -> thd tkd", ("t", "h", "k", "hk"))',
        TWO,
    ),
    Fault(
        "sharding: lse is sharded on its tokens",
        RULES,
        '"varlen_attention": ("thd skd skd . . -> thd ht"',
        '"varlen_attention": ("thd skd skd . . -> thd th"',
        TWO,
    ),
    Fault(
        "sharding: gradients of one key head are not summed",
        RULES,
        "-> thd s.d+ s.d+",
        "-> thd s.d s.d",
        TWO,
    ),
    Fault(
        "sharding: maxima are those of all channels",
        RULES,
        'name += ", max"',
        'name += ""',
        TWO,
    ),
    Fault(
        "sharding: sizes of images are those of the last call",
        RULES,
        "            _remember_sizes(op)\n",
        "",
        TWO,
    ),
    Fault(
        "sharding: heads need not be even",
        RULES,
        "x.shape[dim] % x.mesh.size() == 0",
        "x.shape[dim] >= x.mesh.size()",
        FOUR,
    ),
    Fault(
        "sharding: keys are written in a copy",
        RULES,
        'if name.endswith("_") and',
        "if not name and",
        TWO,
    ),
    Fault(
        "in place: heads of a sharded buffer are copies",
        "python/patchpack/ops/_in_place.py",
        "placement.is_shard(1)",
        "placement.is_shard(3)",
        TWO,
    ),
    Fault(
        "exchange: gradients go the same way",
        COLLECTIVES,
        "ctx.way_back = receive, send, group",
        "ctx.way_back = send, receive, group",
        TWO,
    ),
    Fault(
        "exchange: with all ranks, not those of the group",
        COLLECTIVES,
        "x.contiguous(), receive, send, group)",
        "x.contiguous(), receive, send)",
        FOUR,
    ),
    Fault(
        "sequences: shards are as long as the first",
        SEQUENCE,
        "sum(lengths[: group.rank()])",
        "lengths[0] * group.rank()",
        FOUR,
    ),
    Fault(
        "sequences: key heads on several ranks take turns",
        SEQUENCE,
        "x.repeat_interleave(n // num_k_heads, dim=1)",
        "x.repeat(1, n // num_k_heads, 1)",
        FOUR,
    ),
    Fault(
        "sequences: heads come home in the order of tokens",
        SEQUENCE,
        "return heads.transpose(0, 1).flatten(1, 2)",
        "return heads.reshape(tokens, -1, heads.shape[-1])",
        TWO,
    ),
    Fault(
        "encode_images: tokens come home in the order they left",
        IMAGES,
        "back = sorted(range(len(order)), key=order.__getitem__)",
        "back = list(range(len(order)))",
        TWO,
    ),
    Fault(
        "encode_images: cost is not asked",
        IMAGES,
        "cost(size) if cost else vit_flops",
        "vit_flops",
        TWO,
    ),
    Fault(
        "encode_images: a rank without images does not encode",
        IMAGES,
        "found = encoder(packed, there)",
        "found = encoder(packed, there) if len(packed) else packed.new_zeros(0, 24)",
        FOUR,
    ),
    Fault(
        "bench: tokens go home for nothing",
        "bench/bench_packing.py",
        "    sent += np.bincount(away, tokens, ranks)\n",
        "",
        "tests/test_bench.py -k not_at_home",
    ),
]

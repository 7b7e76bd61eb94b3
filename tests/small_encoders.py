"""The encoder of every system with few numbers, batches for it, and what it computes of them."""

from dataclasses import replace

import torch

from patchpack.models.native_vit import CONFIGS, NativeViT

SMALL = {"hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1.5}


def small(name):
    """The configuration of a system with all it has, and few numbers."""
    config = CONFIGS[name]
    changes = SMALL | {"depth": 2 if config.window_size else 1}
    for option, value in {
        "pos_table": (5, 7),
        "window_size": 16,  # 2 x 2 merged tokens
        "full_attention_blocks": (1,),
        "deepstack_blocks": (0,),
        "merger_size": 28,
        "out_size": 20,
    }.items():
        if getattr(config, option):
            changes[option] = value
    return replace(config, **changes)


def make(config, impl="native", dtype=torch.float32):
    torch.manual_seed(0)
    model = NativeViT(config, impl=impl)
    for parameter in model.parameters():  # biases and norms too, or their gradients hide faults
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def pixels_of(config, num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, config.patch_dim, generator=generator).to(dtype)


def tokens_of(result):
    """All tokens of a result as one tensor: those of deepstack have as many rows."""
    return result if isinstance(result, torch.Tensor) else torch.cat([result[0], *result[1]], dim=1)


def results_of(model, parameters, pixels, grid, num_rows=None):
    """Tokens and gradients under a cotangent of the first ``num_rows``, 0 for the others."""
    pixels = pixels.clone().requires_grad_()
    tokens = tokens_of(model(pixels, grid))
    rows = tokens[:num_rows]
    (rows * torch.linspace(-1, 1, rows.numel()).view(rows.shape).to(rows.dtype)).sum().backward()
    results = {"tokens": tokens.detach(), "pixels": pixels.grad}
    for name, parameter in parameters.items():
        results[name], parameter.grad = parameter.grad, None
    return results


def assert_equal(got, want):
    assert got.keys() == want.keys()
    different = [name for name, x in want.items() if not torch.equal(got[name], x)]
    assert not different, different


# images, tokens, segments, windows and longest segments differ, and none by chance is another
BATCHES = (
    [(1, 4, 6), (1, 8, 4)],
    [(2, 6, 4), (1, 10, 4), (1, 4, 14)],
    [(1, 4, 12), (3, 6, 6), (1, 8, 10), (1, 12, 2)],
    [(1, 14, 10), (1, 2, 2)],
    [(1, 6, 10)] * 5,
    [(2, 2, 2)] * 9,
    [(7, 8, 2), (1, 6, 18)],
    [(1, 2 + 2 * i, 16 - 2 * i) for i in range(4)],
)

# of a padded grid
ROOM = {"num_tokens": 360, "num_grids": 9, "num_segments": 18}

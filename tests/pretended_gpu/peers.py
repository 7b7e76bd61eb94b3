"""Libraries with the signatures and the habits of those that run on GPUs alone."""

import torch
import torch.nn.functional as F  # noqa: N812


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    if q.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    lengths = cu_seqlens_q.diff().tolist()
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    outs = []
    for heads in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True):
        outs.append(F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True))
    return torch.cat(outs, dim=1).transpose(0, 1)


def flash_attn_4_varlen_func(q, k, v, qv=None, **options):
    """It has an argument more before those of the segments, and gives more."""
    return flash_attn_varlen_func(q, k, v, **options), None


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False):
    assert x.dtype == cos.dtype == sin.dtype
    assert (interleaved, inplace) == (False, False)
    lo, hi = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1)


class InPlace(torch.autograd.Function):
    """Rotates where it can what it is given, be it the heads or their gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return InPlace.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return InPlace.rotate(grad, cos, -sin), None, None

    @staticmethod
    def rotate(x, cos, sin):
        x = x.transpose(1, 2).contiguous()  # [1, T, H, D]
        x.copy_(apply_rotary_emb(x, *(y[0, :, : y.shape[-1] // 2].to(x.dtype) for y in (cos, sin))))
        return x.transpose(1, 2)


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return InPlace.apply(q, cos, sin), InPlace.apply(k, cos, sin)


def liger_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    assert cos.shape == sin.shape == (3, 1, q.shape[2], q.shape[3])
    assert 2 * sum(mrope_section) == q.shape[3]
    return liger_rotary_pos_emb(q, k, cos[0], sin[0])


def liger_rotary_pos_emb_vision(q, k, cos, sin):
    heads = (x.float().transpose(0, 1)[None] for x in (q, k))
    both = liger_rotary_pos_emb(*heads, cos[None], sin[None])
    return [x[0].transpose(0, 1).to(q.dtype) for x in both]


MODULES = {
    "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
    "flash_attn.layers": {},
    "flash_attn.layers.rotary": {"apply_rotary_emb": apply_rotary_emb},
    "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_4_varlen_func},
    "flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func},
    "liger_kernel": {},
    "liger_kernel.transformers": {},
    "liger_kernel.transformers.rope": {
        "liger_rotary_pos_emb": liger_rotary_pos_emb,
        "liger_rotary_pos_emb_vision": liger_rotary_pos_emb_vision,
    },
    "liger_kernel.transformers.qwen2vl_mrope": {
        "liger_multimodal_rotary_pos_emb": liger_multimodal_rotary_pos_emb
    },
}

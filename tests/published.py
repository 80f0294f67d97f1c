"""Small models written the ways in which published ones are: what `capture` meets besides the reference models.

Each takes token ids [1, T] and gives logits [1, T, VOCAB], bare or as `.logits`. One layer, width 16.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, HEAD_DIM, MAX_POSITIONS = 23, 16, 4, 4, 48


@dataclass
class Output:
    """What Hugging Face models return."""

    logits: Tensor
    hidden_states: None = None


class Model(nn.Module):
    """Parts that the models share; weights are drawn so that tokens and positions differ clearly."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.v_proj = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.gate_up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, T, WIDTH] -> q [1, HEADS, T, HEAD_DIM], k and v [1, kv_heads, T, HEAD_DIM]."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        return q, k, v


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, with weights of a spread at which its layers matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() else 0.0
            spread = 2 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.3
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class RMSNormInAutocast(nn.Module):
    """Statistics in float32 inside a region that switches autocast off, as in LLaDA."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(enabled=False, device_type=x.device.type):
            dtype = x.dtype
            x = x.to(torch.float32)
            variance = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(variance + 1e-5)
            x = x.to(dtype)
        return self.weight * x


class RotaryTables(nn.Module):
    """Tables [1, 1, max_len, head_dim] made once and kept in a dictionary, as in LLaDA."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = 1 / 10 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(2 * MAX_POSITIONS).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)[None, None]
        self.cache = {"sin": angles.sin(), "cos": angles.cos()}

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cache["sin"][:, :, :length, :], self.cache["cos"][:, :, :length, :]

    def rotate_half(self, x: Tensor) -> Tensor:
        b, heads, t, width = x.size()
        x = x.view(b, heads, t, 2, width // 2)
        first, second = x.unbind(dim=-2)
        return torch.cat((-second, first), dim=-1)

    def rotate(self, sin: Tensor, cos: Tensor, x: Tensor) -> Tensor:
        return ((x * cos) + (self.rotate_half(x) * sin)).to(x.dtype)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        wide_q, wide_k = q.float(), k.float()
        with torch.autocast(q.device.type, enabled=False):
            query_length, key_length = wide_q.shape[-2], wide_k.shape[-2]
            sin, cos = self.tables(key_length)
            sin, cos = sin.type_as(wide_q), cos.type_as(wide_q)
            past = key_length - query_length
            wide_q = self.rotate(sin[:, :, past:key_length, :], cos[:, :, past:key_length, :], wide_q)
            wide_k = self.rotate(sin, cos, wide_k)
        return wide_q.type_as(q), wide_k.type_as(k)


class LikeLLaDA(Model):
    """Pre-norm; rotary tables from a cache; KV heads repeated; a tied head; logits that may be scaled, in place."""

    def __init__(self, scale_logits: bool = False) -> None:
        super().__init__(kv_heads=2)
        self.scale_logits = scale_logits
        self.norm, self.rotary, self.last_norm = RMSNormInAutocast(), RotaryTables(), RMSNormInAutocast()
        self.dropout = nn.Dropout(0.1)
        del self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Output:
        x = self.dropout(self.embed_tokens(input_ids))
        b, t, width = x.shape
        q, k, v = self.heads(self.norm(x))
        q, k = self.rotary(q, k)
        assert k.size(1) == v.size(1)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1, output_size=q.size(1))
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1, output_size=q.size(1))
        dropout = 0.1 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=False)
        x = x + self.dropout(self.o_proj(y.transpose(1, 2).contiguous().view(b, t, width)))
        logits = F.linear(self.last_norm(x), self.embed_tokens.weight, None)
        if self.scale_logits:
            logits.mul_(1 / math.sqrt(width))
        return Output(logits)


class RMSNorm(nn.Module):
    """The usual spelling of Hugging Face models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden.to(dtype)


class RotaryEmbedding(nn.Module):
    """Angles as a product of matrices, without gradients, as in Qwen2 and Dream."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = 1 / 10 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        positions = position_ids[:, None, :].float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            angles = (frequencies.float() @ positions.float()).transpose(1, 2)
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos(), angles.sin()
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first = x[..., : x.shape[-1] // 2]
    second = x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, kv_heads, t, width = x.shape
    return x[:, :, None, :, :].expand(b, kv_heads, times, t, width).reshape(b, kv_heads * times, t, width)


class LikeDream(Model):
    """Positions counted by `arange`; KV heads repeated by expand and reshape; logits as float32 of an output."""

    def __init__(self, enable_gqa: bool = False) -> None:
        super().__init__(kv_heads=2)
        self.enable_gqa = enable_gqa
        self.rotary, self.norm, self.mlp_norm, self.last_norm = RotaryEmbedding(), RMSNorm(), RMSNorm(), RMSNorm()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Output:
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(0, x.shape[1], device=x.device).unsqueeze(0)
        cos, sin = self.rotary(x, position_ids)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k, v = self.heads(self.norm(x))
        q, k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
        if self.enable_gqa:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2))
        y = y.transpose(1, 2).contiguous()
        x = x + self.o_proj(y.view(*input_ids.shape, WIDTH))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        return Output(self.lm_head(self.last_norm(x)).float())


class LearnedPositions(Model):
    """GPT's way: a table of positions that is learned, looked up or sliced; GELU; residuals added in place."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced
        self.embed_positions = nn.Embedding(MAX_POSITIONS, WIDTH)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        t = input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        x += self.embed_positions.weight[:t] if self.sliced else self.embed_positions(torch.arange(t)[None])
        y = F.scaled_dot_product_attention(*self.heads(x))
        x += self.o_proj(y.transpose(1, 2).reshape(1, t, WIDTH))
        gate, _ = self.gate_up(x.view(t, WIDTH)).split(2 * WIDTH, dim=-1)
        x += self.down(F.gelu(gate)).view(1, t, WIDTH)
        return self.lm_head(x)


class SelectedTokens(LearnedPositions):
    """Tells masked tokens from others by their ids: values chosen, filled and multiplied by a condition."""

    def forward(self, input_ids: Tensor) -> Tensor:
        masked = (input_ids == 0)[..., None]
        x = torch.where(masked, self.down.bias, self.embed_tokens(input_ids))
        x = x + 3 * self.embed_positions(torch.arange(input_ids.shape[1])[None]).masked_fill(~masked & (x > 1), 0.5)
        y = F.scaled_dot_product_attention(*self.heads(x))
        x = x + self.o_proj(y.transpose(1, 2).flatten(2)) * masked
        return torch.einsum("btd,vd->btv", x, self.lm_head.weight)


class LearnedPositionsAndNorms(LearnedPositions):
    """As a from-scratch encoder has it: torch's own norms before attention and before the head."""

    def __init__(self) -> None:
        super().__init__(sliced=True)
        self.first_norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Sequential(OrderedDict(norm=nn.RMSNorm(WIDTH), head=nn.Linear(WIDTH, VOCAB)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().heads(self.first_norm(x))

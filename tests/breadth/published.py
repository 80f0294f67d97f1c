"""LLaDA and Dream as their authors publish them, in the checkpoints' parameter names: whole models, any depth.

What is not used at inference is left out; every spelling that capture meets is kept. Built from config.json's fields.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LLaDAOutput(NamedTuple):
    """What the inner model of LLaDA returns; its keys and values are for a cache."""

    logits: Tensor
    attn_key_values: list[tuple[Tensor, Tensor]] | None


@dataclass
class Output:
    """What the model returns to users, as Hugging Face's do."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]] | None = None


class LLaDANorm(nn.Module):
    """RMS norm whose statistics are float32 even under autocast."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.eps = config["rms_norm_eps"]
        self.weight = nn.Parameter(torch.ones(config["d_model"]))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(enabled=False, device_type=x.device.type):
            og_dtype = x.dtype
            x = x.to(torch.float32)
            variance = x.pow(2).mean(-1, keepdim=True)
            x = x * torch.rsqrt(variance + self.eps)
            x = x.to(og_dtype)
        return self.weight * x


class LLaDARotary(nn.Module):
    """Tables in a cache that is shared by the layers, made for the longest sequence and sliced by length."""

    def __init__(self, config: Mapping[str, Any], cache: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.cache = cache
        self.tables(config["max_sequence_length"], torch.device("cpu"))

    def tables(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        sin, cos = self.cache.get("sin"), self.cache.get("cos")
        if sin is not None and cos is not None and sin.shape[-2] >= seq_len and cos.shape[-2] >= seq_len:
            return sin[:, :, :seq_len, :], cos[:, :, :seq_len, :]
        with torch.autocast(device.type, enabled=False):
            dim = self.config["d_model"] // self.config["n_heads"]
            exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float) / dim
            inv_freq = 1.0 / (self.config["rope_theta"] ** exponent)
            seq = torch.arange(seq_len, device=device, dtype=torch.float)
            freqs = torch.einsum("i , j -> i j", seq, inv_freq)
            positions = torch.cat((freqs, freqs), dim=-1)
            sin, cos = positions.sin()[None, None, :, :], positions.cos()[None, None, :, :]
        self.cache["sin"], self.cache["cos"] = sin, cos
        return sin, cos

    def rotate_half(self, x: Tensor) -> Tensor:
        b, nh, t, hs = x.size()
        x = x.view(b, nh, t, 2, hs // 2)
        x1, x2 = x.unbind(dim=-2)
        return torch.cat((-x2, x1), dim=-1)

    def apply(self, sin: Tensor, cos: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return ((t * cos) + (self.rotate_half(t) * sin)).to(t.dtype)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_, k_ = q.float(), k.float()
        with torch.autocast(q.device.type, enabled=False):
            query_len, key_len = q_.shape[-2], k_.shape[-2]
            sin, cos = self.tables(key_len, q_.device)
            sin, cos = sin.type_as(q_), cos.type_as(q_)
            past = key_len - query_len
            q_ = self.apply(sin[:, :, past:key_len, :], cos[:, :, past:key_len, :], q_)
            k_ = self.apply(sin, cos, k_)
        return q_.type_as(q), k_.type_as(k)


class LLaDABlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: Mapping[str, Any], cache: dict[str, Tensor]) -> None:
        super().__init__()
        width, hidden = config["d_model"], config["mlp_hidden_size"]
        self.config = config
        kv_width = width // config["n_heads"] * config["n_kv_heads"]
        self.dropout = nn.Dropout(config["residual_dropout"])
        self.attn_norm, self.ff_norm = LLaDANorm(config), LLaDANorm(config)
        self.rotary_emb = LLaDARotary(config, cache)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        assert k.size(1) == v.size(1)
        if q.size(1) != k.size(1):
            assert q.size(1) % k.size(1) == 0
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1, output_size=q.size(1))
            v = v.repeat_interleave(q.size(1) // v.size(1), dim=1, output_size=q.size(1))
        dropout_p = self.config["attention_dropout"] if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout_p, is_causal=False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attention_bias: Tensor | None) -> Tensor:
        batch, t, width = q.size()
        dtype = k.dtype
        heads, kv_heads = self.config["n_heads"], self.config["n_kv_heads"]
        q = q.view(batch, t, heads, width // heads).transpose(1, 2)
        k = k.view(batch, t, kv_heads, width // heads).transpose(1, 2)
        v = v.view(batch, t, kv_heads, width // heads).transpose(1, 2)
        q, k = self.rotary_emb(q, k)
        att = self.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, attn_mask=attention_bias)
        att = att.transpose(1, 2).contiguous().view(batch, t, width)
        return self.attn_out(att)

    def forward(self, x: Tensor, attention_bias: Tensor | None = None) -> Tensor:
        x_normed = self.attn_norm(x)
        q, k, v = self.q_proj(x_normed), self.k_proj(x_normed), self.v_proj(x_normed)
        x = x + self.dropout(self.attention(q, k, v, attention_bias))
        og_x = x
        x = self.ff_norm(x)
        x, x_up = self.ff_proj(x), self.up_proj(x)
        x = F.silu(x)
        x = x * x_up
        x = self.ff_out(x)
        x = self.dropout(x)
        return og_x + x


class LLaDA(nn.Module):
    """LLaDAModelLM with the inner LLaDAModel in it: `.logits` of an output."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config_fields = config
        cache: dict[str, Tensor] = {}
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config["embedding_size"], config["d_model"]),
            "emb_drop": nn.Dropout(config["embedding_dropout"]),
            "ln_f": LLaDANorm(config),
            "blocks": nn.ModuleList([LLaDABlock(config, cache) for _ in range(config["n_layers"])]),
        }
        if not config["weight_tying"]:
            parts["ff_out"] = nn.Linear(config["d_model"], config["embedding_size"], bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    def inner(self, input_ids: Tensor, use_cache: bool) -> LLaDAOutput:
        transformer: Any = self.model["transformer"]
        x = transformer["wte"](input_ids)
        x = transformer["emb_drop"](x)
        for block in transformer["blocks"]:
            x = block(x)
        x = transformer["ln_f"](x)
        if self.config_fields["weight_tying"]:
            logits = F.linear(x, transformer["wte"].weight, None)
        else:
            logits = transformer["ff_out"](x)
        if self.config_fields["scale_logits"]:
            logits.mul_(1 / math.sqrt(self.config_fields["d_model"]))
        return LLaDAOutput(logits=logits, attn_key_values=[] if use_cache else None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[Tensor] | None = None,
        use_cache: bool | None = None,
    ) -> Output:
        outputs = self.inner(input_ids, bool(use_cache))
        return Output(logits=outputs.logits, past_key_values=outputs.attn_key_values)


class DreamNorm(nn.Module):
    """Qwen2's RMS norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config["hidden_size"]))
        self.variance_epsilon = config["rms_norm_eps"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class DreamRotary(nn.Module):
    """Angles as a product of matrices, without gradients and outside of autocast."""

    inv_freq: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["hidden_size"] // config["num_attention_heads"]
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        self.register_buffer("inv_freq", 1.0 / (config["rope_theta"] ** exponent), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq_expanded = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        position_ids_expanded = position_ids[:, None, :].float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            freqs = (inv_freq_expanded.float() @ position_ids_expanded.float()).transpose(1, 2)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos, sin = emb.cos(), emb.sin()
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


class DreamAttention(nn.Module):
    """Grouped-query attention, keys and values repeated before SDPA."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config["hidden_size"]
        self.head_dim = width // self.num_heads
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        bsz, q_len, width = hidden_states.size()
        query_states = self.q_proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)
        query_states = (query_states * cos) + (rotate_half(query_states) * sin)
        key_states = (key_states * cos) + (rotate_half(key_states) * sin)
        groups = self.num_heads // self.num_key_value_heads
        key_states, value_states = repeat_kv(key_states, groups), repeat_kv(value_states, groups)
        attn_output = F.scaled_dot_product_attention(
            query_states, key_states, value_states, attn_mask=None, dropout_p=0.0, is_causal=False
        )
        attn_output = attn_output.transpose(1, 2).contiguous()
        attn_output = attn_output.view(bsz, q_len, width)
        return self.o_proj(attn_output)


class DreamMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))


class DreamLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.self_attn, self.mlp = DreamAttention(config), DreamMLP(config)
        self.input_layernorm, self.post_attention_layernorm = DreamNorm(config), DreamNorm(config)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), position_embeddings)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + hidden_states


class Dream(nn.Module):
    """DreamModel with its DreamBaseModel in it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config["vocab_size"], config["hidden_size"], config["pad_token_id"]),
                "layers": nn.ModuleList(DreamLayer(config) for _ in range(config["num_hidden_layers"])),
                "norm": DreamNorm(config),
                "rotary_emb": DreamRotary(config),
            }
        )
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        num_logits_to_keep: int = 0,
        **loss_kwargs: Any,
    ) -> Output:
        model: Any = self.model
        hidden_states = model["embed_tokens"](input_ids)
        if cache_position is None:
            cache_position = torch.arange(0, hidden_states.shape[1], device=hidden_states.device)
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        position_embeddings = model["rotary_emb"](hidden_states, position_ids)
        for layer in model["layers"]:
            hidden_states = layer(hidden_states, position_embeddings)
        hidden_states = model["norm"](hidden_states)
        return Output(self.lm_head(hidden_states[:, -num_logits_to_keep:, :]))

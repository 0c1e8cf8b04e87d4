"""The networks of known models in plain torch: the same weights, the same products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

HEAD = 128
TIMES = 256  # features of a time step
_EPS = 1e-6
_HEAD_PIECES = 16


def heads(x: Tensor) -> Tensor:
    """Split features into heads: (batch, tokens, features) to (batch, heads, tokens, 128)."""
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of features by the angles of their places."""
    cos, sin = turns
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


def turns_of(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Angles for so many places, where and as ``x`` is."""
    places = torch.arange(tokens, device=x.device, dtype=torch.float32)
    pace = 1e4 ** -(torch.arange(HEAD // 2, device=x.device, dtype=torch.float32) / (HEAD // 2))
    angles = torch.outer(places, pace)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = False) -> Tensor:
    """Attention, its heads side by side again."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(2)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


class Mlp(nn.Module):
    """Two layers and what is between them."""

    def __init__(self, width: int, hidden: int, out: int, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(width, hidden), between
        self.second = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def _embedder(width: int, dim: int) -> Mlp:
    return Mlp(width, dim, dim, nn.SiLU())


def _feed_forward(dim: int, hidden: int) -> Mlp:
    return Mlp(dim, hidden, dim, nn.GELU(approximate="tanh"))


class Modulation(nn.Module):
    """Shifts, scales and gates that follow from the time and the text."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, count * dim)
        self.count = count

    def forward(self, c: Tensor) -> Sequence[Tensor]:
        return self.linear(F.silu(c)).unsqueeze(1).chunk(self.count, dim=-1)


class JointAttention(nn.Module):
    """Picture and text attend to both, each with weights of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.text_q, self.text_k, self.text_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(HEAD, eps=_EPS) for _ in range(2))
        self.text_norm_q, self.text_norm_k = (nn.RMSNorm(HEAD, eps=_EPS) for _ in range(2))
        self.out, self.text_out = (nn.Linear(dim, dim) for _ in range(2))

    def forward(
        self, x: Tensor, text: Tensor, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        text_q, q = self.text_norm_q(heads(self.text_q(text))), self.norm_q(heads(self.q(x)))
        text_k, k = self.text_norm_k(heads(self.text_k(text))), self.norm_k(heads(self.k(x)))
        value = torch.cat((heads(self.text_v(text)), heads(self.v(x))), dim=2)
        query = turned(torch.cat((text_q, q), dim=2), turns)
        key = turned(torch.cat((text_k, k), dim=2), turns)
        out = attend(query, key, value)
        return self.out(out[:, text.shape[1] :]), self.text_out(out[:, : text.shape[1]])


class DoubleBlock(nn.Module):
    """A block with two streams, of FLUX and of Qwen-Image alike."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mod, self.text_mod = Modulation(dim, 6), Modulation(dim, 6)
        self.attention = JointAttention(dim)
        self.mlp, self.text_mlp = _feed_forward(dim, 4 * dim), _feed_forward(dim, 4 * dim)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.mod(c)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.text_mod(c)
        attended, text_attended = self.attention(
            norm(x) * (1 + scale) + shift, norm(text) * (1 + t_scale) + t_shift, turns
        )
        x, text = x + gate * attended, text + t_gate * text_attended
        x = x + mlp_gate * self.mlp(norm(x) * (1 + mlp_scale) + mlp_shift)
        text = text + t_mlp_gate * self.text_mlp(norm(text) * (1 + t_mlp_scale) + t_mlp_shift)
        return x, text


class SingleBlock(nn.Module):
    """FLUX's block with one stream: attention and feed-forward side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mod = Modulation(dim, 3)
        self.mlp = nn.Linear(dim, 4 * dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(HEAD, eps=_EPS) for _ in range(2))
        self.out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.mod(c)
        y = norm(x) * (1 + scale) + shift
        hidden = F.gelu(self.mlp(y), approximate="tanh")
        query = turned(self.norm_q(heads(self.q(y))), turns)
        key = turned(self.norm_k(heads(self.k(y))), turns)
        attended = attend(query, key, heads(self.v(y)))
        return x + gate * self.out(torch.cat((attended, hidden), dim=-1))


class Flux(nn.Module):
    """FLUX.1-dev."""

    def __init__(self, dim: int, double: int, single: int, text_dim: int) -> None:
        super().__init__()
        self.time, self.guidance = _embedder(TIMES, dim), _embedder(TIMES, dim)
        self.pooled = _embedder(768, dim)
        self.text_in, self.x_in = nn.Linear(text_dim, dim), nn.Linear(64, dim)
        self.dual = nn.ModuleList(DoubleBlock(dim) for _ in range(double))
        self.single = nn.ModuleList(SingleBlock(dim) for _ in range(single))
        self.mod_out, self.out = Modulation(dim, 2), nn.Linear(dim, 64)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, pooled: Tensor) -> Tensor:
        c = self.time(time) + self.guidance(time) + self.pooled(pooled)
        text, x = self.text_in(text), self.x_in(x)
        num_text = text.shape[1]
        turns = turns_of(x, num_text + x.shape[1])
        for block in self.dual:
            x, text = block(x, text, c, turns)
        x = torch.cat((text, x), dim=1)
        for block in self.single:
            x = block(x, c, turns)
        shift, scale = self.mod_out(c)
        return self.out(norm(x[:, num_text:]) * (1 + scale) + shift)


class QwenImage(nn.Module):
    """Qwen-Image."""

    def __init__(self, dim: int, layers: int, text_dim: int) -> None:
        super().__init__()
        self.time = _embedder(TIMES, dim)
        self.text_norm = nn.RMSNorm(text_dim, eps=_EPS)
        self.x_in, self.text_in = nn.Linear(64, dim), nn.Linear(text_dim, dim)
        self.dual = nn.ModuleList(DoubleBlock(dim) for _ in range(layers))
        self.mod_out, self.out = Modulation(dim, 2), nn.Linear(dim, 64)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        c = self.time(time)
        x, text = self.x_in(x), self.text_in(self.text_norm(text))
        turns = turns_of(x, text.shape[1] + x.shape[1])
        for block in self.dual:
            x, text = block(x, text, c, turns)
        shift, scale = self.mod_out(c)
        return self.out(norm(x) * (1 + scale) + shift)


class Attention(nn.Module):
    """Wan's: normed over all heads at once, to the video itself or to the text."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=_EPS) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, to: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        query, key = heads(self.norm_q(self.q(x))), heads(self.norm_k(self.k(to)))
        if turns is not None:
            query, key = turned(query, turns), turned(key, turns)
        return self.out(attend(query, key, heads(self.v(to))))


class WanBlock(nn.Module):
    """Attention to the video, to the text, feed-forward."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, 6, dim))
        self.attention = Attention(dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.text_attention = Attention(dim)
        self.ffn = _feed_forward(dim, ffn)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + c).chunk(6, dim=1)
        y = norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(y, y, turns)
        x = x + self.text_attention(self.norm(x), text)
        return x + mlp_gate * self.ffn(norm(x) * (1 + mlp_scale) + mlp_shift)


class Wan(nn.Module):
    """Wan 14B."""

    def __init__(self, dim: int, ffn: int, layers: int, text_dim: int) -> None:
        super().__init__()
        self.x_in = nn.Conv3d(16, dim, (1, 2, 2), (1, 2, 2))
        self.time, self.mod = _embedder(TIMES, dim), nn.Linear(dim, 6 * dim)
        self.text_in = Mlp(text_dim, dim, dim, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList(WanBlock(dim, ffn) for _ in range(layers))
        self.table, self.out = nn.Parameter(torch.empty(1, 2, dim)), nn.Linear(dim, 64)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x, text = self.x_in(x).flatten(2).transpose(1, 2), self.text_in(text)
        time = self.time(time)
        c = self.mod(F.silu(time)).unflatten(-1, (6, -1))
        turns = turns_of(x, x.shape[1])
        for block in self.blocks:
            x = block(x, text, c, turns)
        shift, scale = (self.table + time.unsqueeze(1)).chunk(2, dim=1)
        return self.out(norm(x) * (1 + scale) + shift)


class LlamaLayer(nn.Module):
    """A layer of a language model, at one token of each of a batch."""

    def __init__(self, dim: int, ffn: int, kv_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=_EPS)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(dim, kv_heads * HEAD, bias=False) for _ in range(2))
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=_EPS)
        self.gate, self.up = (nn.Linear(dim, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor, past: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        y = self.norm(x)
        query, key = turned(heads(self.q(y)), turns), turned(heads(self.k(y)), turns)
        key = torch.cat((past[0], key), dim=2)
        value = torch.cat((past[1], heads(self.v(y))), dim=2)
        x = x + self.out(attend(query, key, value, grouped=True))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A language model; all its layers share one memory of earlier tokens, to keep it small."""

    def __init__(self, dim: int, ffn: int, layers: int, vocabulary: int, kv_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(LlamaLayer(dim, ffn, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=_EPS)
        # in pieces, so that nobody has to decode all of it at once
        piece = vocabulary // _HEAD_PIECES
        self.head = nn.ModuleList(nn.Linear(dim, piece, bias=False) for _ in range(_HEAD_PIECES))

    def forward(self, ids: Tensor, past: Tensor) -> Tensor:
        x = self.embedding(ids)
        cos, sin = turns_of(x, past.shape[3] + 1)
        turns = cos[-1:], sin[-1:]
        for layer in self.layers:
            x = layer(x, past, turns)
        x = self.norm(x)
        return torch.cat([piece(x) for piece in self.head], dim=-1)

"""CLIP's text transformer: token ids or embeddings -> the context that the UNet attends to."""
import torch
import torch.nn.functional as F
from torch import nn

from .configs import complete

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}  # SD 1.x, 2.x


class TextEncoder(nn.Module):
    """Call it as `sd.encode_tokens(ids)` or `sd.encode_tokens(embeddings)`.

    Attribute names are the published tensor names without their common prefix `text_model.`.
    Source: Radford et al. 2021 (CLIP), section 2.4.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = complete("text_encoder", config)
        width = config["hidden_size"]
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = embedding(config["vocab_size"], width)
        self.embeddings.position_embedding = embedding(config["max_position_embeddings"], width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            Layer(config) for _ in range(config["num_hidden_layers"]))
        self.final_layer_norm = nn.LayerNorm(width, config["layer_norm_eps"])

    def forward(self, tokens):
        """(B, L) ids, or (B, L, D) embeddings, as of attacks -> (B, L, D) after the final norm."""
        is_ids = not tokens.is_floating_point()
        h = self.embeddings.token_embedding(tokens) if is_ids else tokens
        h = h + self.embeddings.position_embedding.weight[: h.shape[1]]
        for layer in self.encoder.layers:
            h = layer(h)
        return self.final_layer_norm(h)


def embedding(n, width):
    """Of zeros: normal numbers on the meta device make torch import its compiler, for seconds."""
    return nn.Embedding.from_pretrained(torch.zeros(n, width), freeze=False)


class Layer(nn.Module):
    """A pre-norm transformer layer: causal self-attention, then a two-layer perceptron."""

    def __init__(self, config):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.self_attn = SelfAttention(width, config["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config["intermediate_size"])
        self.mlp.fc2 = nn.Linear(config["intermediate_size"], width)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, h):
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(h))))


class SelfAttention(nn.Module):
    """Causal: a token sees itself and those before it, so a prefix reaches the whole prompt."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h):
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        return self.out_proj(h.transpose(1, 2).flatten(2))

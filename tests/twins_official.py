"""Reference twins of the published models: plain NumPy float64, cell by cell, in the names of the published tensors."""

from __future__ import annotations

from math import erf

import numpy as np

HEAD_WIDTH = 64


def random_token_weights(
    n_genes: int, width: int, n_hidden: int, n_layers: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A state dict in the layout of the published token model; every tensor matters to the result."""
    n_rows = n_genes + 5
    shapes: dict[str, tuple[int, ...]] = {
        "gene_embedding.weight": (n_rows, width),
        "value_encoder.0.weight": (width, 1),
        "value_encoder.0.bias": (width,),
        "value_encoder.2.weight": (width, width),
        "value_encoder.2.bias": (width,),
        "value_mask_emb": (width,),
        "gene_mask_emb": (width,),
        "input_proj.weight": (width, width),
        "latent_encoder.mlp.0.weight": (width, width),
        "latent_encoder.mlp.0.bias": (width,),
        "latent_encoder.mlp.1.weight": (width,),
        "latent_encoder.mlp.1.bias": (width,),
        "latent_encoder.mlp.3.weight": (width, width),
        "latent_encoder.mlp.3.bias": (width,),
        "final_norm.weight": (width,),
        "gene_head.weight": (n_rows, width),
        "value_head.0.weight": (width, width),
        "value_head.0.bias": (width,),
        "value_head.2.weight": (1, width),
        "value_head.2.bias": (1,),
        **_layer_shapes("layers", width, n_hidden, n_layers),
    }
    return _draw(shapes, rng)


def random_dense_weights(
    n_genes: int, width: int, n_hidden: int, n_layers: int, n_latent: int, n_classes: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A state dict in the layout of the published dense model."""
    n_rows = n_genes + 5
    shapes: dict[str, tuple[int, ...]] = {
        "gene_embedding.gene_projection.weight": (width, n_rows),
        "gene_embedding.gene_projection.bias": (width,),
        "gene_embedding.layer_norm.weight": (width,),
        **_layer_shapes("encoder.layers", width, n_hidden, n_layers),
        "variational_layer.mu_projection.weight": (n_latent, width),
        "variational_layer.mu_projection.bias": (n_latent,),
        "variational_layer.logvar_projection.weight": (n_latent, width),
        "variational_layer.logvar_projection.bias": (n_latent,),
        "annotation_head.dense.weight": (width, n_latent),
        "annotation_head.dense.bias": (width,),
        "annotation_head.classifier.weight": (n_classes, width),
        "annotation_head.classifier.bias": (n_classes,),
        "batch_integration_head.dense.weight": (width, n_latent),
        "batch_integration_head.dense.bias": (width,),
        "batch_integration_head.decoder.weight": (n_rows, width),
        "batch_integration_head.decoder.bias": (n_rows,),
    }
    return _draw(shapes, rng)


def _layer_shapes(prefix: str, width: int, n_hidden: int, n_layers: int) -> dict[str, tuple[int, ...]]:
    one = {
        "norm1.weight": (width,),
        "attn.q_proj.weight": (width, width),
        "attn.k_proj.weight": (width, width),
        "attn.v_proj.weight": (width, width),
        "attn.o_proj.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.gate_proj.weight": (n_hidden, width),
        "mlp.up_proj.weight": (n_hidden, width),
        "mlp.down_proj.weight": (width, n_hidden),
    }
    return {f"{prefix}.{i}.{name}": shape for i in range(n_layers) for name, shape in one.items()}


def _draw(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Matrices that keep the size of what goes through them, gains near one, biases that are not zero."""
    weights = {}
    for name, shape in shapes.items():
        is_gain = "norm" in name or name == "latent_encoder.mlp.1.weight"
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "embedding.weight" not in name else 0.3
        weights[name] = (is_gain + scale * rng.normal(size=shape)).astype(np.float32)
    return weights


def token_model(
    weights: dict[str, np.ndarray], rows: np.ndarray, values: np.ndarray, is_hidden: np.ndarray, lat: str = "clean"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One cell through the token model.

    Returns
    -------
    hidden
        ``(L + 1, D)`` final hidden states, the latent token first.
    gene_logits, values
        ``(L, V)`` and ``(L,)``: the two heads on positions 1 to L.
    """
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    token = []
    for row, value in zip(rows, values, strict=True):
        hidden = relu(w["value_encoder.0.weight"][:, 0] * float(value) + w["value_encoder.0.bias"])
        token.append(w["gene_embedding.weight"][row] + w["value_encoder.2.weight"] @ hidden + w["value_encoder.2.bias"])
    width = w["final_norm.weight"].size
    pooled = [x for x, hide in zip(token, is_hidden, strict=True) if lat == "clean" or not hide]
    mean = np.mean(pooled, axis=0) if pooled else np.zeros(width)
    latent = w["latent_encoder.mlp.0.weight"] @ mean + w["latent_encoder.mlp.0.bias"]
    latent = (latent - latent.mean()) / np.sqrt(latent.var() + 1e-5)
    latent = relu(latent * w["latent_encoder.mlp.1.weight"] + w["latent_encoder.mlp.1.bias"])
    latent = w["latent_encoder.mlp.3.weight"] @ latent + w["latent_encoder.mlp.3.bias"]
    mask = w["gene_mask_emb"] + w["value_mask_emb"]
    x = [latent]
    x += [w["input_proj.weight"] @ (mask if hide else t) for t, hide in zip(token, is_hidden, strict=True)]
    x = np.array(x)
    n_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for i in range(n_layers):
        x = block(x, w, f"layers.{i}.", np.arange(len(x)))
    x = np.array([rms_norm(row, w["final_norm.weight"]) for row in x])
    logits = x[1:] @ w["gene_head.weight"].T
    predicted = [
        (w["value_head.2.weight"] @ relu(w["value_head.0.weight"] @ h + w["value_head.0.bias"]))[0]
        + w["value_head.2.bias"][0]
        for h in x[1:]
    ]
    return x, logits, np.array(predicted)


def dense_model(weights: dict[str, np.ndarray], values: np.ndarray) -> tuple[np.ndarray, ...]:
    """One cell ``(V,)`` through the dense model: mean, log-variance, class logits, reconstructed expression."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["gene_embedding.gene_projection.weight"] @ values.astype(np.float64)
    x = rms_norm(x + w["gene_embedding.gene_projection.bias"], w["gene_embedding.layer_norm.weight"])[None]
    n_layers = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("encoder.layers."))
    for i in range(n_layers):
        x = block(x, w, f"encoder.layers.{i}.", np.zeros(1))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    mu, logvar = linear(x[0], "variational_layer.mu_projection"), linear(x[0], "variational_layer.logvar_projection")
    logits = linear(gelu(linear(mu, "annotation_head.dense")), "annotation_head.classifier")
    expression = linear(gelu(linear(mu, "batch_integration_head.dense")), "batch_integration_head.decoder")
    return mu, logvar, logits, expression


def block(x: np.ndarray, w: dict[str, np.ndarray], prefix: str, position: np.ndarray) -> np.ndarray:
    """A pre-norm layer, head by head, query by query."""
    normed = np.array([rms_norm(row, w[prefix + "norm1.weight"]) for row in x])
    q, k, v = (normed @ w[f"{prefix}attn.{name}_proj.weight"].T for name in "qkv")
    attended = np.zeros_like(x)
    for start in range(0, x.shape[1], HEAD_WIDTH):
        head = slice(start, start + HEAD_WIDTH)
        queries = [rotated(row, p) for row, p in zip(q[:, head], position, strict=True)]
        keys = [rotated(row, p) for row, p in zip(k[:, head], position, strict=True)]
        for i, query in enumerate(queries):
            score = np.array([query @ key for key in keys]) / np.sqrt(HEAD_WIDTH)
            share = np.exp(score - score.max())
            attended[i, head] = (share / share.sum()) @ v[:, head]
    x = x + attended @ w[prefix + "attn.o_proj.weight"].T
    normed = np.array([rms_norm(row, w[prefix + "norm2.weight"]) for row in x])
    gate, up = normed @ w[prefix + "mlp.gate_proj.weight"].T, normed @ w[prefix + "mlp.up_proj.weight"].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ w[prefix + "mlp.down_proj.weight"].T


def rotated(x: np.ndarray, position: float) -> np.ndarray:
    """RoPE, rotate-half: dimension i turns with dimension i + half, by position / 10000^(2 i / width)."""
    half = x.size // 2
    out = x.copy()
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / x.size)
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Divide by the root of the mean square (eps 1e-5)."""
    return x / np.sqrt((x**2).mean() + 1e-5) * gain


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0)."""
    return np.maximum(x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function."""
    return np.array([value * 0.5 * (1 + erf(value / np.sqrt(2))) for value in x])

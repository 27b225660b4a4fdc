"""GLM-5 in float64 numpy, one token at a time: slow, short, and independent of the package.

It works on published tensor names, computes attention with expanded per-head keys and loops over
tokens and experts, so that it shares neither layout nor algorithm with the code under test.
"""

from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, axis=-1, keepdims=True) + 1e-6) * scale + bias


def rotate(x: np.ndarray, position: int, theta: float, interleaved: bool = True) -> np.ndarray:
    """Turns the last axis at one position, each pair as a complex number, in place."""
    half = x.shape[-1] // 2
    pairs = [(2 * j, 2 * j + 1) if interleaved else (j, j + half) for j in range(half)]
    out = np.empty_like(x)
    for j, (a, b) in enumerate(pairs):
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * position * theta ** (-j / half))
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray, w: Weights, prefix: str) -> np.ndarray:
    gate, up, down = (w[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (silu(gate @ x) * (up @ x))


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def select(scores: np.ndarray, count: int) -> np.ndarray:
    """The positions of the highest scores, the first of equal ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


class Layer:
    """One decoder layer; `run` takes a whole sequence and returns it with its selections."""

    attends_to_all = False  # whatever is selected

    def __init__(self, w: Weights, prefix: str, config: dict[str, Any], full: bool, moe: bool):
        self.w = {name[len(prefix) :]: x for name, x in w.items() if name.startswith(prefix)}
        self.prefix = prefix
        self.config = config
        self.full = full
        self.moe = moe

    def run(
        self, xs: np.ndarray, positions: np.ndarray, selections: list[np.ndarray] | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        w, eps = self.w, self.config["rms_norm_eps"]
        normed = [rms_norm(x, w["input_layernorm.weight"], eps) for x in xs]
        attended, selections = self.attend(normed, positions, selections)
        xs = xs + attended
        normed = [rms_norm(x, w["post_attention_layernorm.weight"], eps) for x in xs]
        mlp = self.experts if self.moe else lambda x: swiglu(x, w, "mlp.")
        return xs + np.stack([mlp(x) for x in normed]), selections

    def attend(
        self, xs: list[np.ndarray], positions: np.ndarray, selections: list[np.ndarray] | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        w, c = self.w, self.config
        heads, nope, rope = (
            c["num_attention_heads"],
            c["qk_nope_head_dim"],
            c["qk_rope_head_dim"],
        )
        value, rank = c["v_head_dim"], c["kv_lora_rank"]
        theta, eps = c["rope_parameters"]["rope_theta"], c.get("mla_norm_eps", 1e-5)
        latents = [
            rms_norm(w["self_attn.q_a_proj.weight"] @ x, w["self_attn.q_a_layernorm.weight"], eps)
            for x in xs
        ]
        keys, values = [], []
        for x, position in zip(xs, positions, strict=True):
            row = w["self_attn.kv_a_proj_with_mqa.weight"] @ x
            latent = rms_norm(row[:rank], w["self_attn.kv_a_layernorm.weight"], eps)
            up = (w["self_attn.kv_b_proj.weight"] @ latent).reshape(heads, nope + value)
            turned = np.tile(rotate(row[rank:], position, theta), (heads, 1))
            keys.append(np.concatenate([up[:, :nope], turned], axis=1))
            values.append(up[:, nope:])
        if self.full:
            selections = self.index(xs, latents, positions)
        assert selections is not None
        outputs = []
        for t, latent in enumerate(latents):
            query = (w["self_attn.q_b_proj.weight"] @ latent).reshape(heads, nope + rope)
            query[:, nope:] = rotate(query[:, nope:], positions[t], theta)
            out = np.zeros((heads, value))
            attended_to = range(t + 1) if self.attends_to_all else selections[t]
            for head in range(heads):
                scores = np.array([query[head] @ keys[s][head] for s in range(t + 1)])
                scores = scores * (nope + rope) ** -0.5
                self.watch(t, softmax(scores), selections[t])
                probs = softmax(scores[attended_to])
                out[head] = sum(
                    p * values[s][head] for p, s in zip(probs, attended_to, strict=True)
                )
            outputs.append(w["self_attn.o_proj.weight"] @ out.reshape(-1))
        return np.stack(outputs), selections

    def watch(self, t: int, probs: np.ndarray, selection: np.ndarray) -> None:
        """Told of every head what it pays to all tokens up to t, and which are selected."""

    def index(
        self, xs: list[np.ndarray], latents: list[np.ndarray], positions: np.ndarray
    ) -> list[np.ndarray]:
        return [
            select(scores, self.config["index_topk"])
            for scores in self.index_scores(xs, latents, positions)
        ]

    def index_scores(
        self, xs: list[np.ndarray], latents: list[np.ndarray], positions: np.ndarray
    ) -> list[np.ndarray]:
        """For every token the scores of the tokens up to itself."""
        c, prefix = self.config, "self_attn.indexer."
        w = {name[len(prefix) :]: x for name, x in self.w.items() if name.startswith(prefix)}
        heads, dim, rope = c["index_n_heads"], c["index_head_dim"], c["qk_rope_head_dim"]

        def turn(x: np.ndarray, position: int) -> np.ndarray:
            theta, interleaved = (
                c["rope_parameters"]["rope_theta"],
                c.get("indexer_rope_interleave", True),
            )
            front = rotate(x[..., :rope], position, theta, interleaved)
            return np.concatenate([front, x[..., rope:]], axis=-1)

        keys = [
            turn(layer_norm(w["wk.weight"] @ x, w["k_norm.weight"], w["k_norm.bias"]), position)
            for x, position in zip(xs, positions, strict=True)
        ]
        rows = []
        for t, (x, latent) in enumerate(zip(xs, latents, strict=True)):
            query = turn((w["wq_b.weight"] @ latent).reshape(heads, dim), positions[t])
            gates = w["weights_proj.weight"] @ x * heads**-0.5
            dots = np.maximum(query @ np.stack(keys[: t + 1]).T * dim**-0.5, 0)
            rows.append(gates @ dots)
        return rows

    def route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chosen experts of one token and their gates."""
        w, c = self.w, self.config
        scores = 1 / (1 + np.exp(-(w["mlp.gate.weight"] @ x)))
        ranked = scores + w["mlp.gate.e_score_correction_bias"]
        num_groups = c.get("n_group", 1)
        if num_groups > 1:
            groups = ranked.reshape(num_groups, -1)
            best = select(np.sort(groups, axis=1)[:, -2:].sum(axis=1), c["topk_group"])
            allowed = np.repeat(np.isin(np.arange(num_groups), best), groups.shape[1])
            ranked = np.where(allowed, ranked, -np.inf)
        chosen = select(ranked, c["num_experts_per_tok"])
        gates = scores[chosen]
        if c.get("norm_topk_prob", True):
            gates = gates / gates.sum()
        return chosen, gates * c["routed_scaling_factor"]

    def experts(self, x: np.ndarray) -> np.ndarray:
        chosen, gates = self.route(x)
        y = swiglu(x, self.w, "mlp.shared_experts.")
        for expert, gate in zip(chosen, gates, strict=True):
            y = y + gate * swiglu(x, self.w, f"mlp.experts.{expert}.")
        return y


class NumpyGlm5:
    """The model over one sequence, and its MTP layer."""

    def __init__(self, weights: Weights, config: dict[str, Any]):
        self.w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
        self.config = config
        self.layers = [
            Layer(self.w, f"model.layers.{i}.", config, kind == "full", mlp == "sparse")
            for i, (kind, mlp) in enumerate(
                zip(config["indexer_types"], config["mlp_layer_types"], strict=True)
            )
        ]

    def hidden(self, ids: list[int]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Hidden states after the final norm, and the selections of every layer."""
        xs = self.w["model.embed_tokens.weight"][ids]
        positions, selections, all_selections = np.arange(len(ids)), None, []
        for layer in self.layers:
            xs, selections = layer.run(xs, positions, selections)
            all_selections.append(selections)
        eps = self.config["rms_norm_eps"]
        return rms_norm(xs, self.w["model.norm.weight"], eps), all_selections

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.hidden(ids)[0] @ self.w["lm_head.weight"].T

    def mtp_logits(self, ids: list[int], depth: int) -> list[np.ndarray]:
        """For each depth d logits [len(ids) - d, vocabulary]; row i predicts token i + 1 + d."""
        prefix, eps = f"model.layers.{len(self.layers)}.", self.config["rms_norm_eps"]
        layer = Layer(self.w, prefix, self.config, full=True, moe=True)
        hidden, _ = self.hidden(ids)
        results = []
        for d in range(1, depth + 1):
            embedded = self.w["model.embed_tokens.weight"][ids[d:]]
            hidden = hidden[: len(embedded)]
            joined = np.concatenate(
                [
                    rms_norm(embedded, layer.w["enorm.weight"], eps),
                    rms_norm(hidden, layer.w["hnorm.weight"], eps),
                ],
                axis=1,
            )
            out, _ = layer.run(joined @ layer.w["eh_proj.weight"].T, np.arange(len(embedded)), None)
            hidden = rms_norm(out, layer.w["shared_head.norm.weight"], eps)
            results.append(hidden @ self.w["lm_head.weight"].T)
        return results

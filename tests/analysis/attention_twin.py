"""The naive twin of the attention statistics: plain loops in float64 over the maps of eager attention."""

import math

import numpy as np
import torch


def eager_maps(model, **inputs):
    """Attention maps `(L, B, H, S, S)` and norms of the values `(L, B, H, S)`, both float64."""
    if model.config.model_type != "bert":
        # With a cache transformers does not look for texts packed into one row.
        inputs["use_cache"] = False
    own = model.config._attn_implementation
    values = []
    projections = [
        module for name, module in model.named_modules() if name.endswith(("v_proj", "self.value", "value_states"))
    ]
    hooks = [module.register_forward_hook(lambda _, __, out: values.append(out)) for module in projections]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model.base_model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(own)
        for hook in hooks:
            hook.remove()
    maps = torch.stack(output.attentions).double()
    heads, width = maps.shape[2], None
    norms = []
    for value in values:
        size = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
        width = value.shape[-1] // size
        split = value.double().unflatten(-1, (width, size)).norm(dim=-1).transpose(1, 2)
        norms.append(split.repeat_interleave(heads // width, dim=1))
    return maps.numpy(), torch.stack(norms).numpy()


def entropy(weights):
    return -sum(float(p) * math.log(p) for p in weights if p > 0)


def text_statistics(maps, norms, row, positions, categories, num_categories):
    """
    Every number of one text from its own map.

    `positions` are the columns of its tokens in the row, first token first; `categories` their categories.
    """
    layers, _, heads, _, _ = maps.shape
    size = len(positions)
    found = {
        name: np.zeros((layers, heads)) for name in ("entropy", "entropy_rest", "sink", "value_sink", "head_distance")
    }
    found |= {name: np.zeros((layers, heads, num_categories)) for name in ("mass", "value_mass")}
    found["received"] = np.zeros((layers, heads, size))
    found["distance"] = [[{} for _ in range(heads)] for _ in range(layers)]
    found["rollout"] = np.zeros((layers, num_categories))
    rolled = np.eye(size)
    queries = None
    for layer in range(layers):
        square = [maps[layer, row, head][np.ix_(positions, positions)] for head in range(heads)]
        rolled = (0.5 * np.eye(size) + 0.5 * np.mean(square, axis=0)) @ rolled
        queries = [q for q in range(size) if sum(square[0][q, k] > 0 for k in range(1, size)) >= 2]
        for q in queries:
            rests = []
            for head in range(heads):
                line = square[head][q]
                keys = [k for k in range(1, size) if line[k] > 0]
                rest = {k: line[k] / sum(line[j] for j in keys) for k in keys}
                rests.append([rest.get(k, 0.0) for k in range(size)])
                seen = len(keys) + (line[0] > 0)
                weight = 1 / len(queries)
                found["entropy"][layer, head] += weight * entropy(line) / math.log(seen)
                found["entropy_rest"][layer, head] += weight * entropy(rest.values()) / math.log(len(keys))
                found["sink"][layer, head] += weight * line[0]
                value = norms[layer, row, head][positions]
                found["value_sink"][layer, head] += weight * line[0] * value[0] / float(line @ value)
                total = sum(rest[k] * value[k] for k in keys)
                for k in keys:
                    found["mass"][layer, head, categories[k]] += weight * rest[k]
                    found["value_mass"][layer, head, categories[k]] += weight * rest[k] * value[k] / total
                    found["received"][layer, head, k] += rest[k]
                    by_distance = found["distance"][layer][head]
                    by_distance[q - k] = by_distance.get(q - k, 0.0) + rest[k]
            for head in range(heads):
                others = [other for other in range(heads) if other != head]
                for other in others:
                    middle = [(a + b) / 2 for a, b in zip(rests[head], rests[other])]
                    divergence = entropy(middle) - (entropy(rests[head]) + entropy(rests[other])) / 2
                    found["head_distance"][layer, head] += divergence / math.log(2) / len(others) / len(queries)
            shares = np.array(
                [sum(rolled[q, k] for k in range(1, size) if categories[k] == c) for c in range(num_categories)]
            )
            found["rollout"][layer] += shares / shares.sum() / len(queries)
    found["queries"] = len(queries)
    return found

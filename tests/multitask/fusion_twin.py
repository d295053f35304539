"""
Attention fusion a second time, in float64 and by loops over rows, tasks, heads and tokens, and small models for it.

Written from the definition alone. Symbols: T tasks, H hidden size, k `fusion_dim`, h heads of the fusion, d = k / h,
t the row's task, v_i its pooled vector by LoRA i, u_i what LoRA i adds in one linear to one token.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_curriculum.multitask.attention_fusion import AttentionFusionConfig, AttentionFusionModel
from hf_curriculum.multitask.attention_fusion.task_loras import task_lora_layers
from hf_curriculum.multitask.task_head import TaskHead


VOCABULARY = 48
HEADS = {"topic": TaskHead(3), "mood": TaskHead(5), "tags": TaskHead(4, "multi_label_classification")}
# A batch of five rows.
TASKS = [0, 1, 2, 1, 0]
LABELS = torch.tensor(
    [[2.0, -100, -100, -100], [4, -100, -100, -100], [1, 0, 0, 1], [0, -100, -100, -100], [1, -100, -100, -100]]
)


@dataclass
class LoRA:
    """One LoRA of one linear: A (r, d_in), B (d_out, r), and what B A is multiplied by."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


@dataclass
class Fusion:
    """Leaves of one fusion: of the model (output level), or of one linear (layer level)."""

    W_q: torch.Tensor
    W_k: torch.Tensor
    W_v: torch.Tensor
    W_o: torch.Tensor
    E_q: torch.Tensor
    E_k: torch.Tensor
    heads: int

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("W_q", "W_k", "W_v", "W_o", "E_q", "E_k")}


@dataclass
class Parts:
    """All that a fused model is made of, as float64 leaves."""

    base: nn.Module
    loras: dict[str, list[LoRA]]  # by the name of the linear, one for each task
    fusions: dict[str, Fusion]  # by the name of the linear, or "" at the output level
    weight: torch.Tensor  # (C_1 + ... + C_T, H)
    bias: torch.Tensor
    heads: list[tuple[int, str, float]]  # outputs, problem type, scale of the targets
    pooling: str
    class_weights: list[list[float] | None] = field(default_factory=list)

    def leaves(self) -> dict[str, torch.Tensor]:
        found = {"classifier.weight": self.weight, "classifier.bias": self.bias}
        for linear, loras in self.loras.items():
            for task, lora in enumerate(loras):
                found[f"lora.{linear}.{task}.A"] = lora.A
                found[f"lora.{linear}.{task}.B"] = lora.B
        for linear, fusion in self.fusions.items():
            found |= {f"fusion.{linear}.{name}": value for name, value in fusion.leaves().items()}
        return found


def leaf(value: torch.Tensor) -> torch.Tensor:
    """A copy in float64 that is a leaf of a graph of its own."""
    return value.detach().clone().double().requires_grad_()


# ------------------------------------------------------------------ attention over tasks


def softmax(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    largest = max(float(score) for score in scores)
    powers = [torch.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def attend(
    queries: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    heads: int,
    listened: Sequence[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Query (k,), keys and values T of (k,) -> what was heard (k,), and T numbers: the attention, mean over heads."""
    width = len(queries) // heads
    heard, attention = [], [torch.zeros((), dtype=torch.float64) for _ in keys]
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = [sum(queries[own] * keys[i][own]) / math.sqrt(width) for i in listened]
        weights = softmax(scores)
        heard.append(sum(weight * values[i][own] for weight, i in zip(weights, listened, strict=True)))
        for weight, i in zip(weights, listened, strict=True):
            attention[i] = attention[i] + weight / heads
    return torch.cat(heard), attention


def layer_norm(vector: torch.Tensor) -> torch.Tensor:
    centred = vector - sum(vector) / len(vector)
    return centred / torch.sqrt(sum(centred * centred) / len(vector) + 1e-5)


def root_mean_square_norm(vector: torch.Tensor) -> torch.Tensor:
    return vector / torch.sqrt(sum(vector * vector) / len(vector) + 1e-6)


def fuse_pooled(
    pooled: Sequence[torch.Tensor], task: int, fusion: Fusion, listened: Sequence[int] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One row at the output level: T pooled vectors (H,) -> fused (H,), attention T."""
    listened = range(len(pooled)) if listened is None else listened
    normed = [layer_norm(vector) for vector in pooled]
    queries = fusion.W_q @ normed[task] + fusion.E_q[task]
    keys = [fusion.W_k @ vector + fusion.E_k[i] for i, vector in enumerate(normed)]
    values = [fusion.W_v @ vector for vector in normed]
    heard, attention = attend(queries, keys, values, fusion.heads, listened)
    return pooled[task] + fusion.W_o @ heard, attention


def fuse_token(
    x: torch.Tensor, loras: Sequence[LoRA], task: int, fusion: Fusion, listened: Sequence[int] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One token in one linear at the layer level: x (d_in,) -> what is added to W x (d_out,), attention T."""
    listened = range(len(loras)) if listened is None else listened
    added = [lora.scale * (lora.B @ (lora.A @ x)) for lora in loras]
    normed = [root_mean_square_norm(vector) for vector in added]
    queries = fusion.W_q @ normed[task] + fusion.E_q[task]
    keys = [fusion.W_k @ vector + fusion.E_k[i] for i, vector in enumerate(normed)]
    values = [fusion.W_v @ vector for vector in added]
    heard, attention = attend(queries, keys, values, fusion.heads, listened)
    return added[task] + fusion.W_o @ heard, attention


# ------------------------------------------------------------------ whole models


def pool_row(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Hidden states of one row (S, H) and its mask (S,) -> (H,)."""
    kept = [vector for vector, here in zip(hidden, mask.tolist(), strict=True) if here]
    if pooling == "cls":
        return kept[0]
    return kept[-1] if pooling == "last" else sum(kept) / len(kept)


def call_base(
    base: nn.Module, inputs: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Last hidden states of the stock model with some of its parameters exchanged."""
    return torch.func.functional_call(base, dict(changed), kwargs=dict(inputs)).last_hidden_state


def merged_weights(parts: Parts, task: int) -> dict[str, torch.Tensor]:
    """W + s B A of every adapted linear; a `Conv1D` holds its weight transposed."""
    found = {}
    for linear, loras in parts.loras.items():
        module = parts.base.get_submodule(linear)
        change = loras[task].scale * (loras[task].B @ loras[task].A)
        found[f"{linear}.weight"] = module.weight + (change.T if isinstance(module, Conv1D) else change)
    return found


def pooled_by(parts: Parts, inputs: Mapping[str, torch.Tensor], task: int) -> list[torch.Tensor]:
    """Pooled vectors (H,) of all rows by the LoRA of one task: one pass of the stock model with merged weights."""
    hidden = call_base(parts.base, inputs, merged_weights(parts, task))
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))
    return [pool_row(states, row_mask, parts.pooling) for states, row_mask in zip(hidden, mask, strict=True)]


class LoopLinear(nn.Module):
    """A linear whose tokens are fused one by one."""

    def __init__(self, linear: nn.Module, loras: list[LoRA], fusion: Fusion, listened: Sequence[int] | None) -> None:
        super().__init__()
        self.linear, self.loras, self.fusion, self.listened = linear, loras, fusion, listened
        self.tasks: list[int] = []
        self.attention: list[list[list[torch.Tensor]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, task in zip(x, self.tasks, strict=True):
            fused = [fuse_token(token, self.loras, task, self.fusion, self.listened) for token in row]
            rows.append(torch.stack([added for added, _ in fused]))
            self.attention.append([weights for _, weights in fused])
        return self.linear(x) + torch.stack(rows)


def fuse_layers(
    parts: Parts, inputs: Mapping[str, torch.Tensor], tasks: Sequence[int], listened: Sequence[int] | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The layer level: pooled vectors (H,) of all rows, and attention (B, T)."""
    base = copy.deepcopy(parts.base)
    loops = []
    for linear, loras in parts.loras.items():
        loop = LoopLinear(base.get_submodule(linear), loras, parts.fusions[linear], listened)
        loop.tasks = list(tasks)
        base.set_submodule(linear, loop)
        loops.append(loop)
    hidden = base(**inputs).last_hidden_state
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))
    pooled = [pool_row(states, row_mask, parts.pooling) for states, row_mask in zip(hidden, mask, strict=True)]
    attention = []
    for row, row_mask in enumerate(mask.tolist()):
        of_linears = []
        for loop in loops:
            kept = [torch.stack(weights) for weights, here in zip(loop.attention[row], row_mask, strict=True) if here]
            of_linears.append(sum(kept) / len(kept))
        attention.append(sum(of_linears) / len(of_linears))
    return pooled, torch.stack(attention)


def row_loss(parts: Parts, logits: torch.Tensor, label: Sequence[float], task: int) -> torch.Tensor | None:
    """Loss of one row in units of a guess; None without a label."""
    size, kind, scale = parts.heads[task]
    if label[0] == -100:
        return None
    if kind == "regression":
        return sum((logits[j] - label[j]) ** 2 for j in range(size)) / size / scale**2
    if kind == "multi_label_classification":
        terms = [F.softplus(logits[j]) - label[j] * logits[j] for j in range(size)]
        return sum(terms) / size / math.log(2)
    return (torch.logsumexp(logits, 0) - logits[int(label[0])]) / math.log(size)


@dataclass
class Outcome:
    """What the twin computes of a batch: logits of each row's own classes, attention (B, T) or None, and the loss."""

    logits: list[torch.Tensor]
    attention: torch.Tensor | None
    loss: torch.Tensor | None
    pooled: list[torch.Tensor]


def run(
    parts: Parts,
    inputs: Mapping[str, torch.Tensor],
    tasks: Sequence[int],
    labels: torch.Tensor | None = None,
    *,
    stage: str = "joint",
    level: str = "output",
    listened: Sequence[int] | None = None,
) -> Outcome:
    """A whole batch by loops. `listened` are the tasks that may be heard, all by default."""
    attention = None
    if stage == "tasks":
        by_task = {task: pooled_by(parts, inputs, task) for task in set(tasks)}
        vectors = [by_task[task][row] for row, task in enumerate(tasks)]
    elif level == "layer":
        vectors, attention = fuse_layers(parts, inputs, tasks, listened)
    else:
        every = [pooled_by(parts, inputs, task) for task in range(len(parts.heads))]
        fused = [
            fuse_pooled([own[row] for own in every], task, parts.fusions[""], listened)
            for row, task in enumerate(tasks)
        ]
        vectors = [vector for vector, _ in fused]
        attention = torch.stack([torch.stack(weights) for _, weights in fused])
    starts = [sum(size for size, _, _ in parts.heads[:task]) for task in range(len(parts.heads) + 1)]
    logits = []
    for vector, task in zip(vectors, tasks, strict=True):
        own = slice(starts[task], starts[task + 1])
        logits.append(parts.weight[own] @ vector + parts.bias[own])
    loss = None
    if labels is not None:
        columns = labels[:, None] if labels.dim() == 1 else labels
        losses = [
            row_loss(parts, row, label, task) for row, label, task in zip(logits, columns.tolist(), tasks, strict=True)
        ]
        counted = [value for value in losses if value is not None]
        loss = sum(counted) / len(counted)
    return Outcome(logits, attention, loss, vectors)


# ------------------------------------------------------------------ small models

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 8}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# Kind -> (class of the config, its fields, class of the model, adapted linears, pooling by default).
KINDS: dict[str, tuple[str, dict[str, object], str, list[str], str]] = {
    "bert": ("BertConfig", {**_ENCODER, **_QUIET}, "BertModel", ["query", "value", "output.dense"], "mean"),
    "roberta": ("RobertaConfig", {**_ENCODER, **_QUIET}, "RobertaModel", ["query", "value"], "mean"),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "DistilBertModel",
        ["q_lin", "v_lin", "lin1"],
        "mean",
    ),
    "mpnet": ("MPNetConfig", {**_ENCODER, **_QUIET}, "MPNetModel", ["q", "v"], "mean"),
    "modernbert": (
        "ModernBertConfig",
        {
            **_ENCODER,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "ModernBertModel",
        ["Wqkv", "Wo"],
        "mean",
    ),
    "deberta-v2": (
        "DebertaV2Config",
        {**_ENCODER, **_QUIET, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "DebertaV2Model",
        ["query_proj", "value_proj"],
        "mean",
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_inner": 24,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 40,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        "GPT2Model",
        ["c_attn", "c_fc"],
        "last",
    ),
    "llama": ("LlamaConfig", _DECODER, "LlamaModel", ["q_proj", "v_proj", "down_proj"], "last"),
    "qwen3": ("Qwen3Config", _DECODER, "Qwen3Model", ["q_proj", "o_proj"], "last"),
    "gemma3": (
        "Gemma3TextConfig",
        {**_DECODER, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "Gemma3TextModel",
        ["q_proj", "v_proj"],
        "last",
    ),
}


def base_model(kind: str = "bert", seed: int = 1, **fields: object) -> nn.Module:
    """A small model without head, in evaluation mode."""
    config_class, sizes, model_class, _, _ = KINDS[kind]
    options = {"add_pooling_layer": False} if kind in ("bert", "roberta", "mpnet") else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, config_class)(**{**sizes, **fields})
        return getattr(transformers, model_class)(config, **options).eval()


def lora_config(kind: str = "bert", *, upper: bool = False, **fields: object) -> LoraConfig:
    """On all blocks, or on the second of the two only."""
    if upper:
        # Without a pattern PEFT finds no layers in a model whose names begin with `layers.`.
        pattern = {"gpt2": "h"}.get(
            kind, "layer" if kind in ("bert", "roberta", "distilbert", "mpnet", "deberta-v2") else "layers"
        )
        fields |= {"layers_to_transform": [1], "layers_pattern": pattern}
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": list(KINDS[kind][3]), **fields})


def batch(rows: int = 5, length: int = 6, side: str = "right", seed: int = 5) -> dict[str, torch.Tensor]:
    """Rows of several lengths, the first one full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = [length if row == 0 else max(1, length - (2 * row) % length) for row in range(rows)]
    place = torch.arange(length)
    kept = torch.tensor(lengths)[:, None]
    mask = place < kept if side == "right" else place >= length - kept
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def make(
    kind: str = "bert",
    *,
    level: str = "output",
    stage: str = "joint",
    upper: bool = False,
    random: bool = True,
    heard: bool = True,
    heads: Mapping[str, TaskHead] | None = None,
    base: nn.Module | None = None,
    lora: LoraConfig | None = None,
    seed: int = 3,
    **options: object,
) -> AttentionFusionModel:
    """A fused model in evaluation mode, all that learns drawn at random; with `heard=False` W_o stays zero."""
    config = AttentionFusionConfig(
        heads=dict(HEADS if heads is None else heads),
        level=level,
        lora=lora_config(kind, upper=upper) if lora is None else lora,
        **{"dropout": 0.0, "fusion_dim": 8, "num_attention_heads": 2, **options},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AttentionFusionModel(base_model(kind) if base is None else base, config)
    if random:
        randomise(model, {"lora", "own_classifier"}, seed)
        # The first stage with fusion begins with the heads of the tasks.
        model.set_stage("fusion")
        randomise(model, {"fusion", "classifier"} if heard else {"fusion"}, seed + 1, heard)
    model.set_stage(stage)
    return model.eval()


# ------------------------------------------------------------------ where the model keeps its parts


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Which of base, lora, fusion, classifier (of fused outputs) and own_classifier each parameter is part of."""

    def kind(name: str) -> str:
        parts = name.split(".")
        if "fusion" in parts:
            return "fusion"
        if parts[0] in ("classifier", "own_classifier"):
            return parts[0]
        return "lora" if parts[-1] in ("lora_A", "lora_B") else "base"

    return {name: kind(name) for name, _ in model.named_parameters()}


def fusions_of(model: nn.Module) -> dict[str, nn.Module]:
    """By the name of the linear, or "" at the output level."""
    if model.fusion_config.level == "output":
        return {"": model.fusion}
    return {name: layer.fusion for name, layer in task_lora_layers(model.backbone)}


_FUSION_NAMES = {
    "W_q": "query",
    "W_k": "key",
    "W_v": "value",
    "W_o": "output",
    "E_q": "task_query",
    "E_k": "task_key",
}


@torch.no_grad()
def randomise(model: nn.Module, which: set[str], seed: int = 3, heard: bool = True) -> None:
    """Draws some kinds of parameters; with `heard=False` W_o stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    kinds = kinds_of(model)
    for name, parameter in model.named_parameters():
        silent = not heard and kinds[name] == "fusion" and name.endswith(".output")
        if kinds[name] in which and not silent:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * (0.5 if kinds[name] == "fusion" else 0.3))


@torch.no_grad()
def silence(model: nn.Module) -> None:
    """Sets W_o to zero, as it is before training."""
    for fusion in fusions_of(model).values():
        fusion.output.zero_()


def places_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, object]]:
    """Where the model keeps each leaf of `Parts.leaves`: a parameter and an index into it."""
    heads = model.own_classifier if model.stage == "tasks" else model.classifier
    found = {"classifier.weight": (heads.weight, ...), "classifier.bias": (heads.bias, ...)}
    for linear, layer in task_lora_layers(model.backbone):
        for task in range(len(model.heads)):
            found[f"lora.{linear}.{task}.A"] = (layer.lora_A, task)
            found[f"lora.{linear}.{task}.B"] = (layer.lora_B, task)
    for linear, fusion in fusions_of(model).items():
        found |= {f"fusion.{linear}.{ours}": (getattr(fusion, name), ...) for ours, name in _FUSION_NAMES.items()}
    return found


def parts_of(model: nn.Module) -> Parts:
    """Copies in float64 of all that a model is made of; its base is one without LoRAs."""
    values = {name: leaf(parameter[index]) for name, (parameter, index) in places_of(model).items()}
    base = copy.deepcopy(model.backbone)
    loras = {}
    for linear, layer in list(task_lora_layers(base)):
        scales = layer.scaling.double().tolist()
        base.set_submodule(linear, layer.base_layer)
        loras[linear] = [
            LoRA(values[f"lora.{linear}.{task}.A"], values[f"lora.{linear}.{task}.B"], scale)
            for task, scale in enumerate(scales)
        ]
    fusions = {}
    for linear in fusions_of(model):
        leaves = {ours: values[f"fusion.{linear}.{ours}"] for ours in _FUSION_NAMES}
        fusions[linear] = Fusion(**leaves, heads=model.fusion_config.num_attention_heads)
    return Parts(
        base=clean(base),
        loras=loras,
        fusions=fusions,
        weight=values["classifier.weight"],
        bias=values["classifier.bias"],
        heads=[(head.num_labels, head.problem_type, head.target_scale) for head in model.heads.values()],
        pooling=model.pooling,
    )


def clean(base: nn.Module) -> nn.Module:
    """The stock model: a new one of its class with its weights, so that no hook of the fused model is left."""
    stock = type(base)(base.config)
    stock.load_state_dict(base.state_dict(), strict=False)
    return stock.double().eval().requires_grad_(False)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the leaves that learn."""
    return {
        name: parameter.grad[index].clone()
        for name, (parameter, index) in places_of(model).items()
        if parameter.grad is not None
    }


@torch.no_grad()
def permute_tasks(first: nn.Module, second: nn.Module, order: Sequence[int]) -> None:
    """Gives `second`, whose task j is task `order[j]` of `first`, the parameters of `first`."""
    sizes = [head.num_labels for head in first.heads.values()]
    starts = [sum(sizes[:task]) for task in range(len(sizes))]
    rows = [start for task in order for start in range(starts[task], starts[task] + sizes[task])]
    theirs, ours = places_of(first), places_of(second)
    for name, (parameter, index) in ours.items():
        source = name
        if name.startswith("lora."):
            head, task, matrix = name.rsplit(".", 2)
            source = f"{head}.{order[int(task)]}.{matrix}"
        value, place = theirs[source]
        value = value[place]
        if name.startswith("classifier."):
            value = value[rows]
        elif name.endswith((".E_q", ".E_k")):
            value = value[list(order)]
        parameter[index] = value


def encoded(model: nn.Module, task: str, labels: Sequence[object]) -> torch.Tensor:
    """Labels of one task as a batch has them."""
    return torch.tensor([model.encode_label(task, label) for label in labels])

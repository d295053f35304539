"""The losses of distillation as the formulas say them: float64, whole softmax, one position after the other."""

import torch


def head_logits(hidden, head):
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def kl(p, q):
    """KL(p || q) with 0 log 0 = 0."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p.unbind(), q.unbind()):
        if a > 0:
            total = total + a * (a.log() - b.log())
    return total


def divergence_of(student, teacher, kind, beta):
    """D of two vectors of probabilities."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(teacher, student)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(student, teacher)
    mixture = (1 - beta) * student + beta * teacher
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def buckets(probabilities, indices):
    """The named outcomes and, unless all are named, the rest as one more."""
    others = [token for token in range(len(probabilities)) if token not in indices.tolist()]
    named = probabilities[indices]
    return named if not others else torch.cat([named, probabilities[others].sum().reshape(1)])


def top_k_of(logits, k, temperature):
    """Indices and log-probabilities of the k most likely tokens."""
    log_probs = torch.log_softmax(logits.double() / temperature, dim=-1)
    values, indices = log_probs.sort(dim=-1, descending=True)
    return indices[:, :k], values[:, :k]


def token_losses(student_logits, targets, teacher_logits, alpha, divergence, indices=None):
    """Lists of (1 - alpha) CE + alpha T^2 D, CE, T^2 D, entropy and top-1; with `indices` D is over buckets."""
    temperature = divergence.temperature
    rows = []
    for t in range(len(targets)):
        p = torch.softmax(student_logits[t], dim=-1)
        ce = -torch.log_softmax(student_logits[t], dim=-1)[targets[t]]
        entropy = -(p * p.log()).sum()
        kd = torch.zeros((), dtype=torch.float64)
        if teacher_logits is not None and alpha[t] != 0:
            p_s = torch.softmax(student_logits[t] / temperature, dim=-1)
            p_t = torch.softmax(teacher_logits[t] / temperature, dim=-1)
            if indices is not None:
                p_s, p_t = buckets(p_s, indices[t]), buckets(p_t, indices[t])
            kd = temperature**2 * divergence_of(p_s, p_t, divergence.kind, divergence.beta)
        is_top1 = int(student_logits[t].argmax()) == int(targets[t])
        rows.append(((1 - alpha[t]) * ce + alpha[t] * kd, ce, kd, entropy, torch.tensor(is_top1)))
    return [torch.stack(column) for column in zip(*rows)]


def binary_divergence_of(student_logits, teacher_logits, divergence):
    """Mean over the classes of D between two coins."""
    results = []
    for student, teacher in zip(student_logits.double(), teacher_logits.double()):
        per_class = []
        for z_s, z_t in zip(student, teacher):
            p_s, p_t = (1 / (1 + torch.exp(-z / divergence.temperature)) for z in (z_s, z_t))
            coins = (torch.stack([p, 1 - p]) for p in (p_s, p_t))
            per_class.append(divergence_of(*coins, divergence.kind, divergence.beta))
        results.append(torch.stack(per_class).mean())
    return torch.stack(results)

"""Class weights and thresholds of task heads, and how they and label checks follow from data."""

import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_curriculum.multitask.head_math import HeadLayout, batch_loss, row_losses
from hf_curriculum.multitask.labels import best_thresholds, check_labels, heads_of_labels
from hf_curriculum.multitask.task_head import TaskHead, prediction
from hf_curriculum.multitask.task_losses import ItemLosses, sums_by_task


SINGLE = (0.3, 1.0, 4.0)
SEVERAL = (2.0, 1.0, 0.5, 7.0)
HEADS = (
    TaskHead(3, class_weights=SINGLE),
    TaskHead(4, "multi_label_classification", class_weights=SEVERAL),
    TaskHead(2, "regression", target_scale=2.0),
    TaskHead(2),
)


def batch(heads=HEADS, count=40, seed=0):
    """Logits of all heads (float64, with gradient), labels and tasks of mixed rows; every fifth row has no label."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, sum(head.num_labels for head in heads), dtype=torch.float64, generator=generator)
    tasks = torch.randint(len(heads), (count,), generator=generator)
    labels = torch.full((count, max(head.num_labels for head in heads)), -100.0)
    for row in range(count):
        head = heads[tasks[row]]
        if row % 5 == 4:
            continue
        if head.problem_type == "single_label_classification":
            labels[row, 0] = int(torch.randint(head.num_labels, (), generator=generator))
        elif head.problem_type == "multi_label_classification":
            labels[row, : head.num_labels] = torch.randint(2, (head.num_labels,), generator=generator).float()
        else:
            labels[row, : head.num_labels] = torch.randn(head.num_labels, generator=generator)
    return outputs.requires_grad_(), labels, tasks


def own_rows(heads, outputs, labels, tasks, task):
    """The labelled rows of a task through its own outputs."""
    start = sum(head.num_labels for head in heads[:task])
    mine = (tasks == task) & (labels[:, 0] != -100)
    return outputs[mine, start : start + heads[task].num_labels], labels[mine].double()


def naive_sum(head, scores, wanted):
    """Sum of the losses of rows of one task in units of a guess, with the losses of torch."""
    size = head.num_labels
    if head.problem_type == "regression":
        return F.mse_loss(scores, wanted[:, :size], reduction="none").mean(dim=1).sum() / head.target_scale**2
    weights = torch.tensor(head.class_weights or (1.0,) * size, dtype=torch.float64)
    if head.problem_type == "single_label_classification":
        # Weights of mean 1 over rows that have the classes in a share of 1 / weight.
        shares = (1 / weights) / (1 / weights).sum()
        relative = weights / (shares * weights).sum()
        return F.cross_entropy(scores, wanted[:, 0].long(), weight=relative, reduction="sum") / math.log(size)
    shares = 1 / (1 + weights)
    guess = (shares * weights + (1 - shares)).mean() * math.log(2)
    losses = F.binary_cross_entropy_with_logits(scores, wanted[:, :size], pos_weight=weights, reduction="none")
    return losses.mean(dim=1).sum() / guess


def test_batch_loss_and_its_gradient_are_a_float64_loop_s_over_torch_s_losses():
    outputs, labels, tasks = batch()
    layout = HeadLayout(HEADS)
    found = batch_loss(layout.pick(outputs, tasks), labels, tasks, layout)
    parts = [naive_sum(head, *own_rows(HEADS, outputs, labels, tasks, task)) for task, head in enumerate(HEADS)]
    expected = torch.stack(parts).sum() / (labels[:, 0] != -100).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    ours, theirs = torch.autograd.grad(found, outputs)[0], torch.autograd.grad(expected, outputs)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert ours.abs().sum() > 0


def test_the_weighted_mean_of_a_task_s_rows_is_torch_s_loss_with_weights():
    outputs, labels, tasks = batch()
    layout = HeadLayout(HEADS)
    losses, weights = row_losses(layout.pick(outputs, tasks), labels, tasks, layout)
    assert ((weights > 0) == (labels[:, 0] != -100)).all()
    scores, wanted = own_rows(HEADS, outputs, labels, tasks, 0)
    mine = tasks == 0
    expected = F.cross_entropy(scores, wanted[:, 0].long(), weight=torch.tensor(SINGLE, dtype=torch.float64))
    found = (losses * weights)[mine].sum() / weights[mine].sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    scores, wanted = own_rows(HEADS, outputs, labels, tasks, 1)
    mine = (tasks == 1) & (labels[:, 0] != -100)
    expected = F.binary_cross_entropy_with_logits(
        scores, wanted, pos_weight=torch.tensor(SEVERAL, dtype=torch.float64), reduction="none"
    ).mean(dim=1)
    torch.testing.assert_close(losses[mine].double(), expected, rtol=1e-6, atol=1e-7)
    assert (weights[mine] == 1).all()


def test_logged_losses_of_a_task_are_torch_s_weighted_mean_however_rows_are_batched():
    outputs, labels, tasks = batch()
    layout = HeadLayout(HEADS)
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(40).split(3):
        items = row_losses(layout.pick(outputs[rows], tasks[rows]), labels[rows], tasks[rows], layout)
        sums += sums_by_task(ItemLosses(*(item[:, None] for item in items)), tasks[rows], 4).sum(dim=0)[0]
    scores, wanted = own_rows(HEADS, outputs, labels, tasks, 0)
    expected = F.cross_entropy(scores, wanted[:, 0].long(), weight=torch.tensor(SINGLE, dtype=torch.float64))
    assert float(sums[0] / sums[1]) == pytest.approx(expected.item(), rel=1e-6)


def test_small_batches_add_up_to_a_large_one():
    outputs, labels, tasks = batch(count=48)
    labels[4::5] = labels[:1]  # as many labels in each batch
    tasks[4::5] = tasks[0]
    layout = HeadLayout(HEADS)
    logits = layout.pick(outputs, tasks)
    whole = batch_loss(logits, labels, tasks, layout)
    parts = [batch_loss(logits[rows], labels[rows], tasks[rows], layout) for rows in torch.arange(48).split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("factor", [1e-6, 7.0, 1e6])
def test_only_the_ratios_of_weights_of_single_labels_matter(factor):
    outputs, labels, tasks = batch()
    scaled = (TaskHead(3, class_weights=tuple(factor * weight for weight in SINGLE)), *HEADS[1:])
    found = [
        batch_loss(layout.pick(outputs, tasks), labels, tasks, layout)
        for layout in (HeadLayout(HEADS), HeadLayout(scaled))
    ]
    torch.testing.assert_close(*found)


def test_weights_of_one_change_no_bit():
    outputs, labels, tasks = batch()
    plain = [TaskHead(head.num_labels, head.problem_type, target_scale=head.target_scale) for head in HEADS]
    ones = [TaskHead(3, class_weights=(2.0,) * 3), TaskHead(4, HEADS[1].problem_type, class_weights=(1.0,) * 4)]
    found = []
    for heads in (plain, ones + plain[2:]):
        layout = HeadLayout(heads)
        loss = batch_loss(layout.pick(outputs, tasks), labels, tasks, layout)
        found.append((loss, torch.autograd.grad(loss, outputs)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    layout = HeadLayout(HEADS)
    assert batch_loss(layout.pick(outputs, tasks), labels, tasks, layout) != found[0][0]


def test_a_guess_costs_one_in_every_task_that_its_weights_balance():
    generator = np.random.default_rng(0)
    rare = ["a"] * 90 + ["b"] * 9 + ["c"]
    several = [
        [name for name, share in zip("xyz", (0.02, 0.5, 0.9)) if generator.random() < share] for _ in range(100)
    ]
    several[0] = ["x", "y", "z"]
    names = ["rare", "several"]
    tasks = ["rare"] * 100 + ["several"] * 100
    found = heads_of_labels(names, tasks, rare + several, class_weights="balanced")
    layout = HeadLayout(list(found.values()))
    for task, (labels, classes) in enumerate([(rare, "abc"), (several, "xyz")]):
        ids = torch.full((100,), task)
        wanted = torch.tensor([[float(name in label) for name in classes] for label in labels])
        if task == 0:
            wanted = wanted.argmax(dim=1, keepdim=True).float()
        logits = layout.pick(torch.zeros(100, layout.num_outputs), ids)
        torch.testing.assert_close(batch_loss(logits, wanted, ids, layout), torch.tensor(1.0))
        _, weights = row_losses(logits, wanted, ids, layout)
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_balanced_classes_pull_alike():
    labels = ["a"] * 19 + ["b"]
    head = heads_of_labels(["t"], ["t"] * 20, labels, class_weights="balanced")["t"]
    layout, tasks = HeadLayout([head]), torch.zeros(20, dtype=torch.int64)
    outputs = torch.zeros(20, 2, requires_grad=True)
    wanted = torch.tensor([float(label == "b") for label in labels])
    # A batch of one row at a time: weights that are divided by their sum would do nothing there.
    for row in range(20):
        part = slice(row, row + 1)
        batch_loss(layout.pick(outputs[part], tasks[part]), wanted[part], tasks[part], layout).backward()
    torch.testing.assert_close(outputs.grad.sum(dim=0), torch.zeros(2), rtol=0, atol=1e-6)


def test_rows_without_a_label_do_not_count_and_a_batch_of_them_keeps_its_graph():
    outputs, labels, tasks = batch()
    layout = HeadLayout(HEADS)
    kept = labels[:, 0] != -100
    logits = layout.pick(outputs, tasks)
    torch.testing.assert_close(
        batch_loss(logits, labels, tasks, layout), batch_loss(logits[kept], labels[kept], tasks[kept], layout)
    )
    nothing = batch_loss(logits, torch.full_like(labels, -100), tasks, layout)
    nothing.backward()
    assert nothing == 0
    assert not outputs.grad.any()


def test_the_loss_is_one_graph():
    outputs, labels, tasks = batch()
    layout = HeadLayout(HEADS)

    def loss(outputs, labels, tasks):
        return batch_loss(layout.pick(outputs, tasks), labels, tasks, layout)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)(outputs, labels, tasks)
    torch.testing.assert_close(compiled, loss(outputs, labels, tasks))


def test_tables_follow_the_rows_to_another_device():
    layout = HeadLayout(HEADS)
    tasks = torch.zeros(3, dtype=torch.int64, device="meta")
    logits = layout.pick(torch.zeros(3, layout.num_outputs, device="meta"), tasks)
    assert batch_loss(logits, torch.zeros(3, 4, device="meta"), tasks, layout).device.type == "meta"


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, ["c", "d"]), (0.25, ["b", "c", "d"]), ((0.001, 0.9, 0.999, 0.7), ["a", "d"])],
)
def test_classes_above_their_threshold_are_predicted(threshold, expected):
    head = TaskHead(4, "multi_label_classification", id2label=tuple("abcd"), threshold=threshold)
    probabilities = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    logits = torch.cat([torch.logit(probabilities), torch.tensor([torch.finfo(torch.float64).max])])
    assert prediction(head, logits) == expected


def test_a_probability_equal_to_the_threshold_is_not_above_it():
    head = TaskHead(3, "multi_label_classification")
    tiny = torch.finfo(torch.float32).tiny
    assert prediction(head, torch.tensor([0.0, tiny, -tiny])) == [1]


def test_heads_read_from_json_are_those_written_and_older_ones_have_the_defaults():
    heads = [
        *HEADS,
        TaskHead(2, "multi_label_classification", ("p", "q"), class_weights=(1.0, 3.0), threshold=(0.5, 0.25)),
        TaskHead(2, "multi_label_classification", threshold=0.4),
    ]
    for head in heads:
        read = TaskHead(**json.loads(json.dumps(asdict(head))))
        assert read == head
        assert hash(read) == hash(head)
    old = {"num_labels": 2, "problem_type": "single_label_classification", "id2label": None, "target_scale": 1.0}
    assert TaskHead(**old) == TaskHead(2)


def test_numbers_of_numpy_and_whole_numbers_become_floats():
    head = TaskHead(2, class_weights=np.array([1, 3], dtype=np.float32))
    assert head.class_weights == (1.0, 3.0)
    json.dumps(asdict(head))
    assert TaskHead(2, class_weights=[1, 3]) == head
    assert TaskHead(1, "multi_label_classification", threshold=np.float64(0.25)).threshold == 0.25


SEVERAL_KIND = "multi_label_classification"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TaskHead(3, class_weights=(1.0, 2.0)),
            r"`class_weights`: got \(1.0, 2.0\), expected 3 finite numbers",
        ),
        (lambda: TaskHead(2, class_weights=(1.0, 0.0)), r"expected 2 finite numbers > 0, one for each class"),
        (lambda: TaskHead(2, class_weights=(1.0, -1.0)), r"`class_weights`: got \(1.0, -1.0\)"),
        (lambda: TaskHead(2, class_weights=(1.0, math.nan)), "`class_weights`"),
        (lambda: TaskHead(2, class_weights=(1.0, math.inf)), "`class_weights`"),
        (lambda: TaskHead(2, class_weights=(1.0, True)), "`class_weights`"),
        (lambda: TaskHead(2, class_weights=("a", "b")), "`class_weights`"),
        (lambda: TaskHead(2, class_weights="balanced"), "`class_weights`: got balanced, expected 2 finite numbers"),
        (lambda: TaskHead(2, class_weights=2.0), "`class_weights`: got 2.0"),
        (lambda: TaskHead(1, "regression", class_weights=(1.0,)), "expected None for a regression"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=0.0), r"`threshold`: got 0.0, expected a float in \(0, 1\)"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=1), "`threshold`: got 1,"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=math.nan), "`threshold`: got nan"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=None), "`threshold`: got None"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold="half"), "`threshold`: got half"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=(0.5,)), "or 2 of them, one for each class"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=()), r"`threshold`: got \(\)"),
        (lambda: TaskHead(2, SEVERAL_KIND, threshold=(0.5, 1.5)), r"`threshold`: got \(0.5, 1.5\)"),
        (lambda: TaskHead(2, threshold=0.4), "expected 0.5 except for a multi-label"),
        (lambda: TaskHead(2, "regression", threshold=(0.5, 0.5)), "expected 0.5 except for a multi-label"),
    ],
)
def test_weights_and_thresholds_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_balanced_weights_are_scikit_learn_s():
    labels = ["x"] * 6 + ["y"] * 3 + ["z"]
    head = heads_of_labels(["a"], ["a"] * 10, labels, class_weights="balanced")["a"]
    counts = Counter(labels)
    assert head.class_weights == pytest.approx([10 / (3 * counts[name]) for name in "xyz"])
    assert heads_of_labels(["a"], ["a"] * 10, labels)["a"].class_weights is None
    several = [["x", "x"], ["x", "y"], ["x"], [], None]
    head = heads_of_labels(["a"], ["a"] * 5, several, class_weights="balanced")["a"]
    assert head.class_weights == pytest.approx([1 / 3, 3.0])


def test_classes_that_never_or_always_occur_weigh_one_and_leave_the_others_balanced():
    head = heads_of_labels(["a"], [0] * 4, [3, 0, 0, 0], class_weights="balanced")["a"]
    assert head.class_weights == pytest.approx([4 / (2 * 3), 1.0, 1.0, 4 / 2])
    several = [[0, 3], [0], [0], [0, 3], None]
    head = heads_of_labels(["a"], [0] * 5, several, class_weights="balanced")["a"]
    assert head.class_weights == (1.0, 1.0, 1.0, 1.0)
    assert heads_of_labels(["a"], [0] * 2, [1, 1], class_weights="balanced")["a"].class_weights == (1.0, 1.0)


def test_regressions_have_no_weights_beside_tasks_that_do():
    found = heads_of_labels(["n", "c"], ["n", "c", "n", "c"], [1.0, 0, 3.0, 1], class_weights="balanced")
    assert found == {"n": TaskHead(1, "regression"), "c": TaskHead(2, class_weights=(1.0, 1.0))}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, math.nan], "got nan in row 1, of task a, expected a class by name or id"),
        ([0.5, math.inf], "got inf in row 1"),
        ([0, -1], "got -1 in row 1"),
        ([0, True], "got True in row 1"),
        (["x", ["x"]], r"got \['x'\] in row 1, of task a, expected a label for a single_label_classification"),
        ([["x"], "x"], "got 'x' in row 1, of task a, expected a label for a multi_label_classification"),
        ([0.5, 1], "got 1 in row 1, of task a, expected a label for a regression"),
        ([["x"], [None]], r"got \[None\] in row 1"),
        ([["x"], [0.5]], r"got \[0.5\] in row 1"),
        (["x", 3], "classes by name and by id, of task a"),
        ([[], []], "`num_labels`: got 0"),
    ],
)
def test_labels_that_are_none_are_named_with_their_row(labels, message):
    with pytest.raises(ValueError, match=message):
        heads_of_labels(["a"], ["a"] * 2, labels)


def test_other_ways_to_weigh_are_refused():
    with pytest.raises(ValueError, match="`class_weights`: got sqrt, expected None or 'balanced'"):
        heads_of_labels(["a"], ["a"], ["x"], class_weights="sqrt")


def f1(scores, wanted, threshold):
    found = scores > threshold
    total = int(found.sum() + wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else 0.0


@pytest.mark.parametrize("decimals", [1, 2, 17])
def test_thresholds_beat_every_other_and_are_nearest_to_a_half(decimals):
    generator = np.random.default_rng(decimals)
    scores = generator.random((60, 5)).round(decimals)
    wanted = generator.random((60, 5)) < 0.7 * scores + 0.1
    grid = np.linspace(0.0005, 0.9995, 1000)
    for number, threshold in enumerate(best_thresholds(scores, wanted)):
        column, mine = scores[:, number], wanted[:, number]
        best = f1(column, mine, threshold)
        assert 0 < threshold < 1
        assert best >= max(f1(column, mine, other) for other in grid)
        values = np.unique(np.append(column, 0.0))
        middles = [*(values[:-1] + values[1:]) / 2, 0.5]
        equal = [other for other in middles if 0 < other < 1 and f1(column, mine, other) == best]
        assert abs(threshold - 0.5) == min(abs(other - 0.5) for other in equal)


def test_a_half_stays_where_it_is_as_good_as_any_and_in_degenerate_classes():
    scores = np.array([[0.9, 0.9, 0.1, 0.0], [0.8, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.9]])
    labels = np.array([[1, 1, 0, 1], [1, 1, 0, 1], [0, 1, 0, 0]])
    # The last: rows of probability 0 are above no threshold, so none finds any of its positives.
    assert best_thresholds(scores, labels) == (0.5, 0.5, 0.5, 0.5)
    assert best_thresholds(np.array([[0.2], [0.4], [0.1]]), np.array([[1], [1], [0]])) == pytest.approx((0.15,))
    # All rows are best predicted.
    assert best_thresholds(np.array([[0.2], [0.3], [0.4]]), np.array([[1], [0], [1]])) == (0.1,)


def test_found_thresholds_are_a_head_s_and_predict_what_was_counted():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 3, generator=generator)
    labels = (torch.rand(50, 3, generator=generator) < torch.sigmoid(logits - 2)).numpy()
    thresholds = best_thresholds(torch.sigmoid(logits).numpy(), labels)
    head = TaskHead(3, SEVERAL_KIND, threshold=thresholds)
    assert head.threshold == thresholds
    assert thresholds != (0.5,) * 3
    found = np.array([[number in prediction(head, row) for number in range(3)] for row in logits])
    assert (found == (torch.sigmoid(logits).double().numpy() > np.array(thresholds))).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros(3), np.zeros(3), r"`scores`: got shape \(3,\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), r"`scores`: got shape \(0, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 1)), r"`labels`: got shape \(3, 1\), expected that of the scores, \(3, 2\)"),
        (np.array([[0.5], [1.5]]), np.zeros((2, 1)), "`scores`: got 1.5 in row 1, of class 0"),
        (np.array([[0.5], [math.nan]]), np.zeros((2, 1)), "`scores`: got nan in row 1"),
        (
            np.full((2, 2), 0.5),
            np.array([[0, 1], [1, -100]]),
            "`labels`: got -100 in row 1, of class 1, expected 0 or 1",
        ),
        (np.full((2, 1), 0.5), np.array([[0.0], [math.nan]]), "`labels`: got nan in row 1"),
    ],
)
def test_what_no_threshold_can_be_found_from_is_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        best_thresholds(scores, labels)


MIXED = {"topic": TaskHead(3), "tags": TaskHead(4, SEVERAL_KIND), "score": TaskHead(2, "regression")}
NONE = [-100.0] * 4


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        (0, [math.nan, *NONE[1:]], r"labels \[nan, .*\] in row 2, of task topic, expected a class in \[0, 3\)"),
        (0, [3.0, *NONE[1:]], r"labels \[3.0, .* \(or -100 in the first place: no label"),
        (0, [-1.0, *NONE[1:]], r"labels \[-1.0, .* in row 2"),
        (0, [math.inf, *NONE[1:]], "in row 2, of task topic"),
        (0, [None, *NONE[1:]], r"labels \[None, .*\] in row 2, of task topic"),
        (1, [math.nan, 0.0, 1.0, 0.0], "in row 2, of task tags, expected 4 numbers that are 0 or 1"),
        (1, [1.0, 0.0, math.nan, 0.0], "in row 2, of task tags"),
        (2, [math.nan, 0.0, *NONE[2:]], "in row 2, of task score, expected 2 finite numbers"),
        (2, [0.5, math.nan, *NONE[2:]], "in row 2, of task score"),
        (2, [1.0], r"labels \[1.0\] in row 2 beside \[.*\] in row 0: no table of numbers"),
        (2, None, "labels None in row 2 beside .* no table of numbers"),
    ],
)
def test_nan_missing_and_unknown_labels_are_refused_with_their_row(task, label, message):
    good = [0.0, 1.0, 1.0, 0.0]
    rows = Dataset.from_dict({"labels": [good, NONE, label]})
    with pytest.raises(ValueError, match=f"`rows`: got .*{message}"):
        check_labels(MIXED, rows, np.array([1, 0, task]), "rows")


@pytest.mark.parametrize(
    ("label", "message"),
    [(math.nan, "labels nan in row 1"), (None, "labels None in row 1"), (2, "labels 2 in row 1"), (-1, "labels -1")],
)
def test_nan_missing_and_unknown_labels_of_a_single_column_are_refused(label, message):
    rows = Dataset.from_dict({"labels": [0, label, -100] if isinstance(label, int) else [0.0, label, -100.0]})
    with pytest.raises(ValueError, match=message):
        check_labels({"a": TaskHead(2)}, rows, np.zeros(3, dtype=np.int64), "rows")
    names = Dataset.from_dict({"labels": ["war", "art"]})
    with pytest.raises(ValueError, match="labels 'war' in row 0"):
        check_labels({"a": TaskHead(2)}, names, np.zeros(2, dtype=np.int64), "rows")


def test_labels_as_encoded_and_missing_ones_pass():
    labels = [[2.0, *NONE[1:]], NONE, [0.0, 1.0, 1.0, 0.0], NONE, [0.5, -3.0, *NONE[2:]], NONE]
    check_labels(MIXED, Dataset.from_dict({"labels": labels}), np.array([0, 0, 1, 1, 2, 2]), "rows")

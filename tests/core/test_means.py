import torch

from hf_curriculum.core.means import RunningMeans


def pairs(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_means_are_of_what_was_added_since_the_last_take():
    means = RunningMeans(("a", "b", "c"), torch.device("cpu"))
    means.add("b", torch.tensor(3.0, requires_grad=True), torch.tensor(2))
    means.add("b", torch.tensor(3.0), torch.tensor(1))
    means.add_all(pairs((0.0, 0.0), (0.0, 0.0), (5.0, 1.0)))
    assert means.take() == {"b": 2.0, "c": 5.0}
    assert means.take() == {}


def test_values_that_every_rank_has_are_not_added_up_again():
    means = RunningMeans(("a",), torch.device("cpu"))
    means.add("a", torch.tensor(4.0), torch.tensor(2))
    assert means.take(over_ranks=False) == {"a": 2.0}
    assert means.take() == {}


def test_state_goes_into_a_checkpoint_and_back():
    means = RunningMeans(("a", "b"), torch.device("cpu"))
    means.add_all(pairs((6.0, 3.0), (1.0, 4.0)))
    state = means.state()
    assert state == [[6.0, 3.0], [1.0, 4.0]]
    other = RunningMeans(("a", "b"), torch.device("cpu"))
    other.add("a", torch.tensor(9.0), torch.tensor(9))
    other.restore(state)
    assert other.take() == means.take() == {"a": 2.0, "b": 0.25}
    other.restore(state)
    other.restore(None)
    assert other.take() == {}


def test_large_counts_stay_exact():
    means = RunningMeans(("a",), torch.device("cpu"))
    for _ in range(3):
        means.add("a", torch.tensor(0.0), torch.tensor(2**30 + 1))
    assert means.state() == [[0.0, 3 * (2**30 + 1)]]

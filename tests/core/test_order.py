import numpy as np
import pytest

from hf_curriculum.core.order import draw_order, group_by_length, mix_streams, repeat_order, seeded_order


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 65, 1000])
def test_order_is_a_permutation_and_repeats_for_the_same_key(n):
    order = seeded_order(n, 5, 1)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, seeded_order(n, 5, 1))


def test_order_is_the_one_that_earlier_versions_gave():
    assert seeded_order(10, 0).tolist() == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]
    assert seeded_order(10, 7, -1).tolist() == [5, 1, 7, 3, 4, 2, 9, 8, 6, 0]


def test_order_sorts_the_high_bits_of_raw_draws():
    words = [1, 9, 0]
    draws = np.random.PCG64(np.random.SeedSequence(words)).random_raw(100).tolist()
    naive = sorted(range(100), key=lambda i: (draws[i] >> 7, i))
    assert seeded_order(100, 9).tolist() == naive


def test_keys_that_a_seed_sequence_would_merge_give_different_orders():
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (2**32,), (-1,), (2**32 - 1,), (2**63 - 1,), (-(2**63),)]
    orders = {tuple(seeded_order(50, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("key", [1.0, True, "1", 2**63, None], ids=repr)
def test_key_that_is_no_64_bit_integer_is_refused(key):
    with pytest.raises(ValueError, match=r"Invalid `key`: got .* expected signed 64-bit integers"):
        seeded_order(3, 0, key)


def test_order_neither_reads_nor_moves_the_global_generator():
    np.random.seed(0)  # noqa: NPY002 - the legacy global state is what is being watched
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - as above
    first = mix_streams([seeded_order(5, 1), seeded_order(4, 2)], 3)[0]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002 - as above
    np.random.seed(1)  # noqa: NPY002 - as above
    np.testing.assert_array_equal(first, mix_streams([seeded_order(5, 1), seeded_order(4, 2)], 3)[0])


def test_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"Invalid `n`: got -1"):
        seeded_order(-1)


def test_draws_come_in_whole_passes_that_differ():
    drawn = draw_order(20, 50, 3).reshape(-1, 10)
    first, second = np.concatenate(drawn[:2]), np.concatenate(drawn[2:4])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    assert len(set(drawn[4].tolist())) == 10


def test_drawing_from_nothing_is_refused_unless_nothing_is_drawn():
    assert len(draw_order(0, 0, 1)) == 0
    with pytest.raises(ValueError, match="at least one row, to draw 2 from"):
        draw_order(0, 2, 1)


@pytest.mark.parametrize(("n", "repeats", "count"), [(10, 1, 10), (10, 2.5, 25), (3, 0.5, 2), (10, 0, 0), (0, 3, 0)])
def test_repeats_round_to_whole_rows(n, repeats, count):
    assert len(repeat_order(n, repeats, 1)) == count


@pytest.mark.parametrize("repeats", [-1, float("inf"), float("nan")])
def test_repeats_out_of_range_are_refused(repeats):
    with pytest.raises(ValueError, match="Invalid `repeats`"):
        repeat_order(3, repeats)


def test_mixing_keeps_inner_orders_and_says_where_each_value_came_from():
    streams = [np.array([5, 3, 9, 3]), np.array([], dtype=np.int64), np.array([7, 7, 1])]
    mixed, source = mix_streams(streams, 4)
    for number, stream in enumerate(streams):
        assert mixed[source == number].tolist() == stream.tolist()
    assert len(mixed) == 7


def test_every_interleaving_is_about_equally_likely():
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        source = tuple(mix_streams([np.array([0, 1]), np.array([2, 3])], seed)[1].tolist())
        seen[source] = seen.get(source, 0) + 1
    assert len(seen) == 6
    assert all(150 < count < 250 for count in seen.values())


def test_a_lone_stream_passes_unchanged():
    mixed, source = mix_streams([np.array([], dtype=np.int64), np.array([4, 2, 8])], 1)
    assert mixed.tolist() == [4, 2, 8]
    assert source.tolist() == [1, 1, 1]
    assert len(mix_streams([], 1)[0]) == 0


def naive_groups(indices, lengths, batch_size, group_batches, key):
    indices = indices.tolist()
    stretches = [
        indices[i : i + batch_size * group_batches] for i in range(0, len(indices), batch_size * group_batches)
    ]
    batches = []
    for stretch in stretches:
        stretch.sort(key=lambda row: -lengths[row])
        batches += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
    rest = batches.pop() if batches and len(batches[-1]) < batch_size else []
    drawn = seeded_order(len(batches), *key).tolist()
    order = [b for s in range(len(stretches)) for b in drawn if b // group_batches == s]
    return [row for b in order for row in batches[b]] + rest


@pytest.mark.parametrize("n", [0, 3, 4, 12, 13, 59, 60])
def test_groups_equal_a_loop_over_stretches_and_batches(n):
    rng = np.random.default_rng(n)
    lengths = rng.integers(1, 8, 100)
    indices = rng.permutation(100)[:n]
    grouped = group_by_length(indices, lengths, 4, 2, 0, group_batches=3)
    assert grouped.tolist() == naive_groups(indices, lengths, 4, 3, (2, 0))


def test_grouping_makes_batches_of_like_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 1600)
    spread = np.ptp(lengths[group_by_length(np.arange(1600), lengths, 16, 0)].reshape(-1, 16), axis=1)
    assert np.median(spread) < 0.1 * np.median(np.ptp(lengths.reshape(-1, 16), axis=1))


@pytest.mark.parametrize(("batch_size", "group_batches", "name"), [(0, 1, "batch_size"), (1, 0, "group_batches")])
def test_empty_batches_are_refused(batch_size, group_batches, name):
    with pytest.raises(ValueError, match=f"Invalid `{name}`: got 0"):
        group_by_length(np.arange(3), np.arange(3), batch_size, group_batches=group_batches)

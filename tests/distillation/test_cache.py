import errno
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_curriculum.distillation import cache as cache_module
from hf_curriculum.distillation import cache_writer
from hf_curriculum.distillation.cache import TopKCache, TopKSpec, disk_bytes_per_position, link_or_copy
from hf_curriculum.distillation.cache_writer import TopKPart, TopKWriter, merge_parts, to_half


IDENTITY = {"data": "d1", "plan": "p1", "teacher": "t1", "stage": 1}
SPEC = TopKSpec(k=4, temperature=2.0, vocabulary=50, identity=IDENTITY)
COUNTS = {7: 3, 0: 5, 3: 0, 11: 1, 4: 2, 2**62: 4}


def teacher(spec=SPEC, counts=None, seed=0):
    """Row -> token ids and float64 log-probabilities of the k likeliest, by sorting the whole softmax."""
    rng = np.random.default_rng(seed)
    entries = {}
    for row, count in (COUNTS if counts is None else counts).items():
        scaled = rng.normal(0, 6, (count, spec.vocabulary)) / spec.temperature
        log_probs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        order = np.argsort(-log_probs, axis=1)[:, : spec.columns]
        entries[row] = order, np.take_along_axis(log_probs, order, axis=1)
    return entries


def batch_of(entries, rows):
    indices, log_probs = (np.concatenate([entries[row][part] for row in rows]) for part in (0, 1))
    counts = torch.tensor([len(entries[row][0]) for row in rows])
    return torch.tensor(rows), counts, torch.from_numpy(indices), torch.from_numpy(log_probs)


def write(path, batches, spec=SPEC, entries=None):
    entries = teacher(spec) if entries is None else entries
    with TopKWriter(path, spec) as writer:
        for rows in batches:
            writer.append(*batch_of(entries, rows))
        return writer.finish()


ONE_BY_ONE = [[row] for row in COUNTS]
ALL = list(COUNTS)


@pytest.mark.parametrize("vocabulary", [50, 2**16, 2**16 + 1], ids=["small", "last uint16", "first int32"])
def test_reads_back_what_was_written(tmp_path, vocabulary):
    spec = TopKSpec(4, 0.7, vocabulary, IDENTITY)
    entries = teacher(spec, {5: 3, 9: 2})
    entries[5][0][0, 0] = vocabulary - 1
    cache = write(tmp_path / "cache", [[9, 5]], spec, entries)
    indices, log_probs = cache.rows(np.array([5, 9, 5]), np.array([3, 2, 3]))
    exact = np.concatenate([entries[row][1] for row in (5, 9, 5)])
    assert (indices.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    assert indices.tolist() == np.concatenate([entries[row][0] for row in (5, 9, 5)]).tolist()
    assert (np.abs(log_probs.numpy() - exact) <= 2**-10 * np.abs(exact) + 6e-8).all()
    bytes_here = disk_bytes_per_position(4, vocabulary)
    assert bytes_here == 4 * (4 if vocabulary <= 2**16 else 6)
    assert cache.num_bytes - os.path.getsize(write(tmp_path / "none", [], spec).path) <= 5 * bytes_here + 2 * 16 + 64


def test_rows_come_in_the_order_of_the_batch_with_empty_rows_and_huge_ids(tmp_path):
    entries = teacher()
    cache = write(tmp_path / "cache", ONE_BY_ONE)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.permutation(ALL)[: rng.integers(1, 7)].tolist()
        row_ids, counts, indices, log_probs = batch_of(entries, rows)
        found = cache.rows(row_ids, counts)
        assert torch.equal(found[0], indices)
        torch.testing.assert_close(found[1].double(), log_probs, rtol=2**-10, atol=6e-8)
    for rows in ([], [3], [3, 3]):
        found = cache.rows(np.array(rows, dtype=np.int64), np.zeros(len(rows), dtype=np.int64))
        assert [tuple(tensor.shape) for tensor in found] == [(0, 4), (0, 4)]


def test_file_is_the_same_whatever_the_order_batches_and_repeats(tmp_path):
    files = [
        write(tmp_path / name, batches).path.read_bytes()
        for name, batches in {
            "together": [ALL],
            "backwards": ONE_BY_ONE[::-1],
            "repeated": [ALL, [7, 0], ALL[::-1], [3]],
        }.items()
    ]
    assert files[0] == files[1] == files[2]
    assert write(tmp_path / "less", [ALL[1:]]).path.read_bytes() != files[0]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_of_several_ranks_give_the_file_of_one(tmp_path, monkeypatch, world):
    monkeypatch.setattr(cache_writer, "_MERGE_POSITIONS", 2)  # several pieces, rows that are larger than one
    entries, folders = teacher(), [tmp_path / f"rank-{rank}" for rank in range(world)]
    for rank, folder in enumerate(folders):
        part = TopKPart(folder, SPEC)
        for row in [*ALL[rank::world], ALL[0]]:
            part.append(*batch_of(entries, [row]))
        part.close()
    merge_parts(folders, tmp_path / "merged", SPEC)
    TopKCache.open(tmp_path / "merged", SPEC)
    assert (tmp_path / "merged").read_bytes() == write(tmp_path / "alone", [ALL]).path.read_bytes()


def test_of_a_repeated_row_the_first_one_of_the_lowest_rank_is_kept(tmp_path):
    folders, rows = [tmp_path / "a", tmp_path / "b"], list(range(100))
    counts = dict.fromkeys(rows, 1)
    for folder, seeds in zip(folders, ([1, 2, 3], [0]), strict=True):
        part = TopKPart(folder, SPEC)
        for seed in seeds:
            part.append(*batch_of(teacher(counts=counts, seed=seed), rows))
        part.close()
    merge_parts(folders, tmp_path / "merged", SPEC)
    found, _ = TopKCache(tmp_path / "merged").rows(np.array(rows), np.ones(100, dtype=np.int64))
    assert torch.equal(found, batch_of(teacher(counts=counts, seed=1), rows)[2])


def test_safetensors_library_reads_the_file(tmp_path):
    cache = write(tmp_path / "cache.safetensors", [ALL])
    with safe_open(cache.path, framework="pt") as file:
        assert set(file.keys()) == {"row_ids", "offsets", "indices", "log_probs"}
        assert file.get_tensor("row_ids").tolist() == sorted(COUNTS)
        assert file.get_tensor("offsets").tolist() == [0, *np.cumsum([COUNTS[row] for row in sorted(COUNTS)])]
        assert torch.equal(file.get_tensor("indices").long()[:5], torch.from_numpy(teacher()[0][0]))
        assert file.get_tensor("log_probs").dtype == torch.float16
        spec = json.loads(file.metadata()["spec"])
    assert (spec["k"], spec["temperature"], spec["vocabulary"], spec["identity.teacher"]) == (4, 2.0, 50, "t1")


def test_k_of_the_whole_vocabulary_and_above_keeps_every_token(tmp_path):
    spec = TopKSpec(k=80, temperature=1.0, vocabulary=9)
    entries = teacher(spec, {0: 40})
    indices, log_probs = write(tmp_path / "cache", [[0]], spec, entries).rows(np.array([0]), np.array([40]))
    assert (indices.sort(dim=1).values == torch.arange(9)).all()
    assert (log_probs.exp().sum(dim=1) <= 1 + 1e-6).all()
    assert disk_bytes_per_position(80, 9) == 9 * 4


# Rounding


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_rounding_leaves_room_for_the_tail_and_stays_near(spread):
    exact = torch.log_softmax(spread * torch.randn(2000, 12, dtype=torch.float64), dim=-1)
    rounded = to_half(exact).double()
    nearest = exact.float().half().double()
    assert (nearest.exp().sum(dim=-1) > 1).any()
    assert (rounded.exp().sum(dim=-1) <= 1 + 1e-7).all()
    assert ((rounded - exact).abs() <= 2**-10 * exact.abs() + 6e-8).all()
    fits = nearest.exp().sum(dim=-1) < 1 - 1e-6
    assert torch.equal(rounded[fits], nearest[fits])


def test_rounding_keeps_the_extremes_finite():
    log_probs = torch.tensor([[0.0, -math.inf], [-1e-9, -1e6], [5e-4, -65504.0]])
    rounded = to_half(log_probs)
    assert rounded[:, 1].tolist() == [-65504.0] * 3
    assert (rounded[:, 0] <= 0).all()
    assert (rounded[:, 0] >= -6e-8).all()


@pytest.mark.parametrize("value", [math.nan, 0.5, math.inf])
def test_what_is_no_log_probability_is_refused(value):
    with pytest.raises(ValueError, match="Invalid `log_probs`: got a value that is NaN or above 0"):
        to_half(torch.tensor([[-1.0, value]]))


# What does not fit


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 5}, "k: 4 there, 5 here"),
        ({"temperature": 1.5}, "temperature: 2.0 there, 1.5 here"),
        ({"vocabulary": 51}, "vocabulary: 50 there, 51 here"),
        ({"identity": {**IDENTITY, "data": "d2"}}, r"\(data: d1 there, d2 here\)"),
        ({"identity": {**IDENTITY, "plan": "p2"}}, r"\(plan: p1 there, p2 here\)"),
        ({"identity": {**IDENTITY, "teacher": "t2"}}, r"\(teacher: t1 there, t2 here\)"),
        ({"identity": {**IDENTITY, "stage": 2}}, r"\(stage: 1 there, 2 here\)"),
        ({"identity": {**IDENTITY, "kö": [1]}}, r"\(kö: nothing there, \[1\] here\)"),
        ({"k": 5, "identity": {}}, "data: d1 there, nothing here; .*k: 4 there, 5 here"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_cache_of_something_else_is_refused_by_name(tmp_path, change, named):
    path = write(tmp_path / "cache", [ALL]).path
    with pytest.raises(ValueError, match=f"Invalid `top-k cache`: got a cache of something else .*{named}"):
        TopKCache.open(path, TopKSpec(**{**vars(SPEC), **change}))
    TopKCache.open(path, TopKSpec(**vars(SPEC)))


def test_every_cut_and_every_changed_byte_is_found(tmp_path):
    path = write(tmp_path / "cache", [ALL]).path
    whole = path.read_bytes()
    for length in [0, 5, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Invalid `top-k cache`"):
            TopKCache.open(path, SPEC, verify=False)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{len(whole) + 1} bytes.*expected the {len(whole)} bytes"):
        TopKCache.open(path, SPEC, verify=False)
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="Invalid `"):
            TopKCache.open(path, SPEC)
    path.write_bytes(whole)
    TopKCache.open(path, SPEC)


def test_damage_to_the_values_is_found_by_verification_alone(tmp_path):
    path = write(tmp_path / "cache", [ALL]).path
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    TopKCache.open(path, SPEC, verify=False)
    with pytest.raises(ValueError, match="contents with hash"):
        TopKCache.open(path, SPEC)


def test_file_of_another_kind_and_missing_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Invalid `top-k cache`: got no file"):
        TopKCache.open(tmp_path / "none", SPEC)
    path = tmp_path / "other"
    from safetensors.torch import save_file

    save_file({"row_ids": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="a file whose header cannot be read"):
        TopKCache.open(path, SPEC)


def test_digest_of_a_checkpoint_must_be_the_files(tmp_path):
    cache = write(tmp_path / "cache", [ALL])
    assert TopKCache.open(cache.path, SPEC, digest=cache.digest).digest == cache.digest
    other = write(tmp_path / "other", [ALL], entries=teacher(seed=1))
    assert other.digest != cache.digest
    with pytest.raises(ValueError, match=f"expected the recorded hash {cache.digest}"):
        TopKCache.open(other.path, SPEC, digest=cache.digest)


@pytest.mark.parametrize("row", [-1, 1, 12, 2**62 + 1])
def test_row_that_was_not_written_is_an_error(tmp_path, row):
    cache = write(tmp_path / "cache", [ALL])
    with pytest.raises(ValueError, match=rf"no entry for the rows \[{row}\]"):
        cache.rows(np.array([0, row, 7]), np.array([5, 1, 3]))


def test_empty_cache_has_no_row(tmp_path):
    cache = write(tmp_path / "cache", [])
    assert (cache.num_rows, cache.num_positions) == (0, 0)
    with pytest.raises(ValueError, match=r"no entry for the rows \[0\]"):
        cache.rows(np.array([0]), np.array([0]))


@pytest.mark.parametrize(("counts", "named"), [([5, 2], "3 labelled positions of row 7"), ([0, 3], "5 .*of row 0")])
def test_other_number_of_labelled_positions_is_an_error(tmp_path, counts, named):
    cache = write(tmp_path / "cache", [ALL])
    with pytest.raises(ValueError, match=named):
        cache.rows(np.array([0, 7]), np.array(counts))
    with pytest.raises(ValueError, match="Invalid `counts`"):
        cache.rows(np.array([0, 7]), np.array([5]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({0: torch.tensor([-1, 7])}, "none negative"),
        ({1: torch.tensor([5])}, "two lists as long"),
        ({1: torch.tensor([5, 2])}, r"expected \(7, 4\)"),
        ({2: torch.full((8, 4), 50)}, r"token ids from 50 to 50, expected token ids in \[0, 50\)"),
        ({2: torch.full((8, 4), -1)}, "token ids from -1"),
        ({3: torch.zeros(8, 3)}, r"expected \(8, 4\)"),
        ({3: torch.full((8, 4), 3.0)}, "NaN or above 0"),
    ],
)
def test_batch_that_does_not_fit_is_refused_and_not_half_written(tmp_path, change, named):
    good = batch_of(teacher(), [0, 7])
    with TopKWriter(tmp_path / "cache", SPEC) as writer:
        with pytest.raises(ValueError, match=named):
            writer.append(*(change.get(position, value) for position, value in enumerate(good)))
        writer.append(*good)
        cache = writer.finish()
    assert torch.equal(cache.rows(*good[:2])[0], good[2])


def test_row_written_with_two_lengths_is_an_error(tmp_path):
    with TopKWriter(tmp_path / "cache", SPEC) as writer:
        writer.append(*batch_of(teacher(), ALL))
        writer.append(*batch_of(teacher(counts={7: 2}), [7]))
        with pytest.raises(ValueError, match="3 and 2 labelled positions of row 7"):
            writer.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"identity": {"data": object()}}, "identity"),
        ({"identity": {"data": math.nan}}, "identity"),
    ],
)
def test_spec_out_of_range_is_refused(values, named):
    with pytest.raises(ValueError, match=f"Invalid `{named}`"):
        TopKSpec(**{**vars(SPEC), **values})


# Kills, full disks, ranks that do not see one another


def test_killed_writer_leaves_no_file_and_the_next_one_none_of_its_parts(tmp_path):
    path = tmp_path / "cache"
    killed = TopKWriter(path, SPEC)
    killed.append(*batch_of(teacher(seed=1), ALL))
    assert not path.exists()
    shutil.copytree(tmp_path / "cache.parts" / "rank-00000", tmp_path / "cache.parts" / "rank-00001")
    TopKWriter(path, SPEC)
    assert os.listdir(tmp_path / "cache.parts") == ["rank-00000"]
    cache = write(path, [ALL])
    assert os.listdir(tmp_path) == ["cache"]
    assert cache.path.read_bytes() == write(tmp_path / "other", [ALL]).path.read_bytes()


def test_too_little_space_is_found_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 1000 * disk_bytes_per_position(4, 50))
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda folder: usage)
    TopKWriter(tmp_path / "new" / "cache", SPEC, num_positions=1000)
    with pytest.raises(OSError, match=r"Too little space for a top-k cache.*Lower k, or free some"):
        TopKWriter(tmp_path / "new" / "cache", SPEC, num_positions=1001)


def test_failure_while_merging_keeps_the_earlier_file(tmp_path, monkeypatch):
    before = write(tmp_path / "cache", [ALL]).path.read_bytes()

    def fail(*args):
        yield np.zeros((1, 4), np.uint16)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_writer._Merged, "gather", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "cache", [ALL], entries=teacher(seed=1))
    assert os.listdir(tmp_path) == ["cache"]
    assert (tmp_path / "cache").read_bytes() == before


@pytest.mark.parametrize("name", ["rows.npz", "indices.bin", "log_probs.bin"])
def test_missing_or_short_part_is_an_error(tmp_path, name):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, row in zip(folders, (0, 7), strict=True):
        part = TopKPart(folder, SPEC)
        part.append(*batch_of(teacher(), [row]))
        part.close()
    if name != "rows.npz":
        (folders[1] / name).write_bytes(b"\0")
        with pytest.raises(ValueError, match=f"b/{name}`: got a file that is missing or cut off"):
            merge_parts(folders, tmp_path / "merged", SPEC)
    (folders[1] / name).unlink()
    with pytest.raises(ValueError, match="All processes must write to one folder that rank 0 can read"):
        merge_parts(folders, tmp_path / "merged", SPEC)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


SCRIPT = """
    import shutil, sys
    import torch, torch.distributed as dist

    from hf_curriculum.core.distributed import end_processes
    from hf_curriculum.distillation.cache import TopKSpec
    from hf_curriculum.distillation.cache_writer import TopKPart, TopKWriter

    dist.init_process_group("gloo")
    rank, path = dist.get_rank(), sys.argv[1]
    spec = TopKSpec(k=2, temperature=1.0, vocabulary=100)

    def write(writer, rows):
        for row in rows:  # row r has r positions; its tokens are r and r + 1
            tokens = torch.tensor([[row, row + 1]]).expand(row, 2)
            writer.append(torch.tensor([row]), torch.tensor([row]), tokens, torch.full((row, 2), -1.0))

    with TopKWriter(path, spec) as writer:
        write(writer, [0, 5, 3][rank:] + [4])
        cache = writer.finish()
    indices, log_probs = cache.rows(torch.tensor([4, 3]), torch.tensor([4, 3]))
    assert indices[:, 0].tolist() == [4] * 4 + [3] * 3
    digests = [None, None]
    dist.all_gather_object(digests, (cache.digest, cache.num_rows, cache.num_positions))
    assert digests == [(cache.digest, 4, 12)] * 2, digests

    def failing(change):
        try:
            with TopKWriter(path, spec) as writer:
                write(writer, [1])
                if rank == 1:
                    change(writer._part)
                writer.finish()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def full(part):
        def close():
            raise OSError(28, "disk full")
        part.close = close

    def elsewhere(part):
        close = part.close
        part.close = lambda: (close(), shutil.rmtree(part.folder))

    for change in (full, elsewhere):  # one write a line: unbuffered prints of two processes mix within a line
        sys.stdout.write(f"{change.__name__} {rank} {failing(change)}\\n")
    sys.stdout.write(f"digest {cache.digest}\\n")
    end_processes()
"""


@pytest.mark.distributed
def test_two_processes_write_one_file_and_share_their_errors(launch, tmp_path):
    text = launch(SCRIPT, 2, args=[str(tmp_path / "cache")]).stdout
    assert "full 1 OSError: [Errno 28] disk full" in text
    assert "full 0 RuntimeError: The top-k cache could not be written on rank 1: [Errno 28] disk full" in text
    assert "elsewhere 0 ValueError: Invalid `top-k cache`: got no complete part" in text
    assert "elsewhere 1 RuntimeError: Rank 0 failed: ValueError: Invalid `top-k cache`" in text
    spec = TopKSpec(k=2, temperature=1.0, vocabulary=100)
    rows = {row: (np.tile([row, row + 1], (row, 1)), np.full((row, 2), -1.0)) for row in (0, 3, 4, 5)}
    alone = write(tmp_path / "alone", [[0, 3, 4, 5]], spec, rows)
    assert f"digest {alone.digest}" in text
    assert (tmp_path / "cache").read_bytes() == alone.path.read_bytes()
    assert not (tmp_path / "cache.parts").exists()


# Second places


def test_link_shares_the_bytes_and_outlives_a_new_file(tmp_path):
    source, target = tmp_path / "cache", tmp_path / "checkpoint-3" / "cache"
    first = write(source, [ALL])
    link_or_copy(source, target)
    link_or_copy(source, target)
    assert target.samefile(source)
    assert os.listdir(target.parent) == ["cache"]
    second = write(source, [ALL], entries=teacher(seed=1))
    assert TopKCache.open(target, SPEC).digest == first.digest != second.digest
    link_or_copy(source, target)
    assert target.samefile(source)
    assert os.listdir(target.parent) == ["cache"]


def test_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(cache_module.os, "link", refuse)
    source, target = tmp_path / "cache", tmp_path / "checkpoint-3" / "cache"
    digest = write(source, [ALL]).digest
    link_or_copy(source, target)
    assert not target.samefile(source)
    assert TopKCache.open(target, SPEC).digest == digest
    assert os.listdir(target.parent) == ["cache"]


def test_missing_source_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "none", tmp_path / "target")
    assert os.listdir(tmp_path) == []

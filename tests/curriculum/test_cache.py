import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, score_dataset
from hf_curriculum.curriculum import cache
from hf_curriculum.curriculum.cache import cached_scores, fingerprint
from hf_curriculum.curriculum.difficulty import LossScorer
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


ROWS = {"input_ids": [[1, 2], [3], []], "labels": [[1, -100], [3], []], "text": ["a", None, "ü"]}


def print_of(rows=None, trainable=(True, True, True), model=None, settings=None):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows or ROWS)
    return fingerprint(dataset, np.array(trainable), model, settings or {})


def test_fingerprint_is_by_value_not_by_storage():
    rows = Dataset.from_dict({name: [values[0], *values] for name, values in ROWS.items()})
    assert print_of(rows.select([1, 2, 3])) == print_of()
    assert print_of(rows.select([0, 2, 3]).flatten_indices()) == print_of()


def test_fingerprint_changes_with_everything_it_covers():
    tokenizer = build_tokenizer()
    model, other = build_model(tokenizer), build_model(tokenizer, seed=1)
    prints = [
        print_of(),
        print_of({**ROWS, "input_ids": [[1, 2], [4], []]}),
        print_of({**ROWS, "input_ids": [[1], [2, 3], []]}),
        print_of({**ROWS, "text": ["a", "", "ü"]}),
        print_of(trainable=(True, True, False)),
        print_of(settings={"seed": 1}),
        print_of(model=model),
        print_of(model=other),
    ]
    frozen, scaled = build_model(tokenizer), build_model(tokenizer)
    frozen.model.embed_tokens.requires_grad_(False)
    scaled.config.rms_norm_eps = 0.5
    prints += [print_of(model=frozen), print_of(model=scaled)]
    for alpha in (8, 64):
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
        prints.append(print_of(model=get_peft_model(build_model(tokenizer), config)))
    assert len(set(prints)) == len(prints)
    assert print_of(model=model) == print_of(model=build_model(tokenizer))


@pytest.fixture
def score(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    model, rows = build_model(tokenizer), generate_corpus(6)
    calls = []
    original = LossScorer.score
    monkeypatch.setattr(LossScorer, "score", lambda self, inputs: calls.append(1) or original(self, inputs))

    def run(**settings):
        config = CurriculumConfig(cache_dir=str(tmp_path / "cache"), **settings)
        return score_dataset(model, rows, "loss", processing_class=tokenizer, config=config)["difficulty"][:]

    return run, calls, tmp_path / "cache"


def test_second_time_is_read_from_the_cache(score):
    run, calls, _ = score
    assert run() == run()
    assert len(calls) == 1
    run(loss_normalization="sample")
    assert len(calls) == 2
    run(use_cache=False)
    assert len(calls) == 3


def test_seed_and_learning_rate_count_where_something_is_learned(tmp_path):
    tokenizer = build_tokenizer()
    model, rows = build_model(tokenizer), generate_corpus(12)
    folder = tmp_path / "cache"

    def files(scorer, **kwargs):
        args = SFTConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **kwargs)
        config = CurriculumConfig(probe="full", probe_batch_size=8, cache_dir=str(folder))
        score_dataset(model, rows, scorer, processing_class=tokenizer, args=args, config=config)
        return len(list(folder.iterdir()))

    counts = [files(scorer, **kwargs) for scorer in ("loss", "self_paced") for kwargs in ({}, {"seed": 1})]
    assert counts == [1, 1, 2, 3]
    assert files("self_paced", learning_rate=1.0) == 4


def flip(contents, position):
    return contents[:position] + bytes([contents[position] ^ 1]) + contents[position + 1 :]


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-30]), id="cut-off"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), id="no-zip"),
        pytest.param(lambda path: np.savez(path, scores=np.zeros(3)), id="other-shape"),
        pytest.param(lambda path: np.savez(path, other=np.zeros(6)), id="other-name"),
        pytest.param(lambda path: path.write_bytes(flip(path.read_bytes(), 140)), id="bit"),
    ],
)
def test_corrupt_cache_is_told(score, corrupt):
    run, _, folder = score
    scores = run()
    (path,) = folder.iterdir()
    corrupt(path)
    with pytest.raises(ValueError, match=r"Invalid `score cache`.*Delete that file, or pass `use_cache=False`"):
        run()
    assert run(use_cache=False) == scores


def test_folder_without_permission_is_found_before_the_work(score, monkeypatch):
    run, calls, folder = score
    folder.parent.joinpath("cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cannot keep the scores"):
        run()
    assert calls == []


def test_full_disk_is_found_before_the_work_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_atomic", full)
    computed = []
    with pytest.raises(OSError, match=r"No space left on device: cannot keep the scores.*`cache_dir`"):
        cached_scores(tmp_path / "x.npz", 10, lambda: computed.append(1))
    assert computed == []
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount a small file system")
def test_really_full_disk_leaves_nothing(tmp_path):
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match="cannot keep the scores"):
            cached_scores(small / "x.npz", 100_000, lambda: np.zeros(100_000))
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)

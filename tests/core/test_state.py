import json
import os

import pytest

from hf_curriculum.core import state
from hf_curriculum.core.files import write_atomic
from hf_curriculum.core.records import RunRecord


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "shard").write_bytes(b"1234")
    state.write_checkpoint_state(folder, {"run": {"step": 5}})
    state.write_manifest(folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_whole_checkpoint_is_complete_and_reads_back(checkpoint):
    assert state.incompleteness(checkpoint) is None
    assert state.read_checkpoint_state(checkpoint) == {"run": {"step": 5}}


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / "sub" / "shard").write_bytes(b"12"), "sub/shard has 2 bytes instead of 4"),
        (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda c: (c / "trainer_state.json").write_text('{"epoch'), "trainer_state.json is cut off"),
        (lambda c: (c / state.MANIFEST_NAME).unlink(), "hf_curriculum_manifest.json is missing"),
        (lambda c: (c / state.MANIFEST_NAME).write_text("{"), "hf_curriculum_manifest.json cannot be read"),
        (lambda c: state.invalidate_checkpoint(c), "hf_curriculum_manifest.json is missing"),
    ],
)
def test_broken_checkpoint_is_named(checkpoint, break_it, told):
    break_it(checkpoint)
    assert told in state.incompleteness(checkpoint)


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"sha256": "0", "state": {"run": {}}})])
def test_changed_state_is_an_error_and_makes_the_checkpoint_incomplete(checkpoint, text):
    (checkpoint / state.STATE_NAME).write_text(text)
    state.write_manifest(checkpoint)
    assert state.STATE_NAME in state.incompleteness(checkpoint)
    with pytest.raises(ValueError, match="Resume from another checkpoint"):
        state.read_checkpoint_state(checkpoint)


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x", "other-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in state.list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-9"]
    assert state.list_checkpoints(tmp_path / "nowhere") == []


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, fail)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "old"


def test_resumed_record_equals_the_uninterrupted_one(tmp_path):
    record = RunRecord(tmp_path)
    record.start("id")
    record.append("stage_end", 3, stage=0)
    record.append("stage_end", 6, stage=1)
    with open(record.path, "a") as file:
        file.write('{"event": "stage_end", "st')  # cut off by a kill
    record.resume("id", 4)
    record.append("stage_end", 6, stage=1)
    assert [line.get("stage") for line in record.read("stage_end")] == [0, 1]
    assert record.run_id == "id"


def test_record_of_another_run_begins_anew_and_json_is_strict(tmp_path):
    record = RunRecord(tmp_path)
    record.start("first")
    record.append("stage_end", 2, metrics={"loss": [1.0, float("nan")]})
    assert "NaN" not in record.path.read_text()
    assert record.read("stage_end")[0]["metrics"] == {"loss": [1.0, None]}
    record.resume("second", 2)
    assert record.run_id == "second"
    assert record.read("stage_end") == []


def test_record_of_another_rank_writes_nothing(tmp_path):
    record = RunRecord(tmp_path, enabled=False)
    record.start("id")
    record.append("x", 1)
    record.resume("id", 0)
    assert os.listdir(tmp_path) == []
    assert record.run_id is None


def test_rewinding_drops_what_a_plain_trainer_does_again_of_one_event_alone(tmp_path):
    record = RunRecord(tmp_path)
    record.rewind("layers", 3)
    assert not record.path.exists()
    for step in (1, 3, 5):
        record.append("layers", step)
        record.append("attention", step)
    record.rewind("layers", 3)
    assert [line["step"] for line in record.read("layers")] == [1, 3]
    assert [line["step"] for line in record.read("attention")] == [1, 3, 5]
    record.rewind("layers", 0)
    assert record.read("layers") == []


def test_rewinding_drops_what_an_earlier_run_of_our_trainers_left(tmp_path):
    record = RunRecord(tmp_path)
    record.start("a run")
    record.append("plan", 0)
    record.append("layers", 5)
    record.rewind("layers", 0)
    assert [line["event"] for line in record.read()] == ["run", "plan"]

import json
from pathlib import Path

import numpy as np
import pytest

from hf_curriculum.core.ranks import spearman


WORKER = Path(__file__).with_name("scoring_worker.py")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("scorer", ["loss", "self_paced"])
def test_scores_of_one_and_two_processes_agree(launch, tmp_path, scorer):
    scores = []
    for processes in (1, 2):
        text = launch(WORKER, processes, args=[scorer, str(tmp_path / f"cache-{processes}")]).stdout
        measured, cached = (json.loads(line[7:]) for line in text.splitlines() if line.startswith("SCORES "))
        assert measured == cached
        scores.append(np.array(measured))
    if scorer == "loss":
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-6)
    else:
        assert spearman(scores[0], scores[1]) >= 0.999

import copy

import numpy as np
import pytest
import torch

from hf_curriculum import CurriculumConfig, score_dataset
from hf_curriculum.curriculum.difficulty import build_scorer
from hf_curriculum.curriculum.probe import open_probe
from hf_curriculum.curriculum.self_paced import (
    age_schedule,
    normalised_losses,
    phase_steps,
    self_paced_difficulty,
    spl_weights,
)
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


REGULARISERS = {
    "hard": lambda v, age: -age * v,
    "linear": lambda v, age: age * (v**2 / 2 - v),
}


@pytest.mark.parametrize("kind", ["hard", "linear"])
@pytest.mark.parametrize("age", [0.2, 0.5, 1.0])
def test_spl_weights_minimise_their_objective(kind, age):
    losses = np.linspace(0.0, 1.0, 41) + 1e-3
    grid = np.linspace(0.0, 1.0, 10_001)
    weights = spl_weights(losses, age, kind)
    for loss, weight in zip(losses, weights, strict=True):
        objective = grid * loss + REGULARISERS[kind](grid, age)
        best = weight * loss + REGULARISERS[kind](weight, age)
        assert best <= objective.min() + 1e-9


def test_linear_weights_have_the_closed_form():
    np.testing.assert_allclose(spl_weights(np.array([0.0, 0.1, 0.4, 0.5]), 0.4, "linear"), [1.0, 0.75, 0.0, 0.0])


def test_normalised_losses_are_the_empirical_distribution():
    reference = np.array([3.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(normalised_losses(reference, reference), [7 / 8, 1 / 8, 1 / 2, 1 / 2])
    # Rows that are not in the reference: below all, between, above all.
    np.testing.assert_allclose(normalised_losses(np.array([0.0, 2.5, 9.0]), reference), [0.0, 0.75, 1.0])


def test_normalised_losses_do_not_depend_on_the_scale():
    losses = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(
        normalised_losses(losses, losses), normalised_losses(np.exp(3 * losses), np.exp(3 * losses))
    )


def test_probe_trains_its_epochs_in_all_half_of_them_before_the_first_round():
    assert phase_steps(60, 3) == [30, 15, 15]
    assert phase_steps(60, 4) == [30, 10, 10, 10]
    assert phase_steps(0.3, 3) == [1, 1, 1]


def test_age_grows_to_one():
    ages = age_schedule(0.25, 4)
    np.testing.assert_allclose(ages, [0.25, 0.5, 0.75, 1.0])


def naive_difficulty(normalised, ages):
    scores = []
    for row in range(normalised.shape[1]):
        admitted = next((r for r in range(len(ages)) if normalised[r, row] < ages[r]), len(ages) - 1)
        scores.append((admitted + normalised[-1, row]) / len(ages))
    return scores


def test_difficulty_equals_the_loop_over_rows():
    normalised = np.random.default_rng(1).random((3, 200))
    normalised[-1, 0] = 1.0  # an evaluation row that is harder than every training row
    ages = age_schedule(0.3, 3)
    difficulty = self_paced_difficulty(normalised, ages)
    np.testing.assert_allclose(difficulty, naive_difficulty(normalised, ages))
    assert difficulty.min() >= 0
    assert difficulty.max() <= 1


def test_difficulty_orders_by_admission_first_and_loss_second():
    ages = np.array([0.5, 1.0])
    normalised = np.array([[0.1, 0.2, 0.9, 0.8], [0.9, 0.2, 0.1, 0.5]])
    assert self_paced_difficulty(normalised, ages).argsort().tolist() == [1, 0, 2, 3]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def snapshot(model):
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return copy.deepcopy(model.state_dict()), flags, modes, [type(m) for m in model.modules()], set(vars(model))


def assert_untouched(model, before):
    weights, flags, modes, kinds, attributes = before
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


SMALL = {"probe_batch_size": 8, "probe_epochs": 1.0, "use_cache": False}


@pytest.mark.parametrize("probe", ["full", "lora"])
def test_model_and_generators_are_as_before(tokenizer, probe):
    model = build_model(tokenizer).train()
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)
    random_state = torch.get_rng_state()
    scored = score_dataset(
        model, generate_corpus(32), processing_class=tokenizer, config=CurriculumConfig(probe=probe, **SMALL)
    )
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(set(scored["difficulty"])) > 16


def test_own_adapter_is_the_probe_of_a_peft_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = snapshot(model)
    score_dataset(model, generate_corpus(32), processing_class=tokenizer, config=CurriculumConfig(**SMALL))
    assert_untouched(model, before)


def test_model_is_put_back_when_scoring_breaks(tokenizer):
    model = build_model(tokenizer)
    before = snapshot(model)

    def broken(examples):
        raise RuntimeError("collator broke")

    from hf_curriculum.curriculum.scoring import ScoringInputs

    inputs = ScoringInputs(
        model=model,
        rows=generate_corpus(4),
        batch_columns=(),
        collate=broken,
        lengths=np.ones(4, dtype=np.int64),
        label_counts=np.ones(4, dtype=np.int64),
        trainable=np.ones(4, dtype=bool),
        device=torch.device("cpu"),
        autocast_dtype=None,
        learning_rate=1e-3,
        gradient_checkpointing=False,
    )
    for kind in ("full", "lora"):

        def change_and_break(kind=kind):
            with open_probe(kind, inputs) as (probe, _):
                with torch.no_grad():
                    for parameter in probe.parameters():
                        if parameter.requires_grad:
                            parameter.add_(1.0)
                broken([])

        with pytest.raises(RuntimeError, match="collator broke"):
            change_and_break()
        assert_untouched(model, before)


def test_gradient_checkpointing_changes_no_score(tokenizer):
    from trl import SFTConfig

    def scores(checkpointing):
        model = build_model(tokenizer)
        args = SFTConfig(use_cpu=True, bf16=False, gradient_checkpointing=checkpointing, report_to="none")
        config = CurriculumConfig(probe="full", **SMALL)
        scored = score_dataset(model, generate_corpus(24), processing_class=tokenizer, args=args, config=config)
        assert not model.is_activation_checkpointing
        return scored["difficulty"][:]

    np.testing.assert_allclose(scores(True), scores(False), atol=1e-6)


def test_held_out_rows_are_scored_but_never_learned_from(tokenizer):
    rows = generate_corpus(32)
    held_out = np.arange(32) >= 24
    config = CurriculumConfig(probe="full", **SMALL)

    def scores(dataset, held_out):
        return np.array(
            score_dataset(
                build_model(tokenizer), dataset, processing_class=tokenizer, config=config, held_out=held_out
            )["difficulty"]
        )

    together = scores(rows, held_out)
    alone = scores(rows.select(range(24)), None)
    # Other rows beside them, other batches: the probe is the same up to rounding, and so are the scores.
    np.testing.assert_allclose(together[:24], alone, atol=1e-6)
    assert np.isfinite(together[24:]).all()


@pytest.mark.parametrize(
    "field", ["probe_rounds", "probe_epochs", "probe_learning_rate", "lambda_start", "spl_weights"]
)
def test_each_probe_setting_changes_the_scores(tokenizer, field):
    changed = {
        "probe_rounds": 4,
        "probe_epochs": 3.0,
        "probe_learning_rate": 3e-3,
        "lambda_start": 0.9,
        "spl_weights": "hard" if CurriculumConfig().spl_weights == "linear" else "linear",
    }[field]

    def scores(**settings):
        config = CurriculumConfig(probe="full", **{**SMALL, **settings})
        scored = score_dataset(build_model(tokenizer), generate_corpus(48), processing_class=tokenizer, config=config)
        return scored["difficulty"][:]

    assert scores() != scores(**{field: changed})


def test_full_probe_of_a_peft_model_is_refused(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Invalid `probe`: got full, expected 'lora' with a PEFT model"):
        score_dataset(
            model,
            generate_corpus(8),
            processing_class=tokenizer,
            config=CurriculumConfig(probe="full", use_cache=False),
        )


def test_proxy_scores_and_needs_the_same_vocabulary(tokenizer, tmp_path):
    proxy = build_model(tokenizer, seed=3)
    proxy.save_pretrained(tmp_path / "proxy")
    tokenizer.save_pretrained(tmp_path / "proxy")
    config = CurriculumConfig(probe=str(tmp_path / "proxy"), **SMALL)
    settings = build_scorer(config).settings()
    scored = score_dataset(None, generate_corpus(16), processing_class=tokenizer, config=config)
    assert np.isfinite(scored["difficulty"]).all()
    other = build_tokenizer()
    other.add_tokens(["entirely-new"])
    other.save_pretrained(tmp_path / "proxy")
    assert build_scorer(config).settings() != settings  # so that the cache does not serve another probe's scores
    with pytest.raises(ValueError, match="vocabulary of the training run"):
        score_dataset(None, generate_corpus(16), processing_class=tokenizer, config=config)


def test_diverged_probe_is_an_error(tokenizer):
    config = CurriculumConfig(probe="full", probe_learning_rate=1e30, **SMALL)
    with pytest.raises(ValueError, match="Lower `probe_learning_rate`"):
        score_dataset(build_model(tokenizer), generate_corpus(32), processing_class=tokenizer, config=config)

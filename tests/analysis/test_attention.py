import json
import math
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM, Trainer, TrainingArguments

from hf_curriculum.analysis.attention import AttentionFocus
from hf_curriculum.analysis.attention_callback import AttentionFocusCallback
from hf_curriculum.analysis.attention_causal import _hidden_words, causal_check
from hf_curriculum.analysis.attention_comparison import (
    Change,
    bootstrap_interval,
    compare_attention,
    shuffled_heads,
)
from hf_curriculum.analysis.attention_layout import probe_batches
from hf_curriculum.analysis.attention_measurement import mean_without_nan, measure_attention
from hf_curriculum.analysis.attention_plots import draw_all
from hf_curriculum.analysis.attention_words import CATEGORIES, WordRules, encode_texts
from hf_curriculum.core.head import causal_lm_head
from hf_curriculum.core.records import RunRecord
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def texts():
    rows = generate_corpus(6, seed=3)
    return [f"{prompt} {completion}" for prompt, completion in zip(rows["prompt"], rows["completion"])]


def sharp_model(tokenizer, seed=0):
    model = build_model(tokenizer, seed=seed).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def models(tokenizer):
    return sharp_model(tokenizer, 0), sharp_model(tokenizer, 1)


@pytest.fixture(scope="module")
def measurements(models, texts, tokenizer):
    return [measure_attention(model, texts, processing_class=tokenizer, progress=False) for model in models]


def bert(tokenizer, kind=BertForMaskedLM, config=BertConfig):
    return kind(
        config(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=200, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def arrays(measurement):
    return {
        **measurement.per_head, "mass": measurement.mass, "value_mass": measurement.value_mass,
        "rollout": measurement.rollout,
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["left", "packed"])
@pytest.mark.parametrize("batch_tokens", [10, 150, 10_000])
def test_layout_and_batch_size_change_no_number(models, texts, tokenizer, measurements, layout, batch_tokens):
    other = measure_attention(
        models[0], texts, processing_class=tokenizer, layout=layout, batch_tokens=batch_tokens, progress=False
    )
    for name, values in arrays(measurements[0]).items():
        # A rank correlation moves in steps where two values are equal but for rounding.
        tolerance = 0.02 if name == "idf_correlation" else 1e-6
        assert np.abs(values - arrays(other)[name]).max() < tolerance, name
    for one, two in zip(measurements[0].texts, other.texts):
        assert one.words == two.words
        assert np.allclose(one.received, two.received, atol=1e-5, equal_nan=True)


def test_encoder_is_measured_in_left_and_right_padded_batches(tokenizer, texts):
    model = bert(tokenizer)
    found = [
        measure_attention(model, texts, processing_class=tokenizer, layout=layout, progress=False)
        for layout in ("right", "left")
    ]
    for name, values in arrays(found[0]).items():
        if name != "idf_correlation":
            assert np.abs(values - arrays(found[1])[name]).max() < 1e-6, name


def test_shares_add_up_and_lie_in_their_ranges(measurements):
    for found in measurements:
        for values in (found.mass, found.value_mass, found.rollout):
            assert values.sum(-1) == pytest.approx(np.ones(values.shape[:-1]), abs=1e-6)
            assert (values >= 0).all()
        for name in ("entropy", "entropy_rest", "sink", "value_sink", "head_distance"):
            assert (found.per_head[name] > -1e-6).all()
            assert (found.per_head[name] < 1 + 1e-6).all()


def test_word_of_the_first_token_is_left_out(measurements, texts, tokenizer):
    first = encode_texts(tokenizer, texts, WordRules())
    for found, encoded in zip(measurements[0].texts, first):
        assert [word.start for word in found.words] == [word.start for word in encoded.words[1:]]


def test_model_is_afterwards_as_it_was(models, texts, tokenizer):
    model = models[0]
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    measure_attention(model, texts, processing_class=tokenizer, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    model.eval()


def test_attention_that_follows_rarity_correlates_with_idf(tokenizer):
    # One head that looks for rare words by hand: the key of a token is its idf, so the correlation must be near 1.
    texts = ["Ada has 4 apples and the cards of Ben.", "Cleo has the books and the pens of Dan."] * 3
    model = build_model(tokenizer).eval()
    idf = {"": 0.0} | {
        word: float(rank) for rank, word in enumerate(sorted({w.lower().strip(".") for t in texts for w in t.split()}))
    }
    width = model.config.hidden_size
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, 0] = 1.0
        for word, rarity in idf.items():
            for spelled in (word, word.title()):
                for token in tokenizer(" " + spelled).input_ids:
                    embedding[token, 1] = rarity
        attention = model.model.layers[0].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.zero_()
        # The slowest rotation of the first head, so that positions hardly matter; the norm's scale is undone by rows.
        slow = width // model.config.num_attention_heads // 2 - 1
        attention.q_proj.weight[slow, 0] = 30.0
        attention.k_proj.weight[slow, 1] = 3.0
    found = measure_attention(model, texts, processing_class=tokenizer, idf=idf, progress=False)
    assert found.per_head["idf_correlation"][:, 0, 0].mean() > 0.8


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_positions_that_do_not_count_from_zero_are_refused(tokenizer, layout):
    model = bert(tokenizer, RobertaForMaskedLM, RobertaConfig)
    with pytest.raises(NotImplementedError, match="Use `layout='right'`"):
        measure_attention(model, ["Ada has 4 apples."], processing_class=tokenizer, layout=layout)


def test_unknown_layout_is_refused(models, tokenizer):
    with pytest.raises(ValueError, match="one of right, left, packed"):
        measure_attention(models[0], ["Ada has 4 apples."], processing_class=tokenizer, layout="centre")


def test_empty_probe_set_is_refused(models, tokenizer):
    with pytest.raises(ValueError, match="an empty probe set, expected at least one text"):
        measure_attention(models[0], [], processing_class=tokenizer)


def test_texts_too_short_for_a_choice_are_refused(models, tokenizer):
    with pytest.raises(ValueError, match="at least one text of four tokens"):
        measure_attention(models[0], ["Ada", "4", ""], processing_class=tokenizer, progress=False)


def test_short_text_beside_others_is_left_out_of_the_means(models, texts, tokenizer, measurements):
    found = measure_attention(models[0], [*texts, "Ada", ""], processing_class=tokenizer, progress=False)
    assert np.isnan(found.mass[-2:]).all()
    assert found.summary()["sink"] == pytest.approx(measurements[0].summary()["sink"], abs=1e-6)


def test_long_text_is_read_to_the_models_end(models, tokenizer):
    found = measure_attention(models[0], ["Ada has 4 apples. " * 300], processing_class=tokenizer, progress=False)
    assert len(found.texts[0].words) < 600
    short = measure_attention(
        models[0], ["Ada has 4 apples. " * 300], processing_class=tokenizer, max_length=10, progress=False
    )
    assert len(short.texts[0].words) == 9


# Comparison


def test_comparison_of_a_model_with_itself_is_zero(measurements):
    found = compare_attention(measurements[0], measurements[0])
    for item in found.changes.values():
        assert item.change == item.low == item.high == 0 or math.isnan(item.change)
        assert item.verdict in ("same", "-")
    assert all(item.observed == 0 < item.shuffled for name, item in found.shuffles.items())


def test_change_is_the_mean_of_the_texts_changes(measurements):
    found = compare_attention(*measurements)
    naive = np.mean(
        [measurements[1].mass[t, :, :, 0].mean() - measurements[0].mass[t, :, :, 0].mean() for t in range(6)]
    )
    assert found.changes["mass_content"].change == pytest.approx(naive, abs=1e-12)
    assert found.changes["mass_content"].low <= naive <= found.changes["mass_content"].high
    layer = np.mean(
        [measurements[1].per_head["sink"][t, 2] - measurements[0].per_head["sink"][t, 2] for t in range(6)]
    )
    assert found.by_layer["sink"][2].change == pytest.approx(layer, abs=1e-12)
    assert found.heads["entropy"].shape == (4, 5)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 2.0, (400, 40))
    hits = [low <= 1.0 <= high for low, high in (bootstrap_interval(row, resamples=500) for row in samples)]
    assert 0.88 < np.mean(hits) < 0.98


def test_interval_is_a_function_of_the_seed_and_ignores_missing_values():
    values = np.array([[1.0, np.nan, np.nan], [2.0, 5.0, np.nan], [4.0, 5.0, np.nan]])
    low, high = bootstrap_interval(values, seed=3)
    assert np.array_equal(bootstrap_interval(values, seed=3)[0], low, equal_nan=True)
    assert 1 <= low[0] < high[0] <= 4
    assert (low[1], high[1]) == (5, 5)
    assert np.isnan(low[2])


def test_shuffled_heads_show_whether_heads_kept_their_roles():
    before = np.array([[0.1, 0.5, 0.9], [0.2, 0.4, 0.8]])
    kept = shuffled_heads(before, before + 0.01)
    assert kept.observed == pytest.approx(0.01)
    assert kept.shuffled > 0.2
    swapped = shuffled_heads(before, before[:, ::-1])
    assert swapped.observed > kept.observed * 10
    # Heads stay in their layer: with one head in each there is nothing to shuffle.
    alone = shuffled_heads(before[:, :1], before[:, :1] + 0.5)
    assert alone.shuffled == alone.observed == pytest.approx(0.5)


def test_measurements_of_other_texts_or_shapes_do_not_compare(measurements, models, texts, tokenizer):
    other = measure_attention(models[0], texts[:-1], processing_class=tokenizer, progress=False)
    with pytest.raises(ValueError, match="a measurement of other texts"):
        compare_attention(measurements[0], other)
    small = measure_attention(bert(tokenizer), texts, processing_class=tokenizer, progress=False)
    with pytest.raises(ValueError, match="2 layers of 2 heads, expected 4 layers of 5 heads"):
        compare_attention(measurements[0], small)


def test_verdict_needs_an_interval_without_zero():
    assert Change(0, 1, 1, 0.5, 1.5).verdict == "up"
    assert Change(1, 0, -1, -1.5, -0.5).verdict == "down"
    assert Change(0, 0.1, 0.1, -0.5, 0.5).verdict == "unclear"


def test_mean_without_nan_equals_a_loop():
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    found = mean_without_nan(values, 0)
    assert found[0] == 2.0
    assert np.isnan(found[1])


# Metric


def test_metric_gives_summary_and_change(models, texts, tokenizer, measurements, tmp_path):
    metric = AttentionFocus(cache_dir=str(tmp_path))
    found = metric.compute(predictions=texts, model=models[1], base=models[0], processing_class=tokenizer)
    assert found["mass_content"] == pytest.approx(measurements[1].summary()["mass_content"], abs=1e-12)
    change = compare_attention(*measurements).changes["mass_content"]
    assert found["change"]["mass_content"] == vars(change)
    alone = metric.compute(predictions=texts, model=models[1], processing_class=tokenizer)
    assert "change" not in alone


def test_metric_compares_with_the_adapter_switched_off(texts, tokenizer, tmp_path):
    base = sharp_model(tokenizer)
    plain = measure_attention(base, texts, processing_class=tokenizer, progress=False).summary()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    metric = AttentionFocus(cache_dir=str(tmp_path))
    found = metric.compute(predictions=texts, model=model, adapter_off=True, processing_class=tokenizer)
    assert found["change"]["entropy"]["before"] == pytest.approx(plain["entropy"], abs=1e-9)
    assert found["change"]["entropy"]["after"] != pytest.approx(plain["entropy"], abs=1e-6)


def test_metric_refuses_adapter_off_without_an_adapter(models, texts, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected a `PeftModel` and no `base`"):
        AttentionFocus(cache_dir=str(tmp_path)).compute(
            predictions=texts, model=models[0], adapter_off=True, processing_class=tokenizer
        )


# Causal check


def test_causal_check_equals_losses_with_words_hidden_one_text_at_a_time(models, texts, tokenizer, measurements):
    model, found = models[0], causal_check(models[0], texts, measurements[0], processing_class=tokenizer, draws=2)
    encoded = encode_texts(tokenizer, texts, WordRules(), 512)
    rng = np.random.default_rng(0)
    for index, text in enumerate(encoded):
        arms = _hidden_words(text, measurements[0], index, 0.1, 2, rng)
        assert len(arms[0]) > 0
        ids = torch.tensor([text.input_ids])
        losses = []
        for words in ([], *arms):
            seen = torch.from_numpy(~np.isin(text.word_of_token, words)).long()[None]
            mask = seen[:, None, None].bool() & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")
            losses.append((loss, seen[0, 1:].bool()))
        plain = losses[0][0]
        changes = [((loss - plain)[seen]).mean().item() for loss, seen in losses[1:]]
        assert found.loss[index] == pytest.approx(plain.mean().item(), abs=1e-6)
        assert found.top[index] == pytest.approx(changes[0], abs=1e-6)
        assert found.control[index] == pytest.approx(np.mean(changes[1:]), abs=1e-6)
    assert {"loss", "top", "control", "difference", "low", "high"} == set(found.summary())


def test_hidden_words_are_the_most_attended_and_controls_stand_near_them(texts, tokenizer, measurements):
    encoded = encode_texts(tokenizer, texts, WordRules(), 512)
    for index, text in enumerate(encoded):
        top, control = _hidden_words(text, measurements[0], index, 0.1, 1, np.random.default_rng(0))
        assert len(top) == len(control) == len(set(control))
        assert not set(top) & set(control)
        received = {
            word.start: value
            for word, value in zip(measurements[0].texts[index].words, measurements[0].texts[index].received)
        }
        pool = [
            received[word.start]
            for word in text.words[1:]
            if CATEGORIES[word.category] not in ("punctuation", "special")
        ]
        assert min(received[text.words[place].start] for place in top) == sorted(pool, reverse=True)[len(top) - 1]
        assert all(np.abs(control - word).min() < 12 for word in top)


def test_causal_check_of_a_text_with_too_few_words_has_no_value(models, tokenizer):
    texts = ["Ada has 4 apples.", "Ada has 4 apples and Ben has 12 books, so they have many things to carry home."]
    measured = measure_attention(models[0], texts, processing_class=tokenizer, progress=False)
    found = causal_check(models[0], texts, measured, processing_class=tokenizer)
    assert math.isnan(found.top[0])
    assert not math.isnan(found.top[1])


def test_causal_check_refuses_what_it_cannot_do(models, texts, tokenizer, measurements):
    with pytest.raises(ValueError, match=r"a float in \(0, 0.5\)"):
        causal_check(models[0], texts, measurements[0], processing_class=tokenizer, share=0.7)
    with pytest.raises(ValueError, match="6 texts, expected the 5 texts given"):
        causal_check(models[0], texts[:5], measurements[0], processing_class=tokenizer)
    with pytest.raises(NotImplementedError, match="BertModel"):
        causal_check(bert(tokenizer).bert, texts, measurements[0], processing_class=tokenizer)


# Pictures


def test_pictures_are_drawn_with_their_data(measurements, texts, tmp_path):
    pytest.importorskip("matplotlib")
    comparison = compare_attention(*measurements)
    paths = draw_all(texts, *measurements, comparison, tmp_path / "pictures", title="a -> b", sentence=2)
    assert [path.stem for path in paths] == ["entropy_change", "categories", "sentence", "idf"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = (tmp_path / "pictures" / "entropy_change.csv").read_text().splitlines()
    assert lines[0] == "layer,head,entropy_change,entropy_rest_change"
    assert len(lines) == 1 + 4 * 5
    assert float(lines[1].split(",")[2]) == comparison.heads["entropy"][0, 0]
    rows = (tmp_path / "pictures" / "sentence.csv").read_text().splitlines()
    assert len(rows) == 1 + len(measurements[0].texts[2].words)


def test_pictures_without_matplotlib_name_the_extra(measurements, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"hf_curriculum\[plots\]\""):
        draw_all(texts, *measurements, compare_attention(*measurements), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Callback


def trainer_with(callback, tokenizer, output_dir, **options):
    rows = generate_corpus(16, seed=1)
    data = Dataset.from_list([
        {"input_ids": ids, "labels": ids} for ids in (tokenizer(text).input_ids[:20] for text in rows["prompt"])
    ])  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(output_dir), max_steps=4, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2, use_cpu=True, report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(
        model=build_model(tokenizer), args=arguments, train_dataset=data, processing_class=tokenizer,
        eval_dataset={"one": data.select(range(2)), "two": data.select(range(2, 4))}, callbacks=[callback],
    )  # fmt: skip


def test_callback_measures_before_training_and_at_every_second_evaluation(tokenizer, texts, tmp_path):
    callback = AttentionFocusCallback(texts[:2], every_n_evaluations=2)
    trainer = trainer_with(callback, tokenizer, tmp_path)
    before = measure_attention(trainer.model, texts[:2], processing_class=tokenizer, progress=False).summary()
    trainer.train()
    lines = RunRecord(tmp_path).read("attention")
    assert [(line["step"], line["evaluation"]) for line in lines] == [(0, 0), (2, 2), (4, 4)]
    assert lines[0]["entropy"] == pytest.approx(before["entropy"], abs=1e-9)
    after = measure_attention(trainer.model, texts[:2], processing_class=tokenizer, progress=False).summary()
    assert lines[-1]["entropy"] == pytest.approx(after["entropy"], abs=1e-9)
    assert lines[-1]["entropy"] != lines[0]["entropy"]
    assert all(json.loads(line) for line in RunRecord(tmp_path).path.read_text().splitlines())


def test_callback_leaves_the_training_as_it_is(tokenizer, texts, tmp_path):
    weights = []
    for index, callback in enumerate((AttentionFocusCallback(texts[:2]), AttentionFocusCallback(texts[:2]))):
        trainer = trainer_with(callback, tokenizer, tmp_path / str(index))
        if index == 1:
            trainer.remove_callback(callback)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resumed_run_measures_at_the_same_evaluations(tokenizer, texts, tmp_path):
    trainer_with(AttentionFocusCallback(texts[:2], every_n_evaluations=2), tokenizer, tmp_path / "whole").train()
    resumed = trainer_with(AttentionFocusCallback(texts[:2], every_n_evaluations=2), tokenizer, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    whole = RunRecord(tmp_path / "whole").read("attention")
    assert RunRecord(tmp_path / "cut").read("attention") == whole[2:]


def test_run_resumed_in_its_folder_leaves_the_record_of_an_uninterrupted_one(tokenizer, texts, tmp_path):
    trainer_with(AttentionFocusCallback(texts[:2]), tokenizer, tmp_path).train()
    whole = RunRecord(tmp_path).read("attention")
    trainer_with(AttentionFocusCallback(texts[:2]), tokenizer, tmp_path).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert RunRecord(tmp_path).read("attention") == whole


def test_callback_writes_into_the_record_of_our_trainers(tokenizer, texts, tmp_path):
    from trl import SFTConfig

    from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no", use_cpu=True,
        bf16=False, report_to="none", per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    rows = generate_corpus(8, seed=1)
    trainer = CurriculumSFTTrainer(
        model=build_model(tokenizer), args=arguments, train_dataset=rows, eval_dataset=rows.select(range(2)),
        processing_class=tokenizer, curriculum=CurriculumConfig(scorer="length", num_levels=2),
        callbacks=[AttentionFocusCallback(texts[:2])],
    )  # fmt: skip
    trainer.train()
    record = RunRecord(tmp_path)
    assert record.run_id is not None
    assert {line["step"] for line in record.read("attention")} >= {0, 1, 2}


def test_second_run_in_a_folder_leaves_nothing_of_the_first(tokenizer, texts, tmp_path):
    for _ in range(2):
        trainer_with(AttentionFocusCallback(texts[:2], every_n_evaluations=4), tokenizer, tmp_path).train()
    assert [line["step"] for line in RunRecord(tmp_path).read("attention")] == [0, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 1), "at least one text"), (("abc", 1), "got abc"), ((["a"], 0), "an integer >= 1")],
)
def test_callback_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionFocusCallback(*arguments)


def test_batches_hold_every_text_once_and_keep_to_the_budget(texts, tokenizer):
    encoded = encode_texts(tokenizer, texts, WordRules())
    batches = list(probe_batches(encoded, 150, "right"))
    assert sorted(index for batch in batches for index in batch.members) == list(range(len(texts)))
    assert all(batch.inputs["input_ids"].numel() <= 150 or len(batch.members) == 1 for batch in batches)


def test_head_of_the_causal_check_is_that_of_the_model(models):
    assert causal_lm_head(models[0]).projection is models[0].lm_head


def test_interval_of_a_measure_that_no_text_has_is_not_a_number():
    low, high = bootstrap_interval(np.full((3, 2), np.nan))
    assert np.isnan(low).all()
    assert np.isnan(high).all()

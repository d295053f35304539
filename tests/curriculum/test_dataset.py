import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_curriculum import CurriculumConfig, score_dataset
from hf_curriculum.core.ranks import spearman
from hf_curriculum.curriculum.dataset import _Preparation
from hf_curriculum.curriculum.scoring import token_budget_batches
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "<eos>{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sft_config(**kwargs):
    return SFTConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", **kwargs)


def chat(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def kinds():
    rows = generate_corpus(12, seed=5).select_columns(["prompt", "completion"])
    ids = [[5, 6, 7, 8, 9], [5, 6], [7, 8, 9]] * 4
    return {
        "prompt-completion": rows,
        "text": Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows]),
        "messages": Dataset.from_list([{"messages": chat(row)} for row in rows]),
        "conversational prompt-completion": Dataset.from_list(
            [{"prompt": chat(row)[:1], "completion": chat(row)[1:]} for row in rows]
        ),
        "tokenised": Dataset.from_dict({"input_ids": ids}),
        "tokenised with labels": Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]}),
        "tokenised with mask": Dataset.from_dict(
            {"input_ids": ids, "completion_mask": [[0] + [1] * (len(row) - 1) for row in ids]}
        ),
    }


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param({"max_length": 70}, id="truncated"),
        pytest.param({"completion_only_loss": False}, id="whole-sequence"),
        pytest.param({"eos_token": "<pad>"}, id="other-eos"),
        pytest.param({"assistant_only_loss": True}, id="assistant-only"),
    ],
)
@pytest.mark.parametrize("kind", kinds())
def test_rows_are_prepared_as_by_sft_trainer(tokenizer, kind, settings):
    rows = kinds()[kind]
    if "assistant_only_loss" in settings:  # for conversations only
        settings = {**settings, "assistant_only_loss": "messages" in rows.column_names}
    ours = _Preparation(sft_config(**settings), tokenizer, rows[0]).prepare(rows)
    assert tokenizer.eos_token == "<eos>"  # SFTTrainer changes the user's tokenizer here; ours changes a copy
    theirs = SFTTrainer(
        build_model(tokenizer), sft_config(**settings), train_dataset=rows, processing_class=tokenizer
    ).train_dataset
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]


def test_template_file_counts(tokenizer, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("assistant :", "answer :"))
    rows = kinds()["messages"]
    args = sft_config(chat_template_path=str(tmp_path / "template.jinja"))
    templated = _Preparation(args, tokenizer, rows[0]).prepare(rows)
    assert tokenizer.chat_template == TEMPLATE
    theirs = SFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer).train_dataset
    assert templated["input_ids"][:] == theirs["input_ids"][:]


def naive_losses(model, tokenizer, rows, normalization):
    """One row at a time, full logits, float64."""
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        nll = [-torch.log_softmax(logits[i], -1)[ids[i + 1]].item() for i in range(len(prompt) - 1, len(ids) - 1)]
        losses.append(sum(nll) / (len(nll) if normalization == "token" else 1))
    return losses


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_loss_scores_equal_the_naive_loop(tokenizer, normalization):
    model, rows = build_model(tokenizer), generate_corpus(20, seed=1)
    config = CurriculumConfig(loss_normalization=normalization, score_batch_tokens=256, use_cache=False)
    scored = score_dataset(model, rows, "loss", processing_class=tokenizer, config=config)
    expected = naive_losses(model.eval(), tokenizer, rows, normalization)
    np.testing.assert_allclose(scored["difficulty"], expected, rtol=1e-5)


def test_scores_are_measured_in_the_precision_of_the_run(tokenizer):
    def scores(bf16):
        args = SFTConfig(use_cpu=True, bf16=bf16, gradient_checkpointing=False, report_to="none")
        config = CurriculumConfig(use_cache=False)
        scored = score_dataset(build_model(tokenizer), generate_corpus(6), "loss", tokenizer, args, config=config)
        return np.array(scored["difficulty"])

    assert (scores(True) != scores(False)).any()
    np.testing.assert_allclose(scores(True), scores(False), rtol=2e-2)


def test_length_scores_are_token_counts(tokenizer):
    rows = generate_corpus(20, seed=1)
    scored = score_dataset(None, rows, scorer="length", processing_class=tokenizer, args=None)
    ids = [tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"] for row in rows]
    assert scored["difficulty"][:] == [float(len(row)) for row in ids]


def test_rows_keep_order_columns_and_ids(tokenizer):
    rows = generate_corpus(8).add_column("sample_id", [f"id-{i}" for i in range(8)])
    scored = score_dataset(None, rows, "length", processing_class=tokenizer)
    assert scored["sample_id"][:] == [f"id-{i}" for i in range(8)]
    assert scored["prompt"][:] == rows["prompt"][:]
    doubled = rows.remove_columns("sample_id").add_column("sample_id", [1] * 8)
    assert score_dataset(None, doubled, "length", processing_class=tokenizer)["sample_id"][:] == list(range(8))


def test_row_without_a_label_left_gets_nan_and_is_counted(tokenizer, capsys):
    short = generate_corpus(4).select_columns(["prompt", "completion"])
    rows = Dataset.from_list([{"prompt": "apples " * 120, "completion": "1"}, *short])
    scored = score_dataset(None, rows, "length", processing_class=tokenizer, args=sft_config(max_length=100))
    assert np.isnan(scored["difficulty"][0])
    assert np.isfinite(scored["difficulty"][1:]).any()
    captured = capsys.readouterr()
    assert "Spearman with length" in captured.out + captured.err


def test_object_scorer_is_used(tokenizer):
    class Constant:
        name, uses_model = "constant", False

        def settings(self):
            return {}

        def score(self, inputs):
            return np.arange(len(inputs.rows), dtype=np.float64)

    scored = score_dataset(None, generate_corpus(5), Constant(), processing_class=tokenizer)
    assert scored["difficulty"][:] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("result", [np.zeros(3), np.full(5, np.nan)])
def test_object_scorer_with_a_wrong_result_is_an_error(tokenizer, result):
    class Wrong:
        name, uses_model = "wrong", False

        def settings(self):
            return {}

        def score(self, inputs):
            return result

    with pytest.raises(ValueError, match="result of the scorer wrong"):
        score_dataset(None, generate_corpus(5), Wrong(), processing_class=tokenizer)


def test_classifier_rows_are_scored_by_their_loss():
    from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments
    from transformers.data.data_collator import DataCollatorWithPadding

    from hf_curriculum.curriculum.measurement import measure_difficulty

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    ids = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 5]]
    rows = Dataset.from_dict({"input_ids": ids, "label": [0, 1, 2, 1]})
    measured = measure_difficulty(
        rows,
        CurriculumConfig(scorer="loss", use_cache=False),
        model=model,
        collate=DataCollatorWithPadding(tokenizer),
        batch_columns=("input_ids", "label"),
        args=TrainingArguments(use_cpu=True, report_to="none"),
    )
    with torch.no_grad():
        expected = [
            torch.nn.functional.cross_entropy(model(torch.tensor([row])).logits, torch.tensor([label])).item()
            for row, label in zip(ids, [0, 1, 2, 1], strict=True)
        ]
    np.testing.assert_allclose(measured.difficulty, expected, rtol=1e-5)


TINY = {"vocab_size": 525, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_gpt2_which_names_no_loss_is_scored(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=525, n_embd=16, n_layer=1, n_head=2, n_positions=256))
    rows = generate_corpus(6)
    config = CurriculumConfig(use_cache=False)
    scored = score_dataset(model, rows, "loss", processing_class=tokenizer, config=config)
    np.testing.assert_allclose(scored["difficulty"], naive_losses(model.eval(), tokenizer, rows, "token"), rtol=1e-5)


def test_model_in_bfloat16_is_scored(tokenizer):
    config = CurriculumConfig(use_cache=False)
    rows = generate_corpus(6)
    exact, rounded = (
        np.array(score_dataset(build_model(tokenizer).to(dtype), rows, "loss", tokenizer, config=config)["difficulty"])
        for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)


def test_head_that_is_more_than_a_projection_is_refused(tokenizer):
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(**TINY, intermediate_size=16, is_decoder=True, max_position_embeddings=256, pad_token_id=0)
    model = RobertaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.dense.weight)
    with pytest.raises(NotImplementedError, match="its head is more than a projection"):
        score_dataset(
            model, generate_corpus(6), "loss", processing_class=tokenizer, config=CurriculumConfig(use_cache=False)
        )


def test_encoder_decoder_is_refused_with_the_way_out():
    from transformers import T5Config, T5ForConditionalGeneration

    from hf_curriculum.curriculum.scoring import row_losses

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    ids = torch.tensor([[1, 2]])
    with pytest.raises(NotImplementedError, match="scorer='column'"):
        row_losses(model, {"input_ids": ids, "labels": ids})


def test_token_budget_is_kept_and_every_row_is_in_one_batch():
    lengths = np.array([5, 1, 9, 3, 3, 40, 2])
    batches = token_budget_batches(lengths, 10)
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert batches[0].tolist() == [5]  # longer than the budget: alone, and first
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 10 for batch in batches)


@pytest.mark.parametrize(
    ("build", "kwargs", "error", "told"),
    [
        (lambda: Dataset.from_dict({"prompt": []}), {}, ValueError, "got 0 rows, expected at least one row"),
        (lambda: generate_corpus(4).to_iterable_dataset(), {}, NotImplementedError, "Streaming data"),
        (lambda: [{"prompt": "a"}], {}, ValueError, "expected a `datasets.Dataset`"),
        (lambda: Dataset.from_dict({"image": [1], "text": ["a"]}), {}, NotImplementedError, "Vision data"),
        (lambda: generate_corpus(4).add_column("difficulty", [1.0] * 4), {}, ValueError, "column `difficulty`"),
        (lambda: generate_corpus(4), {"scorer": "perplexity"}, ValueError, "Invalid `scorer`: got perplexity"),
        (lambda: generate_corpus(4), {"processing_class": None}, ValueError, "a tokenizer"),
        (lambda: generate_corpus(4), {"scorer": "loss"}, ValueError, "a model for `scorer='loss'`"),
        (
            lambda: Dataset.from_list([{"prompt": "apples " * 50, "completion": "1"}]),
            {"args": {"max_length": 8}},
            ValueError,
            "none with a labelled token",
        ),
        (lambda: generate_corpus(4), {"args": {"packing": True}}, NotImplementedError, "packing"),
    ],
)
def test_bad_input_is_told(tokenizer, build, kwargs, error, told):
    kwargs = {"scorer": "length", "processing_class": tokenizer, **kwargs}
    kwargs["args"] = sft_config(**kwargs.pop("args", {}))
    with pytest.raises(error, match=told):
        score_dataset(None, build(), **kwargs)


def test_model_partitioned_by_zero3_is_refused(tokenizer):
    model = build_model(tokenizer)
    next(model.parameters()).ds_id = 0  # what DeepSpeed puts on every parameter that it partitions
    with pytest.raises(NotImplementedError, match="curriculum_score_only"):
        score_dataset(model, generate_corpus(4), "loss", processing_class=tokenizer)


def test_spearman_equals_the_loop_over_mean_ranks():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 9, 100), generator.normal(size=100)

    def ranks(values):
        return [sum(1 for b in values if b < a) + (sum(1 for b in values if b == a) - 1) / 2 for a in values]

    x, y = np.array(ranks(first)), np.array(ranks(second))
    expected = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(second, second**3) == pytest.approx(1.0)
    assert np.isnan(spearman(np.ones(5), second[:5]))

"""What happens inside a model's forward, over the architectures that treat their logits in ways of their own."""

import copy
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
    Trainer,
)
from trl import SFTTrainer

from hf_curriculum.core.head import causal_lm_head
from hf_curriculum.distillation.chunked import HeadTeacher
from hf_curriculum.distillation.forward import StudentPass, TeacherPass, head_weights, install, projection_of
from hf_curriculum.distillation.losses import Divergence
from hf_curriculum.trainers import KDSFTTrainer, KDTrainer


_spec = importlib.util.spec_from_file_location("distillation_twin", Path(__file__).with_name("distillation_twin.py"))
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MOE = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
CONFIGS = {
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=0.25),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=3.0),
    "cohere2": lambda: Cohere2Config(**SMALL, logit_scale=0.2),
    "phi": lambda: PhiConfig(**SMALL),
    "gptj": lambda: GPTJConfig(**GPT, **DROPOUT, rotary_dim=8, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**GPT, **DROPOUT),
    "granite-moe": lambda: GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **MOE),
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **{**SMALL, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 2.0}
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **MOE),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, **MOE
    ),
}


def model_of(name, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    for part, value in model.named_parameters():
        if part.endswith("lm_head.bias"):
            torch.nn.init.normal_(value)
    return model


def batch_of(rows=3, width=9, vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_the_model_s_own(name):
    model, batch = model_of(name), batch_of()
    own = model(**batch).loss
    own.backward()
    expected = {part: value.grad.clone() for part, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    install(model)
    request = StudentPass(Divergence())
    output = model(**batch, distillation=request)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(own.item(), rel=1e-5)
    twin.assert_close(
        {part: value.grad for part, value in model.named_parameters() if value.grad is not None},
        {part: value.double() for part, value in expected.items()},
        tolerance=1e-3,
    )
    assert request.sums.tokens == (batch["labels"][:, 1:] != -100).sum()
    assert request.sums.distilled == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_number_of_labels_of_the_step_divides_the_cross_entropy(name):
    model, batch = model_of(name), batch_of()
    count = torch.tensor(100)
    own = model(**batch, num_items_in_batch=count).loss.item()
    install(model)
    ours = model(**batch, num_items_in_batch=count, distillation=StudentPass(Divergence())).loss.item()
    assert ours == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_distance_is_that_of_the_logits_as_the_models_define_them(name):
    student, teacher, batch = model_of(name), model_of(name, 1), batch_of()
    chosen = batch["labels"][:, 1:] != -100
    logits = [model(**batch).logits[:, :-1][chosen].double() for model in (student, teacher)]
    expected = 4 * twin.divergence(*logits, "forward_kl", 2.0).sum().item()
    for model in (student, teacher):
        install(model)
    with torch.no_grad():
        hidden = teacher(**batch, distillation=TeacherPass()).last_hidden_state
    head = causal_lm_head(teacher)
    request = StudentPass(Divergence("forward_kl", temperature=2.0), 0.5)
    request.teacher = HeadTeacher(hidden, head_weights(projection_of(head), head))
    student(**batch, distillation=request)
    assert hidden.shape == (chosen.sum(), 32)
    assert request.sums.kd.item() == pytest.approx(expected, rel=1e-4)


def test_batch_without_a_label_gives_zero_with_a_graph():
    model, batch = twin.llama(), batch_of()
    install(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    # A label in the first column is never predicted.
    batch["labels"][:, 0] = 5
    output = model(**batch, distillation=StudentPass(Divergence()))
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


def test_calls_without_a_request_get_the_forward_that_was_there():
    model, batch = twin.llama(), batch_of()
    expected = model(**batch)
    signature = inspect.signature(model.forward)
    install(model)
    found = model(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected.logits)
    assert inspect.signature(model.forward) == signature


def test_copy_of_a_model_runs_its_own_forward():
    model = model_of("gpt2")
    install(model)
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter)
    assert copied(**batch_of()).logits.abs().max() == 0
    assert copied(**batch_of(), distillation=StudentPass(Divergence())).loss.item() == pytest.approx(np.log(50))
    assert model(**batch_of()).logits.abs().max() > 0


def plain_rows(vocabulary=50):
    ids = torch.randint(3, vocabulary, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 9] * 8})


def test_model_whose_head_is_more_than_a_projection_is_refused_in_the_first_step(tmp_path):
    model = AutoModelForCausalLM.from_config(RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=64))
    config = twin.DistillationConfig(teacher="base")
    trainer = KDTrainer(model=model, args=twin.arguments(tmp_path), train_dataset=plain_rows(), distillation=config)
    with pytest.raises(NotImplementedError, match=r"RobertaForCausalLM.*its head is more than a projection"):
        trainer.train()


def test_causal_models_are_known_by_their_class(tmp_path):
    model = model_of("gpt2")
    assert model.loss_type is None
    config = twin.DistillationConfig(teacher="base", alpha=0.5)
    trainer = KDTrainer(model=model, args=twin.arguments(tmp_path), train_dataset=plain_rows(), distillation=config)
    recorder = twin.Recorder(trainer)
    trainer.train()
    # Of 9 labels in a row 8 are predicted.
    first = model_of("gpt2")(**recorder.batches[0][0]).loss.item()
    assert recorder.losses[0]["ce_loss"] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_generation_and_columns_are_as_before(tmp_path, peft):
    def build():
        return twin.lora(twin.llama()) if peft else twin.llama()

    prompt = torch.tensor([[5, 6, 7]])
    expected = build().generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    ours = twin.sft_trainer(KDSFTTrainer, tmp_path, build(), {"teacher": "base"}, max_steps=1, learning_rate=0.0)
    ours.train()
    model = ours.model.eval()
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False), expected)
    plain = twin.sft_trainer(SFTTrainer, tmp_path, build(), None)
    trainers = [
        cls(model=build(), args=twin.arguments(tmp_path), **extra)
        for cls, extra in ((Trainer, {}), (KDTrainer, {"distillation": twin.DistillationConfig(teacher="base")}))
    ]
    for there, here in ((plain, ours), trainers):
        for trainer in (there, here):
            trainer._set_signature_columns_if_needed()
        assert here._signature_columns == there._signature_columns
        assert here.model_accepts_loss_kwargs == there.model_accepts_loss_kwargs


def test_head_with_an_adapter_is_refused(tmp_path):
    model = get_peft_model(twin.llama(), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match="language-model head of type Linear"):
        KDTrainer(model=model, args=twin.arguments(tmp_path), distillation=twin.DistillationConfig(teacher="base"))


def with_trained_tokens(tied):
    model = get_peft_model(
        twin.llama(tied=tied), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    )
    for name, value in model.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(value)
    return model


def test_trained_tokens_beside_an_untied_head(tmp_path):
    model = with_trained_tokens(tied=False)
    ids = torch.tensor([[5, 6, 7, 8], [7, 5, 9, 6]])
    own = model(input_ids=ids, labels=ids).loss.item()
    config = twin.DistillationConfig(teacher="base")
    trainer = KDTrainer(model=model, args=twin.arguments(tmp_path), distillation=config)
    ours = trainer.model(input_ids=ids, labels=ids, distillation=StudentPass(Divergence())).loss.item()
    assert ours == pytest.approx(own, rel=1e-5)


def test_trained_tokens_of_the_head_are_refused(tmp_path):
    # With tied embeddings PEFT trains the tokens in the head as well, beside its weight.
    config = twin.DistillationConfig(teacher="base")
    with pytest.raises(NotImplementedError, match="language-model head of type TrainableTokensWrapper"):
        KDTrainer(model=with_trained_tokens(tied=True), args=twin.arguments(tmp_path), distillation=config)


@pytest.mark.parametrize(
    ("name", "accumulation"), [("mixtral", 2), pytest.param("qwen3-moe", 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sft", [True, False])
def test_load_balancing_loss_is_kept(tmp_path, name, sft, accumulation):
    def build():
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config.vocab_size = len(twin.TOKENIZER)
        config.pad_token_id, config.eos_token_id = twin.TOKENIZER.pad_token_id, twin.TOKENIZER.eos_token_id
        return AutoModelForCausalLM.from_config(config)

    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    logs = []
    for with_teacher in (False, True):
        folder = tmp_path / str(with_teacher)
        config = {"teacher": twin.llama(5), "alpha": 0.0} if with_teacher else None
        if sft:
            cls = KDSFTTrainer if with_teacher else SFTTrainer
            trainer = twin.sft_trainer(cls, folder, build(), config, **settings)
        else:
            rows = twin.generate_corpus(8)
            ids = [twin.TOKENIZER(row["prompt"] + row["completion"]).input_ids[:16] for row in rows]
            rows = rows.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(i) for i in ids]})
            extra = {"distillation": twin.DistillationConfig(**config)} if with_teacher else {}
            cls = KDTrainer if with_teacher else Trainer
            trainer = cls(
                model=build(),
                args=twin.arguments(folder, **{**settings, "per_device_train_batch_size": 1}),
                train_dataset=rows,
                **extra,
            )
        trainer.train()
        names = ("loss", "grad_norm", "aux_loss")
        logs.append([{n: log[n] for n in names if n in log} for log in trainer.state.log_history if "loss" in log])
    assert ("aux_loss" in logs[0][0]) == sft
    for there, here in zip(*logs, strict=True):
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sft", [True, False])
def test_metrics_see_the_student_s_logits(tmp_path, sft):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction
        return {"marker": 1.0}

    model, settings = twin.llama(), {"max_steps": 1, "per_device_eval_batch_size": 2}
    config = {"teacher": twin.llama(5)}
    if sft:
        trainer = twin.sft_trainer(
            KDSFTTrainer, tmp_path, model, config, eval_rows=4, compute_metrics=compute_metrics, **settings
        )
    else:
        ids = torch.randint(3, 300, (6, 7), generator=torch.Generator().manual_seed(0)).tolist()
        rows = twin.generate_corpus(1).from_dict({"input_ids": ids, "labels": ids})
        trainer = KDTrainer(
            model=model, args=twin.arguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows,
            compute_metrics=compute_metrics, distillation=twin.DistillationConfig(**config),
        )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_marker"] == 1.0
    assert metrics["eval_kl_to_teacher"] > 0.1
    assert seen["logits"].shape == (*seen["labels"].shape, len(twin.TOKENIZER))
    student = twin.llama()
    student.load_state_dict(trainer.model.state_dict())
    batch = next(iter(trainer.get_eval_dataloader()))
    expected = student.eval()(**batch).logits.detach().numpy()
    np.testing.assert_allclose(seen["logits"][:2, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)

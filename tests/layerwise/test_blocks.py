import dataclasses
import functools

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_curriculum.core.parameters import parameters_by_name
from hf_curriculum.layerwise.blocks import BLOCK_COLUMNS, Block, Blocks, find_blocks
from hf_curriculum.layerwise.depth import Layer
from hf_curriculum.multitask.cgc_lora.config import CGCLoraConfig
from hf_curriculum.multitask.heads import MultiTaskHeads, TaskHead


BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VISION = {**BERT, "image_size": 8, "patch_size": 4}
del VISION["vocab_size"]


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def qwen():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=3))


def gpt2():
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def t5():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=3, decoder_start_token_id=0)
    )


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def clip():
    text = {**BERT, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def llava(feature_layer=-1):
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=feature_layer
    )
    return transformers.LlavaForConditionalGeneration(config)


def albert(groups=1):
    sizes = {**BERT, "embedding_size": 8, "num_hidden_groups": groups}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes))


def lora(model, **changes):
    config = {"r": 2, "target_modules": "all-linear", **changes}
    return get_peft_model(model, LoraConfig(**config))


def names(blocks):
    return [block.name for block in blocks.blocks]


def layers(path, count):
    return [f"{path}.{index}" for index in range(count)]


TOWERS = {
    "llama": (llama, layers("model.layers", 3)),
    "qwen3": (qwen, layers("model.layers", 3)),
    "mixtral": (mixtral, layers("model.layers", 3)),
    "gpt2": (gpt2, layers("transformer.h", 3)),
    "bert": (bert, layers("bert.encoder.layer", 3)),
    "t5": (t5, layers("encoder.block", 2) + layers("decoder.block", 3)),
    "vit": (vit, layers("vit.layers", 3)),
    "clip": (clip, layers("vision_model.encoder.layers", 3) + layers("text_model.encoder.layers", 2)),
    "llava": (llava, layers("model.vision_tower.encoder.layers", 3) + layers("model.language_model.layers", 3)),
}


@pytest.mark.parametrize(("make", "expected"), TOWERS.values(), ids=TOWERS)
def test_blocks_of_an_architecture_are_its_layers_in_forward_order(make, expected):
    model = make()
    blocks = find_blocks(model)
    assert names(blocks) == expected
    assert not blocks.adapters
    modules, parameters = dict(model.named_modules()), parameters_by_name(model)
    for block in blocks.blocks:
        assert block.name == f"{block.tower}.{block.index}"
        assert block.kind == type(modules[block.name]).__name__
        own = [f"{block.name}.{name}" for name, _ in modules[block.name].named_parameters()]
        assert list(block.parameters) == own
        assert block.num_parameters == block.num_weights == sum(parameters[name].numel() for name in own)
    # Every parameter that may learn is in exactly one place.
    placed = [name for block in blocks.blocks for name in block.parameters] + [*blocks.always, *blocks.frozen]
    assert sorted(placed) == sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    assert blocks.num_weights == sum(parameter.numel() for parameter in parameters.values())
    assert blocks.num_always == sum(parameters[name].numel() for name in blocks.always)
    assert blocks.num_frozen == sum(parameters[name].numel() for name in blocks.frozen)


def step(model):
    """A forward pass with every input that the model takes, and its loss."""
    ids = torch.tensor([[3, 4, 5, 1]])
    inputs = {"input_ids": ids, "labels": ids}
    if hasattr(model.config, "vision_config"):
        images = [39] * 4 if hasattr(model.config, "image_token_index") else []
        ids = torch.tensor([[*images, 3, 4, 5, 1]])
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    elif model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "labels": torch.tensor([1])}
    elif hasattr(model, "classifier"):
        inputs["labels"] = torch.tensor([1])
    outputs = model(**inputs)
    if outputs.get("loss") is not None:
        return outputs["loss"]
    return (outputs.get("logits") if "logits" in outputs else outputs["text_embeds"] @ outputs["image_embeds"].T).sum()


@pytest.mark.parametrize("make", [pair[0] for pair in TOWERS.values()], ids=TOWERS)
def test_gradients_run_through_the_layers_that_depth_counts(make):
    model = make().eval()
    blocks = find_blocks(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    crossed = set()

    def note(name, module, inputs, outputs):
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: crossed.add(name))

    for layer in blocks.layers:
        modules[layer.name].register_forward_hook(functools.partial(note, layer.name))
    for lowest in range(len(blocks.blocks)):
        model.requires_grad_(False)
        for name in blocks.blocks[lowest].parameters:
            parameters[name].requires_grad_(True)
        crossed.clear()
        step(model).backward()
        assert any(parameters[name].grad.abs().max() > 0 for name in blocks.blocks[lowest].parameters)
        assert blocks.depth([lowest]) == sum(
            layer.num_weights for layer in blocks.layers if layer.name in crossed
        ) / sum(layer.num_weights for layer in blocks.layers)


@pytest.mark.parametrize(("feature_layer", "count"), [(-1, 3), (-2, 2), (2, 2), ([1, -2], 2)])
def test_vision_layers_that_nobody_reads_are_no_blocks(feature_layer, count):
    blocks = find_blocks(llava(feature_layer))
    assert names(blocks) == layers("model.vision_tower.encoder.layers", count) + layers(
        "model.language_model.layers", 3
    )
    assert ("model.vision_tower.encoder.layers.2.mlp.fc1.weight" in blocks.frozen) == (count == 2)


def test_embeddings_final_norm_and_output_embeddings_are_frozen():
    blocks = find_blocks(llama())
    assert blocks.frozen == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert blocks.always == ()
    assert find_blocks(llama(tie_word_embeddings=True)).frozen == ("model.embed_tokens.weight", "model.norm.weight")


def test_everything_around_output_embeddings_is_pretrained_and_frozen():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    blocks = find_blocks(model)
    assert "cls.predictions.transform.dense.weight" in blocks.frozen
    assert blocks.always == ()


@pytest.mark.parametrize(
    ("make", "head", "frozen"),
    [
        (bert, ("classifier.weight", "classifier.bias"), "bert.pooler.dense.weight"),
        (vit, ("classifier.weight", "classifier.bias"), "vit.layernorm.weight"),
        (
            lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA)),
            ("score.weight",),
            "model.norm.weight",
        ),
        # A model that is its own base model.
        (
            lambda: transformers.CLIPForImageClassification(clip().config),
            ("classifier.weight", "classifier.bias"),
            "vision_model.post_layernorm.weight",
        ),
    ],
    ids=["bert", "vit", "llama", "clip"],
)
def test_task_head_keeps_learning(make, head, frozen):
    blocks = find_blocks(make())
    assert blocks.always == head
    assert frozen in blocks.frozen


def test_heads_around_a_base_model_keep_learning():
    model = MultiTaskHeads(transformers.BertModel(transformers.BertConfig(**BERT)), {"a": TaskHead(2)}, pooling="cls")
    blocks = find_blocks(model)
    assert names(blocks) == layers("backbone.encoder.layer", 3)
    assert blocks.always == ("classifier.weight", "classifier.bias")
    assert "backbone.pooler.dense.weight" in blocks.frozen


def test_what_the_user_froze_is_neither_a_block_parameter_nor_frozen_by_us():
    model = llava()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.embed_tokens.requires_grad_(False)
    blocks = find_blocks(model)
    assert names(blocks) == layers("model.language_model.layers", 3)
    assert "model.language_model.embed_tokens.weight" not in blocks.frozen
    text = sum(block.num_weights for block in blocks.blocks)
    vision = sum(parameter.numel() for parameter in model.model.vision_tower.encoder.layers.parameters())
    # The frozen tower lies below, and is never crossed.
    assert blocks.depth(range(3)) == pytest.approx(text / (text + vision))
    assert blocks.share(range(3)) == 1.0


# Adapters


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_a_block_are_what_learns_in_it(dora):
    model = lora(llama(), use_dora=dora)
    blocks = find_blocks(model)
    assert blocks.adapters
    assert names(blocks) == layers("base_model.model.model.layers", 3)
    assert (blocks.always, blocks.frozen) == ((), ())
    block = blocks.blocks[1]
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"} if dora else {"lora_A", "lora_B"}
    assert {part for name in block.parameters for part in name.split(".") if part.startswith("lora_")} == kinds
    assert block.num_weights == block.num_parameters + find_blocks(llama()).blocks[1].num_parameters
    assert blocks.num_parameters == model.get_nb_trainable_parameters()[0]


def test_what_peft_was_asked_to_train_outside_the_blocks_keeps_learning():
    blocks = find_blocks(lora(bert(), target_modules=["query"], modules_to_save=["classifier"]))
    assert blocks.always == (
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    )
    assert blocks.frozen == ()
    assert blocks.depth([2]) == pytest.approx(1 / 3)


def test_adapters_on_embeddings_are_below_every_block():
    blocks = find_blocks(lora(llama(), target_modules=["embed_tokens", "q_proj"]))
    assert len(blocks.always) == 2
    assert blocks.depth([2]) == blocks.depth([]) == 1.0


def test_of_several_adapters_the_active_one_is_found():
    model = lora(llama())
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    blocks = find_blocks(model)
    assert all(".second." in name for block in blocks.blocks for name in block.parameters)
    assert blocks.sizes.tolist() == [4 * (16 + 16)] * 3


def test_blocks_without_adapter_are_no_choice_but_lie_in_the_way():
    blocks = find_blocks(lora(llama(num_hidden_layers=4), target_modules=["q_proj"], layers_to_transform=[1, 3]))
    assert [block.index for block in blocks.blocks] == [1, 3]
    assert blocks.depth([0]) == pytest.approx(0.75, abs=0.01)
    assert blocks.depth([1]) == pytest.approx(0.25, abs=0.01)
    assert blocks.layers_to_transform([0, 1])["layers_to_transform"] == [1, 3]


def test_blocks_of_cgc_lora_hold_experts_and_gates():
    config = CGCLoraConfig(
        task_names=["a", "b"], r=4, lora_alpha=8, num_common_experts=1, num_task_experts=1,
        target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    blocks = find_blocks(model)
    assert blocks.adapters
    assert names(blocks) == layers("base_model.model.model.layers", 3)
    assert blocks.num_parameters + blocks.num_always == model.get_nb_trainable_parameters()[0]
    assert len(set(blocks.sizes.tolist())) == 1


def test_heads_over_an_adapted_backbone_keep_learning():
    backbone = lora(transformers.BertModel(transformers.BertConfig(**BERT)))
    blocks = find_blocks(MultiTaskHeads(backbone, {"a": TaskHead(2)}, pooling="cls"))
    assert names(blocks) == layers("backbone.base_model.model.encoder.layer", 3)
    assert "classifier.weight" in blocks.always
    assert blocks.frozen == ()


# Wrappers


def test_wrappers_leave_no_trace_in_names():
    model = llama()
    plain = find_blocks(model)
    for layer in range(3):
        model.model.layers[layer] = torch.compile(model.model.layers[layer], backend="eager")
    assert find_blocks(torch.compile(model, backend="eager")) == plain


def test_blocks_below_a_wrapper_of_several_processes_are_found(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = llama()
        plain = find_blocks(model)
        assert find_blocks(nn.parallel.DistributedDataParallel(model)) == plain
        for module in [*model.model.layers, model]:
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        sharded = find_blocks(model)
        assert sharded.fingerprint() == plain.fingerprint()
        assert (names(sharded), sharded.frozen, sharded.num_weights) == (names(plain), plain.frozen, plain.num_weights)
    finally:
        torch.distributed.destroy_process_group()


def test_sizes_under_zero_3_are_those_of_the_full_tensors():
    model, whole = llama(), find_blocks(llama())
    for parameter in model.parameters():
        # What DeepSpeed leaves of a parameter that is partitioned.
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert find_blocks(model) == whole


# Models whose blocks cannot be found


def test_stages_of_a_convolutional_network_are_no_blocks_until_they_are_named():
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 16], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(ValueError, match=r"resnet.encoder.stages \(2 x ResNetStage\).*block_modules="):
        find_blocks(model)
    assert names(find_blocks(model, block_modules=["resnet.encoder.stages"])) == layers("resnet.encoder.stages", 2)


def test_networks_of_several_resolutions_are_refused_until_their_layers_are_named():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2]}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=4))
    with pytest.raises(ValueError, match=r"swin.encoder.layers \(2 x SwinStage\)"):
        find_blocks(model)
    wanted = ["layers.0.blocks", "layers.1.blocks"]
    assert len(find_blocks(model, block_modules=wanted).blocks) == 3
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    with pytest.raises(ValueError, match=r"convnext.encoder.stages \(2 x ConvNextStage\)"):
        find_blocks(transformers.ConvNextForImageClassification(config))


def test_model_without_lists_is_refused():
    with pytest.raises(ValueError, match=r"got Sequential with no `nn.ModuleList`.*block_modules="):
        find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


class Layered(nn.Module):
    """A model that is not transformers'."""

    def __init__(self, blocks=3, body=4):
        super().__init__()
        self.embedding = nn.Embedding(1000, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(blocks))
        self.body = nn.Linear(4, body)
        self.heads = nn.ModuleList(nn.Linear(body, 2) for _ in range(2))


def test_list_that_looks_like_layers_is_found_in_any_model():
    blocks = find_blocks(Layered())
    assert names(blocks) == layers("blocks", 3)
    assert "embedding.weight" in blocks.frozen
    assert "heads.1.weight" in blocks.frozen
    assert blocks.always == ()


def test_lists_with_less_than_half_of_the_weights_are_refused():
    with pytest.raises(ValueError, match=r"blocks \(3 x Sequential\), heads \(2 x Linear\), expected lists of layers"):
        find_blocks(Layered(body=20))


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_that_share_their_parameters_are_refused(groups):
    with pytest.raises(NotImplementedError, match=rf"its 3 layers share the parameters of {groups}"):
        find_blocks(albert(groups))


def test_albert_without_sharing_has_blocks():
    assert len(find_blocks(albert(3)).blocks) == 3


def test_module_that_runs_twice_is_refused():
    model = Layered()
    model.blocks.append(model.blocks[0])
    with pytest.raises(NotImplementedError, match=r"blocks.3 and blocks.0 .* one module"):
        find_blocks(model)


def test_blocks_with_a_parameter_in_common_are_refused():
    model = llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotImplementedError, match=r"layers.2 and model.layers.0 .* share model.layers.0.mlp.up_proj"):
        find_blocks(model)
    # A frozen weight in common moves with neither.
    assert len(find_blocks(lora(model, target_modules=["q_proj"])).blocks) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_model_with_less_than_two_blocks_that_may_learn_is_refused(count):
    model = llama()
    model.requires_grad_(False)
    model.model.layers[:count].requires_grad_(True)
    with pytest.raises(ValueError, match=rf"got {count} blocks with parameters that may learn, of 3"):
        find_blocks(model)


def test_adapters_that_are_in_no_block_are_refused():
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"got 0 blocks with parameters that may learn"):
        find_blocks(get_peft_model(llama(), config))


# Blocks by name


def test_named_modules_are_blocks_in_the_order_given():
    model = llama()
    wanted = ["layers.2.mlp", "model.layers.0.self_attn"]
    blocks = find_blocks(model, block_modules=wanted)
    assert names(blocks) == ["model.layers.2.mlp", "model.layers.0.self_attn"]
    assert blocks.blocks[0].tower == "model.layers.2.mlp"
    assert "model.layers.1.mlp.up_proj.weight" in blocks.frozen
    with pytest.raises(NotImplementedError, match="numbers in one list of layers"):
        blocks.layers_to_transform([0])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["model.blocks"], r"`block_modules`: got model.blocks, .*model.layers \(3 x LlamaDecoderLayer\)"),
        (["mlp"], r"got mlp, expected one of model.layers.0.mlp, model.layers.1.mlp"),
        (
            ["model.layers", "layers.1.mlp"],
            r"model.layers.1.mlp and model.layers.1, expected modules that do not contain",
        ),
        (["model.layers", "model.layers"], r"model.layers.0 and model.layers.0, expected"),
        ("model.layers", r"expected a list of names of modules"),
    ],
    ids=["unknown", "several", "nested", "twice", "text"],
)
def test_wrong_names_of_modules_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(llama(), block_modules=wanted)


# Parts that always learn


def test_parts_named_to_learn_are_not_frozen():
    blocks = find_blocks(llama(), always_train=["lm_head", "norm"])
    assert blocks.always == ("model.norm.weight", "lm_head.weight")
    assert blocks.frozen == ("model.embed_tokens.weight",)
    assert blocks.depth([2]) == pytest.approx(1 / 3)


def test_tied_output_embeddings_learn_as_input_embeddings_and_lie_below_every_block():
    blocks = find_blocks(llama(tie_word_embeddings=True), always_train=["lm_head"])
    assert blocks.always == ("model.embed_tokens.weight",)
    assert blocks.depth([2]) == 1.0


@pytest.mark.parametrize(
    ("make", "part", "crossed"),
    [
        (llava, "multi_modal_projector", "language_model"),
        (llava, "language_model.embed_tokens", "language_model"),
        (llava, "language_model.norm", None),
        (llava, "vision_tower.embeddings", ""),
        (t5, "shared", ""),
        (t5, "encoder.final_layer_norm", "decoder"),
        (t5, "decoder.final_layer_norm", None),
        (clip, "logit_scale", None),
        (clip, "text_model.embeddings", "text_model"),
        (clip, "vision_model.post_layernorm", None),
        (bert, "pooler", None),
    ],
)
def test_back_propagation_crosses_what_lies_above_a_part_that_always_learns(make, part, crossed):
    blocks = find_blocks(make(), always_train=[part])
    above = [block.num_weights for block in blocks.blocks if crossed is not None and crossed in block.name]
    assert blocks.depth([]) == pytest.approx(sum(above) / blocks.num_layer_weights)


@pytest.mark.parametrize(
    ("make", "part", "message"),
    [
        (llama, "head", r"got head, expected parts outside .*: model.embed_tokens, model.norm, lm_head"),
        (llama, "layers.0", r"got layers.0, expected parts outside the blocks"),
        (lambda: lora(llama()), "lm_head", r"lm_head, which has `requires_grad=False`.*`modules_to_save`"),
    ],
    ids=["unknown", "in a block", "adapters"],
)
def test_part_that_cannot_learn_beside_the_blocks_is_refused(make, part, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(make(), always_train=[part])


def test_parts_given_as_text_are_refused():
    with pytest.raises(ValueError, match="expected a list of names"):
        find_blocks(llama(), always_train="lm_head")


# Blocks


def naive_depth(blocks, active):
    """Walks down from the top of each chain until no block below learns."""
    names = {blocks.blocks[number].name for number in active}
    crossed = 0
    for chain in {layer.chain for layer in blocks.layers}:
        own = [layer for layer in blocks.layers if layer.chain == chain]
        while own and not any(layer.name in names or layer.is_crossed for layer in own[:1]):
            own.pop(0)
        crossed += sum(layer.num_weights for layer in own)
    return crossed / sum(layer.num_weights for layer in blocks.layers)


@pytest.mark.parametrize("make", [llama, t5, clip, llava], ids=["llama", "t5", "clip", "llava"])
def test_share_and_depth_of_any_choice_are_those_of_a_walk_from_the_bottom(make):
    blocks = find_blocks(make())
    generator = np.random.default_rng(0)
    for _ in range(20):
        active = np.flatnonzero(generator.random(len(blocks.blocks)) < 0.4).tolist()
        assert blocks.depth(active) == pytest.approx(naive_depth(blocks, active), rel=1e-12)
        assert blocks.share(active) == pytest.approx(blocks.sizes[active].sum() / blocks.sizes.sum(), rel=1e-12)
    assert (blocks.depth([]), blocks.share([])) == (0.0, 0.0)
    everything = range(len(blocks.blocks))
    assert (blocks.depth(everything), blocks.share(everything)) == (1.0, 1.0)


def test_towers_side_by_side_are_crossed_each_on_its_own():
    blocks = find_blocks(clip())
    assert blocks.depth(blocks.resolve(["vision_model.encoder.layers.2"])) == pytest.approx(0.2)
    assert blocks.depth(blocks.resolve(["vision_model.encoder.layers.2", "text_model.encoder.layers.1"])) == (
        pytest.approx(0.4)
    )


def hand_made(sizes=(4, 4, 8), **changes):
    blocks = tuple(Block(f"m.layers.{i}", "m.layers", i, (f"m.layers.{i}.w",), n, n, "L") for i, n in enumerate(sizes))
    return Blocks(**{"blocks": blocks, "always": (), "frozen": (), "adapters": False, **changes})


def test_blocks_made_by_hand_are_their_own_depth():
    blocks = hand_made()
    assert blocks.layers == tuple(Layer(f"m.layers.{i}", n) for i, n in enumerate((4, 4, 8)))
    assert (blocks.depth([2]), blocks.depth([1]), blocks.share([1])) == (0.5, 0.75, 0.25)
    assert blocks.sizes.dtype == np.int64


def test_names_endings_towers_and_numbers_resolve_to_numbers():
    blocks = find_blocks(llava())
    assert blocks.resolve(["language_model.layers.0", "vision_tower.encoder.layers.2", -1, np.int64(0)]) == (
        3,
        2,
        5,
        0,
    )
    assert blocks.resolve(["model.language_model.layers"]) == (3, 4, 5)
    assert blocks.resolve(["language_model.layers.0", 3, -3]) == (3,)
    assert blocks.resolve([]) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0", r"got layers.0, expected one of model.vision_tower.encoder.layers.0, model.language_model"),
        ("ayers.0", r"got ayers.0, expected a name such as model.vision_tower.encoder.layers.0, .*, \.\.\., or a"),
        ("", r"expected a name such as"),
        (6, r"got 6, expected a number in \[-6, 6\)"),
        (-7, r"got -7, expected a number"),
        (True, r"got True, expected a name"),
        (1.0, r"got 1.0, expected a name"),
    ],
)
def test_names_of_no_block_or_several_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(llava()).resolve([name])


def test_name_given_as_text_is_refused():
    with pytest.raises(ValueError, match="a list of names or numbers"):
        hand_made().resolve("layers.0")


def test_table_joins_equal_neighbours():
    rows = hand_made(sizes=(4, 4, 8)).rows()
    assert rows == [["m.layers", "0 to 1", "L", 4, "50.0 %"], ["m.layers", "2", "L", 8, "50.0 %"]]
    assert {len(row) for row in rows} == {len(BLOCK_COLUMNS)}
    assert [row[:2] for row in find_blocks(llava()).rows()] == [
        ["model.vision_tower.encoder.layers", "0 to 2"],
        ["model.language_model.layers", "0 to 2"],
    ]


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (llama, "layers"), (gpt2, "h"), (bert, "layer"), (t5, "decoder.block"), (llava, "language_model.layers"),
        (clip, "text_model.encoder.layers"), (lambda: lora(llama()), "layers"),
    ],
    ids=["llama", "gpt2", "bert", "t5", "llava", "clip", "adapters"],
)  # fmt: skip
def test_static_list_puts_adapters_into_those_blocks_alone(make, pattern):
    model = make()
    top = find_blocks(model)
    last = len(top.blocks) - 1
    static = top.layers_to_transform([last, last - 1])
    assert static["layers_pattern"] == pattern
    base = model.get_base_model() if top.adapters else model
    if top.adapters:
        base = model.unload()
    modules = ["c_attn", "q_proj", "query", "q"]
    adapted = find_blocks(get_peft_model(base, LoraConfig(r=1, target_modules=modules, **static)))
    expected = [block.name.removeprefix("base_model.model.") for block in top.blocks[-2:]]
    assert [block.name.removeprefix("base_model.model.") for block in adapted.blocks] == expected


@pytest.mark.parametrize("active", [[], [0, 5]], ids=["none", "two towers"])
def test_static_list_of_several_towers_is_refused(active):
    with pytest.raises(NotImplementedError, match="numbers in one list of layers"):
        find_blocks(llava()).layers_to_transform(active)


def test_fingerprint_tells_models_apart():
    one = hand_made()
    assert one.fingerprint() == hand_made().fingerprint()
    # What is outside does not matter for a choice of blocks.
    assert one.fingerprint() == hand_made(frozen=("x",)).fingerprint()
    renamed = dataclasses.replace(one.blocks[0], name="other")
    others = [
        hand_made(sizes=(4, 4, 9)),
        hand_made(sizes=(4, 4)),
        hand_made(adapters=True),
        dataclasses.replace(one, blocks=(renamed, *one.blocks[1:])),
    ]
    assert len({blocks.fingerprint() for blocks in [one, *others]}) == 5
    assert find_blocks(llama()).fingerprint() == find_blocks(llama()).fingerprint()


@pytest.mark.slow
@pytest.mark.distributed
def test_blocks_of_a_zero_3_engine_are_those_of_the_whole_model(launch):
    script = """
        import dataclasses, json, sys
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
        from hf_curriculum.core.distributed import end_processes
        from hf_curriculum.layerwise.blocks import find_blocks

        sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
        whole = find_blocks(model)

        class Look(TrainerCallback):
            def on_train_begin(self, args, state, control, model, **kwargs):
                assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
                assert sum(parameter.numel() for parameter in model.parameters()) < whole.num_weights
                assert find_blocks(model) == whole
                sys.stdout.write("SAME\\n")

        args = TrainingArguments("out", use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
        rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 32
        Trainer(model, args, train_dataset=rows, callbacks=[Look()]).train()
        end_processes()
    """
    assert launch(script, 2, config="zero3.yaml").stdout.count("SAME") == 2

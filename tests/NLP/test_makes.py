"""Teachers and students of every make: encoders and decoders of transformers, cut by layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
    SmolLM3Config,
    XLMConfig,
    XLMRobertaConfig,
    pipeline,
)

from kd.common.outputs import FeatureHooks
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import load_text_data
from kd.nlp.student_model.layers import cut_layers, kept_layers, last_layer, layer_paths
from kd.nlp.student_model.methods import hidden_states
from kd.nlp.student_model.pooling import head_pooling, pool
from kd.nlp.teacher_model.generative import byte_level_bpe
from kd.nlp.teacher_model.teacher import encoder_of, is_decoder
from kd_testing.scripts import run_script

SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS: dict[str, Any] = {name: SHAPE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
UNDECLARED: dict[str, dict[str, Any]] = {
    "DeBERTa-v2": {"position_buckets": 8, "conv_kernel_size": 3, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "ModernBERT": {"global_attn_every_n_layers": 3},
    "Gemma 3": {"sliding_window_pattern": 2},
}
ENCODERS = {
    "BERT": BertConfig(**SHAPE),
    "RoBERTa": RobertaConfig(**SHAPE),
    "XLM-R": XLMRobertaConfig(**SHAPE),
    "ELECTRA": ElectraConfig(**SHAPE, embedding_size=8),
    "DistilBERT": DistilBertConfig(vocab_size=50, dim=16, n_layers=4, n_heads=2, hidden_dim=16),
    "MPNet": MPNetConfig(**SHAPE),
    "DeBERTa-v2": DebertaV2Config(
        **SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        **UNDECLARED["DeBERTa-v2"],
    ),
    "ALBERT": AlbertConfig(**SHAPE, embedding_size=8),
    "ModernBERT": ModernBertConfig(
        **SHAPE, cls_token_id=1, sep_token_id=2, local_attention=4, **UNDECLARED["ModernBERT"]
    ),
}  # fmt: skip
DECODERS = {
    "GPT-2": GPT2Config(**TOKENS, n_embd=16, n_layer=4, n_head=2),
    "GPT-Neo": GPTNeoConfig(
        **TOKENS, hidden_size=16, num_layers=4, num_heads=2, window_size=4, attention_types=[[["global", "local"], 2]]
    ),
    "OPT": OPTConfig(**TOKENS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, ffn_dim=16,
                     word_embed_proj_dim=16, max_position_embeddings=64),
    "BLOOM": BloomConfig(**TOKENS, hidden_size=16, n_layer=4, n_head=2),
    "Llama": LlamaConfig(**SHAPE),
    "Qwen2": Qwen2Config(
        **SHAPE, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "Gemma 3": Gemma3TextConfig(
        **SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=4, **UNDECLARED["Gemma 3"]
    ),
    "SmolLM3": SmolLM3Config(**SHAPE, num_key_value_heads=1, no_rope_layer_interval=2),
}  # fmt: skip
CONFIGS = ENCODERS | DECODERS


def classifier(config: Any) -> PreTrainedModel:
    """A classifier with random weights, large enough that layers and positions matter."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model.eval()


def texts(length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 50, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_hand(model: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """The model with the chosen ones of its layers, as they are in it."""
    cut = copy.deepcopy(model)
    path = layer_paths(cut)[0].rpartition(".")[0]
    layers = cut.get_submodule(path)
    cut.set_submodule(path, nn.ModuleList(layers.get_submodule(str(old)) for old in chosen))
    stack = cut.get_submodule(path.rpartition(".")[0])
    for config in (encoder_of(cut).config, getattr(stack, "config", cut.config)):
        if len(getattr(config, "layer_types", None) or ()) == 4:
            config.layer_types = [config.layer_types[old] for old in chosen]
        config.num_hidden_layers, config.use_cache = len(chosen), False  # the cache has an entry per layer
    return cut


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_equals_the_kept_layers_and_reloads(kind: str, tmp_path: Path) -> None:
    teacher = classifier(CONFIGS[kind])
    chosen = kept_layers(teacher, 2)
    assert chosen == ([0, 3] if kind == "ModernBERT" else [1, 3])
    student = cut_layers(teacher, 2).eval()
    assert student.config.num_hidden_layers == 2 < teacher.config.num_hidden_layers
    with torch.no_grad():
        logits = student(**texts()).logits
        if kind != "ALBERT":
            torch.testing.assert_close(logits, by_hand(teacher, chosen)(**texts()).logits)
        assert not torch.allclose(logits, teacher(**texts()).logits, atol=1e-3)
        student.save_pretrained(tmp_path)
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(reloaded(**texts()).logits, logits)


def test_a_cut_keeps_the_kind_of_attention_of_each_layer() -> None:
    full, local = "full_attention", "sliding_attention"
    assert CONFIGS["ModernBERT"].layer_types == [full, local, local, full]
    for name in ("ModernBERT", "Qwen2", "Gemma 3"):
        model, kinds = classifier(CONFIGS[name]), CONFIGS[name].layer_types
        for layers in (1, 2, 3):
            chosen = kept_layers(model, layers)
            assert cut_layers(model, layers).config.layer_types == [kinds[old] for old in chosen]
    assert kept_layers(classifier(CONFIGS["ModernBERT"]), 3) == [0, 2, 3]  # the first layer has no norm
    assert cut_layers(classifier(CONFIGS["GPT-Neo"]), 2).config.attention_layers == ["local", "local"]
    assert CONFIGS["SmolLM3"].no_rope_layers == [1, 0, 1, 0]
    assert cut_layers(classifier(CONFIGS["SmolLM3"]), 2).config.no_rope_layers == [0, 0]


def test_a_cut_of_albert_applies_its_layer_fewer_times() -> None:
    teacher = classifier(CONFIGS["ALBERT"])
    student = cut_layers(teacher, 2).eval()
    with torch.no_grad():
        states = teacher(**texts(), output_hidden_states=True).hidden_states
        hooks = FeatureHooks(student, {"last": last_layer(student)})
        student(**texts())
    torch.testing.assert_close(hooks.take()["last"], states[2])
    with pytest.raises(UserError, match="no list of 4 layers.*--align_epochs 0.*--hidden_weight"):
        hidden_states(teacher, teacher, 1.0)
    groups = classifier(AlbertConfig(**SHAPE, embedding_size=8, num_hidden_groups=2))
    assert kept_layers(groups, 2) == [1, 3]
    with pytest.raises(UserError, match="differ in shape.*--student_layers"):
        kept_layers(groups, 3)


def test_layers_in_several_lists_are_refused() -> None:
    model = classifier(XLMConfig(vocab_size=50, emb_dim=16, n_layers=4, n_heads=2))
    with pytest.raises(UserError, match="no list of 4 layers.*--student"):
        cut_layers(model, 2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_pooled_feature_is_the_input_of_the_head(kind: str) -> None:
    """The logits have no gradient in the outputs of the last layer at other tokens than the pooled one."""
    model = classifier(CONFIGS[kind])
    batch = texts()
    batch["input_ids"][0, 9:] = 0
    batch["attention_mask"][0, 9:] = 0
    assert is_decoder(model.config) == (kind in DECODERS)
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        found[-1].retain_grad()

    model.get_submodule(last_layer(model)).register_forward_hook(keep)
    model(**batch).logits[:, 0].sum().backward()
    states = found[-1]
    assert states.grad is not None
    pooling = head_pooling(model, "classification")
    assert pooling == ("last" if kind in DECODERS else "cls")
    expected = torch.zeros(2, 12, dtype=torch.bool)
    expected[torch.arange(2), torch.tensor([8, 11]) if pooling == "last" else 0] = True
    assert torch.equal(states.grad.abs().sum(-1) > 0, expected)
    torch.testing.assert_close(pool(states.detach(), batch["attention_mask"], pooling), states.detach()[expected])


def test_the_pooling_of_other_heads() -> None:
    model = classifier(ModernBertConfig(**SHAPE, classifier_pooling="mean"))
    assert head_pooling(model, "classification") == "mean" and head_pooling(model, "token_classification") == "tokens"


@pytest.mark.parametrize("kind", ["ModernBERT", "GPT-2"])
def test_the_script_cuts_a_model_of_another_make(kind: str, small: Path, tmp_path: Path) -> None:
    """A trained teacher and a cut of it, with hidden states; the student loads with transformers alone."""
    data = load_text_data(str(small))
    words = byte_level_bpe(data.splits["train"]["text"][:], 400, 64)
    config = copy.deepcopy(CONFIGS[kind])
    config.vocab_size, config.id2label = len(words), dict(enumerate(data.label_names))
    config.label2id = {name: i for i, name in enumerate(data.label_names)}
    set_token_ids(config, words)
    classifier(config).save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    fixed = ["--dataset", small, "--teacher", tmp_path / "teacher", "--no_control", "--report_to", "none"]
    run_script("NLP/scripts/distill_classifier.py", *fixed, "--student_layers", 2, "--align_epochs", 0.1,
               "--num_train_epochs", 0.2, "--hidden_weight", 1, "--output_dir", tmp_path / "run")  # fmt: skip
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert student.config.num_hidden_layers == 2 and student.config.model_type == config.model_type
    if kind == "ModernBERT":
        assert student.config.layer_types == ["full_attention", "full_attention"]
    classify = pipeline("text-classification", model=str(tmp_path / "run" / "student"), device="cpu")
    texts = data.splits["validation"]["text"][:4]
    alone = [classify(text)[0]["score"] for text in texts]
    assert alone == pytest.approx([found["score"] for found in classify(texts, batch_size=4)], abs=1e-4)


def set_token_ids(config: Any, tokenizer: Any) -> None:
    for token in ("pad", "bos", "eos", "cls", "sep"):
        if hasattr(config, f"{token}_token_id"):
            setattr(config, f"{token}_token_id", tokenizer.eos_token_id)


def test_the_last_token_is_found_with_padding_on_either_side() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    right, left = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert pool(hidden, right, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(hidden, left, "last").tolist() == [[4, 5], [10, 11]]
    assert pool(hidden, None, "last").tolist() == [[4, 5], [10, 11]]

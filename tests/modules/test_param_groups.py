"""Parameter groups."""

import pytest
from torch import nn

from llmgr_rec.modules.param_groups import param_group, select_trainable


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("recommender.item_tables.ebc.embedding_bags.item_id.weight", "tables"),
        ("llmgr.recommender.encoder.graph_network.message", "encoder"),
        ("_dmp_wrapped_module.module.llmgr.adapter.nodes.weight", "adapter"),
        ("recommender.text_encoder.decoder.layers.0.mlp.weight", "text_encoder"),
        ("recommender.text_tables.embedding_bags.item_text.weight", None),
        ("llmgr.head.query.weight", "head"),
        ("llmgr.head.text.weight", "head"),
        ("llmgr.language_model.decoder.layers.0.self_attn.q_proj.lora_A.default.weight", "lora"),
        ("llmgr.language_model.decoder.layers.0.self_attn.q_proj.base_layer.weight", None),
        ("llmgr.language_model.encoder.head.weight", None),
        ("llmgr.text_tables.embedding_bags.item_text.weight", None),
        ("over.0.weight", None),
    ],
)
def test_group_of(name: str, group: str | None) -> None:
    assert param_group(name) == group


def model() -> nn.Module:
    recommender = nn.ModuleDict({"item_tables": nn.EmbeddingBag(3, 2), "encoder": nn.Linear(2, 2)})
    return nn.ModuleDict({"recommender": recommender, "head": nn.Linear(2, 2, bias=False), "other": nn.Linear(2, 2)})


def test_select_trainable_switches_on_what_is_named_and_off_all_else() -> None:
    module = model()
    names = select_trainable(module, ["encoder", "head"])
    assert names == ["recommender.encoder.weight", "recommender.encoder.bias", "head.weight"]
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == names


def test_select_trainable_can_switch_back() -> None:
    module = model()
    assert select_trainable(module, []) == []
    assert select_trainable(module, ["tables"]) == ["recommender.item_tables.weight"]

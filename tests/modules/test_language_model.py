import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, GPT2Config, GPTNeoConfig, MistralConfig, Qwen3Config

from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.language_model import (
    LoraLanguageModel,
    embed_item_texts,
    mean_embedding_norm,
)
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.storage.pretrained import load_decoder

OTHER_DECODERS = [
    Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    ),
    MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
]  # fmt: skip


def make(decoder=None, dtype="float32", dropout=0.0):
    torch.manual_seed(0)
    model = LoraLanguageModel(decoder or load_decoder("random-tiny", dtype=dtype), 4, 4.0, dropout)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pack(lengths, prefix, one_pass=False, suffix=0):
    """Prompts of some lengths; in one pass, each has an output at every node and has a suffix there."""
    segments = ["nodes", *([list(range(1, suffix + 1))] if suffix else [])]
    nodes = Jagged.from_lengths(torch.arange(sum(lengths)), torch.tensor(lengths))
    offsets = nodes.offsets if one_pass else None
    return CompiledPrompt(list(prefix), segments)(nodes, Jagged.empty(0), offsets)


def read_with_gradients(model, embeddings_XH, packed, packs_prompts):
    """Readings and gradients of a fixed function of them: of the inputs and of every LoRA matrix."""
    model.packs_prompts = packs_prompts
    model.zero_grad()
    inputs = embeddings_XH.clone().requires_grad_()
    hidden_CH = model(inputs, packed)
    (hidden_CH * torch.linspace(-1, 1, hidden_CH.numel()).view_as(hidden_CH)).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_CH.detach(), {"inputs": inputs.grad, **gradients}


def assert_packed_equals_each(model, embeddings_XH, packed):
    fast, fast_gradients = read_with_gradients(model, embeddings_XH, packed, packs_prompts=True)
    plain, plain_gradients = read_with_gradients(model, embeddings_XH, packed, packs_prompts=False)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in fast_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-5, rtol=1e-5, msg=name)
    return fast_gradients


@pytest.fixture(scope="module")
def tiny():
    return make()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.lists(st.integers(0, 258), max_size=6),
    st.integers(0, 9),
)
def test_packed_row_equals_whole_prompts(tiny, lengths, prefix, seed):
    packed = pack(lengths, prefix)
    torch.manual_seed(seed)
    gradients = assert_packed_equals_each(tiny, torch.randn(packed.num_tokens, 64), packed)
    # 7 linear layers in each of 2 decoder layers, two matrices each, and the inputs.
    assert len(gradients) == 29


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.integers(0, 258), max_size=4),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_outputs_of_one_pass_equal_whole_prompts(tiny, lengths, prefix, suffix, seed):
    packed = pack(lengths, prefix, one_pass=True, suffix=suffix)
    assert packed.num_tokens == sum(lengths) * (1 + suffix)
    torch.manual_seed(seed)
    assert_packed_equals_each(tiny, torch.randn(packed.num_tokens, 64), packed)


@pytest.mark.parametrize("config", OTHER_DECODERS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("suffix", [None, 2])
def test_any_causal_decoder_packs(config, suffix):
    torch.manual_seed(1)
    model = make(AutoModel.from_config(config, attn_implementation="sdpa"))
    packed = pack([4, 1, 2], [7, 8, 9]) if suffix is None else pack([4, 1, 2], [7, 8, 9], True, suffix)
    assert len(assert_packed_equals_each(model, torch.randn(packed.num_tokens, 16), packed)) > 9


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_decoder_whose_attention_cannot_be_replaced_encodes_whole_prompts(one_pass):
    torch.manual_seed(1)
    config = GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = make(AutoModel.from_config(config)).eval()
    assert not model.packs_prompts
    packed = pack([2, 3], [7, 8], one_pass, suffix=1)
    embeddings_XH = torch.randn(packed.num_tokens, 16)
    outputs_CH = model(embeddings_XH, packed)
    assert len(outputs_CH) == (5 if one_pass else 2)
    for output, found in enumerate(outputs_CH):
        whole = torch.cat([model.token_embedding(torch.tensor([7, 8])), embeddings_XH[packed.path(output)]])
        alone = model.base(inputs_embeds=whole.unsqueeze(0)).last_hidden_state[0, -1]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packs_prompts", [True, False])
def test_hidden_state_is_that_of_the_prompt_alone(tiny, packs_prompts):
    """Neither padding nor other prompts of the batch change its hidden state."""
    torch.manual_seed(3)
    tiny.packs_prompts = packs_prompts
    lengths, prefix = [2, 6, 1], [5, 6]
    packed = pack(lengths, prefix)
    embeddings_XH = torch.randn(9, 64)
    hidden_CH = tiny(embeddings_XH, packed)
    for hidden_H, embeddings in zip(hidden_CH, embeddings_XH.split(lengths), strict=True):
        whole = torch.cat([tiny.token_embedding(torch.tensor(prefix)), embeddings])
        alone = tiny.base(inputs_embeds=whole.unsqueeze(0)).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden_H, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packs_prompts", [True, False])
@pytest.mark.parametrize("suffix", [0, 2])
def test_nothing_leaks_from_later_nodes(tiny, packs_prompts, suffix):
    """A hidden state neither depends on later nodes of its context or other suffixes, nor sends them a gradient."""
    torch.manual_seed(3)
    tiny.packs_prompts = packs_prompts
    packed = pack([5], [5, 6], one_pass=True, suffix=suffix)
    embeddings_XH = torch.randn(packed.num_tokens, 64, requires_grad=True)
    tiny(embeddings_XH, packed)[2].sum().backward()
    has_gradient = embeddings_XH.grad.abs().sum(dim=1) > 0
    own_suffix = range(5 + 2 * suffix, 5 + 3 * suffix)
    assert has_gradient.nonzero().flatten().tolist() == [0, 1, 2, *own_suffix]


def test_the_last_layer_is_computed_for_last_tokens_only(tiny):
    """And of the prefix, each layer sees one copy."""
    widths = {}
    layers = tiny.base.layers
    hooks = [
        layer.register_forward_hook(lambda _, __, output, n=number: widths.__setitem__(n, output.shape[1]))
        for number, layer in enumerate(layers)
    ]
    tiny.packs_prompts = True
    packed = pack([3, 2, 4], [7, 8, 9, 10, 11])
    tiny(torch.randn(9, 64), packed)
    for hook in hooks:
        hook.remove()
    assert widths == {0: 5 + 9, 1: 3}


@pytest.mark.parametrize("config", [None, OTHER_DECODERS[0]])
def test_rows_of_padding_change_nothing(config, monkeypatch):
    model = make(config and AutoModel.from_config(config, attn_implementation="sdpa"))
    packed = pack([3, 2], [7, 8], one_pass=True, suffix=2)
    embeddings_XH = torch.randn(packed.num_tokens, model.hidden_size)
    expected = read_with_gradients(model, embeddings_XH, packed, True)
    monkeypatch.setattr(LoraLanguageModel, "_padding", lambda self, rows: 3)
    torch.testing.assert_close(read_with_gradients(model, embeddings_XH, packed, True), expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_rows_are_rounded_up_to_few_sizes():
    model = make(dtype="bfloat16")
    sizes = {rows + model._padding(rows) for rows in range(1, 4097)}
    assert len(sizes) < 110
    assert all(model._padding(rows) < max(16, rows / 16) for rows in range(1, 4097))
    assert make()._padding(100) == 0


def test_prefix_gradient_reaches_lora(tiny):
    """The prefix is not a constant: with LoRA after it switched off, its gradient is still there."""
    torch.manual_seed(0)
    embeddings_XH = torch.randn(3, 64)
    short = read_with_gradients(tiny, embeddings_XH, pack([2, 1], [5]), True)[1]
    other = read_with_gradients(tiny, embeddings_XH, pack([2, 1], [6]), True)[1]
    name = next(name for name in short if "layers.0.self_attn.k_proj.lora_A" in name)
    assert not torch.allclose(short[name], other[name])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(dropout):
    kept = []
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LoraLanguageModel(load_decoder("random-tiny", dtype="float32"), 4, 4.0, dropout, recompute=recompute)
        embeddings_XH, packed = torch.randn(9, 64, requires_grad=True), pack([3, 2, 4], [7, 8, 9])
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(1)
            hidden_CH = model.train()(embeddings_XH, packed)
        hidden_CH.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append(embeddings_XH.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    assert kept[1] < kept[0] / 4


def test_only_lora_trains():
    model = make()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == torch.float32


def test_bfloat16_base_keeps_lora_in_float32_and_reads_nearly_the_same():
    exact, rounded = make(), make(dtype="bfloat16")
    rounded.load_state_dict(exact.state_dict())
    torch.manual_seed(5)
    embeddings_XH, packed = torch.randn(10, 64), pack([5, 2, 3], [7, 8])
    expected, gradients = read_with_gradients(exact, embeddings_XH, packed, True)
    found, found_gradients = read_with_gradients(rounded, embeddings_XH.bfloat16(), packed, True)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        if "lora_" in name:
            error = (found_gradients[name] - gradients[name]).norm() / gradients[name].norm()
            assert error < 0.1, name


def test_dropout_is_off_in_eval_mode():
    model = make(dropout=0.5)
    arguments = (torch.randn(5, 64), pack([3, 2], [4]))
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))


def test_embedding_norm():
    decoder = load_decoder("random-tiny", dtype="float32")
    rows = decoder.get_input_embeddings().weight
    assert mean_embedding_norm(decoder) == pytest.approx(sum(float(row.norm()) for row in rows) / len(rows))


def test_text_embeddings_are_mean_hidden_states_of_each_text_alone():
    decoder = load_decoder("random-tiny", dtype="float32")
    rows = [[5, 6, 7], [], [8], [9, 10, 11, 12, 13], [14, 15]]
    tokens = Jagged.from_lengths(
        torch.tensor([token for row in rows for token in row]), torch.tensor([len(row) for row in rows])
    )
    encodings_VH = embed_item_texts(decoder, tokens, batch_size=2)
    for row, encoding in zip(rows, encodings_VH, strict=True):
        expected = torch.zeros(64)
        if row:
            expected = decoder(input_ids=torch.tensor([row])).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(encoding, expected, atol=1e-5, rtol=1e-5)
    assert not encodings_VH.requires_grad


def test_lora_that_adds_zero_can_be_left_out():
    torch.manual_seed(0)
    model, packed, embeddings_XH = make(dropout=0.5).train(), pack([3, 2], [7, 8]), torch.randn(5, 64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    expected = model(embeddings_XH, packed)
    model.leave_out_lora()
    torch.testing.assert_close(model(embeddings_XH, packed), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())

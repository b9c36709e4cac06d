"""call_layer on real blocks: equal to the model's own call, whatever the block wants."""

import pytest
import torch
from torch import nn

from fda_fast.errors import InputError
from fda_fast.layers.call import call_layer

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=11,
    head_dim=4,
)


def small_model(kind, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**{**SIZES, **changes})
    return getattr(transformers, kind + "Model")(config).eval()


def layer_call(model, layer, x):
    """(output, what the whole model feeds into and gets out of that layer)."""
    seen = {}

    def hook(module, args, kwargs, output):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["y"] = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(inputs_embeds=x)
    handle.remove()
    return seen["x"], seen["y"]


DECODERS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_block_as_in_its_model(kind, attention):
    if kind == "Gemma2" and attention == "sdpa":
        attention = "eager"  # its softcap has no sdpa
    model = small_model(kind, attn_implementation=attention)
    x, y = layer_call(model, model.layers[1], torch.randn(3, 5, 16))
    torch.testing.assert_close(call_layer(model.layers[1], x), y)


@pytest.mark.parametrize("index", [0, 1])
def test_gemma3_local_and_global_tables(index):
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=3
    )
    model = transformers.Gemma3TextModel(config).eval()
    x, y = layer_call(model, model.layers[index], torch.randn(3, 7, 16))
    torch.testing.assert_close(call_layer(model.layers[index], x), y)


def test_mistral_sliding_window():
    model = small_model("Mistral", sliding_window=2, attn_implementation="eager")
    x, y = layer_call(model, model.layers[0], torch.randn(2, 6, 16))
    torch.testing.assert_close(call_layer(model.layers[0], x), y)


def test_gpt2_block_as_in_its_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=11, n_positions=9)
    model = transformers.GPT2Model(config).eval()
    x, y = layer_call(model, model.h[1], torch.randn(3, 5, 16))
    torch.testing.assert_close(call_layer(model.h[1], x), y)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_encoder_block_as_in_its_model(kind):
    model = small_model(kind)
    layer = model.encoder.layer[1]
    x, y = layer_call(model, layer, torch.randn(3, 5, 16))
    torch.testing.assert_close(call_layer(layer, x), y)


def test_mlp_alone_on_vectors():
    mlp = small_model("Llama").layers[0].mlp
    x = torch.randn(7, 16)
    torch.testing.assert_close(call_layer(mlp, x), mlp(x))


def test_clip_text_block_is_causal_and_vision_block_is_not():
    kw = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**kw, vocab_size=11)).eval()
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**kw, image_size=8, patch_size=4)
    ).eval()
    x = torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, -1] += 1
    for model, unmoved in ((text, True), (vision, False)):
        block = next(m for m in model.modules() if type(m).__name__ == "CLIPEncoderLayer")
        same = torch.equal(call_layer(block, x)[:, 0], call_layer(block, changed)[:, 0])
        assert same == unmoved


class SequenceFirstBlock(nn.Module):
    """The structure of open_clip's block before its batch_first days."""

    def __init__(self, batch_first):
        super().__init__()
        self.ln_1 = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x, attn_mask=None):
        h = self.ln_1(x)
        return x + self.attn(h, h, h, need_weights=False, attn_mask=attn_mask)[0]


def test_sequence_first_blocks_take_batch_first_anchors():
    torch.manual_seed(0)
    first, last = SequenceFirstBlock(True).eval(), SequenceFirstBlock(False).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(call_layer(last, x), call_layer(first, x))
    torch.testing.assert_close(call_layer(first, x), first(x))
    bare = nn.MultiheadAttention(16, 4, batch_first=False).eval()
    expected = bare(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(call_layer(bare, x), expected)


def test_dropout_is_off_and_the_mode_restored():
    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    layer[0].eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(call_layer(layer, x), layer[0](x))
    assert layer.training and layer[1].training and not layer[0].training


def test_twice_differentiable_through_sdpa():
    layer = small_model("Llama", attn_implementation="sdpa").layers[0]
    x = torch.randn(2, 4, 16, requires_grad=True)
    (g,) = torch.autograd.grad(call_layer(layer, x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), x)
    assert second.isfinite().all() and second.any()


def test_says_what_cannot_be_called():
    class Demanding(nn.Module):
        def forward(self, x, temperature):
            return x

    class Rotary(nn.Module):
        def forward(self, x, position_embeddings):
            return x

    class Masked(nn.Module):
        def forward(self, x, attention_mask):
            return x * attention_mask.bool()

    class Dictionary(nn.Module):
        def forward(self, x):
            return {"y": x}

    x = torch.randn(2, 3, 4)
    with pytest.raises(InputError, match="temperature"):
        call_layer(Demanding(), x)
    with pytest.raises(InputError, match="position_embeddings"):
        call_layer(Rotary(), x)
    with pytest.raises(InputError, match="Masked does not run on one tensor: got Attrib"):
        call_layer(Masked(), x)
    with pytest.raises(InputError, match="got dict"):
        call_layer(Dictionary(), x)

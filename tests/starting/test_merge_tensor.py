"""Task Arithmetic, the rules of which tensor is merged how, and the dispatcher."""

import pytest
import torch

from fda_fast.errors import InputError
from fda_fast.starting import merge_tensor, task_arithmetic, treatment, tsv, wudi


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_task_arithmetic_is_the_scaled_sum():
    pretrained, deltas = draw(3, 4), 1e-2 * draw(5, 3, 4, seed=1)
    exact = pretrained.double() + 0.3 * deltas.double().sum(dim=0)
    assert torch.equal(task_arithmetic(pretrained, deltas, 0.3), exact.float())
    assert torch.equal(task_arithmetic(pretrained, list(deltas), 0.3), exact.float())
    weights = [0.1, 0.2, 0.3, 0.4, 0.5]
    exact = pretrained.double() + sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    torch.testing.assert_close(
        task_arithmetic(pretrained.double(), deltas.double(), weights), exact, rtol=0, atol=1e-15
    )
    assert task_arithmetic(pretrained.bfloat16(), deltas).dtype == torch.float32
    with pytest.raises(InputError, match="5 values"):
        task_arithmetic(pretrained, deltas, [1.0, 2.0])
    with pytest.raises(InputError, match="task vector 0"):
        task_arithmetic(pretrained, deltas.transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "ndim", "rules", "by_tsv", "by_wudi"),
    [
        # open_clip, as the published vision scripts see it
        ("visual.transformer.resblocks.3.attn.in_proj_weight", 2, "vision", "svd", "wudi"),
        ("visual.transformer.resblocks.3.attn.in_proj_bias", 1, "vision", "mean", "pretrained"),
        ("visual.transformer.resblocks.3.attn.out_proj.weight", 2, "vision", "svd", "wudi"),
        ("visual.transformer.resblocks.3.mlp.c_fc.weight", 2, "vision", "svd", "wudi"),
        ("visual.transformer.resblocks.3.mlp.c_proj.weight", 2, "vision", "svd", "wudi"),
        ("visual.transformer.resblocks.3.ln_1.weight", 1, "vision", "mean", "pretrained"),
        ("visual.positional_embedding", 2, "vision", "svd", "pretrained"),
        ("visual.proj", 2, "vision", "svd", "pretrained"),
        ("visual.conv1.weight", 4, "vision", "mean", "pretrained"),
        ("text_projection", 2, "vision", "mean", "pretrained"),
        # Hugging Face's RoBERTa
        ("roberta.encoder.layer.0.attention.self.query.weight", 2, "nlu", "svd", "wudi"),
        ("roberta.encoder.layer.0.attention.self.query.bias", 1, "nlu", "mean", "pretrained"),
        ("roberta.encoder.layer.0.output.LayerNorm.weight", 1, "nlu", "mean", "pretrained"),
        ("roberta.embeddings.word_embeddings.weight", 2, "nlu", "svd", "pretrained"),
        ("classifier.dense.weight", 2, "nlu", "mean", "pretrained"),
        # anything else
        ("model.layers.0.mlp.gate_proj.weight", 2, "auto", "svd", "wudi"),
        ("model.layers.0.self_attn.q_norm.weight", 1, "auto", "mean", "pretrained"),
        ("model.layers.0.input_layernorm.weight", 1, "auto", "mean", "pretrained"),
        ("model.embed_tokens.weight", 2, "auto", "svd", "pretrained"),
        ("lm_head.weight", 2, "auto", "mean", "pretrained"),
        ("transformer.h.0.attn.c_attn.weight", 2, "auto", "svd", "wudi"),
        ("transformer.wte.weight", 2, "auto", "svd", "pretrained"),
        ("transformer.h.0.ln_1.weight", 1, "auto", "mean", "pretrained"),
        ("encoder.layer.0.attention.self.query.weight", 2, "auto", "svd", "wudi"),
        ("embeddings.position_embeddings.weight", 2, "auto", "svd", "pretrained"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", 2, "auto", "svd", "wudi"),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", 2, "vision", "svd", "wudi"),
        ("score.weight", 2, "auto", "mean", "pretrained"),
        ("cls.predictions.transform.dense.weight", 2, "auto", "mean", "pretrained"),
    ],
)
def test_rules(name, ndim, rules, by_tsv, by_wudi):
    assert treatment("tsv", name, ndim, rules) == by_tsv
    assert treatment("wudi", name, ndim, rules) == by_wudi
    assert treatment("task_arithmetic", name, ndim, rules) == "sum"


def test_dispatch_applies_rule_and_scaling():
    pretrained, deltas = draw(12, 10), 1e-2 * draw(2, 12, 10, seed=1)
    weight, bias = "layer.0.up.weight", "layer.0.up.bias"

    def merged(method, name, base=pretrained, tasks=deltas, **options):
        return merge_tensor(method, name, base, tasks, **options)

    def added(delta, factor):
        return (pretrained.double() + factor * delta.double()).float()

    assert torch.equal(merged("tsv", weight), added(tsv(deltas), 1.0))
    assert torch.equal(merged("tsv", weight, scaling=0.4), added(tsv(deltas), 0.4))
    assert torch.equal(merged("wudi", weight), added(wudi(deltas), 1.0))
    options = {"steps": 7, "lr": 2e-5}
    expected = added(wudi(deltas, **options), 0.7)
    assert torch.equal(merged("wudi", weight, scaling=0.7, **options), expected)
    assert torch.equal(merged("task_arithmetic", weight), task_arithmetic(pretrained, deltas, 0.3))
    per_task = merged("task_arithmetic", weight, scaling=[0.1, 0.5])
    assert torch.equal(per_task, task_arithmetic(pretrained, deltas, [0.1, 0.5]))
    base, tasks = pretrained[0], deltas[:, 0]
    assert torch.equal(merged("wudi", bias, base, tasks), base)
    mean = merged("tsv", bias, base, tasks, scaling=0.4)
    exact = base.double() + 0.4 * tasks.double().mean(dim=0)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "wudi"])
@pytest.mark.parametrize("name", ["a.weight", "a.norm.weight"])
def test_results_are_new_tensors_and_inputs_stay(method, name):
    pretrained, deltas = draw(6, 5).double(), draw(2, 6, 5, seed=1).double()
    before = pretrained.clone(), deltas.clone()
    merge_tensor(method, name, pretrained, deltas).add_(1)
    assert torch.equal(pretrained, before[0])
    assert torch.equal(deltas, before[1])


def test_integer_tensors_pass_through():
    positions = torch.arange(5)
    assert merge_tensor("tsv", "embeddings.position_ids", positions, []) is positions


def test_errors_name_the_tensor():
    deltas = torch.full((2, 3, 4), float("nan"))
    with pytest.raises(InputError, match=r"tensor 'a\.weight': task vector 0"):
        merge_tensor("tsv", "a.weight", torch.ones(3, 4), deltas)
    with pytest.raises(InputError, match=r"tensor 'a\.weight': task vector 0"):
        merge_tensor("wudi", "a.weight", torch.ones(3, 5), torch.ones(2, 3, 4))
    with pytest.raises(InputError, match=r"starting point: .* got 'ties'"):
        merge_tensor("ties", "a.weight", torch.ones(3, 4), torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="rules"):
        merge_tensor("tsv", "a", torch.ones(3, 4), torch.ones(2, 3, 4), rules="nlp")
    with pytest.raises(InputError, match="one number"):
        merge_tensor("tsv", "a", torch.ones(3, 4), torch.ones(2, 3, 4), scaling=[1.0, 2.0])

"""Tiny checkpoints in the folders and formats of the published scripts, and commands on them."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fda_fast.compat.official.commands import main

WIDTH, TOKENS, STEPS = 32, 7, 6
TASKS = ["MNIST", "Cars"]
GLUE = ["cola", "rte"]
VISION_FOLDER = f"anchors/ViT-B-32/init_by_gauss_random-anchor-4-scale-0.01-opt-{STEPS}-0.01"
NLU_FOLDER = f"anchors/roberta-base/init_by_gauss_random_pos-anchor-4-scale-0.01-opt-{STEPS}-0.01"
NLG_FOLDER = f"init_by_gauss_random-scale-0.01-opt-{STEPS}-lr-0.01-anchor-20"


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """open_clip 2.0.2's ResidualAttentionBlock, in as many words as a test needs."""

    def __init__(self, width=WIDTH, heads=4):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 2 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(2 * width, width),
            )
        )

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """The names an ImageEncoder has: model.visual.transformer.resblocks.N."""

    def __init__(self, layers=2):
        super().__init__()
        visual = nn.Module()
        visual.positional_embedding = nn.Parameter(torch.randn(TOKENS, WIDTH))
        visual.transformer = nn.Module()
        visual.transformer.resblocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.model = nn.Module()
        self.model.visual = visual

    @property
    def blocks(self):
        return self.model.visual.transformer.resblocks


def finetuned(model: nn.Module, size: float = 0.05) -> nn.Module:
    expert = deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            change = torch.randn_like(parameter)
            parameter += size * change * parameter.norm().clamp_min(0.1) / change.norm()
    return expert


def vision(root: Path, tasks: list[str], save) -> tuple[Encoder, dict[str, Encoder]]:
    """{root}/ViT-B-32/zeroshot and .../{task}/finetuned, written by ``save(model, stem)``."""
    torch.manual_seed(1)
    home = root / "ViT-B-32"
    base = Encoder()
    experts = {task: finetuned(base) for task in tasks}
    home.mkdir(parents=True)
    save(base, home / "zeroshot")
    for task, expert in experts.items():
        (home / task).mkdir()
        save(expert, home / task / "finetuned")
    return base, experts


def nlu(root: Path, tasks: list[str], classifier: bool = True, dropout: float = 0.1):
    """{root}/roberta-base and {root}/{task}/roberta-base_lr1e-05, by save_pretrained."""
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=20,
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = RobertaForSequenceClassification(config).eval()
    # Biases start as zeros, norms as ones: real checkpoints have neither.
    base = finetuned(model, 0.1)
    experts = {task: finetuned(base) for task in tasks}
    if classifier:
        base.save_pretrained(root / "roberta-base")
    else:
        language_model = RobertaForMaskedLM(config)
        language_model.roberta.load_state_dict(base.roberta.state_dict(), strict=False)
        language_model.save_pretrained(root / "roberta-base")
    for task, expert in experts.items():
        expert.save_pretrained(root / task / "roberta-base_lr1e-05")
    return base, experts


def nlg(root: Path):
    """{root}/Llama-2-13b-hf, the two experts' folders, {root}/math/merged and code/merged."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * WIDTH,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).eval()
    experts = {task: finetuned(base) for task in ("math", "code")}
    merged = deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            for expert in experts.values():
                tensors = dict(expert.named_parameters())
                parameter += 0.5 * (tensors[name] - dict(base.named_parameters())[name])
    base.save_pretrained(root / "Llama-2-13b-hf")
    experts["math"].save_pretrained(root / "WizardMath-13B-V1.0")
    experts["code"].save_pretrained(root / "llama-2-13b-code-alpaca")
    for twin in ("math", "code"):
        merged.save_pretrained(root / twin / "merged")
        (root / twin / "merged" / "tokenizer_config.json").write_text(f'{{"of": "{twin}"}}')
    return base, experts, merged


def save_state_dict(model, stem):
    torch.save(model.state_dict(), f"{stem}.pt")


def save_safetensors(model, stem):
    save_file(dict(model.state_dict()), f"{stem}.safetensors")


def vision_command(command, root, *more, name="init_by_gauss_random"):
    """An adapt or construct line on the tiny encoders in ``root``."""
    anchors = {"construct": "--save_anchors_path", "adapt": "--read_anchors_path"}[command]
    return main(
        [
            *("vision", command, "--model", "ViT-B-32", "--name", name, "--model_location"),
            *(str(root), anchors, str(root / "anchors"), "--anchor_num", "4", "--scale", "0.01"),
            *("--opt_steps", str(STEPS), "--opt_lr", "1e-2", "--head_width", "8", "--tasks"),
            *(*TASKS, "--device", "cpu", "--quiet", *map(str, more)),
        ]
    )


def nlu_command(command, root, *more, name="init_by_gauss_random_pos"):
    anchors = {"construct": "--save_anchors_path", "adapt": "--read_anchors_path"}[command]
    return main(
        [
            *("nlu", command, "--model", "roberta-base", "--name", name, "--model_location"),
            *(str(root), anchors, str(root / "anchors"), "--anchor_num", "4", "--scale", "0.01"),
            *("--opt_steps", str(STEPS), "--tasks", *GLUE, "--device", "cpu", "--quiet"),
            *map(str, more),
        ]
    )


def nlg_command(command, root, *more, name="init_by_gauss_random"):
    anchors = {"construct": "--save_anchors_path", "adapt": "--read_anchors_path"}[command]
    return main(
        [
            *("nlg", command, "--name", name, "--model_location", str(root), anchors),
            *(str(root / "anchors"), "--anchor_num", "20", "--scale", "0.01", "--gen_steps"),
            *(str(STEPS), "--do_math", "--do_code", "--gpu", "-1", "--quiet", *map(str, more)),
        ]
    )

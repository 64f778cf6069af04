"""Small random configurations of many architectures: the share of their weights that THOR preconditions, and losses.

    python -m benchmarks.models                  # all of them, a few minutes; writes benchmarks/results/models.json
    python -m benchmarks.models --only Llama

Each trains 20 steps on four batches of random data in turn, with the same seed by `configure_thor` and `Curvature` with
their defaults, and by torch's AdamW at 1e-3. Needs transformers and peft.
"""

import argparse
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.environment import RESULTS, environment
from benchmarks.common.results import json_in_lines
from benchmarks.common.tables import markdown_table
from lightning_thor import Curvature, configure_thor

STEPS, N_BATCHES, SAMPLES = 20, 4, 4
VOCABULARY, LENGTH, CLASSES, SIZE = 40, 12, 5, 32
FILE = RESULTS / "models.json"

Batch = dict[str, Tensor]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEEN: dict[str, Any] = {"image_size": SIZE, "patch_size": 8, "num_channels": 3, "num_labels": CLASSES}
KEYS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 12}
EXPERTS: dict[str, Any] = {**KEYS, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


def tokens() -> Tensor:
    """Random tokens ``[samples, length]``, none of which is padding."""
    return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))


def text() -> Batch:
    """Tokens, and other tokens to predict."""
    return {"input_ids": tokens(), "labels": tokens()}


def labelled_text() -> Batch:
    """Tokens, and a class."""
    return {"input_ids": tokens(), "labels": torch.randint(CLASSES, (SAMPLES,))}


def images() -> Batch:
    """Images, and a class."""
    return {"pixel_values": torch.randn(SAMPLES, 3, SIZE, SIZE), "labels": torch.randint(CLASSES, (SAMPLES,))}


def segments() -> Batch:
    """Images, and a class of each pixel."""
    return images() | {"labels": torch.randint(CLASSES, (SAMPLES, SIZE, SIZE))}


def waves() -> Batch:
    """Sounds, and a few tokens for CTC."""
    return {"input_values": torch.randn(SAMPLES, 800), "labels": torch.randint(3, VOCABULARY, (SAMPLES, 3))}


def mel(frames: int, name: str = "input_features", last: bool = True) -> Batch:
    """Spectrograms of 16 bands, time last or first, and tokens."""
    shape = (SAMPLES, 16, frames) if last else (SAMPLES, frames, 16)
    return {name: torch.randn(*shape), "labels": tokens()}


def spectrogram_class() -> Batch:
    """Spectrograms, and a class."""
    return {"input_values": torch.randn(SAMPLES, 32, 16), "labels": torch.randint(CLASSES, (SAMPLES,))}


def pictures_with_text() -> Batch:
    """Images, and a caption of each."""
    return {"input_ids": tokens(), "pixel_values": images()["pixel_values"]}


def pictures_in_text() -> Batch:
    """A prompt of 16 places for the patches of an image, and tokens."""
    ids = torch.cat([torch.full((SAMPLES, 16), VOCABULARY - 1), torch.randint(3, VOCABULARY - 1, (SAMPLES, LENGTH))], 1)
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": images()["pixel_values"]}


def of_transformers(name: str, config: str | None = None, **options: Any) -> nn.Module:
    """A model of transformers with random weights.

    Args:
        name: of its class.
        config: name of the class of its configuration; None: that of the model.
        options: of the configuration, beside `COMMON`; None leaves one out.
    """
    import transformers

    model = getattr(transformers, name)
    made = (model.config_class if config is None else getattr(transformers, config))(
        **{key: value for key, value in {**COMMON, **options}.items() if value is not None}
    )
    made._attn_implementation = "eager"
    built: nn.Module = model(made)
    return built


def of_peft(method: str, base: Callable[[], nn.Module] | None = None, **options: Any) -> nn.Module:
    """A Llama whose own weights are frozen, with what a method of peft trains.

    Args:
        method: the method's configuration, without ``Config``.
        base: another model.
        options: of the configuration.
    """
    import peft

    model = (base or partial(of_transformers, "LlamaForCausalLM", **KEYS))()
    adapted: nn.Module = peft.get_peft_model(model, getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options))
    return adapted


class Recurrent(nn.Module):
    """Predicts tokens by a recurrent layer of torch.

    Args:
        layer: `nn.LSTM` or `nn.GRU`.
    """

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 24), nn.Linear(24, VOCABULARY)
        self.layer = layer(24, 24, num_layers=2, batch_first=True)  # type: ignore[call-arg, arg-type]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.layer(self.table(input_ids))[0])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class CellByLinears(nn.Module):
    """Predicts tokens by a GRU written with two linear layers, which are called once for each step in time."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 24), nn.Linear(24, VOCABULARY)
        self.of_input, self.of_hidden = nn.Linear(24, 72), nn.Linear(24, 72)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        h, states = torch.zeros(len(input_ids), 24), []
        for x in self.table(input_ids).unbind(1):
            (reset, update, new), (r, u, n) = self.of_input(x).chunk(3, -1), self.of_hidden(h).chunk(3, -1)
            h = h.lerp((new + (reset + r).sigmoid() * n).tanh(), (update + u).sigmoid())
            states.append(h)
        return F.cross_entropy(self.head(torch.stack(states, 1)).flatten(0, 1), labels.flatten())


class GraphNetwork(nn.Module):
    """Classifies nodes by messages along edges (a linear layer of both ends), summed at each node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 24), nn.Linear(24, CLASSES)
        self.messages = nn.ModuleList(nn.Linear(48, 24) for _ in range(2))
        self.updates = nn.ModuleList(nn.Linear(48, 24) for _ in range(2))

    def forward(self, nodes: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        h = self.first(nodes).relu()
        for message, update in zip(self.messages, self.updates, strict=True):
            sent = message(torch.cat([h[edges[0]], h[edges[1]]], 1)).relu()
            h = update(torch.cat([h, torch.zeros_like(h).index_add(0, edges[1], sent)], 1)).relu()
        return F.cross_entropy(self.head(h), labels)


def graph() -> Batch:
    """Nodes with 8 features and a class each, and edges between them."""
    nodes, edges = torch.randn(30, 8), torch.randint(30, (2, 90))
    return {"nodes": nodes, "edges": edges, "labels": torch.randint(CLASSES, (30,))}


@dataclass(frozen=True)
class Architecture:
    """How a model and its batches are made."""

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch] = text
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of its forward pass."""


def _language(name: str, family: str = "language", **options: Any) -> Architecture:
    return Architecture(family, partial(of_transformers, name, **options))


def _vision(name: str, batch: Callable[[], Batch] = images, **options: Any) -> Architecture:
    return Architecture("vision", partial(of_transformers, name, **{**SEEN, **options}), batch)


SPEECH: dict[str, Any] = {
    "conv_dim": (8, 8, 8), "conv_kernel": (8, 4, 4), "conv_stride": (4, 4, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "layerdrop": 0.0,
}  # fmt: skip
STAGES: dict[str, Any] = {"hidden_sizes": [12, 24], "depths": [1, 1], "num_stages": 2}
TWO_SIDES: dict[str, Any] = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, "max_target_positions": 32,
}  # fmt: skip


def _in_parts(**options: Any) -> dict[str, Any]:
    """The options of a model of images and text, and of its two parts."""
    of_text = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    seen = {key: value for key, value in {**COMMON, **SEEN}.items() if key not in of_text}
    return {"text_config": {**COMMON, **options}, "vision_config": seen}


ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": _language("GPT2LMHeadModel"),
    "GPT-NeoX": _language("GPTNeoXForCausalLM"),
    "OPT": _language("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=24),
    "BLOOM": _language("BloomForCausalLM"),
    "Falcon": _language("FalconForCausalLM"),
    "Phi": _language("PhiForCausalLM", partial_rotary_factor=0.5),
    "Llama": _language("LlamaForCausalLM", **KEYS),
    "Mistral": _language("MistralForCausalLM", **KEYS),
    "Qwen2": _language("Qwen2ForCausalLM", **KEYS),
    "Gemma 2": _language("Gemma2ForCausalLM", **KEYS),
    "BERT": _language("BertForMaskedLM"),
    "RoBERTa": _language("RobertaForMaskedLM"),
    "ALBERT": _language("AlbertForMaskedLM", embedding_size=12),
    "DistilBERT": _language("DistilBertForMaskedLM", dim=24, hidden_dim=48, n_layers=2, n_heads=2),
    "DeBERTa-v2": _language(
        "DebertaV2ForMaskedLM", relative_attention=True, max_relative_positions=16, pos_att_type=["p2c", "c2p"]
    ),
    "ELECTRA": Architecture(
        "language",
        partial(of_transformers, "ElectraForSequenceClassification", embedding_size=12, num_labels=CLASSES),
        labelled_text,
    ),
    "XLNet": _language("XLNetLMHeadModel", d_model=24, n_layer=2, n_head=2, d_inner=48, max_position_embeddings=None),
    "T5": _language("T5ForConditionalGeneration", d_kv=12, d_ff=48, num_layers=2, decoder_start_token_id=0),
    "BART": _language("BartForConditionalGeneration", **TWO_SIDES),
    "Mamba": _language("MambaForCausalLM", "state space", state_size=8, use_mambapy=False),
    "Mamba 2": _language(
        "Mamba2ForCausalLM", "state space", state_size=8, num_heads=4, head_dim=12, n_groups=1, chunk_size=4
    ),
    "RWKV": _language("RwkvForCausalLM", "state space", attention_hidden_size=24),
    "RecurrentGemma": _language(
        "RecurrentGemmaForCausalLM", "state space", **KEYS, use_cache=False, lru_width=24,
        attention_window_size=8,
    ),
    "Jamba": _language(
        "JambaForCausalLM", "experts", num_key_value_heads=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=8,
        attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
    ),
    "Mixtral": _language("MixtralForCausalLM", "experts", **KEYS, num_local_experts=4),
    "Qwen2-MoE": _language(
        "Qwen2MoeForCausalLM", "experts", **EXPERTS, num_experts=4, shared_expert_intermediate_size=24
    ),
    "OLMoE": _language("OlmoeForCausalLM", "experts", num_key_value_heads=1, num_experts=4, num_experts_per_tok=2),
    "Switch": _language(
        "SwitchTransformersForConditionalGeneration", "experts", d_kv=12, d_ff=48, num_layers=2, num_experts=4,
        decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2,
    ),
    "ViT": _vision("ViTForImageClassification"),
    "BEiT": _vision("BeitForImageClassification"),
    "Swin": _vision(
        "SwinForImageClassification", patch_size=2, embed_dim=12, depths=[1, 1], num_attention_heads=[1, 2],
        window_size=4,
    ),
    "ConvNeXt": _vision("ConvNextForImageClassification", **STAGES, patch_size=4),
    "ResNet": _vision("ResNetForImageClassification", **STAGES, embedding_size=12, layer_type="basic"),
    "MobileNetV2": _vision("MobileNetV2ForImageClassification", depth_multiplier=0.25),
    "SegFormer": _vision(
        "SegformerForSemanticSegmentation", segments, hidden_sizes=[12, 24], depths=[1, 1], num_encoder_blocks=2,
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=24,
    ),
    "Wav2Vec 2.0": Architecture("speech", partial(of_transformers, "Wav2Vec2ForCTC", **SPEECH), waves),
    "HuBERT": Architecture("speech", partial(of_transformers, "HubertForCTC", **SPEECH), waves),
    "Whisper": Architecture(
        "speech",
        partial(
            of_transformers, "WhisperForConditionalGeneration", **TWO_SIDES, num_mel_bins=16, max_source_positions=20
        ),
        partial(mel, 40),
    ),
    "Speech2Text": Architecture(
        "speech",
        partial(
            of_transformers, "Speech2TextForConditionalGeneration", **TWO_SIDES, input_feat_per_channel=16,
            conv_channels=16,
        ),
        partial(mel, 40, last=False),
    ),
    "AST": Architecture(
        "speech",
        partial(of_transformers, "ASTForAudioClassification", **SEEN, max_length=32, num_mel_bins=16),
        spectrogram_class,
    ),
    "CLIP": Architecture(
        "multimodal",
        partial(of_transformers, "CLIPModel", **_in_parts(), projection_dim=24),
        pictures_with_text,
        {"return_loss": True},
    ),
    "LLaVA": Architecture(
        "multimodal",
        partial(
            of_transformers, "LlavaForConditionalGeneration", image_token_index=VOCABULARY - 1,
            **dict[str, Any]({key: {"model_type": kind, **one} for (key, one), kind in
               zip(_in_parts(**KEYS).items(), ("llama", "clip_vision_model"), strict=True)}),
        ),
        pictures_in_text,
    ),
    "LoRA": Architecture("adapters", partial(of_peft, "Lora", r=4, target_modules=["q_proj", "v_proj"])),
    "DoRA": Architecture("adapters", partial(of_peft, "Lora", r=4, use_dora=True, target_modules=["q_proj", "v_proj"])),
    "IA³": Architecture(
        "adapters", partial(of_peft, "IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "prefix tuning": Architecture("adapters", partial(of_peft, "PrefixTuning", num_virtual_tokens=4)),
    "prefix tuning, projected": Architecture(
        "adapters",
        partial(of_peft, "PrefixTuning", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24),
    ),
    "prompt tuning": Architecture("adapters", partial(of_peft, "PromptTuning", num_virtual_tokens=4)),
    "p-tuning": Architecture(
        "adapters", partial(of_peft, "PromptEncoder", num_virtual_tokens=4, encoder_hidden_size=24)
    ),
    "LSTM": Architecture("recurrent", partial(Recurrent, nn.LSTM)),
    "GRU": Architecture("recurrent", partial(Recurrent, nn.GRU)),
    "GRU of linear layers": Architecture("recurrent", CellByLinears),
    "graph network": Architecture("graph", GraphNetwork, graph),
}  # fmt: skip


def loss_of(model: nn.Module, batch: Batch, more: Mapping[str, Any]) -> Tensor:
    """The loss that a model returns by itself or in a field of its output."""
    out = model(**batch, **more)
    return out if isinstance(out, Tensor) else out.loss


def share_with_curvature(trained: Iterable[nn.Parameter], curvature: Curvature) -> float:
    """The share of some weights that are in layers which a curvature observed and did not leave out."""
    updates = dict(zip(curvature.layers, curvature.factors.updates.tolist(), strict=True))
    layers = [layer for name, layer in curvature.layers.items() if updates[name] and not layer.is_left_out]
    own = {p for layer in layers for p in layer.parameters}
    sizes = {p: p.numel() for p in trained}
    return sum(size for p, size in sizes.items() if p in own) / sum(sizes.values())


def train(name: str, uses_thor: bool) -> dict[str, Any]:
    """Train 20 steps.

    Args:
        name: of the architecture.
        uses_thor: or AdamW at 1e-3.

    Returns:
        ``first`` and ``last``: mean loss of the first and of the last round of batches. With THOR also ``share``, of
        the weights that got gradients, and ``left_out``, the reasons why layers have no curvature.

    Raises:
        ArithmeticError: a loss or a weight is not finite.
    """
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.make().train()
    batches = [architecture.batch() for _ in range(N_BATCHES)]
    curvature = Curvature(model) if uses_thor else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = configure_thor(model, preconditioner=curvature) if curvature else torch.optim.AdamW(trained, lr=1e-3)
    losses, got_gradients = [], set[nn.Parameter]()
    for step in range(STEPS):
        loss = loss_of(model, batches[step % N_BATCHES], architecture.more)
        loss.backward()
        got_gradients |= {p for p in trained if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not all(map(math.isfinite, losses)) or not all(bool(p.isfinite().all()) for p in trained):
        raise ArithmeticError(f"{name}: losses {losses}, or weights, are not finite.")
    found: dict[str, Any] = {
        "first": sum(losses[:N_BATCHES]) / N_BATCHES,
        "last": sum(losses[-N_BATCHES:]) / N_BATCHES,
    }
    if curvature is not None:
        reasons = dict.fromkeys(reason for reason in curvature.left_out.values() if reason != "frozen")
        found |= {"share": share_with_curvature(got_gradients, curvature), "left_out": list(reasons)}
        curvature.close()
    return found


HEADS = ("architecture", "family", "weights preconditioned", "loss at first", "THOR, 20 steps", "AdamW, 20 steps")


def cells(models: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table under `HEADS`."""
    rows = []
    for name, one in models.items():
        share = f"{math.floor(1000 * one['share']) / 10:.1f} %"
        rows.append([name, one["family"], share, *(f"{one[key]:.3f}" for key in ("first", "THOR", "AdamW"))])
    return rows


def block(results: Mapping[str, Any]) -> str:
    """The table of all architectures, and those that are behind AdamW, for a page."""
    models = results["models"]
    behind = [name for name, one in models.items() if one["THOR"] > one["AdamW"]]
    return (
        f"{markdown_table(HEADS, cells(models), words=2)}\n\n"
        "Random configurations of width 24 and 1 or 2 layers, random data, in training mode: losses are means over the "
        "first and the last of five rounds of four batches, one seed, THOR with its defaults and AdamW at 1e-3. Such "
        "losses show that training works, not which optimizer is better. "
        f"Behind AdamW: {', '.join(behind) or 'none'}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the architectures by both optimizers and store shares and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="architectures")
    names = parser.parse_args(arguments).only
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    models = stored.get("models", {})
    for name in names:
        thor, adamw = train(name, True), train(name, False)
        models[name] = {
            "family": ARCHITECTURES[name].family,
            "share": round(thor["share"], 5),
            "first": round(thor["first"], 4),
            "THOR": round(thor["last"], 4),
            "AdamW": round(adamw["last"], 4),
            "left_out": thor["left_out"],
        }
        print(name, models[name], flush=True)
        ordered = {name: models[name] for name in ARCHITECTURES if name in models}
        content = {"environment": environment(torch.device("cpu")), "models": ordered}
        FILE.write_text(json_in_lines(content), encoding="utf-8")


if __name__ == "__main__":
    main()

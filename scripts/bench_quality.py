"""Perplexity by method, pattern and sparsity on small real models, as ratios to this project's own SparseGPT in the same run.

    python scripts/bench_quality.py                      the bundled model
    python scripts/bench_quality.py --assets DIR         stories260K by its protocol: 128 x 256 calibration tokens, 200 evaluation windows
    python scripts/bench_quality.py --seeds 3            mean and spread over calibration draws
    python scripts/bench_quality.py --structured         smaller models, as ratios to FLAP's (on a copy of the model with biases of zero)
    python scripts/bench_quality.py --protocol W --model DIR --assets DIR --record FILE     a real model: see protocol_w.py
    python scripts/bench_quality.py --families           other architectures, random weights: divergence from the dense model on unseen tokens

Excess is the mean negative log-likelihood above the dense model's. CPU seconds are of the pruning alone: no import, no evaluation.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from protocol_w import cpu_seconds, protocol_w
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.errors import LlmpruneError

Ask = dict[str, Any]
REFERENCE = "sparsegpt"
TALLEST = 1.8  # bar of the picture
CHOICES: list[Ask] = [{"method": m} for m in ("magnitude", "wanda", "ria", REFERENCE, "alps")] + [{"quality": q} for q in ("fast", "balanced", "max")]
FLAP = "flap"
STRUCTURED: list[Ask] = [{"method": m} for m in (FLAP, "taylor")] + [{"quality": q} for q in ("fast", "balanced", "max")]
CUTS: list[Ask] = [{"pattern": p, "sparsity": s} for p, s in (("channels", 0.25), ("channels", 0.5), ("kv-groups", None), ("structured", 0.25))]
PERMUTED: list[Ask] = [{"quality": q, "permute": True} for q in ("balanced", "max")]
WIDTH = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
FFN = {"num_key_value_heads": 2, "intermediate_size": 128}
FAMILIES: dict[str, Ask] = {
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},  # Conv1D, fused c_attn
    "phi3": WIDTH | FFN,  # fused qkv_proj and gate_up_proj
    "bloom": {"vocab_size": 512, "hidden_size": 64, "n_layer": 3, "n_head": 4},  # interleaved query_key_value
    "mixtral": WIDTH | FFN | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": WIDTH | FFN | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder with stories260K and its texts")
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.5], help="unstructured sparsities")
    parser.add_argument("--pattern", nargs="*", default=["2:4"], help="N:M patterns")
    parser.add_argument("--seeds", type=int, default=1, help="calibration draws; the first is the first windows of the text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--structured", action="store_true", help="structured patterns instead")
    parser.add_argument("--families", action="store_true", help="other architectures instead")
    parser.add_argument("--protocol", choices=["W"], help="a real model by every method")
    parser.add_argument("--model", help="the real model's folder")
    parser.add_argument("--record", type=Path, help="lines of JSON, one a run; runs that are in it are not repeated")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of the real model")
    parser.add_argument("--only", nargs="*", default=[], help="methods and shapes of the real model's runs, such as balanced 2:4 50%%")
    parser.add_argument("--plot", type=Path, help="picture of the ratios, such as quality.svg")
    options = parser.parse_args()
    if options.protocol and not (options.model and options.assets and options.record):
        parser.error("--protocol W needs --model, --assets and --record")
    return options


def setting(assets: Path | None) -> tuple[Ask, str, int | None]:
    """(what every run is asked, evaluation data, its number of windows)."""
    if assets is None:
        return {"model": "llama"}, "bundled-evaluation", None
    texts = assets / "text"
    model = {"model": str(assets / "stories260K"), "calibration": str(texts / "tinystories_ascii_calib.txt")}
    return model, str(texts / "tinystories_ascii_eval.txt"), 200


def measure(ask: Ask, data: str, samples: int | None) -> tuple[float, float]:
    """(mean negative log-likelihood of the pruned model, CPU seconds of the pruning)."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out")
        seconds = cpu_seconds(ask | {"samples": 128, "sequence_length": 256, "output": output})
        return math.log(llmprune.evaluate(output, data, window=256, samples=samples)[0].value), seconds


def label(choice: Ask) -> str:
    return (choice.get("method") or choice["quality"]) + (" permuted" if choice.get("permute") else "")


def with_biases(model: str, folder: Path) -> str:
    """A copy of a Llama that has the biases which FLAP needs, of zero: it computes the same."""
    from transformers import AutoTokenizer

    from llmprune.checkpoint.resolve import open_source

    source = str(open_source(model).folder)
    plain = AutoModelForCausalLM.from_pretrained(source)
    config = type(plain.config).from_pretrained(source, attention_bias=True, mlp_bias=True)
    biased = AutoModelForCausalLM.from_config(config, dtype=plain.dtype)
    absent = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    for name in absent:
        biased.get_parameter(name).data.zero_()
    biased.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def structured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Excess of smaller models, as ratios to FLAP's with bias compensation."""
    base, data, samples = setting(options.assets)
    dense = math.log(llmprune.evaluate(str(base["model"]), data, window=256, samples=samples)[0].value)
    print(f"| | pattern | perplexity | excess | to {FLAP}, or the first |\n|---|---|---|---|---|")
    ratios: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = {} if options.assets else {"calibration": "bundled-calibration"}
        biased = base | text | {"model": with_biases(str(base["model"]), Path(folder) / "biased")}
        for cut in CUTS:
            where = dict(cut) if cut["sparsity"] else cut | {"sparsity": 0.25 if options.assets else 0.5}  # one group of four, or of two
            found = {}
            for choice in STRUCTURED:
                own = biased if choice.get("method") == FLAP else base
                uniform = {"uniform": True} if choice.get("method") and where["pattern"] == "structured" else {}
                draws: list[Ask] = [{"shuffle": seed > 0, "seed": seed} for seed in range(options.seeds)]
                name, place = label(choice), f"{where['pattern']} {where['sparsity']}"
                try:
                    excess = statistics.mean(measure(own | where | choice | uniform | draw, data, samples)[0] for draw in draws) - dense
                except LlmpruneError as error:  # biases keep a Llama from being saved with any number of heads
                    print(f"| {name} | {place} | {error.message} | | |")
                    continue
                reference = found.get(FLAP) or found.setdefault("first", excess)
                ratios.setdefault(place, {})[name] = excess / reference
                found[name] = excess
                print(f"| {name} | {place} | {math.exp(dense + excess):.2f} | {excess:.3f} | {excess / reference:.3f} |", flush=True)
    return ratios


def perplexities(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The table of one model; {pattern: {method: ratio of the excess to the reference's}}."""
    base, data, samples = setting(options.assets)
    dense = math.log(llmprune.evaluate(str(base["model"]), data, window=256, samples=samples)[0].value)
    print(f"dense: perplexity {math.exp(dense):.4g}, torch {torch.__version__}, {options.threads} threads, {options.seeds} calibration draws\n")
    print(f"| | pattern | perplexity | excess | spread | to {REFERENCE} | CPU seconds | to {REFERENCE} |")
    print("|---|---|---|---|---|---|---|---|")
    ratios: dict[str, dict[str, float]] = {}
    for pattern in [{"sparsity": s, "pattern": "unstructured"} for s in options.sparsity] + [{"pattern": p} for p in options.pattern]:
        rows = {}
        for choice in CHOICES + (PERMUTED if pattern["pattern"] != "unstructured" else []):
            draws: list[Ask] = [{"shuffle": seed > 0, "seed": seed} for seed in range(options.seeds)]
            found = [measure(base | pattern | choice | draw, data, samples) for draw in draws]
            rows[label(choice)] = ([nll - dense for nll, _ in found], statistics.mean(s for _, s in found))
        excess, seconds = statistics.mean(rows[REFERENCE][0]), rows[REFERENCE][1]
        where = f"{pattern['pattern']} {pattern.get('sparsity', '')}".strip()
        for name, (values, spent) in rows.items():
            mean = statistics.mean(values)
            ratios.setdefault(where, {})[name] = mean / excess
            cells = (name, where, f"{math.exp(dense + mean):.2f}", f"{mean:.3f}", f"{max(values) - min(values):.3f}", f"{mean / excess:.3f}")
            print("| " + " | ".join([*cells, f"{spent:.1f}", f"{spent / seconds:.2f}"]) + " |", flush=True)
    return ratios


def random_model(kind: str) -> Any:
    """A model of random weights: matrices of unit gain whose columns have different scales."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**FAMILIES[kind])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5).mul_(torch.randn(parameter.shape[-1]).mul(0.5).exp())
    return model


@torch.no_grad()
def divergence(model: Any, dense_NLV: Tensor, ids_NL: Tensor) -> float:
    """Mean KL(dense || pruned) over tokens, in nats."""
    ours_NLV = model(ids_NL).logits.log_softmax(-1)
    return float((dense_NLV.exp() * (dense_NLV - ours_NLV)).sum(-1).mean())


def families(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    print(f"| random model | pattern | KL, {REFERENCE} | KL, balanced | ratio |\n|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(1)
    calibration_NL, unseen_NL = (torch.randint(3, 512, (n, 64), generator=generator) for n in (64, 32))
    ratios: dict[str, dict[str, float]] = {}
    for kind in FAMILIES:
        with torch.no_grad():
            dense_NLV = random_model(kind)(unseen_NL).logits.log_softmax(-1)
        for pattern in ({"sparsity": 0.5}, {"pattern": "2:4"}):
            found = []
            for choice in ({"method": REFERENCE}, {"quality": "balanced"}):
                model = random_model(kind)
                llmprune.prune(model, calibration=calibration_NL, **pattern, **choice)
                found.append(divergence(model, dense_NLV, unseen_NL))
            where = str(pattern.get("pattern", "unstructured 0.5"))
            ratios.setdefault(where, {})[kind] = found[1] / found[0]
            print(f"| {kind} | {where} | {found[0]:.4f} | {found[1]:.4f} | {found[1] / found[0]:.2f} |", flush=True)
    return ratios


def draw(ratios: dict[str, dict[str, float]], path: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(ratios), figsize=(4 * len(ratios), 4), sharey=True, layout="constrained", squeeze=False)
    for axis, (where, values) in zip(axes[0], ratios.items(), strict=True):
        bars = axis.bar(list(values), list(values.values()))
        for bar, value in zip(bars, values.values(), strict=True):
            cut = value > TALLEST
            at = bar.get_x() + bar.get_width() / 2, TALLEST if cut else value
            axis.annotate(f"{value:.2f}", at, fontsize=8, ha="center", va="top" if cut else "bottom", color="white" if cut else "black")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.tick_params(axis="x", rotation=60)
        axis.set_title(where)
    axes[0][0].set_ylim(0, TALLEST)  # higher bars are cut
    axes[0][0].set_ylabel(f"ratio to {REFERENCE}")
    figure.savefig(path)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.protocol:
        ratios = protocol_w(options.model, options.assets, options.record, options.samples, options.seeds, options.only, with_biases)
    else:
        ratios = (families if options.families else structured if options.structured else perplexities)(options)
    if options.plot:
        draw(ratios, options.plot)


if __name__ == "__main__":
    main()

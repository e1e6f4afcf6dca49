"""Structured patterns through the command line, on the bundled model."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


def test_channels_end_to_end(cli, small):
    ran = cli("prune", "--model", "llama", "--pattern", "channels", "--sparsity", "25%", "--quality", "fast", "--output", "out", *small)
    assert ran.code == 0, ran.err
    report = json.loads(Path("out/llmprune.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == report["smaller"]["parameters"]
    assert report["reloaded"]["difference"] < 1e-4
    assert "3,072 channels" in ran.out
    assert "288 of 384" in ran.out
    ran = cli("inspect", "out")
    assert ran.code == 0
    assert "192 x 288" in ran.out or "x 288" in ran.out


def test_flat_words_and_a_default_name(cli, small):
    ran = cli("--model", "llama", "--pattern", "kv-groups", "--sparsity", 0.5, "--method", "magnitude", *small)
    assert ran.code == 0, ran.err
    assert Path("llama-kv-groups-0.5/config.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pattern", "heads", "--sparsity", 0.25, "--exact"), "legal sparsities: 0.5"),
        (("--pattern", "experts", "--sparsity", 0.5), "it has no experts"),
        (("--pattern", "hidden", "--sparsity", 0.5, "--only", "mlp"), "every matrix reads or writes"),
        (("--pattern", "width", "--sparsity", 0.5), "there are: unstructured"),
        (("--pattern", "channels", "--sparsity", 0.1, "--round-to", 512), "none of the 384 can be dropped"),
        (("--pattern", "unstructured", "--target-size", "1MB"), "zeros take as much space"),
    ],
)
def test_refused_with_the_way_out(cli, words, said):
    ran = cli("prune", "--model", "llama", "--output", "out", *words)
    assert ran.code == 2
    assert said in ran.err
    assert not list(Path().iterdir())


def test_a_dry_run_and_the_list_of_methods_know_structured_patterns(cli):
    ran = cli("prune", "--model", "llama", "--pattern", "structured", "--sparsity", 0.3, "--dry-run")
    assert ran.code == 0
    assert "channels and" in ran.out
    ran = cli("methods")
    assert "--pattern channels" in ran.out
    assert "block_obs" in ran.out


def busy_machine():
    """In place of the clock: the multiplications of the work, and in two of three turns far more, as where another process runs meanwhile."""

    turn = count()

    def seconds(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() + (1e12 if next(turn) % 3 else 0)

    return seconds


def test_a_budget_of_time_is_measured_here(cli, small, monkeypatch):
    monkeypatch.setattr("llmprune.ratios.latency.seconds", busy_machine())
    ran = cli("--model", "llama", "--pattern", "channels", "--target-latency-ratio", "0.8", "--output", "out", *small)
    assert ran.code == 0, ran.err
    stored = json.loads(Path("out/llmprune.json").read_text())
    assert 0 < stored["sparsity"]["asked"] < 0.95
    assert stored["smaller"]["parameters"] < stored["sparsity"]["parameters"]
    assert stored["recipe"]["target_latency_ratio"] == 0.8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--target-latency-ratio", "0.8"), "target_latency_ratio with pattern unstructured: zeros take as long as others"),
        (("--pattern", "channels", "--target-latency-ratio", "1.2"), "target_latency_ratio 1.2: "),
        (("--pattern", "channels", "--target-latency-ratio", "0.8", "--sparsity", "0.5"), "sparsity together with target_latency_ratio"),
        (("--pattern", "experts", "--target-latency-ratio", "0.8"), "a token goes through as many as before"),
    ],
)
def test_budgets_of_time_that_make_no_sense(cli, words, says):
    ran = cli("--model", "llama", *words)
    assert ran.code == 2
    assert says in ran.err

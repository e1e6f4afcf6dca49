"""Pruning in rounds against the same prunings and recoveries, called one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runner import Cli
from families import save_tiny
from often import often
from safetensors.torch import load_file, save_file
from seeing import save_seeing

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.checkpoint.source import open_folder
from llmprune.data.reading import read_windows
from llmprune.errors import RequestError, StoppedError
from llmprune.recipe.levels import levels
from llmprune.recipe.reading import read_recipe
from llmprune.run import rounds
from llmprune.training.masks import read_masks

STEPS, LENGTH, SAMPLES = 2, 64, 8
ASK: dict[str, Any] = {"method": "wanda", "samples": SAMPLES, "sequence_length": LENGTH, "recover_steps": STEPS, "eval": ["bundled-evaluation"]}
LLAMA = BUNDLED / "llama"


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A short text, so that little is measured."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text((BUNDLED / "evaluation.txt").read_text()[:3000])
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The first two blocks of the bundled model."""
    folder = tmp_path_factory.mktemp("small") / "model"
    llmprune.prune("llama", 0.75, "layers", output=str(folder), samples=2, sequence_length=LENGTH, accept_damage=True, target="symmetric")
    (folder / "llmprune.json").unlink()
    return folder


@pytest.fixture
def ask(short) -> dict[str, Any]:
    return ASK | {"eval": [str(short)], "calibration": "bundled-calibration"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def one_by_one(model: Path, folder: Path, levels: list[tuple[str, float]], method: str) -> Path:
    """The same by two public calls a round."""
    folder.mkdir()
    tokenizer = llmprune.data.tokenizer.load_tokenizer(model)
    ids_NL = read_windows("bundled-calibration", "calibration", tokenizer, LENGTH, SAMPLES).ids_NL[:SAMPLES]
    before = model
    for number, (pattern, sparsity) in enumerate(levels):
        llmprune.prune(before, sparsity, pattern, method=method, calibration=ids_NL, output=str(folder / f"p{number}"))
        asked = {"steps": STEPS, "dense": str(model), "sequence_length": LENGTH, "output": str(folder / f"r{number}")}
        llmprune.recover(folder / f"p{number}", "bundled-calibration", **asked)
        before = folder / f"r{number}"
    return before


def test_rounds_are_prunings_and_recoveries_by_turns(small, tmp_path, ask):
    report = llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "out"), **ask)
    levels = [("unstructured", 0.6 * (1 - 0.5**3)), ("unstructured", 0.6)]
    assert same(tmp_path / "out", one_by_one(small, tmp_path / "by-hand", levels, "wanda"))
    assert [(one.number, one.pattern) for one in report.rounds] == [(1, "unstructured"), (2, "unstructured")]
    assert [one.asked for one in report.rounds] == pytest.approx([0.525, 0.6])
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.source.name == small.name
    (found,) = report.perplexity
    for folder, value in ((small, found.dense), (tmp_path / "out", found.pruned)):
        assert llmprune.evaluate(folder, ask["eval"][0], window=LENGTH, samples=value.windows)[0].value == pytest.approx(value.value, rel=1e-6)
    stored = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert stored["recipe"]["rounds"] == 2
    assert len(stored["rounds"]) == 2
    assert "in 2 rounds of pruning and recovery" in (tmp_path / "out" / "README.md").read_text()
    masks = read_masks(tmp_path / "out", llmprune.load(tmp_path / "out")[0])
    assert masks.masked == report.zeros
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.slow
def test_n_of_m_loses_one_more_of_every_group(small, tmp_path, ask):
    report = llmprune.prune(small, pattern="2:4", rounds=2, output=str(tmp_path / "out"), **ask)
    assert [one.pattern for one in report.rounds] == ["3:4", "2:4"]
    assert all(row.zeros * 2 == row.rows * row.columns for row in report.rows)
    assert same(tmp_path / "out", one_by_one(small, tmp_path / "by-hand", [("3:4", 0.25), ("2:4", 0.5)], "wanda"))


@pytest.mark.parametrize("at", often(range(4), 1))
def test_a_killed_run_goes_on(small, tmp_path, ask, monkeypatch, at):
    """After the first pruning, in the first recovery, after it, in the second pruning."""
    llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "whole"), **ask)
    real = {"run": rounds.single.run, "recover": rounds.run_recovery}
    calls: list[str] = []
    last, finishes = ((1, True), (2, False), (2, True), (3, False))[at]  # the call that is interrupted, and whether it has done its work

    def killed(name: str, *about: Any) -> Any:
        calls.append(name)
        if len(calls) == last and not finishes:
            raise KeyboardInterrupt
        found = real[name](*about)
        if len(calls) == last:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rounds.single, "run", lambda *about: killed("run", *about))
        patch.setattr(rounds, "run_recovery", lambda *about: killed("recover", *about))
        with pytest.raises(KeyboardInterrupt):
            llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "out"), **ask)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="another"):
        llmprune.prune(small, 0.7, rounds=2, output=str(tmp_path / "out"), **ask)
    llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "out"), **ask)
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_run_that_is_killed_before_it_is_published_goes_on(small, tmp_path, ask, monkeypatch):
    ask |= {"recover_steps": 0}
    whole = llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "whole"), **ask)
    publish = rounds.Journal.publish

    def killed(self: Any, *about: Any) -> None:
        if self.output.name == "out":
            raise KeyboardInterrupt
        publish(self, *about)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Journal, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "out"), **ask)
    assert not (tmp_path / "out").exists()
    assert llmprune.prune(small, 0.6, rounds=2, output=str(tmp_path / "out"), **ask) == whole
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("family", often(("gpt2", "mixtral", "phi3", "bloom"), "gpt2", "mixtral"))
def test_what_is_put_back_keeps_the_zeros_of_any_family(tmp_path, family):
    """Also where checkpoints name and divide tensors otherwise than the model does."""
    save_tiny(family, tmp_path / "model", torch.float32)
    ids = torch.randint(3, 60, (4, 16))
    llmprune.prune(tmp_path / "model", pattern="2:4", method="wanda", calibration=ids, output=tmp_path / "pruned", accept_damage=True)
    back = rounds.rewound(open_folder(tmp_path / "model", "model"), tmp_path / "pruned", tmp_path / "back")
    sources = [open_folder(folder, "") for folder in (tmp_path / "pruned", back)]
    assert all(torch.equal(sources[0].read(key), sources[1].read(key)) for key in sources[0].tensors)


def test_what_cannot_be_recovered_is_refused_before_it_is_pruned(tmp_path):
    save_seeing("llava", tmp_path / "model")
    ids = torch.randint(3, 60, (4, 16))
    with pytest.raises(RequestError, match="a model of several modalities"):
        llmprune.prune(tmp_path / "model", 0.5, calibration=ids, recover_data="bundled-calibration", rounds=2, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_rounds_end_at_the_limit_with_the_last_good_one(small, tmp_path, ask):
    every = llmprune.prune(small, 0.9, rounds=3, schedule="linear", max_ppl_increase=10.0, output=str(tmp_path / "all"), **ask)
    increases = [one.increase for one in every.rounds]
    assert increases == sorted(increases)
    limit = (increases[0] + increases[1]) / 2
    found = llmprune.prune(small, 0.9, rounds=3, schedule="linear", max_ppl_increase=limit, output=str(tmp_path / "out"), **ask)
    assert [one.increase for one in found.rounds] == pytest.approx(increases[:2])
    assert found.asked == pytest.approx(0.3)
    assert found.sparsity == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(StoppedError, match=r"round 1 at sparsity 0\.3"):
        llmprune.prune(small, 0.9, rounds=3, schedule="linear", max_ppl_increase=increases[0] / 2, output=str(tmp_path / "none"), **ask)


def test_kept_weights_go_back_to_an_earlier_checkpoint(small, tmp_path, ask):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for path in small.iterdir():
        (earlier / path.name).write_bytes(path.read_bytes())
    moved = {key: tensor * 2 for key, tensor in weights(small).items()}
    save_file(moved, earlier / "model.safetensors", {"format": "pt"})
    llmprune.prune(small, 0.5, method="wanda", calibration=torch.randint(3, 2000, (4, LENGTH)), output=str(tmp_path / "pruned"))
    back = rounds.rewound(open_folder(earlier, "earlier"), tmp_path / "pruned", tmp_path / "back")
    pruned, dense = weights(tmp_path / "pruned"), weights(small)
    for key, tensor in weights(back).items():
        assert torch.equal(tensor, moved[key] * (pruned[key] != 0) if not torch.equal(pruned[key], dense[key]) else moved[key]), key
    ask |= {"recover_steps": 1, "schedule": "linear"}
    llmprune.prune(small, 0.6, rounds=1, rewind=str(earlier), output=str(tmp_path / "out"), **ask)
    plain = llmprune.prune(small, 0.6, rounds=1, output=str(tmp_path / "plain"), **ask)
    away = {name: sum(float((weights(tmp_path / name)[key] - moved[key]).abs().sum()) for key in moved) for name in ("out", "plain")}
    assert away["out"] < away["plain"]  # it began at the earlier values
    assert plain.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        ({"sparsity": 0.8, "rounds": 4}, [0.4625, 0.7, 0.7875, 0.8]),
        ({"sparsity": 0.8, "rounds": 4, "schedule": "linear"}, [0.2, 0.4, 0.6, 0.8]),
        ({"sparsity": 0.8, "rounds": 1}, [0.8]),
        ({"pattern": "4:8", "rounds": 4}, [0.125, 0.25, 0.375, 0.5]),
        ({"pattern": "2:8", "rounds": 3}, [0.5, 0.625, 0.75]),
        ({"pattern": "2:8", "rounds": 3, "schedule": "linear"}, [0.25, 0.5, 0.75]),
    ],
    ids=str,
)
def test_levels(ask, wanted):
    assert [share for _, share in levels(read_recipe(None, {"model": "llama"} | ask))] == pytest.approx(wanted)


FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"sparsity": 0.5, "rounds": 0}, "rounds"),
    ({"sparsity": 0.5, "recover_steps": 5}, "recover_steps without rounds"),
    ({"sparsity": 0.5, "schedule": "linear"}, "schedule without rounds"),
    ({"sparsity": 0.25, "pattern": "channels", "rounds": 2}, "rounds with pattern channels"),
    ({"pattern": "2:4", "rounds": 3}, "3 rounds to 2:4, where a group loses 2 weights"),
    ({"rounds": 2}, "no sparsity"),
    ({"target_params": 900_000, "rounds": 2}, "target_params with rounds"),
    ({"sparsity": 0.5, "rounds": 2, "recover_steps": 0, "rewind": "x"}, "rewind without a recovery"),
    ({"sparsity": 0.5, "rounds": 2, "rewind": "nowhere"}, "model 'nowhere': no such folder"),
    ({"sparsity": 0.5, "rounds": 2, "recover_data": "none.txt"}, "none.txt: no such file"),
)


@pytest.mark.parametrize(("ask", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_what_cannot_be_done_in_rounds_is_refused(tmp_path, ask, said):
    with pytest.raises(RequestError) as caught:
        llmprune.prune("llama", output=str(tmp_path / "out"), samples=2, **ask)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_no_place_to_go_back_to(small, tmp_path, ask):
    with pytest.raises(RequestError, match=r"rewind model: .*: has no such tensor"):
        llmprune.prune("llama", 0.5, rounds=2, rewind=str(small), output=str(tmp_path / "out"), **ask)


def test_the_command_line(small, tmp_path, monkeypatch, capsys, short):
    monkeypatch.chdir(tmp_path)
    words = ("--calibration", "bundled-calibration", "--samples", 4, "--sequence-length", LENGTH, "--eval", short, "--method", "wanda")
    ran = Cli(capsys)("prune", "--model", small, "--pattern", "2:4", "--rounds", 2, "--recover-steps", 1, *words, "--output", "out")
    assert ran.code == 0, ran.err
    assert "2 rounds: 3:4 0.25, 2:4 0.5; 1 steps on bundled-calibration after each" in ran.out
    assert Cli(capsys)("inspect", "out", "--verify", "2:4").code == 0

"""A residual stream turned to its principal axes: the same model, or a refusal; and fewer of its channels lose less."""

from __future__ import annotations

import pytest
import torch
from cuts import NAMES, logits, reloaded, tiny
from families import FAMILIES, tiny_windows
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmprune
from llmprune.checkpoint.source import open_folder
from llmprune.errors import RequestError
from llmprune.evaluation.replay import ALIKE, difference
from llmprune.pruners.rotation import check_rotation, rotate
from llmprune.stream.checkpoint import CheckpointStream
from llmprune.structured.spaces import refusal
from llmprune.types import SILENT

IDS = tiny_windows(8, 24)
CPU = torch.device("cpu")


def config_of(family: str):
    kind, values = FAMILIES[family]
    return CONFIG_MAPPING[kind](**values)


def can(family: str) -> bool:
    try:
        check_rotation(config_of(family))
    except RequestError:
        return False
    return True


WIDE = [name for name in NAMES if refusal(config_of(name), "hidden") is None]


@pytest.mark.parametrize("family", [name for name in WIDE if can(name)])
def test_a_rotated_model_is_the_same_model(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    stream = CheckpointStream(open_folder(tmp_path / "model", "model"), torch.float32, CPU)
    (tmp_path / "rotated").mkdir()
    rotate(stream, IDS, tmp_path / "rotated", SILENT)
    turned = reloaded(tmp_path / "rotated")
    assert difference(logits(model), logits(turned)) < ALIKE[torch.float32]  # turning rounds every weight once
    before, after = (m.get_input_embeddings().weight.detach() for m in (model, turned))
    assert float((after - before).abs().max()) > 0.01
    assert torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in WIDE if not can(name)])
def test_norms_of_what_is_added_forbid_it(family, tmp_path):
    tiny(family).save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match="cannot be rotated"):
        llmprune.prune(tmp_path / "model", 0.5, "hidden", rotate=True, calibration=IDS, output=str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_repair_and_rotation_lose_less(tmp_path):
    """On the bundled model, whose channels have learnt to differ."""
    lost = []
    for turned, target in ((False, "symmetric"), (False, None), (True, None)):
        out = str(tmp_path / f"out-{len(lost)}")
        report = llmprune.prune("llama", 0.25, "hidden", rotate=turned, target=target, samples=32, sequence_length=128, output=out)
        assert report.reloaded.difference < 0.1
        lost.append(report.perplexity[0].divergence.kl)
    assert lost[2] < 0.9 * lost[1] < 0.9 * lost[0]

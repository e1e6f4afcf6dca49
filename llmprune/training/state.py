"""What a training with masks leaves in a checkpoint, beside the trainer's own files: masks.safetensors and, of movement, scores.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from llmprune.checkpoint.files import write_whole
from llmprune.errors import RequestError
from llmprune.training.masks import VALUES, Masks

MASKS, SCORES = "masks.safetensors", "scores.safetensors"


@dataclass(frozen=True)
class State:
    """masks: in force. scores: of movement, by parameter name. values: the steps that are done, what was asked for, the counts at the start."""

    masks: Masks
    scores: Mapping[str, Tensor]
    values: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Into a checkpoint's folder; the masks last, so that they are there only if all is."""
        if self.scores:
            write_whole(folder / SCORES, save({name: score.cpu().contiguous() for name, score in self.scores.items()}))
        write_whole(folder / MASKS, self.masks.to_bytes(**self.values))

    @classmethod
    def read(cls, folder: Path) -> State:
        """Raises RequestError where a checkpoint has no masks, or damaged ones."""
        file = folder / MASKS
        if not file.is_file():
            hint = "resume from a checkpoint of this callback; name one elsewhere by TrainingArguments(resume_from_checkpoint=...)"
            raise RequestError(f"{folder.name}: holds no {MASKS}", hint)
        masks = Masks.read(file)
        try:
            scores = load_file(folder / SCORES) if (folder / SCORES).is_file() else {}
            with safe_open(file, "pt") as stored:
                values = json.loads((stored.metadata() or {})[VALUES])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RequestError(f"{folder.name}: its masks cannot be read ({str(error)[:120]})", "resume from another checkpoint") from None
        return cls(masks, scores, values)

    def check(self, asked: dict[str, Any]) -> None:
        """Raises RequestError naming what was asked for differently when this state was made."""
        made = self.values.get("asked", {})
        for name, value in asked.items():
            if made.get(name) != value:
                said = f"the checkpoint was trained with {name} {made.get(name)!r}, not {value!r}"
                raise RequestError(said, "ask for the same, or start from its model without resuming")

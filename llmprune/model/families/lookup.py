"""Tables of the families: which units of a block are removed together, and what the family's config can express."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llmprune.model.families import fused, gated, mixtures, recurrent
from llmprune.model.families.table import Family, Table

TABLES: dict[str, Table] = gated.TABLES | fused.TABLES | mixtures.TABLES | recurrent.TABLES


def family_of(config: PreTrainedConfig) -> Family | None:
    """The table of a config's model_type; None when there is none."""
    table = TABLES.get(config.model_type)
    return None if table is None else table(config)

"""The request as a value. ``llmprune.recipe.reading`` makes one from a TOML recipe and flags; ``refusals`` has what cannot be combined."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.data.specs import last_name, shown
from llmprune.methods import trait
from llmprune.pruners.coarse import COARSE
from llmprune.recipe.flags import BUDGET, DATA, HOW, HUB, MACHINE, MOST_USED, ROUNDS, SMALLER, WHAT, Flag
from llmprune.recipe.kinds import Between, Bytes, Count, Increase, MethodName, Regex, Sparsity, Windows
from llmprune.recipe.named import (
    DEFAULT_QUALITY,
    METHODS,
    POLISH_STEPS,
    QUALITIES,
    STRUCTURED,
    STRUCTURED_METHODS,
    STRUCTURED_QUALITIES,
    Group,
    Method,
    build_pattern,
    find_pattern,
    in_groups,
    names_tried,
    spelled_patterns,
    takes_group,
)
from llmprune.recipe.parts import Part, assigned, packages_of, parts_of
from llmprune.recipe.user_methods import UserClass, UserCriterion, UserSolver

if TYPE_CHECKING:
    from llmprune.pruners.plan import Plan

BUDGETS = ("sparsity", "target_params", "target_size", "target_latency_ratio", "max_ppl_increase")
NAMED = ("quality", "method", "criterion", "solver")  # the fields that name a method
STRUCTURED_STARTS = ("uniform", "sensitivity", "flap")  # what auto tries for units
MOST_SPARSITY = 0.99  # where another budget decides
RECOVER_STEPS = 100


class Recipe(BaseModel):
    """Everything that a pruning run can be asked for. Unset fields get the defaults that README names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Annotated[str, Flag(MOST_USED, "PATH|ID")] = Field(description="folder, Hub id or alias; llama is the small bundled one")
    revision: Annotated[str | None, Flag(WHAT, "NAME")] = Field(None, description="branch, tag or commit of a Hub model")
    sparsity: Annotated[Sparsity | None, Flag(MOST_USED, "FLOAT")] = Field(
        None, description="share of the weights to prune, such as 0.5 or 50%; may be left out with N:M"
    )
    target_params: Annotated[Count | None, Flag(BUDGET, "INT")] = Field(
        None, description="budget: parameters of the whole model that may remain non-zero, such as 900M or 0.9B (billion)"
    )
    target_size: Annotated[Bytes | None, Flag(BUDGET, "BYTES")] = Field(
        None, description="budget of structured patterns: bytes on disk that may remain, such as 1.2GB or 900MB (500B is 500 bytes)"
    )
    target_latency_ratio: Annotated[Between | None, Flag(BUDGET, "FLOAT")] = Field(
        None, description="budget of structured patterns: time of a prefill to the dense model's on this machine, such as 0.7"
    )
    max_ppl_increase: Annotated[Increase | None, Flag(BUDGET, "FLOAT")] = Field(
        None, description="budget: the sparsest model whose perplexity on held-back calibration windows rises by at most this, such as 5%"
    )
    rounds: Annotated[int | None, Flag(ROUNDS)] = Field(
        None, ge=1, description="prune and recover by turns, at growing sparsities; max_ppl_increase ends them"
    )
    schedule: Annotated[Literal["cubic", "linear"] | None, Flag(ROUNDS, "NAME", "cubic")] = Field(
        None, description="how the sparsity grows: cubic (fast at first) or linear"
    )
    recover_steps: Annotated[int | None, Flag(ROUNDS, default=f"{RECOVER_STEPS}")] = Field(
        None, ge=0, description="optimizer steps of the recovery after each pruning; 0: none"
    )
    recover_data: Annotated[str | None, Flag(ROUNDS, "PATH|ID", "the calibration's")] = Field(None, description="data of the recoveries")
    rewind: Annotated[str | None, Flag(ROUNDS, "PATH|ID")] = Field(
        None, description="an earlier checkpoint, to whose values the kept weights go back before each recovery"
    )
    pattern: Annotated[str, Flag(MOST_USED, "N:M|NAME")] = Field(
        "unstructured", description=f"{', '.join(spelled_patterns())}, or structured: {', '.join(STRUCTURED)}"
    )
    round_to: Annotated[int | None, Flag(SMALLER, default="8 for channels and kernel, else 1")] = Field(
        None, ge=1, description="structured: sizes are multiples of this"
    )
    uniform: Annotated[bool, Flag(SMALLER)] = Field(False, description="structured: the same sizes in every layer")
    exact: Annotated[bool, Flag(SMALLER)] = Field(False, description="structured: refuse a sparsity that no size gives, instead of rounding it")
    rotate: Annotated[bool, Flag(SMALLER)] = Field(
        False, description="hidden: rotate the residual stream to its principal axes first, as SliceGPT does"
    )
    pad: Annotated[bool, Flag(SMALLER)] = Field(
        False, description="structured: zeros up to the widest layer, so that plain transformers loads one size for all"
    )
    quality: Annotated[str | None, Flag(MOST_USED, "NAME", DEFAULT_QUALITY)] = Field(
        None, description="one of llmprune's own recipes: fast, balanced or max"
    )
    method: Annotated[str | None, Flag(HOW, "NAME")] = Field(
        None, description="a paper's own recipe, unimproved, for comparison; see llmprune methods"
    )
    criterion: Annotated[Any, MethodName, Flag(HOW, "NAME")] = Field(
        None, description="what scores the weights; on the command line also your own function, my.py:score"
    )
    solver: Annotated[Any, MethodName, Flag(HOW, "NAME")] = Field(
        None,
        description="what chooses the mask and repairs the kept weights; +reconstruct trains each block after it; also your own class, my.py:Mine",
    )
    target: Annotated[Literal["symmetric", "asymmetric"] | None, Flag(HOW, "NAME")] = Field(
        None, description="what a repair aims at: symmetric (the matrix's own outputs) or asymmetric (the dense path's)"
    )
    polish: Annotated[Literal["kd", "none"] | None, Flag(HOW, "NAME")] = Field(
        None, description="kd: distillation of the whole pruned model at the end, which has to fit in memory; or none"
    )
    polish_steps: Annotated[int | None, Flag(HOW, default=f"{POLISH_STEPS}")] = Field(None, ge=1, description="steps of the polish")
    permute: Annotated[bool, Flag(HOW)] = Field(
        False, description="N:M: reorder inner channels so that the groups hold more; folded into the weights"
    )
    group: Annotated[Group | None, Flag(HOW, "NAME")] = Field(None, description="where unstructured weights compete: row or matrix")
    allocation: Annotated[str | None, Flag(HOW, "NAME")] = Field(
        None, description="how the sparsity is shared out over the matrices; see llmprune methods"
    )
    ratios: Annotated[dict[str, float], Flag(HOW, "REGEX=FLOAT", name="ratio")] = Field(
        default_factory=dict, description="allocation explicit: regular expression on a matrix's name, and its ratio"
    )
    options: Annotated[dict[str, float | int | str | bool], Flag(HOW, "NAME=VALUE", name="option")] = Field(
        default_factory=dict, description="options of the methods, such as damping=0.02 or solver.damping=0.02; llmprune methods NAME shows them"
    )
    calibration: Annotated[str | None, Flag(MOST_USED, "PATH|ID", "bundled text for llama, else c4")] = Field(
        None,
        description="texts or dialogues: c4, wikitext2, a Hub data set (org/name[:config][@revision]), a .txt, .jsonl, .json, .csv or .parquet file "
        "(also .gz, .xz, .zst), a folder, or a mixture, a.jsonl*0.7,b.txt*0.3",
    )
    column: Annotated[str | None, Flag(DATA, "NAME", "messages, conversations, text, ...")] = Field(
        None, description="the calibration's column of texts or messages"
    )
    split: Annotated[str | None, Flag(DATA, "NAME", "train")] = Field(None, description="the split of the data set that is calibrated on")
    bos: Annotated[bool | None, Flag(DATA, default="as the model was trained: Gemma needs it")] = Field(
        None, description="whether every window of calibration and evaluation begins with BOS"
    )
    samples: Annotated[int | None, Flag(DATA, default="128")] = Field(None, ge=1, description="calibration windows")
    sequence_length: Annotated[int | None, Flag(DATA, default="2048, or the model's positions where fewer; 256 for llama")] = Field(
        None, ge=2, description="tokens of a window"
    )
    shuffle: Annotated[bool, Flag(DATA)] = Field(False, description="draw the windows at random instead of taking the first")
    seed: Annotated[int, Flag(HOW)] = Field(0, ge=0, description="of everything that is drawn at random")
    device: Annotated[str, Flag(MACHINE, "NAME")] = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag(MACHINE, "NAME")] = Field(
        "auto",
        description="compute dtype: auto, float32, bfloat16 or float16; the saved dtype is the source's. "
        "With auto, training steps are in mixed precision where that is faster",
    )
    skip: Annotated[Regex | None, Flag(WHAT, "REGEX")] = Field(None, description="regular expression: matrices that are not pruned")
    only: Annotated[Regex | None, Flag(WHAT, "REGEX")] = Field(None, description="regular expression: the only matrices that are pruned")
    eval: Annotated[list[str], Flag(DATA, "PATH|ID", "bundled text for llama, else windows held back of the calibration")] = Field(
        default_factory=list, description="data to measure the perplexity on, before and after"
    )
    eval_samples: Annotated[Windows | None, Flag(DATA, "INT|all", "as many as the calibration has")] = Field(
        None, description="windows of each --eval that are measured, the first ones, or all"
    )
    write_sample: Annotated[bool, Flag(DATA)] = Field(
        False, description="continue a prompt by both models, though that takes more than a twentieth of the run"
    )
    accept_damage: Annotated[bool, Flag(HOW)] = Field(False, description="continue when a block's output is destroyed")
    output: Annotated[str | None, Flag(MOST_USED, "PATH", "./<model>-<pattern>-<sparsity>")] = Field(None, description="folder of the result")
    push: Annotated[str | None, Flag(HUB, "ID")] = Field(
        None, description="Hub repository that gets the result at the end, private, such as me/my-model"
    )

    @property
    def in_groups(self) -> bool:
        """N:M, which fixes the sparsity."""
        return in_groups(self.pattern)

    @property
    def takes_group(self) -> bool:
        """Single weights compete, in a row or in the matrix."""
        return not self.structured and takes_group(find_pattern(self.pattern))

    @property
    def structured(self) -> bool:
        """A pattern that makes the model smaller."""
        return self.pattern in STRUCTURED

    @property
    def one_size(self) -> bool:
        """Structured: every layer has the same sizes."""
        return self.parts.allocation == "uniform"

    @property
    def mixed(self) -> bool:
        """N:M as the sparsest pattern of a matrix; others get more of every M, or stay dense."""
        return self.in_groups and self.allocation not in (None, "uniform")

    @property
    def most(self) -> float:
        """The largest possible sparsity."""
        return float(build_pattern(self.pattern).sparsity) if self.in_groups else MOST_SPARSITY

    @property
    def ratio(self) -> float | None:
        """The sparsity asked for, from the pattern where it is left out; None where another budget decides."""
        return self.most if self.in_groups and not self.mixed else self.sparsity

    @property
    def makes_trials(self) -> bool:
        """Whether windows have to be held back for trials."""
        return self.max_ppl_increase is not None or names_tried(self.parts.allocation)

    @property
    def budget(self) -> str:
        """What is asked for, in a word for a file's name."""
        if self.ratio is not None:
            return f"{self.ratio:g}"
        if self.target_size is not None:
            return f"{self.target_size}-bytes"
        if self.target_latency_ratio is not None:
            return f"latency-{self.target_latency_ratio:g}"
        return f"{self.target_params}-parameters" if self.target_params else f"ppl-{self.max_ppl_increase:g}"

    @property
    def criterion_name(self) -> str | None:
        """The criterion in a word, a user's function by its file's last name and hash."""
        return None if self.criterion is None else str(self.criterion)

    @property
    def parts(self) -> Method:
        """The parts of the quality or method, or those asked for one by one. Rows are only weighted where they compete."""
        coarse = COARSE.get(self.pattern)
        if coarse is not None:
            repaired = coarse.repairs and self.target != "symmetric"
            ranked = self.criterion_name or coarse.criteria[0]
            return Method(ranked, str(self.solver or "mask_only"), "matrix", asymmetric=repaired, allocation=self.allocation or "uniform")
        if self.method is not None:
            named = (STRUCTURED_METHODS if self.structured else METHODS)[self.method]
        elif self.criterion is not None or self.solver is not None:
            named = Method(self.criterion_name, str(self.solver or "mask_only"), "row")
        else:
            named = (STRUCTURED_QUALITIES if self.structured else QUALITIES)[self.quality or DEFAULT_QUALITY]
        group = self.group or named.group
        steps = {"kd": POLISH_STEPS, "none": 0, None: named.polish_steps}[self.polish]
        asymmetric = named.asymmetric if self.target is None else self.target == "asymmetric"
        if not (self.in_groups or self.takes_group):
            group = "matrix"  # where blocks and units compete
        allocation = named.allocation
        if self.max_ppl_increase is not None and names_tried(allocation):
            allocation = "fisher"  # a budget that is found by trials excludes an allocation that makes trials
        one_size = self.in_groups or self.uniform or (self.structured and self.pattern != "structured")
        return replace(
            named,
            group=group,
            asymmetric=asymmetric,
            polish_steps=steps and (self.polish_steps or steps),
            allocation=self.allocation or ("uniform" if one_size else allocation),
        )

    def plan(self, structure: Any = None) -> Plan:
        """The request as values, for the engine. Where another budget decides, the sparsity is the largest possible. structure: of a model, where the
        pattern is a structured one.
        """
        from llmprune.pruners.plan import Plan

        parts, made = self.parts, self.made()
        return Plan(
            criterion=made.get("criterion"),
            pattern=made.get("pattern"),
            structure=structure,
            solver=made["solver"],
            reconstruct=made.get("block_solver"),
            allocation=made["allocation"],
            sparsity=self.most if self.ratio is None else self.ratio,
            asymmetric=parts.asymmetric,
            permute=self.permute,
            polish_steps=parts.polish_steps,
            mixed_precision=self.dtype == "auto",
            accept_damage=self.accept_damage,
            mean_bias=parts.mean_bias,
            seed=self.seed,
            ours=self.method is None,
        )

    def methods(self) -> list[Part]:
        """The methods that it uses; a user's own criterion and the measures of coarse patterns are not among them."""
        ranked = isinstance(self.criterion, str | None) and (self.pattern not in COARSE or COARSE[self.pattern].scores)
        solver = self.parts.solver if isinstance(self.solver, str | None) else self.solver
        return parts_of(self.parts, solver, None if self.structured else self.pattern, ranked, self._ratios())

    def made(self) -> dict[str, Any]:
        """Role -> method, with its options. Raises RequestError for unknown options."""
        parts = self.methods()
        given = assigned(self.options, parts)
        made = {part.role: part.make(given[part.role], self.seed) for part in parts}
        if trait(made["solver"], "fits_blocks"):
            made["block_solver"] = made["solver"]
        if isinstance(self.solver, UserClass):
            made["solver"] = UserSolver(self.solver.name, made["solver"])
        return made | ({"criterion": self.criterion} if isinstance(self.criterion, UserCriterion) else {})

    def _ratios(self) -> dict[str, Any]:
        """What the recipe says to its allocation."""
        if self.structured and self.parts.allocation == "auto":
            return {"starts": STRUCTURED_STARTS}
        return {"ratios": tuple(self.ratios.items())} if self.ratios else {}

    @property
    def default_output(self) -> str:
        """``<model>-<pattern>-<sparsity>``, in the current folder."""
        name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(self.model).name or "model")
        return f"{name}-{self.pattern.replace(':', 'of' if self.in_groups else '-')}-{self.budget}"

    def resolved(self) -> dict[str, Any]:
        """The recipe as it is saved: paths as their last name, the quality by its name, output and repository left out."""
        value = self.model_dump(exclude={"output", "push"})
        parts = self.parts
        value |= {"sparsity": self.ratio, "criterion": parts.criterion, "solver": parts.solver}
        if not any(getattr(self, name) for name in NAMED) and self.pattern not in COARSE:
            value["quality"] = DEFAULT_QUALITY
        value["target"] = "asymmetric" if parts.asymmetric else "symmetric"
        methods = self.methods()
        given = assigned(self.options, methods)
        value["options"] = {f"{role}.{name}": said for role, options in given.items() for name, said in sorted(options.items())}
        value["packages"] = packages_of(methods)
        value["allocation"] = parts.allocation
        value["polish"], value["polish_steps"] = ("kd" if parts.polish_steps else None), parts.polish_steps or None
        value["group"] = parts.group if self.takes_group else None
        for key, say in {"model": last_name, "rewind": last_name, "calibration": shown, "recover_data": shown}.items():
            value[key] = value[key] and say(value[key])
        value["eval"] = [shown(name) for name in self.eval]
        return value

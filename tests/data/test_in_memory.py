"""What Python users have in memory is calibrated, measured and trained on as a file of the same rows is; anything else is refused with its type."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader, TensorDataset

import llmprune
from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.given import in_memory, taken
from llmprune.data.reading import read_windows, windows_of
from llmprune.data.sources import TextSource
from llmprune.data.tokenizer import load_tokenizer
from llmprune.errors import RequestError

TEXT = (BUNDLED / "evaluation.txt").read_text()
TEXTS = [TEXT[i : i + 400] for i in range(0, 12_000, 400)]
DIALOGUES = [[{"role": "user", "content": a[:80]}, {"role": "assistant", "content": b[:80]}] for a, b in itertools.pairwise(TEXTS)]
IDS = torch.randint(3, 2000, (12, 32), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"method": "magnitude", "samples": 4, "sequence_length": 32}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer(BUNDLED / "llama")
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows as files."""
    folder = tmp_path_factory.mktemp("files")
    for name, rows in {"texts": [{"text": text} for text in TEXTS], "dialogues": [{"messages": one} for one in DIALOGUES]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {path.stem: path for path in folder.iterdir()}


def rows() -> Iterator[dict[str, Any]]:
    yield from ({"text": text, "n": 1} for text in TEXTS)


SAME: dict[str, tuple[str, Callable[[], Any]]] = {
    "texts": ("texts", lambda: TEXTS),
    "texts and nulls": ("texts", lambda: [None, *TEXTS, None, 5]),
    "a tuple": ("texts", lambda: tuple(TEXTS)),
    "an array of strings": ("texts", lambda: numpy.array(TEXTS)),
    "a generator of texts": ("texts", lambda: (text for text in TEXTS)),
    "rows": ("texts", lambda: list(rows())),
    "an iterator of rows": ("texts", rows),
    "Dataset": ("texts", lambda: Dataset.from_list(list(rows()))),
    "IterableDataset": ("texts", lambda: IterableDataset.from_generator(rows)),
    "dialogues": ("dialogues", lambda: DIALOGUES),
    "a generator of dialogues": ("dialogues", lambda: iter(DIALOGUES)),
    "conversations": (
        "dialogues",
        lambda: [[{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in one] for one in DIALOGUES],
    ),
    "Dataset of messages": ("dialogues", lambda: Dataset.from_list([{"messages": one} for one in DIALOGUES])),
    "pairs": ("dialogues", lambda: [{"prompt": a["content"], "completion": b["content"]} for a, b in DIALOGUES]),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_windows_as_of_a_file(kind: str, files: dict[str, Path], tokenizer: Any) -> None:
    name, made = SAME[kind]
    source = taken(made(), "calibration", 4)
    assert isinstance(source, TextSource)
    assert source.identity is None
    for wanted in (4, None):
        found, theirs = (windows_of(source, tokenizer, 32, wanted), read_windows(str(files[name]), "calibration", tokenizer, 32, wanted))
        assert torch.equal(found.ids_NL[:4], theirs.ids_NL[:4])
        assert wanted or torch.equal(found.ids_NL, theirs.ids_NL)
    assert found.dataset == f"given {'texts' if 'text' in kind or 'string' in kind or 'tuple' in kind else 'rows'}" or name == "dialogues"
    assert found.skipped == (3 if "null" in kind else 0)


def test_one_dialogue_is_a_list_of_messages(tokenizer: Any) -> None:
    one = [turn for dialogue in DIALOGUES for turn in dialogue]
    found = windows_of(taken(one, "calibration", None), tokenizer, 32, None)
    assert found.ids_NL.flatten().tolist() == tokenizer.apply_chat_template(one, tokenize=True, return_dict=False)[: found.ids_NL.numel()]


class Loaded(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index], "attention_mask": torch.ones(32, dtype=torch.long), "labels": IDS[index]}


TOKENS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IDS,
    "int32": lambda: IDS.int(),
    "array": lambda: IDS.numpy(),
    "array of uint16": lambda: IDS.numpy().astype("uint16"),
    "DataLoader": lambda: DataLoader(Loaded(), batch_size=5),
    "DataLoader of tensors": lambda: DataLoader(TensorDataset(IDS), batch_size=3),
    "Dataset of input_ids": lambda: Dataset.from_dict({"input_ids": IDS.tolist()}),
    "a list of windows": lambda: list(IDS),
    "an iterator of batches": lambda: iter(IDS.split(2)),
    "an iterator of arrays": lambda: iter(IDS.numpy()),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_token_ids_are_as_they_are(kind: str) -> None:
    found = taken(TOKENS[kind](), "calibration", None)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found.long(), IDS)


def test_an_iterator_is_consumed_only_as_far_as_needed(tokenizer: Any) -> None:
    pulled = []

    def endless() -> Iterator[Any]:
        for n in itertools.count():
            pulled.append(n)
            yield IDS[n % 12][None] if tokens else TEXTS[n % 30]

    tokens = True
    assert len(taken(endless(), "calibration", 6)) == 6
    assert len(pulled) == 6
    pulled.clear()
    tokens = False
    found = windows_of(taken(endless(), "calibration", 6), tokenizer, 32, 6)
    assert len(found) >= 6
    assert len(pulled) < 12


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 5, "calibration: int"),
    "bytes": (lambda: b"text", "calibration: bytes"),
    "a dict": (lambda: {"text": "x"}, "calibration: dict"),
    "a set": (lambda: {"text"}, "calibration: set"),
    "a function": (lambda: len, "calibration: builtin_function_or_method"),
    "an empty list": (list, "calibration: an empty list"),
    "numbers": (lambda: [1, 2, 3], "calibration: list of int"),
    "token ids as lists": (lambda: [[1, 2], [3, 4]], "calibration: list of list"),
    "nulls": (lambda: [None, None], "calibration: list of nothing"),
    "an empty iterator": (lambda: iter(()), "calibration: tuple_iterator of nothing"),
    "DatasetDict": (lambda: DatasetDict(train=Dataset.from_list([{"text": "x"}])), "calibration: DatasetDict with splits train"),
    "floats": (lambda: torch.rand(2, 8), "calibration token ids: float32 of shape [2, 8]"),
    "booleans": (lambda: torch.ones(2, 8, dtype=torch.bool), "calibration token ids: bool of shape [2, 8]"),
    "one dimension": (lambda: torch.arange(9), "calibration token ids: int64 of shape [9]"),
    "three dimensions": (lambda: numpy.zeros((2, 3, 4), dtype=int), "calibration token ids: int64 of shape [2, 3, 4]"),
    "an array of floats": (lambda: numpy.zeros((2, 3)), "calibration: ndarray of float64"),
    "no windows": (lambda: torch.empty(0, 8, dtype=torch.long), "calibration token ids: int64 of shape [0, 8]"),
    "padding": (
        lambda: [{"input_ids": IDS[:2], "attention_mask": torch.tensor([[1] * 32, [1] * 30 + [0] * 2])}],
        "calibration, batch 1: is padded (attention_mask has zeros)",
    ),
    "lengths": (lambda: DataLoader([IDS[0], IDS[1][:9]], batch_size=1), "calibration, batch 2: windows of 9 tokens, those before of 32"),
    "ragged": (lambda: [{"input_ids": [[1, 2], [3]]}], "calibration, batch 1: list is no tensor of token ids"),
    "floats in a loader": (lambda: DataLoader([torch.rand(8)]), "calibration, batch 1 token ids: float32 of shape [1, 8]"),
    "dialogues without a template": (lambda: DIALOGUES, "given dialogues: holds dialogues (messages), and the tokenizer has no chat template"),
    "a name that is none": (lambda: "no such thing", "data 'no such thing': no such file and no known data set"),
    "a text alone": (lambda: TEXTS[0], f"data {TEXTS[0][:80]!r}: no such file and no known data set"),
    "a missing path": (lambda: Path("absent.jsonl"), "absent.jsonl: no such file"),
    "too little": (lambda: ["one two"], "given texts: 3 tokens, less than one window of 32"),
    "two columns": (lambda: [{"a": "x", "b": "y"}], "given rows: no column 'text' or 'messages' among a, b"),
    "ids beyond": (lambda: IDS + 5000, "given token ids: token id 6990, the model's vocabulary is 0 to 2047"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_anything_else_is_refused(kind: str, tmp_path: Path) -> None:
    made, message = WRONG[kind]
    ask = QUICK | ({"sequence_length": None} if "ids" in kind else {}) | {"output": tmp_path / "out"}
    with pytest.raises(RequestError) as refused:
        llmprune.prune("llama", 0.5, calibration=made(), **{name: value for name, value in ask.items() if value is not None})
    assert refused.value.message == message
    assert refused.value.hint
    assert not list(tmp_path.iterdir())


AT_ODDS: dict[str, tuple[dict[str, Any], str]] = {
    "shuffle of an iterator": ({"calibration": iter(TEXTS), "shuffle": True}, "calibration: shuffle with list_iterator, which is read once"),
    "shuffle of a loader": (
        {"calibration": DataLoader(TensorDataset(IDS)), "shuffle": True},
        "calibration: shuffle with DataLoader, which gives its windows in its own order",
    ),
    "column with token ids": ({"calibration": IDS, "column": "a"}, "column 'a' with token ids"),
    "split in memory": ({"calibration": TEXTS, "split": "test"}, "split 'test' of given texts"),
    "BOS with token ids": ({"calibration": IDS, "bos": True}, "bos with token ids"),
    "a tokenizer": ({"calibration": TEXTS, "tokenizer": "x"}, "a tokenizer with token ids or a checkpoint"),
    "eval of another type": ({"calibration": TEXTS, "eval": 5}, "eval: int"),
    "eval of no text": ({"calibration": TEXTS, "eval": ["absent.txt"]}, "absent.txt: no such file"),
    "eval_samples": ({"calibration": TEXTS, "eval_samples": 0, "eval": TEXT}, "eval_samples 0: is neither a whole number above 0 nor all"),
    "eval_samples alone": ({"calibration": IDS, "eval_samples": 3}, "eval_samples 3 without data to evaluate on"),
    "too few to measure": ({"calibration": IDS, "eval_samples": 99, "eval": IDS[:3]}, "given token ids: 3 windows of 32, 99 asked for"),
    "rounds": ({"calibration": TEXTS, "rounds": 2}, "rounds with a calibration in memory, and no data to recover on"),
}


@pytest.mark.parametrize("kind", AT_ODDS)
def test_what_contradicts_itself(kind: str, tmp_path: Path) -> None:
    asked, message = AT_ODDS[kind]
    ask = {"method": "magnitude", "output": tmp_path / "out"} | asked
    with pytest.raises(RequestError) as refused:
        llmprune.prune("llama", 0.5, **ask)
    assert refused.value.message.startswith(message)


def test_names_and_things_in_memory_may_be_mixed_for_eval() -> None:
    assert in_memory(None) == []
    assert in_memory("c4") == ["c4"]
    assert in_memory(["c4", "a b.txt"]) == ["c4", "a b.txt"]
    assert in_memory(TEXTS) == [TEXTS]
    assert in_memory(DIALOGUES) == [DIALOGUES]
    assert in_memory(DIALOGUES[0]) == [DIALOGUES[0]]
    assert in_memory(["c4", TEXTS, IDS]) == ["c4", TEXTS, IDS]
    assert in_memory(IDS) == [IDS]


def test_a_run_on_what_is_in_memory(files: dict[str, Path], tmp_path: Path) -> None:
    """Byte for byte the model that the same rows in a file make; the record names what was given, and an interrupted run knows other texts."""
    shared = QUICK | {"method": "wanda", "pattern": "2:4"}
    by_name = llmprune.prune("llama", calibration=files["texts"], eval=[str(files["texts"])], output=tmp_path / "a", **shared)
    given = llmprune.prune("llama", calibration=TEXTS, eval=TEXTS, output=tmp_path / "b", **shared)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert given.calibration.dataset == given.perplexity[0].dense.dataset == "given texts"
    assert given.calibration.sha256 == by_name.calibration.sha256
    assert given.perplexity[0].pruned.value == by_name.perplexity[0].pruned.value
    assert given.perplexity[0].pruned.windows == by_name.perplexity[0].pruned.windows == 4
    assert "all, the first windows" in str(given.perplexity[0].pruned)
    whole = llmprune.evaluate(tmp_path / "b", [TEXTS, str(files["texts"]), iter(TEXTS)], window=32)
    assert whole[0].value == whole[1].value == whole[2].value
    assert whole[0].windows > 100
    assert llmprune.evaluate(tmp_path / "b", IDS)[0].windows == 12


def test_a_live_model_on_dialogues(tokenizer: Any) -> None:
    model, _ = llmprune.load(BUNDLED / "llama")
    report = llmprune.prune(model, 0.5, calibration=iter(DIALOGUES), tokenizer=tokenizer, **QUICK)
    assert report.calibration is not None
    assert (report.calibration.dataset, report.calibration.template) == ("given dialogues", "messages")
    assert report.calibration.documents > 0
    with pytest.raises(RequestError, match="a live model that is to read text, without its tokenizer"):
        llmprune.prune(model, 0.5, calibration=DIALOGUES, **QUICK)
    measured = llmprune.prune(model, 0.5, calibration=IDS, eval=[IDS[:3], TEXTS], tokenizer=tokenizer, method="magnitude").perplexity
    assert [(one.pruned.dataset, one.pruned.windows) for one in measured] == [("given token ids", 3), ("given texts", 12)]


@pytest.mark.parametrize("kind", ["texts", "token ids"])
def test_a_recovery_on_what_is_in_memory(kind: str, tmp_path: Path) -> None:
    llmprune.prune("llama", pattern="2:4", calibration=IDS, method="magnitude", output=tmp_path / "pruned")
    data = TEXTS if kind == "texts" else torch.cat([IDS] * 4)
    report = llmprune.recover(tmp_path / "pruned", data, output=str(tmp_path / "out"), steps=2, batch=4, sequence_length=32, loss="ce")
    assert report.recovered[-1].data.dataset == f"given {kind}"
    assert report.recovered[-1].request["data"] == f"given {kind}"


def test_how_windows_are_made_is_of_the_definition_of_a_perplexity() -> None:
    with_bos, without = (llmprune.evaluate("llama", TEXTS, window=64, samples=2, bos=bos)[0] for bos in (True, False))
    assert (with_bos.split, without.split) == ("all, BOS first", "all")
    assert with_bos.value != without.value

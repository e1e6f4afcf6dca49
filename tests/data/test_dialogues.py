"""Dialogues, BOS and mixtures as windows, against transformers' own chat templates and references that go token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from llmprune.checkpoint.resolve import BUNDLED
from llmprune.data.reading import read_windows, windows_of
from llmprune.data.sources import find_source
from llmprune.data.specs import mixture, shown
from llmprune.data.store import load_windows, save_windows
from llmprune.data.windows import RunData, Windows, filled, places
from llmprune.errors import RequestError
from llmprune.model.kinds import begins_with_bos
from llmprune.run.prepare import describe
from llmprune.training.data import packs_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ASK, ANSWER, RULE = "What is a river?", "A river is a stream of water.", "Be brief."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.fixture
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(BUNDLED / "llama")
    found.chat_template = TEMPLATE
    return found


def rows_in(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]], str]] = {
    "messages": (
        {"messages": [system(RULE), user(ASK), assistant(ANSWER)], "text": "not this"},
        [system(RULE), user(ASK), assistant(ANSWER)],
        "messages",
    ),
    "from and value": (
        {"conversations": [{"from": "system", "value": RULE}, {"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
        [system(RULE), user(ASK), assistant(ANSWER)],
        "conversations",
    ),
    "role in conversations": ({"conversations": [user(ASK), assistant(ANSWER)]}, [user(ASK), assistant(ANSWER)], "conversations"),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, assistant(ANSWER)]},
        [user(ASK), assistant(ANSWER)],
        "messages",
    ),
    "strings": ({"prompt": ASK, "completion": ANSWER, "source": "x"}, [user(ASK), assistant(ANSWER)], "prompt + completion"),
    "lists": (
        {"prompt": [system(RULE), user(ASK)], "completion": [assistant(ANSWER)]},
        [system(RULE), user(ASK), assistant(ANSWER)],
        "prompt + completion",
    ),
    "alpaca": ({"instruction": RULE, "input": ASK, "output": ANSWER}, [user(f"{RULE}\n\n{ASK}"), assistant(ANSWER)], "instruction + output"),
    "alpaca without input": ({"instruction": ASK, "input": "", "output": ANSWER}, [user(ASK), assistant(ANSWER)], "instruction + output"),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_what_the_chat_template_makes_of_them(form: str, tmp_path: Path, tokenizer: Any) -> None:
    """Token for token, with one BOS a dialogue; rows without text are skipped, and counted."""
    row, messages, said = FORMS[form]
    nothing = dict.fromkeys(row)
    path = rows_in(tmp_path / "a.jsonl", [nothing, row, nothing, *[row] * 4])
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert wanted.count(tokenizer.bos_token_id) == 1
    found = read_windows(path, "calibration", tokenizer, 7, None)
    every = wanted * 5
    assert found.ids_NL.flatten().tolist() == every[: len(every) // 7 * 7]
    assert found.documents is not None
    assert (found.documents.form, found.skipped) == (said, 2)
    learned = packs_of(find_source(path, "calibration"), tokenizer, 7, None)
    assert torch.equal(learned.windows.ids_NL, found.ids_NL)
    kept = tokenizer.decode(learned.windows.ids_NL[learned.learn_NL])
    assert kept.startswith(f"{ANSWER}<|end|>\n{ANSWER}<|end|>\n")
    assert RULE not in kept


@pytest.mark.parametrize("length", [5, 16, 64])
def test_documents_and_how_many_are_cut(length: int, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [user(ASK * (n % 4)), assistant(ANSWER * (n % 3 + 1))]} for n in range(30)]
    found = read_windows(rows_in(tmp_path / "a.jsonl", rows), "calibration", tokenizer, length, None)
    sizes = [len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)) for row in rows]
    begun, cut, at = [0] * len(found), [0] * len(found), 0
    for size in sizes:
        if at // length < len(found):
            begun[at // length] += 1
            cut[at // length] += (at + size - 1) // length > at // length
        at += size
    assert found.documents is not None
    assert (list(found.documents.begun), list(found.documents.cut)) == (begun, cut)
    said = describe(found.first(3))
    assert (said.template, said.documents, said.tokens) == ("messages", sum(begun[:3]), 3 * length)
    assert said.truncated == (sum(cut[:3]) / sum(begun[:3]) if sum(begun[:3]) else 0)
    mixed = found.shuffled(0)
    assert mixed.documents is not None
    assert sorted(mixed.documents.begun) == sorted(begun)


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "alien": ([{"conversations": [{"from": "alien", "value": "x"}]}], "a.jsonl, row 1: a turn from 'alien'"),
    "no role": ([{"messages": [user(ASK)]}, {"messages": [{"content": "x"}]}], "a.jsonl, row 2: a turn is not a message with role and content"),
    "a number": ([{"messages": [{"role": "user", "content": 5}]}], "a.jsonl, row 1: the content of a turn is not text"),
    "short": ([{"messages": [user(ASK)]}], "a.jsonl: 20 tokens in 1 dialogues, less than one window of 100"),
    "nothing": ([{"messages": []}] * 3, "a.jsonl: 0 tokens in 0 dialogues, less than one window of 100"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_dialogue_is_named(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    rows, message = WRONG[kind]
    with pytest.raises(RequestError) as refused:
        read_windows(rows_in(tmp_path / "a.jsonl", rows), "calibration", tokenizer, 100, None)
    assert refused.value.message == message


def test_without_a_chat_template_a_column_of_text_is_the_way_out(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    path = rows_in(tmp_path / "a.jsonl", [{"messages": [user(ASK)], "notes": "one two three four"}] * 3)
    with pytest.raises(RequestError, match="holds dialogues \\(messages\\), and the tokenizer has no chat template") as refused:
        read_windows(path, "calibration", tokenizer, 4, None)
    assert "--column" in refused.value.hint
    found = windows_of(find_source(path, "calibration", column="notes"), tokenizer, 4, None)
    assert tokenizer.decode(found.ids_NL[0]) == "<s>one two three"


def with_bos(ids: list[int], length: int, bos: int) -> list[list[int]]:
    """Token by token."""
    found: list[list[int]] = []
    window: list[int] = []
    for token in ids:
        if not window and token != bos:
            window = [bos]
        window.append(token)
        if len(window) == length:
            found, window = [*found, window], []
    return found


@pytest.mark.parametrize("length", [2, 3, 10])
def test_every_window_begins_with_bos_once(length: int) -> None:
    ids = torch.randint(1, 9, (101,), generator=torch.Generator().manual_seed(length)).tolist()
    for own in ([], [0], [10, 11, 30], list(range(0, 101, 9))):
        some = [0 if n in own else token for n, token in enumerate(ids)]
        placed = places(some, length, 0)
        assert filled(some, placed, 0).tolist() == with_bos(some, length, 0)


def test_texts_and_dialogues_with_bos(tmp_path: Path, tokenizer: Any) -> None:
    text = (BUNDLED / "evaluation.txt").read_text()[:3000]
    (tmp_path / "a.txt").write_text(text)
    for path, ids in (
        (str(tmp_path / "a.txt"), tokenizer(text, verbose=False)["input_ids"]),
        (
            rows_in(tmp_path / "a.jsonl", [{"messages": [user(ASK)]}] * 9),
            tokenizer.apply_chat_template([user(ASK)], tokenize=True, return_dict=False) * 9,
        ),
    ):
        found = read_windows(path, "calibration", tokenizer, 16, None, bos=True)
        assert found.ids_NL.tolist() == with_bos(ids, 16, tokenizer.bos_token_id)
        assert describe(found).aside == ", each window begins with BOS"
        assert "BOS first" in found.made
        plain = read_windows(path, "calibration", tokenizer, 16, None)
        assert plain.ids_NL.flatten().tolist() == ids[: len(ids) // 16 * 16]
    tokenizer.bos_token = None
    with pytest.raises(RequestError, match="the tokenizer has no BOS token"):
        read_windows(path, "calibration", tokenizer, 16, None, bos=True)


@pytest.mark.parametrize(
    ("kind", "begins"), [("gemma", True), ("gemma2", True), ("gemma3_text", True), ("recurrent_gemma", True), ("llama", False), ("gpt2", False)]
)
def test_the_default_is_as_the_model_was_trained(kind: str, begins: bool) -> None:
    config: PretrainedConfig = AutoConfig.for_model(kind)
    assert begins_with_bos(config) == begins


def test_mixtures(tmp_path: Path, tokenizer: Any) -> None:
    """Windows by their shares, spread evenly, so that every beginning of them has the shares too; the part that has the least bounds all."""
    (tmp_path / "a,[1]*.txt").write_text("apple " * 4000)
    rows_in(tmp_path / "b.jsonl", [{"text": "banana " * 50}, {"text": None}] * 40)
    spec = f"{tmp_path}/a,[1]*.txt*0.75, {tmp_path}/b.jsonl*25%"
    found = read_windows(spec, "calibration", tokenizer, 32, 40)
    assert (found.dataset, found.split) == ("0.75 a,[1]*.txt + 0.25 b.jsonl", "all + all")
    assert len(found) == 40
    apples = ["apple" in tokenizer.decode(ids) for ids in found.ids_NL]
    for count in range(4, 41, 4):
        assert abs(sum(apples[:count]) - 0.75 * count) <= 1
    assert found.skipped > 0
    parts = {name: read_windows(str(tmp_path / name), "calibration", tokenizer, 32, None) for name in ("a,[1]*.txt", "b.jsonl")}
    assert torch.equal(found.ids_NL[torch.tensor(apples)], parts["a,[1]*.txt"].ids_NL[:30])
    every = read_windows(spec, "calibration", tokenizer, 32, None)
    assert abs(len(every) - min(len(parts["a,[1]*.txt"]) / 0.75, len(parts["b.jsonl"]) / 0.25)) <= 2
    assert shown(spec) == "a,[1]*.txt*0.75,b.jsonl*0.25"
    learned = packs_of(find_source(spec, "calibration"), tokenizer, 32, 40)
    assert torch.equal(learned.windows.ids_NL, found.ids_NL)


def test_a_mixture_of_texts_and_dialogues_and_a_split(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("apple " * 400)
    Dataset.from_list([{"said": [user(ASK), assistant(ANSWER)]}] * 40).save_to_disk(tmp_path / "set" / "chats")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["chats"]}')
    source = find_source(f"{tmp_path}/a.txt*0.5,{tmp_path}/set*0.5", "calibration", "said", "chats")
    found = windows_of(source, tokenizer, 32, 16)
    assert found.documents is not None
    assert found.documents.form == "said"
    assert 0 < sum(found.documents.begun) < 40
    assert found.documents.begun[0] + found.documents.begun[1] > 0
    learned = packs_of(source, tokenizer, 32, 16)
    assert torch.equal(learned.windows.ids_NL, found.ids_NL)
    assert learned.learn_NL is not None
    assert 0 < learned.learn_NL.float().mean() < 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("a.txt*0.5,b.txt*0.4", "mixture 'a.txt*0.5,b.txt*0.4': the shares are 0.5 + 0.4 = 0.9"),
        ("a.txt*0.5,b.txt", "mixture 'a.txt*0.5,b.txt': 'b.txt' has no share"),
        ("a.txt*1,b.txt*0", "mixture 'a.txt*1,b.txt*0': the shares are 1 + 0 = 1"),
        ("a.txt*0.5,b.txt*0.5", "b.txt: no such file"),
    ],
)
def test_wrong_mixtures(spec: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    with pytest.raises(RequestError) as refused:
        find_source(spec, "calibration")
    assert refused.value.message == said
    assert mixture("a.txt") == mixture("org/name:config@main") == []


def test_all_that_is_known_of_windows_is_stored(tmp_path: Path, tokenizer: Any) -> None:
    path = rows_in(tmp_path / "a.jsonl", [{"messages": None}, *[{"messages": [user(ASK)]}] * 20])
    found = read_windows(path, "calibration", tokenizer, 16, None, bos=True)
    save_windows(tmp_path, RunData(found, (Windows(found.ids_NL[:2].clone(), "b", "all"),)), "asked")
    loaded = load_windows(tmp_path, "asked", {})
    assert loaded is not None
    assert describe(loaded.calibration) == describe(found)
    assert describe(loaded.evaluation[0]) == describe(Windows(found.ids_NL[:2], "b", "all"))

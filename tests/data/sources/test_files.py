"""Files: every format, every kind of mistake with its place, and what common columns and templates make of rows."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from partitioning import assign

from fedray.data.examples import Examples, assemble
from fedray.data.reading.readers import COMPRESSED
from fedray.data.sources.files import Files
from fedray.errors import DataError
from fedray.types import Task

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "hi"\nthere', "label": "b"}, {"text": "é", "label": "a"}]


def load(entries: dict[str, Any], task: Task = "classification", **settings: Any) -> Examples:
    data = Files.model_validate({"files": entries} | settings)
    return assemble(list(data.load(task, 0, None)), data, task)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(path: Path) -> None:
    path.write_text('text,label\n"one, two",a\n"say ""hi""\nthere",b\né,a\n', encoding="utf-8", newline="")


FORMATS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_text(lines(*ROWS)),
    "x.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: path.write_text(lines(*ROWS)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "tags": ["a"], "data": ROWS}, indent=2)),
    "splits.json": lambda path: path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]})),
    "x.csv": as_csv,
    "x.tsv": lambda path: path.write_text('text\tlabel\none, two\ta\n"say ""hi""\nthere"\tb\né\ta\n'),
    "X.CSV": as_csv,
    "x.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    assert_rows(load({"train": str(tmp_path / name)}))


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["x.jsonl", "data.json", "x.csv", "x.tsv"])
def test_files_may_be_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    FORMATS[name](tmp_path / name)
    packed = tmp_path / f"{name}{suffix}"
    with pa.CompressedOutputStream(str(packed), COMPRESSED[suffix]) as stream:
        stream.write((tmp_path / name).read_bytes())
    assert_rows(load({"train": str(packed)}))
    (tmp_path / "cut").mkdir()
    cut = write(tmp_path, f"cut/{packed.name}", packed.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"cut/.*: cannot be read: .*[Tt]runcated"):
        load({"train": cut})


def assert_rows(examples: Examples) -> None:
    assert examples.table.select(["text", "label"]).to_pylist() == ROWS
    assert examples.label_names == ("a", "b")


def test_relative_paths_start_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x.jsonl", lines(*ROWS))
    monkeypatch.chdir(tmp_path)
    assert len(load({"train": "x.jsonl"})) == 3


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([10, 9, 2], ("2", "9", "10")), ([True, False, True], ("False", "True")), (["b", "B", "a"], ("B", "a", "b"))],
)
def test_class_names_are_sorted_numbers_as_numbers(tmp_path: Path, labels: list[Any], expected: tuple[str]) -> None:
    path = write(tmp_path, "x.jsonl", lines(*({"text": "t", "label": label} for label in labels)))
    assert load({"train": path}).label_names == expected


def test_tasks_and_clients_by_name_and_by_pattern(tmp_path: Path) -> None:
    for name in ("boolq", "arc"):
        for split in ("train", "test"):
            write(tmp_path, f"{name}/{split}.jsonl", lines(*ROWS))
    named = {n: {s: str(tmp_path / n / f"{s}.jsonl") for s in ("train", "test")} for n in ("boolq", "arc")}
    pattern = {s: str(tmp_path / "*" / f"{s}.jsonl") for s in ("train", "test")}
    for entries in (named, pattern):
        examples = load(entries)
        found = Counter(zip(examples.field("task"), examples.field("file"), examples.field("split"), strict=True))
        assert found == {(n, n, s): 3 for n in ("boolq", "arc") for s in ("train", "test")}
    assert set(load({"train": str(tmp_path / "boolq" / "*.jsonl")}).field("file")) == {"train", "test"}
    one_path_each = load({"x": named["arc"]["train"], "test": named["arc"]["test"]})
    assert Counter(one_path_each.field("split")) == {"train": 3, "test": 3}
    assert set(one_path_each.field("file")) == {"x", "test"}


def test_a_json_file_may_name_its_clients(tmp_path: Path) -> None:
    """{client: rows}, as FedLLM-Bench publishes its data: sizes stay, and a column that one client lacks is empty."""
    rows = {
        "7": [{"instruction": "a", "input": "x", "response": "b"}] * 5,
        "Zoë ": [{"instruction": "c", "response": "d"}] * 9,
    }
    path = write(tmp_path, "federation.json", json.dumps(rows))
    templates = {"prompt": "{instruction} {input}", "answer": "{response}"}
    examples = load({"train": path}, "causal_lm", **templates)
    assert Counter(examples.field("file")) == {"7": 5, "Zoë": 9}
    assert set(examples.field("task")) == {"federation"}
    assert examples.place(6) == f"{path}: 'Zoë ': row 2"
    assert examples.table["prompt"].to_pylist()[4:6] == ["a x", "c "]
    clients = assign(examples, "by_file", None, validation_fraction=0, test_fraction=0)
    assert {name: len(splits["train"]) for name, splits in clients.items()} == {"7": 5, "Zoë": 9}
    test = write(tmp_path, "test.json", json.dumps({name: of_client[:2] for name, of_client in rows.items()}))
    clients = assign(load({"train": path, "test": test}, "causal_lm", **templates), "by_file", None)
    assert {name: len(splits["test"]) for name, splits in clients.items()} == {"7": 2, "Zoë": 2}
    named = load({"chat": path, "maths": {"train": path}}, "causal_lm", **templates)
    assert set(named.field("file")) == {"chat/7", "chat/Zoë", "maths/7", "maths/Zoë"}
    assert set(named.field("task")) == {"chat", "maths"}


def test_files_of_a_pattern_are_named_without_their_suffixes(tmp_path: Path) -> None:
    """Brackets are part of a folder's name, as programs make it; only `*` stands for other characters."""
    for name in ("a", "b"):
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.jsonl.gz"), "gzip") as stream:
            stream.write(GOOD.encode())
        write(tmp_path, f"run [v1.2]/{name}.x.csv", "text,label\nt,a\ns,b\n")
    assert set(load({"train": str(tmp_path / "*.jsonl.gz")}).field("file")) == {"a", "b"}
    assert set(load({"train": str(tmp_path / "run [v1.2]" / "*.csv")}).field("file")) == {"a.x", "b.x"}
    assert set(load({"train": str(tmp_path / "run [v1.2]" / "a.x.csv")}).field("file")) == {"a.x"}


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    """The csv module refuses more than 131,072 characters; its limit is the same afterwards."""
    limit = csv.field_size_limit()
    long = "word " * 60_000
    for quoted in (f'"{long}"', f'a "{long}'):  # a quote inside a field is left to the strict parser
        path = write(tmp_path, "x.csv", f"text,label\n{quoted},a\nt,b\n")
        assert load({"train": path}).field("text")[0] == quoted.strip('"')
    assert csv.field_size_limit() == limit


def test_templates_fill_prompt_and_answer_and_own_columns_stay(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", lines({"q": "2+2?", "answer": 4, "who": None}, {"q": "x", "answer": [1]}))
    examples = load({"train": path}, "causal_lm", prompt="Q: {q} {{A}} {who}", answer="= {answer}")
    assert examples.table["prompt"].to_pylist() == ["Q: 2+2? {A} ", "Q: x {A} "]
    assert examples.table["answer"].to_pylist() == ["= 4", "= [1]"]
    assert examples.values("answer").tolist() == ["4", "[1]"]


def test_regression_labels_are_numbers_and_pairs_have_two_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "a,b,score\nx,y,1.5\nz,w,-2\n")
    examples = load({"train": path}, "regression", text="a", text_pair="b", label="score")
    assert examples.table["label"].to_pylist() == [1.5, -2.0]
    assert examples.table["text_pair"].to_pylist() == ["y", "w"]
    assert examples.label_names == ()


GOOD = lines(*ROWS)


def twice() -> bytes:
    """Return a Parquet file with two columns of one name."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "label"]), sink)
    return bytes(sink.getvalue())


TWICE = twice()

BAD_FILES: list[tuple[str, str | bytes, Task, dict[str, Any], list[str]]] = [
    ("x.jsonl", GOOD + "\n{oops\n", "classification", {}, ["x.jsonl: line 5: not valid JSON"]),
    ("x.jsonl", GOOD + "[1]\n", "classification", {}, ["x.jsonl: line 4: expected an object", "list"]),
    ("x.jsonl", b'{"text": "a"}\n\xff\n', "classification", {}, ["x.jsonl: line 2: not UTF-8"]),
    ("x.jsonl", GOOD + lines({"text": " ", "label": "a"}), "classification", {}, ["line 4: column 'text'", "empty"]),
    ("x.jsonl", GOOD + lines({"label": "a"}), "classification", {}, ["line 4: column 'text'", "got nothing"]),
    ("x.jsonl", GOOD + lines({"text": 5, "label": "a"}), "classification", {}, ["line 4: column 'text'", "got 5"]),
    ("x.jsonl", GOOD + lines({"text": "t"}), "classification", {}, ["line 4: column 'label'", "got nothing"]),
    ("x.jsonl", GOOD + lines({"text": "t", "label": 0.5}), "classification", {}, ["line 4", "0.5", "regression"]),
    ("x.jsonl", GOOD + '{"text": "\\ud800", "label": "a"}', "classification", {}, ["line 4: column 'text'", "Unicode"]),
    ("x.jsonl", GOOD, "regression", {}, ["line 1: column 'label'", "got 'a'"]),
    ("x.jsonl", lines({"text": "t", "label": True}), "regression", {}, ["line 1: column 'label'", "got True"]),
    ("x.jsonl", '{"text": "t", "label": NaN}', "regression", {}, ["line 1: column 'label'", "finite", "nothing"]),
    ("x.jsonl", GOOD, "classification", {"text": "txt"}, ["no column 'txt' (data.text)", "did you mean 'text'"]),
    ("x.jsonl", GOOD, "classification", {"label": "labels"}, ["no column 'labels'", "did you mean 'label'"]),
    ("x.jsonl", GOOD, "classification", {"text_pair": "b"}, ["no column 'b' (data.text_pair)", "text, label"]),
    ("x.jsonl", GOOD, "causal_lm", {"prompt": "{txt}"}, ["no column 'txt' (data.prompt)", "did you mean 'text'"]),
    ("x.jsonl", GOOD, "causal_lm", {"prompt": "{text"}, ["data.prompt", "not a template"]),
    ("x.jsonl", GOOD, "causal_lm", {"prompt": "{text!r}"}, ["data.prompt", "a column's name"]),
    ("x.jsonl", lines({"a": ""}), "causal_lm", {"prompt": "", "answer": "{a}"}, ["line 1", "answer", "empty"]),
    ("x.jsonl", '{"p": "p", "a": NaN}', "causal_lm", {"prompt": "{p}", "answer": "{a}"}, ["line 1", "answer", "empty"]),
    ("x.jsonl", '{"text": NaN, "label": 1}', "classification", {}, ["line 1: column 'text'", "got nothing"]),
    ("x.jsonl", '{"text": "t", "label": NaN}', "classification", {}, ["line 1: column 'label'", "got nothing"]),
    ("x.jsonl", lines(ROWS[0]), "classification", {}, ["single class 'a'"]),
    ("x.jsonl", "\n", "classification", {}, ["no examples", "x.jsonl"]),
    ("x.json", "[{]", "classification", {}, ["x.json: line 1: not valid JSON"]),
    ("x.json", json.dumps([ROWS[0], 3]), "classification", {}, ["x.json: row 2: expected an object", "int"]),
    ("x.json", json.dumps([*ROWS, {"text": "t"}]), "classification", {}, ["x.json: row 4: column 'label'"]),
    ("x.csv", 'text,label\n"a\nb",x\nc\n', "classification", {}, ["x.csv: line 4: 1 fields", "header has 2"]),
    ("x.csv", 'text,label\na,x\n"b,y\n', "classification", {}, ["x.csv: line 3: not valid CSV"]),
    ("x.csv", 'text,label\n"a\nb",x\n,y\n', "classification", {}, ["x.csv: line 4: column 'text'"]),
    ("x.csv", "text,b,b,text\na,x,,\n", "classification", {}, ["line 1", "twice: 'text', 'b'; rename or remove"]),
    ("x.csv", b"text,label\na,x\n\xff,x\n", "classification", {}, ["x.csv: line 3: not UTF-8"]),
    ("x.tsv", "text\tlabel\na\tx\n\nb\n", "classification", {}, ["x.tsv: line 4: 1 fields", "header has 2"]),
    ("x.tsv", 'text\tlabel\na\tx\n"b\n', "classification", {}, ["x.tsv: line 3: not valid CSV"]),
    ("x.parquet", "PAR1", "classification", {}, ["x.parquet: not a valid Parquet file"]),
    ("x.parquet", TWICE, "classification", {}, ["x.parquet: a column's name occurs twice: 'text'"]),
    ("x.json", '{"rows": [{"text": "a"}, 3]}', "classification", {}, ["x.json: row 2: expected an object", "int"]),
    (
        "x.json",
        json.dumps({"dev": ROWS, "test": ROWS}),
        "classification",
        {},
        ["several lists of rows: 'dev', 'test'", "'train'"],
    ),
    ("x.json", json.dumps({"a": ROWS, "b": ROWS, "n": 2}), "classification", {}, ["'n': int, not a list of rows"]),
    ("x.json", json.dumps({"a": ROWS, "b": ROWS, "c": []}), "classification", {}, ["'c': no rows", "remove this"]),
    ("x.json", json.dumps({"a": ROWS, " ": ROWS}), "classification", {}, ["' ': a client without a name"]),
    ("x.json", json.dumps({"a": ROWS, "b": [*ROWS, 3]}), "classification", {}, ["x.json: 'b': row 4: expected an obj"]),
    ("x.json", json.dumps({"a": ROWS, "b": [{"text": "t"}]}), "classification", {}, ["'b': row 1: column 'label'"]),
    ("x.json", '{\n"data": [{]}', "classification", {}, ["x.json: line 2: not valid JSON"]),
    ("x.csv.gz", GOOD, "classification", {}, ["x.csv.gz: cannot be read"]),
    ("x.xlsx", "a\tb", "classification", {}, ["x.xlsx", "'.xlsx'", ".jsonl, .json, .csv, .tsv, .parquet", ".gz, .zst"]),
    ("x.parquet.gz", "", "classification", {}, ["'.parquet.gz'", "all but .parquet may be compressed"]),
]


@pytest.mark.parametrize(("name", "content", "task", "settings", "parts"), BAD_FILES)
def test_mistakes_in_a_file_are_located(
    tmp_path: Path, name: str, content: str | bytes, task: Task, settings: dict[str, Any], parts: list[str]
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load({"train": path}, task, **settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        ({"train": "{}/trian.jsonl"}, ["data.files.train", "no such file", "did you mean 'train.jsonl'"]),
        ({"train": "{}/*.csv"}, ["data.files.train", "no file matches"]),
        ({"train": "{}/train.jsonl", "tset": "{}/train.jsonl"}, ["unknown split 'tset'", "did you mean 'test'"]),
        ({"x": {"train": "{}/train.jsonl", "dev": "d"}}, ["data.files.x", "'dev'", "train, validation, test"]),
        ({"x": {"test": "{}/train.jsonl"}}, ["data.files.x", "no file for train"]),
        ({"test": "{}/train.jsonl"}, ["no training examples"]),
    ],
)
def test_mistakes_in_the_mapping_of_files_are_located(tmp_path: Path, entries: Any, parts: list[str]) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    filled = json.loads(json.dumps(entries).replace("{}", tmp_path.as_posix()))
    with pytest.raises(DataError) as caught:
        load(filled)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_clients_have_the_same_names_however_a_pattern_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and their folders repeat, so a name needs more of the path: what the files do not have in common."""
    for place in ("a/x", "a/y", "b/x"):
        (tmp_path / "data" / place).mkdir(parents=True)
        (tmp_path / "data" / place / "train.jsonl").write_text('{"text": "t", "label": 1}')
    monkeypatch.chdir(tmp_path)
    written = "data/*/*/train.jsonl", f"{tmp_path}/data/*/*/train.jsonl", "./data/*/*/train.jsonl"
    for pattern in written:
        source = Files(files={"train": pattern})
        assert [rows.file for rows in source.load("classification", 0, None)] == ["a/x/train", "a/y/train", "b/x/train"]

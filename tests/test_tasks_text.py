"""Text: no document in both parts, every byte predicted once, every format read, and one sentence for a file that is broken."""

from __future__ import annotations

import gzip
import json
import math
import os
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from task_fixture import load, totals_of
from twofold.errors import TwofoldError
from twofold.tasks import corpus, text
from twofold.tasks.corpus import Document, divide, local_documents, place, standard_library

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
BROAD = {"context": 8, "max_bytes": 0, "held_out_bytes": 0, "held_out_fraction": 0.3}


def parts(documents, fraction=0.3, train_bytes=0, held_out_bytes=0):
    return divide(
        documents, fraction=fraction, train_bytes=train_bytes, held_out_bytes=held_out_bytes, source="the test"
    )


def texts(stream: bytes) -> list[bytes]:
    assert stream[:1] == stream[-1:] == b"\0"
    return stream[1:-1].split(b"\0")


# Dividing

contents = st.lists(st.binary(max_size=12).map(lambda content: content.replace(b"\0", b"0")), min_size=1, max_size=12)


@given(contents, st.floats(0.01, 0.99))
def test_every_text_is_in_exactly_one_part(found, fraction):
    documents = [Document(f"{number}.txt", content) for number, content in enumerate(found)]
    distinct = {content for content in found if content}
    if not distinct or (len(distinct) == 1 and len(next(iter(distinct))) == 1):
        with pytest.raises(TwofoldError, match=r"holds no text|is too short"):
            parts(documents, fraction)
        return
    divided = parts(documents, fraction)
    train, held_out = texts(divided.train), texts(divided.held_out)
    assert train
    assert held_out
    assert all([*train, *held_out])
    if divided.is_cut:
        assert b"".join(train + held_out) == next(iter(distinct))
    else:
        assert not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(distinct)
        assert (len(train), len(held_out)) == (divided.train_documents, divided.held_out_documents)


def test_a_documents_part_is_decided_by_its_name_alone():
    many = [Document(f"{number}.txt", b"%d" % number) for number in range(400)]
    divided = parts(many)
    assert set(texts(divided.held_out)) == {document.content for document in many if place(document.name) < 0.3}
    assert 80 < divided.held_out_documents < 160
    fewer = parts(reversed(many[::2]))
    assert set(texts(fewer.held_out)) < set(texts(divided.held_out))
    assert set(texts(fewer.train)) < set(texts(divided.train))


def test_parts_end_at_their_bytes_and_reading_ends_with_them():
    def endless():
        number = 0
        while True:
            number += 1
            yield Document(f"{number}", b"%05d" % number)

    divided = parts(endless(), train_bytes=100, held_out_bytes=33)
    assert (len(divided.train), len(divided.held_out)) == (101, 34)
    assert (divided.train_documents, divided.held_out_documents) == (17, 6)


def test_a_part_that_is_full_still_gives_a_document_to_one_that_is_empty():
    documents = [Document(name, name.encode() * 9) for name in "abc"]
    for fraction in (1e-9, 1 - 1e-9):
        divided = parts(documents, fraction=fraction, train_bytes=5, held_out_bytes=5)
        assert not divided.is_cut
        assert len({divided.train[1], divided.held_out[1]}) == 2


def test_a_single_text_is_cut_between_lines():
    divided = parts([Document("book", b"one\ntwo\nthree\nfour\n")], fraction=0.5)
    assert (texts(divided.train), texts(divided.held_out)) == ([b"one\ntwo\n"], [b"three\nfour\n"])


# Chunks


@pytest.mark.parametrize("context", [2, 3, 7, 64, 1000])
def test_every_held_out_byte_is_scored_exactly_once(tmp_path, context):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * (number + 1))
    task = load("text", path=str(tmp_path), **BROAD | {"context": context})
    divided = parts(local_documents(tmp_path, pattern="*", fields=("text",)))
    for batch_size in (1, 4, 10_000):
        scored, seen = [], b"\0"
        for batch in task.held_out_batches(batch_size):
            assert torch.equal(batch["input_ids"], batch["labels"])
            assert batch["input_ids"].shape[1] <= context
            scored.append(task.count(batch))
            for row in batch["labels"].tolist():
                assert row[0] == seen[-1]  # the last byte of the chunk before is what the first is predicted from
                seen += bytes(row[1:])
        assert seen == divided.held_out
        assert sum(scored) == len(divided.held_out) - 1


@given(context=st.integers(2, 20), length=st.integers(40, 200))
def test_training_chunks_are_whole_and_leave_out_less_than_one(tmp_path_factory, context, length):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(bytes(33 + number % 90 for number in range(length)))
    task = load(
        "text", path=str(path), **BROAD | {"context": context, "max_bytes": length // 2, "held_out_fraction": 0.1}
    )
    rows = task.train_batch(torch.arange(task.train_size))["input_ids"]
    assert rows.shape == (task.train_size, context)
    train = path.read_bytes()[: length // 2]
    scored = bytes(rows[:, 1:].flatten().tolist())
    assert scored == train[: len(scored)]
    assert len(train) - len(scored) < context - 1


def test_loss_bits_and_perplexity_are_one_number():
    task = load("text")
    logits_of = lambda batch: torch.zeros(*batch["labels"].shape, 256)  # noqa: E731
    scores = task.scores(totals_of(task, task.held_out_batches(4), logits_of))
    assert scores == pytest.approx({"loss": math.log(256), "bits_per_byte": 8.0, "perplexity": 256.0})
    assert task.scores({"loss": 1e9, "correct": 0.0, "count": 1.0})["perplexity"] < math.inf


# By position


@pytest.mark.parametrize(
    ("context", "names"),
    [(2, ["1-1"]), (16, ["1-15"]), (17, ["1-15", "16-16"]), (128, ["1-15", "16-31", "32-63", "64-127"])],
)
def test_bits_by_position_are_a_partition_of_the_headline(context, names):
    task = load("text", context=context, held_out_bytes=299, by_position=True)
    generator = torch.Generator().manual_seed(0)
    logits_of = lambda batch: torch.randn(*batch["labels"].shape, 256, generator=generator)  # noqa: E731
    totals = totals_of(task, task.held_out_batches(3), logits_of)
    assert sorted(name for name in totals if name.startswith("count@")) == sorted(f"count@{name}" for name in names)
    assert sum(totals[f"count@{name}"] for name in names) == totals["count"] == 299
    assert sum(totals[f"loss@{name}"] for name in names) == pytest.approx(totals["loss"], rel=1e-12)
    scores = task.scores(totals)
    assert {name for name in scores if "@" in name} == {f"bits_per_byte@{name}" for name in names}
    weighted = sum(scores[f"bits_per_byte@{name}"] * totals[f"count@{name}"] for name in names)
    assert weighted / 299 == pytest.approx(scores["bits_per_byte"], rel=1e-12)
    assert "@" not in "".join(load("text", context=context).scores(totals | {"count": 299.0}).keys() - set(scores))


def test_a_byte_is_filed_under_how_many_stand_before_it():
    """A model that knows all bytes but those after 16 to 31 others has its loss there and nowhere else."""
    task = load("text", context=64, held_out_bytes=299, by_position=True)

    def logits_of(batch):
        known = torch.nn.functional.one_hot(batch["labels"].roll(-1, dims=1), 256) * 1e3
        known[:, 15:31] = 0  # what stands at 15 is predicted from 16 bytes
        return known.double()

    scores = task.scores(totals_of(task, task.held_out_batches(3), logits_of))
    assert scores["bits_per_byte@16-31"] == pytest.approx(8)
    assert [scores[f"bits_per_byte@{name}"] for name in ("1-15", "32-63")] == pytest.approx([0, 0], abs=1e-9)


def test_positions_beyond_a_short_text_have_no_score():
    task = load("text", context=64, held_out_bytes=20, by_position=True)
    logits_of = lambda batch: torch.zeros(*batch["labels"].shape, 256)  # noqa: E731
    scores = task.scores(totals_of(task, task.held_out_batches(3), logits_of))
    assert {name for name in scores if "@" in name} == {"bits_per_byte@1-15", "bits_per_byte@16-31"}


# Sources


def test_a_tree_of_a_kernels_sources_is_a_folder_like_any_other(tmp_path):
    """As Debian's linux-source unpacks: C files and headers deep in folders, and much else that the pattern leaves out."""
    tree = {
        "kernel/sched/core.c": "int schedule(void) { return 0; }\n",
        "kernel/sched/sched.h": "extern int schedule(void);\n",
        "include/linux/list.h": "struct list_head { struct list_head *next; };\n",
        "drivers/char/mem.c": "static int zero; /* caf\u00e9 */\n",
        "Documentation/index.rst": "The kernel\n",
        "Makefile": "all:\n",
        ".clang-format": "# hidden\n",
        "arch/x86/boot/.gitignore": "*.o\n",
    }
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("latin-1"))  # old sources are not all UTF-8
    (tmp_path / "include" / "uapi").symlink_to(tmp_path / "include" / "linux")
    (tmp_path / "vmlinux.c").symlink_to(tmp_path / "gone.c")
    found = {
        document.name: document.content for document in local_documents(tmp_path, pattern="*.[ch]", fields=("text",))
    }
    wanted = {name: content.encode("latin-1") for name, content in tree.items() if name.endswith((".c", ".h"))}
    assert {name: content for name, content in found.items() if "uapi" not in name} == wanted
    task = load("text", path=str(tmp_path), pattern="*.[ch]", **BROAD)
    divided = parts(local_documents(tmp_path, pattern="*.[ch]", fields=("text",)))
    assert sorted(texts(divided.train) + texts(divided.held_out)) == sorted(wanted.values())
    assert task.train_size > 0
    assert str(tmp_path) in task.description


def test_the_standard_library_is_the_embedded_corpus():
    task = load("text", context=128, max_bytes=0, held_out_bytes=0)
    assert platform.python_version() in task.description
    names = [document.name for document in standard_library()]
    assert "textwrap.py" in names
    assert len(names) == len(set(names)) > 150
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert 2_000_000 < task.train_size * 127 < 40_000_000
    assert task.data_hash != load("text", context=128, max_bytes=0, held_out_bytes=1000).data_hash


ROWS = [{"text": f"row {number} of a table, long enough\n", "note": f"{number}"} for number in range(30)]


def write_text(path: Path) -> None:
    path.write_text("".join(row["text"] for row in ROWS))


def write_json_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


def write_parquet(path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)


def zipped(write):
    def write_zipped(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


FORMATS = {
    "a.txt": write_text,
    "a.txt.gz": zipped(write_text),
    "a.jsonl": write_json_lines,
    "a.jsonl.gz": zipped(write_json_lines),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_text(tmp_path, name):
    FORMATS[name](tmp_path / name)
    content = "".join(row["text"] for row in ROWS).encode()
    of_file = list(local_documents(tmp_path / name, pattern="*", fields=("text",)))
    assert b"".join(document.content for document in of_file) == content
    assert len(of_file) == (1 if ".txt" in name else 30)
    assert len({document.name for document in of_file}) == len(of_file)
    assert list(local_documents(tmp_path, pattern="*", fields=("text",))) == of_file
    assert load("text", path=str(tmp_path / name), **BROAD).train_size > 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_several_fields_are_joined(tmp_path, name):
    FORMATS[name](tmp_path / name)
    first = next(iter(local_documents(tmp_path / name, pattern="*", fields=("note", "text"))))
    assert first.content == b"0\nrow 0 of a table, long enough\n"


def test_a_folder_leaves_out_hidden_and_binary_files_and_what_the_pattern_does_not_name(tmp_path):
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "deep/c.md", ".hidden.txt", "deep/.git/d.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    (tmp_path / "e.bin").write_bytes(b"\x7fELF\0\0")
    found = {document.name for document in local_documents(tmp_path, pattern="*", fields=("text",))}
    assert found == {"a.txt", "deep/b.txt", "deep/c.md"}
    found = {document.name for document in local_documents(tmp_path, pattern="*.txt", fields=("text",))}
    assert found == {"a.txt", "deep/b.txt"}


def test_the_hash_follows_every_byte_and_not_the_folders_name(tmp_path):
    def data_hash(folder: str, change: str = "") -> str:
        (tmp_path / folder).mkdir()
        for number in range(9):
            (tmp_path / folder / f"{number}.txt").write_text(f"a text with number {number}" + change * (number == 4))
        return load("text", path=str(tmp_path / folder), **BROAD).data_hash

    assert data_hash("one") == data_hash("two") != data_hash("three", "!")


def test_a_data_set_by_name_is_read_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    write_json_lines(tmp_path / "rows" / "train.jsonl")
    task = load("text", dataset=str(tmp_path / "rows"), **BROAD)
    assert "30" not in task.description.split(" held out")[0]
    seen = task.train_batch(torch.arange(task.train_size))["input_ids"][:, 1:]
    assert b"of a table" in bytes(seen.flatten().tolist())
    for options, sentence in (
        ({"field": "body"}, "has no column 'body'; its columns are text, note"),
        ({"split": "test"}, "cannot be loaded"),
        ({"dataset": "nobody/nothing"}, "The data set 'nobody/nothing' cannot be loaded"),
    ):
        with pytest.raises(TwofoldError) as caught:
            load("text", **{"dataset": str(tmp_path / "rows")} | options)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


# Broken files


def cut(write):
    def write_cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:-20])

    return write_cut


def written(content: bytes):
    return lambda path: path.write_bytes(content)


BROKEN = {
    "empty.txt": (written(b""), "holds no text"),
    "one.txt": (written(b"x"), "is too short"),
    "short.txt": (written(b"some"), "is too short"),
    "cut.txt.gz": (cut(zipped(write_text)), "is not a whole gzip file"),
    "not.txt.gz": (written(b"plain"), "is not a whole gzip file"),
    "cut.jsonl.gz": (cut(zipped(write_json_lines)), "is not a whole gzip file"),
    "cut.parquet": (cut(write_parquet), "is not a whole parquet file"),
    "empty.parquet": (written(b""), "is not a whole parquet file"),
    "malformed.jsonl": (written(b'{"text": "a"}\n\n{"text": "b"\n'), "malformed.jsonl, line 3, is not JSON"),
    "latin.jsonl": (written(b'{"text": "a"}\n{"text": "\xff"}\n'), "latin.jsonl, line 2, is not JSON"),
    "list.jsonl": (written(b'["text"]\n'), "line 1, is JSON but not an object"),
    "other.jsonl": (
        written(b'{"text": "a"}\n{"body": "b", "id": 1}\n'),
        "line 2, has no field 'text'; its fields are body, id",
    ),
    "number.jsonl": (written(b'{"text": 7}\n'), "line 1, holds int in the field 'text', where text is wanted"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gets_its_sentence(tmp_path, name):
    write, sentence = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(TwofoldError) as caught:
        load("text", path=str(tmp_path / name), **BROAD)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_or_with_empty_cells(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "id": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(TwofoldError, match=r"a\.parquet row 1, holds NoneType in the field 'text'"):
        load("text", path=str(tmp_path / "a.parquet"))
    with pytest.raises(TwofoldError, match=r"has no column 'body'; its columns are text, id"):
        load("text", path=str(tmp_path / "a.parquet"), field="body")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(TwofoldError, match="cannot be read: Permission denied"):
        load("text", path=str(tmp_path / "a.txt"))


def test_an_empty_folder_and_a_python_without_source(tmp_path, monkeypatch):
    with pytest.raises(TwofoldError, match="holds no text"):
        load("text", path=str(tmp_path))
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TwofoldError, match="keeps no source of its standard library"):
        load("text")


@pytest.mark.skipif(not SHARED.exists(), reason="no shared/data beside this checkout")
def test_real_text_is_read():
    shakespeare = load("text", path=str(SHARED / "shakespeare" / "tinyshakespeare.txt.gz"), context=256, max_bytes=0)
    assert shakespeare.train_size > 4000
    problems = load("text", path=str(SHARED / "gsm8k"), field="question,answer", context=256, max_bytes=0)
    assert problems.train_size > 14_000
    assert text.VOCABULARY == 256

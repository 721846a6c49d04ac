import pytest
from pydantic import ValidationError

from softlabels.errors import MismatchError
from softlabels.lineage import Contents, Parent, RunLineage, TeacherLineage
from tests.tables import make_contents, make_lineage


def test_contents_and_runs_survive_json() -> None:
    contents = make_contents(k=3, temperatures=(1.5, 2.0), carried=("image",))
    assert Contents.model_validate_json(contents.model_dump_json()) == contents
    assert Contents.model_validate_json(contents.model_dump_json()).digest() == contents.digest()
    lineage = make_lineage("r", ["r/u"], 4)
    assert RunLineage.model_validate_json(lineage.model_dump_json()) == lineage


def test_a_teachers_fingerprint_is_of_what_decides_what_it_says() -> None:
    teacher = TeacherLineage(name="a", kind="torch", code="m:f", weights_sha256="1" * 64)
    renamed = teacher.model_copy(update={"name": "b"})
    assert renamed.fingerprint() == teacher.fingerprint()
    for change in (
        {"revision": "r2"},
        {"code": "m:g"},
        {"code_sha256": "2" * 64},
        {"arguments": {"width": 3}},
        {"weights_sha256": "3" * 64},
        {"decode": "m:d"},
        {"decode_sha256": "4" * 64},
        {"kind": "onnx"},
    ):
        changed = teacher.model_copy(update=change)
        assert changed.fingerprint() != teacher.fingerprint(), change


def test_a_file_is_known_by_its_content_not_by_its_place() -> None:
    here = TeacherLineage(name="a", kind="torch", code="m.py:M", code_sha256="1" * 64)
    there = here.model_copy(update={"code": "/elsewhere/m.py:M"})
    assert there.fingerprint() == here.fingerprint()
    other_class = here.model_copy(update={"code": "m.py:N"})
    assert other_class.fingerprint() != here.fingerprint()


def test_a_fingerprint_outlives_json() -> None:
    # As JSON keys 10 sorts before 2, as numbers after it.
    labels = {"id2label": {number: str(number) for number in range(12)}}
    teacher = TeacherLineage(name="a", kind="torch", code="m:f", arguments=labels)
    stored = TeacherLineage.model_validate_json(teacher.model_dump_json())
    assert stored.fingerprint() == teacher.fingerprint()


def test_a_field_added_later_changes_no_digest() -> None:
    class Later(Contents):
        view_policy: str | None = None

    contents = make_contents()
    assert Later.model_validate_json(contents.model_dump_json()).digest() == contents.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"k": 4},
        {"num_classes": 11},
        {"classes": None},
        {"draws": 2},
        {"temperatures": (2.0,)},
        {"profile": "compact"},
        {"carried": ("image",)},
        {"example_ids": "content"},
        {"seed": 1},
        {"alignment": "next"},
        {"tokenizer_sha256": "5" * 64},
        {"teacher": TeacherLineage(name="random", kind="torch", code="other:teacher")},
    ],
)
def test_contents_that_differ_are_named_with_both_values(change: dict[str, object]) -> None:
    contents = make_contents()
    other = Contents.model_validate(contents.model_dump() | change)
    contents.require_same(make_contents(), "the run", "table 't'")
    with pytest.raises(MismatchError, match=r"the run has .*, table 't' has ") as caught:
        contents.require_same(other, "the run", "table 't'")
    (name,) = change
    assert str(caught.value).startswith(f"{name} differs")
    assert contents.digest() != other.digest()


def test_records_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        Contents.model_validate({**make_contents().model_dump(), "kk": 3})
    with pytest.raises(ValidationError):
        make_contents().k = 3


def test_parents_are_written_only_where_there_are_some() -> None:
    plain = make_contents()
    assert "parents" not in plain.model_dump(mode="json")
    assert "parents" not in plain.model_dump_json()
    assert Contents.model_validate_json(plain.model_dump_json()) == plain
    parent = Parent(
        name="a", snapshot_digest="1" * 64, version=3, teacher="t", weight="margin", temperature=2
    )
    mixed = plain.model_copy(update={"parents": (parent,)})
    stored = mixed.model_dump_json()
    assert Contents.model_validate_json(stored) == mixed
    assert Contents.model_validate_json(stored).digest() == mixed.digest() != plain.digest()
    with pytest.raises(MismatchError, match="parents differs"):
        mixed.require_same(plain, "the run", "table 't'")

"""Each error's exit code is a promise to schedulers."""

import pytest

from softlabels import errors


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SoftLabelsError", 1),
        ("BadInputError", 2),
        ("DataError", 1),
        ("MismatchError", 1),
        ("RecipeMismatchError", 2),
        ("IntegrityError", 1),
        ("StorageError", 1),
        ("TryAgainError", 75),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    assert getattr(errors, name)("x").exit_code == code


def test_every_error_is_listed_and_can_be_caught_as_one() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert len(found) == 8
    assert all(issubclass(getattr(errors, name), errors.SoftLabelsError) for name in found)

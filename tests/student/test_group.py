import pytest
import torch

from softlabels.errors import DataError, TryAgainError
from softlabels.student.group import Group, joined, peers

# What several processes tell each other is in test_ranks.py: there are several.


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as group:
        assert group == Group()
        assert not torch.distributed.is_initialized()
    assert group.gather([1, 2.5]).tolist() == [[1, 2.5]]
    assert group.first(lambda: "made") == "made"
    tensors = {"a": torch.ones(2)}
    assert group.tensors(tensors) == tensors

    def fail() -> None:
        raise DataError("x")

    with pytest.raises(DataError) as caught:
        group.together(fail)
    assert not caught.value.told_elsewhere


def test_only_what_the_group_says_is_a_lost_peer() -> None:
    with pytest.raises(TryAgainError, match=r"^another process .*the same command goes on.*$"):
        with peers():
            raise RuntimeError("[x/gloo/transport/tcp/pair.cc:553]\nConnection closed by peer")
    with pytest.raises(RuntimeError, match=r"^shapes$"), peers():
        raise RuntimeError("shapes")

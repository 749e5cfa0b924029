"""What a run says on stderr is seen by `caplog` too."""

import pytest

from expertmesh import backends


@pytest.fixture(autouse=True)
def caught_logs(monkeypatch) -> None:
    monkeypatch.setattr(backends.logger(), "propagate", True)

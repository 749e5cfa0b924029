"""Settings that must stand before the first import of Triton or Transformers."""

import os

os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib  # noqa: E402
import signal  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

for _signal in (signal.SIGINT, signal.SIGHUP):  # a background job ignores them, and so would all that tests start
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _signal == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def nan_memory():
    """Within `nan_memory()` every `torch.empty` is filled with NaN, so that an element nobody writes shows."""

    @contextlib.contextmanager
    def poisoned():
        before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = before[0]
            torch.use_deterministic_algorithms(before[1])

    return poisoned

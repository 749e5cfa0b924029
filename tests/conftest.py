"""Settings that must stand before the first import of Triton or Transformers."""

import os

os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidia0") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

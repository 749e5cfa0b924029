"""pytest plugin: before tests are collected, classes named in SWAPPED_CLASSES become ours wherever tests import them.

A module of its own on the import path, since a transformers checkout has a package `tests` as well (checkout.py).
"""

import importlib
import os

import transformers

from expertmesh.fuse import fused_class


def pytest_configure() -> None:
    """Put our classes in the place of transformers'."""
    for name in os.environ["SWAPPED_CLASSES"].split():
        stock = getattr(transformers, name)
        for module in (stock.__module__, stock.__module__.rpartition(".")[0], "transformers"):
            setattr(importlib.import_module(module), name, fused_class(stock))

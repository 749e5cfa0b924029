"""Built-in data, available offline: `demo:chat` is shipped, `demo:python` is made from the standard library.

demo:chat    a part of the English dialogues of chatterbot-corpus (BSD 3-Clause), selected by hand; see chat/LICENSE
demo:python  questions about Python, answered by the docstrings and reference topics of the interpreter that runs it
demo:all     both
"""

import contextlib
import importlib
import inspect
import json
import random
import re
from collections.abc import Iterator
from importlib import resources
from types import ModuleType

Row = dict[str, list[dict[str, str]]]

# Modules that every supported Python has, that import fast, print nothing and open nothing.
MODULES = """
builtins abc argparse array ast asyncio base64 bisect calendar cmath cmd codecs collections collections.abc colorsys
concurrent.futures configparser contextlib contextvars copy csv dataclasses datetime decimal difflib dis email.message
enum fileinput fnmatch fractions functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser
http.client imaplib importlib.metadata inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox
math mimetypes mmap numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint queue random re reprlib
sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct
subprocess symtable sys sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace traceback
tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request uuid warnings wave weakref
xml.dom.minidom xml.etree.ElementTree zipfile zlib zoneinfo
""".split()

SHORTEST, LONGEST = 40, 400  # characters of an answer: shorter ones are dropped, longer ones are cut at a paragraph


def chat_dialogues(seed: int = 0) -> list[Row]:
    """Return the dialogues of `demo:chat` as `{"messages": [...]}` rows, in an order that depends only on the seed."""
    text = resources.files("expertmesh.data").joinpath("chat/dialogues.jsonl").read_text("utf-8")
    return _shuffled([{"messages": json.loads(line)["messages"]} for line in text.splitlines()], seed)


def python_dialogues(seed: int = 0) -> list[Row]:
    """Return the question and answer pairs of `demo:python` as `{"messages": [...]}` rows, shuffled by the seed.

    The same interpreter always gives the same rows; another Python version has other docstrings.
    Raises ValueError where docstrings were stripped (`python -OO`).
    """
    answers: dict[str, str] = {}  # answer -> question: an inherited or aliased docstring counts once
    for name in MODULES:
        with contextlib.suppress(ImportError):  # a build without sqlite3, ssl or lzma has fewer rows
            for question, answer in _module_pairs(name, importlib.import_module(name)):
                answers.setdefault(answer, question)
    for question, answer in _topic_pairs():
        answers.setdefault(answer, question)
    if len(answers) < len(MODULES):
        raise ValueError(
            "demo:python is made from the standard library's docstrings, and this interpreter has none, as with "
            "`python -OO`. Run without -OO, or train on demo:chat."
        )
    return _shuffled([_row(question, answer) for answer, question in answers.items()], seed)


def all_dialogues(seed: int = 0) -> list[Row]:
    """Return the rows of `demo:all`: both of the above, shuffled together."""
    return _shuffled(chat_dialogues(seed) + python_dialogues(seed), seed)


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    random.Random(seed).shuffle(rows)
    return rows


def _module_pairs(name: str, module: ModuleType) -> Iterator[tuple[str, str]]:
    """Questions about a module, its public functions and classes, and the public methods of those classes."""
    prefix = "" if name == "builtins" else f"{name}."
    if doc := _answer(module):
        yield f"What is the Python module `{name}` for?", doc
    for attribute, value in _public(module):
        path = f"{prefix}{attribute}"
        if doc := _answer(value, path):
            yield (f"What is the class `{path}`?" if inspect.isclass(value) else f"What does `{path}` do?"), doc
        for method, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
            if not method.startswith("_") and inspect.isroutine(member) and (doc := _answer(member, method)):
                yield f"What does the method `{path}.{method}` do?", doc


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Return the functions and classes of a module: those in `__all__`, or without it those defined in the module."""
    names = getattr(module, "__all__", None)
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if attribute.endswith("hook"):  # sys.excepthook and the like may be replaced by the user's own
            continue
        home = getattr(value, "__module__", None)
        if attribute in names if names is not None else home in (module.__name__, f"_{module.__name__}"):
            yield attribute, value


def _answer(value: object, call: str | None = None) -> str | None:
    """Return the object's own docstring below its signature, if it has one; None if the docstring is too short."""
    doc = value.__doc__
    if not isinstance(doc, str) or len(doc := _first_paragraphs(inspect.cleandoc(doc))) < SHORTEST:
        return None
    if call is None or doc.startswith(call.rpartition(".")[2] + "("):
        return doc
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # many builtins have none
        return doc
    # a default shown as an object with its address would differ from run to run
    return doc if " at 0x" in signature else f"`{call}{signature}`\n\n{doc}"


def _topic_pairs() -> Iterator[tuple[str, str]]:
    """Return the language reference by topic, as `help("lambda")` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        lines = [line for line in topics[name].strip().splitlines() if not re.fullmatch(r"[*=\-~^]{3,}", line.strip())]
        text = _first_paragraphs("\n".join(lines))
        if len(text) >= SHORTEST:
            yield f"Explain the Python topic `{name}`.", text


def _first_paragraphs(text: str) -> str:
    """Return the first whole paragraphs within LONGEST characters; nothing if they contain the address of an object."""
    kept = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(kept) + len(paragraph) > LONGEST:
            break
        kept += paragraph.rstrip() + "\n\n"
    return "" if " at 0x" in kept else kept.strip()

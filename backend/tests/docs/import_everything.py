"""Imports every module of the product and prints, as JSON lines, what it should not have done while doing so.

Run as a program of its own: an audit hook can't be taken away again.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import backend

ROOT = Path(backend.__file__).parent / "app"
OPENING_EVENTS = frozenset(
    {
        "os.system",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "sqlite3.connect",
        "subprocess.Popen",
    }
)
# Modules are named before the hook is there: so this list is what the imports are measured against.
MODULES = sorted(
    name.name
    for name in pkgutil.walk_packages([str(ROOT)], "backend.app.", onerror=lambda _name: None)
    if not name.name.endswith("__main__")
)


def report(what: str, detail: object) -> None:
    sys.stdout.write(json.dumps({"what": what, "detail": str(detail)}) + "\n")


def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in OPENING_EVENTS:
        report(event, arguments)
    if event == "open" and any(letter in str(arguments[1]) for letter in "wax+"):
        report("file opened for writing", arguments[0])


def reader(frame: FrameType | None) -> str:
    """The file whose code reads the environment. Libraries may: pydantic looks for plugins, click for a language."""
    while frame is not None and frame.f_globals["__name__"] in ("os", "collections.abc", "_collections_abc"):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else ""


def watch_environment() -> None:
    read: Callable[[Any, str], str] = os._Environ.__getitem__

    def reading(environ: Any, name: str) -> str:
        if reader(sys._getframe(1)).startswith(str(ROOT)):
            report("environment read", name)
        return read(environ, name)

    os._Environ.__getitem__ = reading  # type: ignore[method-assign,assignment]  # watched for this process only


def main() -> None:
    watch_environment()
    sys.addaudithook(on_audit)
    for name in MODULES:
        importlib.import_module(name)
    kinds = {
        "Settings": "backend.app.core.settings",
        "Database": "backend.app.core.database",
        "MetricsCollector": "backend.app.observability.metrics",
        "FastAPI": "fastapi",
        "Engine": "sqlalchemy",
        "Redis": "redis.asyncio",
    }
    classes = tuple(getattr(importlib.import_module(module), name) for name, module in kinds.items())
    for found in gc.get_objects():
        if issubclass(type(found), classes):
            report("object built", type(found).__name__)
    if threading.active_count() != 1:
        report("thread started", threading.enumerate())
    sys.stdout.write(json.dumps({"imported": MODULES}) + "\n")


if __name__ == "__main__":
    main()

"""Forks: a child must not use its parent's connections, nor its locks, which another thread may hold."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

Owner = TypeVar("Owner")

_forgetting: Final[weakref.WeakKeyDictionary[Any, Callable[[Any], None]]] = weakref.WeakKeyDictionary()


def in_child(owner: Owner, forget: Callable[[Owner], None]) -> None:
    """Call `forget(owner)` in every child that this process forks, while `owner` is alive."""
    _forgetting[owner] = forget


def _forget_all() -> None:
    for owner, forget in list(_forgetting.items()):
        forget(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

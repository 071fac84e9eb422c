"""Every target, by name."""

from __future__ import annotations

from tests.fuzz import files, history, marks, processes, records, texts
from tests.fuzz.target import Target

_MODULES = (files, records, marks, history, processes, texts)

TARGETS: dict[str, Target] = {target.name: target for module in _MODULES for target in module.TARGETS}

"""Every target, by name."""

from __future__ import annotations

from tests.fuzz import files, history, processes, records, texts
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {target.name: target for module in (files, records, history, processes, texts) for target in module.TARGETS}

"""The sockets of the pipeline: what it asks of samplers, verifiers, learners, trackers. No engine, no Ray, no I/O.

A `Handle` stands for a group's tokens wherever they live (this process, or Ray's object store). The control plane passes
handles on and never looks inside: it decides by `GroupSummary` and `Judgement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlpost.core.objective import Objective, Supervised
from rlpost.engines.base import StageSpec, StepReport
from rlpost.types import GroupSummary, Judgement, Prompt, RolloutGroup

Handle = Any

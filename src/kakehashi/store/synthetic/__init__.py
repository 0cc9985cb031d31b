"""Studies that nobody had: for demo, tests and benchmarks, the same for the same seed."""

from __future__ import annotations

from kakehashi.store.synthetic.mark import is_synthetic
from kakehashi.store.synthetic.plan import SIZES, VERSION, Plan, plan_studies
from kakehashi.store.synthetic.scanners import FACILITIES
from kakehashi.store.synthetic.write import TRUTH, write_study

__all__ = [
    "FACILITIES",
    "SIZES",
    "TRUTH",
    "VERSION",
    "Plan",
    "is_synthetic",
    "plan_studies",
    "write_study",
]

"""What a smaller cache costs: tasks of lm-evaluation-harness, fidelity, sweeps, statistics, reports."""

from .fidelity import Fidelity, Reference
from .results import ResultsFile, Sample, by_model, read_report_samples, read_samples
from .runner import Subject, plan_work, run_item
from .sweep import Sweep, parse_configurations
from .tasks import Prompt, TaskSource, load_tasks, prompts

__all__ = [
    "Fidelity",
    "Prompt",
    "Reference",
    "ResultsFile",
    "Sample",
    "Subject",
    "Sweep",
    "TaskSource",
    "by_model",
    "load_tasks",
    "parse_configurations",
    "plan_work",
    "prompts",
    "read_report_samples",
    "read_samples",
    "run_item",
]

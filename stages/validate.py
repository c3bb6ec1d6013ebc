"""All of params.yaml checked before any work: `python -m stages.validate`.

Exits with 2 and one line that names the key, its value and what is allowed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stages.faults import ParamsError
from stages.params import PARAMS_FILE, Params, TaskSettings, load
from stages.tasks import changed_baseline, task_settings


def check(path: Path = PARAMS_FILE) -> Params:
    """Validate everything, each task's section and each row at each budget included.

    Raises:
        ParamsError: the first fault that was found.
    """
    params = load(path)
    for name in params.tasks:
        settings = task_settings(params, name)
        _check_finetune(name, settings)
        for method in params.methods.values():
            for budget in [] if method.target else method.budgets(settings.transfer.budgets):
                try:
                    method.config(budget)
                except ValueError as error:
                    raise ParamsError(f"methods.{method.name} at budget {budget}: {error}") from None
    _check_scratch(params)
    return params


def _check_scratch(params: Params) -> None:
    """Each variant's task can be trained, and each row exists at each of its budgets."""
    for name, section in params.scratch_tasks.items():
        for key, variant in section.variants.items():
            where = f"scratch.tasks.{name}.variants.{key}"
            if variant.training and "training" not in params.tasks[name].get("baseline", {}):
                raise ParamsError(f"{where}.training: tasks.{name}.baseline has no training to change")
            task_settings(params, name, changed_baseline(params, name, variant))
            for row in params.scratch_rows.values():
                for budget in row.budgets(variant.budgets or section.budgets):
                    try:
                        row.config(budget)
                    except ValueError as error:
                        raise ParamsError(f"scratch.rows.{row.name} at budget {budget}: {error}") from None


def _check_finetune(name: str, settings: TaskSettings) -> None:
    """Fine-tuning starts from what transfer made."""
    for key in ("budgets", "seeds"):
        made = getattr(settings.transfer, key)
        for value in getattr(settings.finetune, key):
            if value not in made:
                raise ParamsError(
                    f"tasks.{name}.finetune.{key} = {value}: not among tasks.{name}.transfer.{key}, "
                    f"allowed are {', '.join(map(str, made))}"
                )


if __name__ == "__main__":
    try:
        check()
    except ParamsError as fault:
        print(f"params.yaml: {fault}", file=sys.stderr)
        sys.exit(2)

"""Records and their mirror in MLflow: `stage_run` is all that a stage needs."""

from stages.tracking.run import Run, stage_run

__all__ = ["Run", "stage_run"]

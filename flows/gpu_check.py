"""`make gpu-check` as a Prefect flow: all figures of this machine's GPU, alone on it."""

from __future__ import annotations

from prefect import flow

from flows.clone import own_clone
from flows.machine import devices
from flows.machine.programs import run
from flows.prefect.life import signs_of_life
from flows.run import say

MODULE = "benchmarks.gpu_check"
TIMEOUT_S = 3600.0
"""The check takes nine minutes; a broken driver can hang for ever."""


class CheckFailed(Exception):
    """The check ended badly; its log says why."""


@flow(name="gpu-check", persist_result=False)
def gpu_check(project: str | None = None, arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.gpu_check` with `arguments` on a GPU of its own.

    Raises `CheckFailed` if the check failed, or if this machine has no GPU.
    """
    folder = own_clone(project)
    if not devices.gpus():
        raise CheckFailed(
            "this machine has no GPU (nvidia-smi names none): give gpu-pool to a machine with one"
        )
    with signs_of_life(), devices.slot(devices.Needs("cuda"), "gpu-check", say) as variables:
        code, last = run(
            folder, MODULE, arguments or [], say, "gpu-check", timeout_s=TIMEOUT_S, env=variables
        )
    if code is None:
        raise CheckFailed(f"killed after {TIMEOUT_S:g} s, its time limit")
    if code:
        raise CheckFailed(f"python -m {MODULE} ended with {code}: {last}")

"""Energy of a call where the machine has a meter: NVML or nvidia-smi for a GPU, RAPL for processors.

Meters are of a whole device, whoever uses it, and are read every few milliseconds to a tenth of a second:
the call is repeated. What an idle device takes is in the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
SMI_MILLISECONDS = 50


@dataclass(frozen=True)
class Energy:
    """Joules of one call and what measured them; without a meter None, and the reason."""

    joules_per_call: float | None
    meter: str | None
    reason: str | None = None


class Meter(Protocol):
    """Counts from `start` to `stop`."""

    name: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Joules since the start."""
        ...


class NoMeter(Exception):
    """Nothing on this machine tells the energy of the device."""


def energy_per_call(
    call: Callable[[], Any], *, device: str = "cpu", seconds: float = 1.0, meter: Meter | None = None
) -> Energy:
    """Repeat a call for at least so many seconds and divide what the meter counted.

    Args:
        meter: another than the device's own.
    """
    try:
        meter = meter or meter_of(device)
        with torch.no_grad():
            return _repeated(call, device, seconds, meter)
    except (NoMeter, OSError) as error:
        return Energy(None, None, str(error))


def _repeated(call: Callable[[], Any], device: str, seconds: float, meter: Meter) -> Energy:
    calls, begin = 0, time.perf_counter()
    meter.start()
    try:
        while calls == 0 or time.perf_counter() - begin < seconds:
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            calls += 1
    except BaseException:
        with contextlib.suppress(Exception):  # what stopped the call is what is told
            meter.stop()
        raise
    joules = meter.stop()
    if not joules > 0:
        raise NoMeter(f"{meter.name} counted {joules} J in {time.perf_counter() - begin:.1f} s")
    return Energy(joules / calls, meter.name)


def meter_of(device: str) -> Meter:
    """The device's meter.

    Raises:
        NoMeter: there is none that can be read; the message says why.
    """
    if not device.startswith("cuda"):
        return RaplMeter(POWERCAP)
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return NvmlMeter(Nvml(), name)
    except OSError as error:  # no library, or an error of its own: a device without the counter
        if shutil.which("nvidia-smi"):
            return SmiMeter(name)
        raise NoMeter(f"no NVML ({error}) and no nvidia-smi") from error


class RaplMeter:
    """Sum of the processors' packages; energy_uj counts microjoules and starts again at its range.

    A laptop's `psys` stands beside them and holds them: it is left out.

    Raises:
        NoMeter: the system shows no package, or not to this user.
    """

    name = "RAPL"

    def __init__(self, folder: Path) -> None:
        self._packages = sorted(p for p in folder.glob("intel-rapl:*") if _is_package(p))
        if not self._packages:
            raise NoMeter(f"no RAPL package in {folder}")
        try:
            self._ranges = [int((p / "max_energy_range_uj").read_text()) for p in self._packages]
            self._first = self._read()
        except OSError as error:
            raise NoMeter(f"RAPL cannot be read ({error}): it needs root on most systems") from error

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]

    def start(self) -> None:
        self._first = self._read()

    def stop(self) -> float:
        moved = zip(self._read(), self._first, self._ranges, strict=True)
        return 1e-6 * sum((now - first) % (largest + 1) for now, first, largest in moved)


def _is_package(zone: Path) -> bool:
    """Whether this zone is a whole processor: no part of one, and not the platform around all."""
    if zone.name.count(":") != 1:
        return False
    try:
        return (zone / "name").read_text().strip() != "psys"
    except OSError:
        return True


class Nvml:
    """The functions of NVML that count energy, from the library that every driver brings.

    Raises:
        OSError: the library is not here; each function, NVML's error by its number.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")

    def handle(self, uuid: str) -> ctypes.c_void_p:
        """Of the device with this name, `GPU-…`."""
        found = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(found))
        return found

    def millijoules(self, handle: ctypes.c_void_p) -> int:
        """Since the driver was loaded."""
        found = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(found))
        return found.value

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise OSError(f"NVML has no {name}") from error
        if status != 0:
            raise OSError(f"{name} returned {status}")


class NvmlMeter:
    """The driver's count of millijoules (nvmlDeviceGetTotalEnergyConsumption; Volta and later)."""

    name = "NVML"

    def __init__(self, nvml: Nvml, uuid: str) -> None:
        self._nvml, self._handle = nvml, nvml.handle(uuid)
        self._first = self._read()

    def _read(self) -> int:
        return self._nvml.millijoules(self._handle)

    def start(self) -> None:
        self._first = self._read()

    def stop(self) -> float:
        return 1e-3 * (self._read() - self._first)


class SmiMeter:
    """Mean of the power that nvidia-smi reports while it runs, times the time; for boards without a counter.

    They are older than Volta and tell the power of the moment. Later ones tell a second's average, which
    would hold what ran before.
    """

    name = "nvidia-smi"

    def __init__(self, uuid: str) -> None:
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        self._command = ["nvidia-smi", *query, "-i", uuid, "-lms", str(SMI_MILLISECONDS)]

    def start(self) -> None:
        self._begin = time.perf_counter()
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> float:
        elapsed = time.perf_counter() - self._begin
        self._process.terminate()
        return mean_watts(self._process.communicate()[0]) * elapsed


def mean_watts(text: str) -> float:
    """Mean of the lines that hold a number; nvidia-smi writes [N/A] where a board tells none.

    Raises:
        NoMeter: no line holds one.
    """
    found = [float(line) for line in text.split() if line.replace(".", "", 1).isdigit()]
    if not found:
        raise NoMeter("nvidia-smi tells no power.draw for this board")
    return statistics.fmean(found)

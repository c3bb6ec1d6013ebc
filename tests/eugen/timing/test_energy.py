"""Meters made of files and functions that count what we say."""

from __future__ import annotations

import types

import pytest

from eugen.timing import energy, energy_per_call
from eugen.timing.energy import NoMeter, Nvml, NvmlMeter, RaplMeter, mean_watts


def package(folder, name: str, microjoules: int, largest: int = 10**9):
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{largest}\n")


def test_packages_add_up_cores_inside_them_do_not_count(tmp_path):
    for name, count in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 100), ("intel-rapl:0:0", 7)):
        package(tmp_path, name, count)
    meter = RaplMeter(tmp_path)
    package(tmp_path, "intel-rapl:0", 6_000_000)
    meter.start()
    package(tmp_path, "intel-rapl:0", 8_500_000)
    package(tmp_path, "intel-rapl:1", 500_100)
    package(tmp_path, "intel-rapl:0:0", 900_000_000)
    assert meter.stop() == pytest.approx(2.5 + 0.5)


def test_the_platform_around_the_processors_is_not_one_of_them(tmp_path):
    for name, said in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "psys")):
        package(tmp_path, name, 0)
        (tmp_path / name / "name").write_text(f"{said}\n")
    meter = RaplMeter(tmp_path)
    for name, count in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 9_000_000)):
        package(tmp_path, name, count)
    assert meter.stop() == pytest.approx(2)


def test_a_counter_that_starts_again_goes_on(tmp_path):
    package(tmp_path, "intel-rapl:0", 900, largest=999)
    meter = RaplMeter(tmp_path)
    meter.start()
    package(tmp_path, "intel-rapl:0", 100, largest=999)
    assert meter.stop() == pytest.approx(200e-6)


def test_no_package_and_no_permission_have_their_reasons(tmp_path):
    with pytest.raises(NoMeter, match="no RAPL package"):
        RaplMeter(tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    with pytest.raises(NoMeter, match="cannot be read"):
        RaplMeter(tmp_path)


class Library:
    """As libnvidia-ml.so.1, by the functions' C names; `status` is what they return."""

    def __init__(self) -> None:
        self.count, self.status, self.started = 4000, 0, False

    def nvmlInit_v2(self) -> int:
        self.started = True
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:
        assert self.started
        handle._obj.value = {b"GPU-7": 77}[uuid]
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, count) -> int:
        assert handle.value == 77
        count._obj.value = self.count
        return self.status


@pytest.fixture
def library(monkeypatch) -> Library:
    found = Library()
    monkeypatch.setattr(energy.ctypes, "CDLL", {"libnvidia-ml.so.1": found}.__getitem__)
    return found


def test_nvml_counts_millijoules_of_the_board_by_its_name(library):
    meter = NvmlMeter(Nvml(), "GPU-7")
    library.count = 2**40
    meter.start()
    library.count += 1500
    assert meter.stop() == pytest.approx(1.5)


def gpu(monkeypatch) -> None:
    properties = types.SimpleNamespace(uuid="7")
    monkeypatch.setattr(energy.torch.cuda, "get_device_properties", lambda device: properties)


def test_a_board_without_the_counter_is_asked_for_its_power(library, monkeypatch):
    gpu(monkeypatch)
    assert isinstance(energy.meter_of("cuda"), NvmlMeter)
    library.status = 3
    monkeypatch.setattr(energy.shutil, "which", lambda name: "/bin/" + name)
    assert isinstance(energy.meter_of("cuda"), energy.SmiMeter)
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    with pytest.raises(NoMeter, match="nvmlDeviceGetTotalEnergyConsumption returned 3"):
        energy.meter_of("cuda")


def test_a_call_that_breaks_stops_the_meter(clock):
    class Watched(Steady):
        stopped = 0

        def stop(self) -> float:
            self.stopped += 1
            return super().stop()

    def broken() -> None:
        raise RuntimeError("out of paint")

    meter = Watched(clock, 50)
    with pytest.raises(RuntimeError, match="out of paint"):
        energy_per_call(broken, meter=meter)
    assert meter.stopped == 1


def test_power_is_the_mean_of_the_lines_that_tell_it():
    assert mean_watts("100.5\n[N/A]\n99.5\n") == pytest.approx(100)
    with pytest.raises(NoMeter, match=r"power\.draw"):
        mean_watts("[N/A]\n")


class Steady:
    """So many watts, by the clock of the test."""

    name = "steady"

    def __init__(self, clock, watts: float) -> None:
        self.clock, self.watts = clock, watts

    def start(self) -> None:
        self.begin = self.clock.now

    def stop(self) -> float:
        return self.watts * (self.clock.now - self.begin)


def test_a_call_is_repeated_for_the_time_and_its_joules_divided(clock):
    found = energy_per_call(clock.function("call", 0.03), seconds=1, meter=Steady(clock, 50))
    assert found.joules_per_call == pytest.approx(1.5)
    assert (found.meter, found.reason) == ("steady", None)
    assert len(clock.calls) == 34
    energy_per_call(clock.function("long", 9.0), seconds=1, meter=Steady(clock, 50))
    assert clock.calls.count("long") == 1


def test_a_meter_that_stands_still_or_is_missing_gives_a_reason(clock, tmp_path, monkeypatch):
    still = energy_per_call(clock.function("call", 0.6), meter=Steady(clock, 0))
    assert still.joules_per_call is None and "steady counted 0" in (still.reason or "")
    monkeypatch.setattr("eugen.timing.energy.POWERCAP", tmp_path)
    missing = energy_per_call(clock.function("other", 0.6))
    assert missing.joules_per_call is None and "no RAPL package" in (missing.reason or "")
    assert "other" not in clock.calls

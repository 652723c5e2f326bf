"""A run that loses its cores to other processes gets one warning with a setting."""

import threading

import pytest

from llmtrain.runtime.contention import ContentionDetector, core_times, threads_spin


def warnings(
    rates: list[float], waiting: list[float], *, threads: int = 2, spinning: bool = False
) -> list[str | None]:
    """Check intervals of six seconds with these speeds and shares of waiting."""
    times = [(0, 0)]
    detector = ContentionDetector(threads, spinning=spinning, read=lambda: times[-1])
    found = []
    for rate, share in zip(rates, waiting, strict=True):
        ran, waited = times[-1]
        times.append((ran + round(1e9 * (1 - share)), waited + round(1e9 * share)))
        found.append(detector.check(round(6 * rate), 6.0))
    return found


def test_a_collapse_is_reported_once_with_a_setting() -> None:
    found = warnings([40_000, 39_000, 1_000, 1_000], [0.01, 0.02, 0.48, 0.5])
    assert found == [
        None,
        None,
        "other processes slow this run down: 1,000 tokens/s instead of 40,000; its threads wait "
        "for a core 48% of the time; stop those processes, or restart with OMP_NUM_THREADS=1",
        None,
    ]


@pytest.mark.parametrize(
    ("rates", "waiting"),
    [
        ([40_000, 30_000, 25_000], [0.01, 0.4, 0.5]),  # slower, but no collapse
        ([40_000, 10_000], [0.01, 0.05]),  # longer sequences, not other processes
        ([20_000, 40_000, 39_000], [0.5, 0.01, 0.01]),
    ],
)
def test_other_changes_of_speed_are_silent(rates: list[float], waiting: list[float]) -> None:
    assert set(warnings(rates, waiting)) == {None}


def test_spinning_threads_are_reported_from_the_start() -> None:
    (found,) = warnings([1_000], [0.5], spinning=True)
    assert found is not None and found.endswith("or restart with OMP_WAIT_POLICY=PASSIVE")
    assert warnings([1_000], [0.5], spinning=True, threads=1) == [None]


def test_short_intervals_are_judged_together() -> None:
    detector = ContentionDetector(2, spinning=True, read=iter([(0, 0), (1, 1)]).__next__)
    assert [detector.check(10, 2.0) for _ in range(2)] == [None, None]
    assert detector.check(10, 2.0) is not None


def test_core_times_include_all_threads() -> None:
    before = core_times()
    if before == (0, 0):
        pytest.skip("this system has no scheduler statistics")
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [sum(range(10**5)) for _ in range(20)] and stop.wait())
    thread.start()
    while core_times()[0] - before[0] < 10**7:
        pass
    stop.set()
    thread.join()


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0")]
)
def test_settings_that_end_spinning(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(each, raising=False)
    assert threads_spin()
    monkeypatch.setenv(name, value)
    assert not threads_spin()

"""A first signal stops the work where it can go on; handlers are only there while they are needed."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from grasp_lora.errors import Interrupted
from grasp_lora.storage.processes import SIGNALS, Interruption


@pytest.fixture
def interruption():
    """An interruption at a place called `here`; afterwards no handler may be left over."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    before = [signal.getsignal(number) for number in SIGNALS]
    yield Interruption(lambda: "here")
    after = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, outside)
    assert after == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once_past_every_except(interruption, number):
    went_on = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception:  # noqa: BLE001 - as libraries do
            went_on.append("as if it were an error")
        went_on.append("as if nothing were")

    expected = rf"^stopped by {number.name} here; run the same command again to go on$"
    with pytest.raises(Interrupted, match=expected), interruption.handled():
        work()
    assert not went_on
    assert interruption.asked_by == number.name


def test_a_deferred_signal_is_seen_and_stops_at_the_end(interruption):
    done = []

    def work() -> None:
        with interruption.deferred():
            assert interruption.asked_by is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.asked_by == "SIGTERM"
            # From now on a second one ends the process.
            assert all(signal.getsignal(number) is signal.SIG_DFL for number in SIGNALS)
            done.append("the rest of the work")
        done.append("what comes after")

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM here"), interruption.handled():
        work()
    assert done == ["the rest of the work"]


def test_a_deferral_within_another_ends_with_the_outer_one(interruption):
    """A training that first makes what it starts from again is still one training."""
    done = []

    def work() -> None:
        with interruption.deferred():
            with interruption.deferred():
                done.append("its start")
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the rest of the training")
        done.append("what comes after")

    with pytest.raises(Interrupted), interruption.handled():
        work()
    assert done == ["its start", "the rest of the training"]


TWICE = """
import os, signal
from grasp_lora.storage import processes
processes.ECHO = 0.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
stop = processes.Interruption(lambda: "here")
with stop.handled(), stop.deferred():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        print(stop.asked_by, flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGTERM\n"), done.stderr


def test_an_error_of_the_work_is_not_hidden(interruption):
    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), interruption.handled(), interruption.deferred():
        work()


def test_an_ignored_signal_stays_ignored(interruption):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        with interruption.handled():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert interruption.asked_by is None


def test_another_thread_handles_nothing(interruption):
    seen = []

    def work() -> None:
        with interruption.handled():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before

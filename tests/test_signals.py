import os
import signal
import subprocess
import sys
import threading

from softlabels.signals import stop_on_signal


def test_a_signal_is_seen_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal\n"
        "from softlabels.signals import stop_on_signal\n"
        "with stop_on_signal():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "first\n"


def test_other_threads_get_no_handler() -> None:
    seen = []

    def work() -> None:
        with stop_on_signal() as stopped:
            seen.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_blocks_within_each_other_have_one_answer() -> None:
    with stop_on_signal() as outer:
        with stop_on_signal() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner()
        assert outer()
    with stop_on_signal() as later:
        assert not later()

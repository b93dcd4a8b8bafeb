"""Jobs: started in order, limited in number, their errors kept, stopped by one signal."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from metablocks.compare.jobs import Display, Job, child_environment, cores, python, run_jobs


class Recorder(Display):
    """A display that keeps what it is shown."""

    def __init__(self, jobs):
        super().__init__(jobs, quiet=True)
        self.events = []
        self.most = 0

    def started(self, job):
        super().started(job)
        self.most = max(self.most, len(self._running))
        self.events.append(("started", job.title))

    def ended(self, job):
        super().ended(job)
        self.events.append(("ended", job.title))


def run(jobs, side_by_side=1, display=None):
    return run_jobs(jobs, side_by_side=side_by_side, display=display or Recorder(jobs))


@pytest.fixture
def job(tmp_path):
    def make(title, code):
        return Job(title, (sys.executable, "-S", "-c", code), tmp_path / "logs" / title)

    return make


def test_one_after_the_other(job):
    jobs = [job("a", "print(1)"), job("b", "")]
    display = Recorder(jobs)
    assert not run(jobs, display=display)
    assert [each.status for each in jobs] == [0, 0]
    assert [title for _, title in display.events] == ["a", "a", "b", "b"]
    assert jobs[0].output.read_text() == "1\n"


def test_side_by_side_with_a_share_of_the_cores(job, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os, time; time.sleep(0.3); print(os.environ['OMP_NUM_THREADS'])"
    jobs = [job(c, code) for c in "abc"]
    display = Recorder(jobs)
    run(jobs, 2, display)
    assert display.most == 2
    shares = {each.output.read_text().strip() for each in jobs}
    assert shares == {str(max(1, cores() // 2))}


@pytest.mark.parametrize(("own", "share"), [("1", 1), ("999", 4), ("", 4), ("many", 4)])
def test_fewer_threads_of_the_users_own_stay(own, share, monkeypatch):
    monkeypatch.setattr("metablocks.compare.jobs.cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", own)
    assert child_environment(2)["OMP_NUM_THREADS"] == str(share)
    assert child_environment(1)["OMP_NUM_THREADS"] == own


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import sys; print('it diverged', file=sys.stderr); sys.exit(1)", 1, "it diverged"),
        ("raise ValueError('no such thing')", 1, "ValueError: no such thing"),
        ("import sys; sys.exit(3)", 3, "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", -9, "ended by SIGKILL; out of memory is the usual"),
    ],
)
def test_a_failing_job_says_why_and_the_others_go_on(code, status, error, job):
    bad, good = job("bad", code), job("good", "")
    run([bad, good])
    assert (bad.status, good.status) == (status, 0)
    assert bad.error.startswith(error)
    assert good.error == ""


STOPPABLE = """
import signal, sys, time
def stop(*_):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one would kill
    time.sleep(0.3)
    print('saved', flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print('ready', flush=True)
time.sleep(60)
"""


class Interrupter(Recorder):
    """Sends this process a signal once the first jobs are ready, as often as asked."""

    def __init__(self, jobs, number, times=1, ready=1):
        super().__init__(jobs)
        self.jobs, self.number, self.times = jobs[:ready], number, times

    def tick(self):
        ready = [job for job in self.jobs if job.output.exists() and job.output.read_text()]
        if len(ready) == len(self.jobs) and self.times:
            self.times -= 1
            threading.Timer(0.01, os.kill, (os.getpid(), self.number)).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_the_children_cleanly(number, job):
    before = signal.getsignal(signal.SIGINT)
    jobs = [job("a", STOPPABLE), job("b", STOPPABLE), job("later", "")]
    assert run(jobs, 2, Interrupter(jobs, number, ready=2))
    assert [each.status for each in jobs] == [130, 130, None]
    assert [each.output.read_text() for each in jobs[:2]] == ["ready\nsaved\n"] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_kills(job):
    stubborn = job(
        "a",
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(60)",
    )
    run([stubborn], display=Interrupter([stubborn], signal.SIGINT, times=2))
    assert stubborn.status == -signal.SIGKILL


def test_children_of_one_that_is_killed_are_stopped(job):
    """By SIGTERM, on which a run saves."""
    left = job("a", STOPPABLE.replace("SIGINT", "SIGTERM"))
    process = os.fork()
    if not process:
        run([left])
        os._exit(0)

    def wait_for(text):
        for _ in range(3000):
            if left.output.exists() and left.output.read_text() == text:
                return
            time.sleep(0.02)
        raise TimeoutError(text)

    wait_for("ready\n")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    wait_for("ready\nsaved\n")


@pytest.mark.parametrize(("first", "status"), [("", 7), ("/somewhere/bin", 0)])
def test_children_import_from_the_working_directory_if_this_process_does(
    first, status, tmp_path, monkeypatch
):
    """It may be the folder of a run that somebody else made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(sys, "path", [first, *sys.path])
    assert subprocess.run([*python(), "-c", "import colorsys"]).returncode == status


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (0, "done in"),
        (130, "stopped after"),
        (-signal.SIGINT, "stopped after"),
        (1, "FAILED after"),
    ],
)
def test_a_job_that_was_stopped_before_it_began_has_not_failed(status, ending, job, capsys):
    only = job("a", "")
    display = Display([only])
    display.started(only)
    only.status = status
    display.ended(only)
    shown = capsys.readouterr().err
    assert f"1 of 1, a: {ending}" in shown
    assert ("exit status" in shown or "ended by" in shown) == (ending == "FAILED after")

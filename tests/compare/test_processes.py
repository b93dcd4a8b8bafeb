"""Jobs: started in order, limited in number, their errors kept, stopped by one signal."""

import os
import signal
import sys
import threading

import pytest

from metablocks.compare.processes import Job, Outcome, child_environment, cores, run_jobs
from metablocks.compare.progress import Display


class Watcher:
    """Keeps what it is told."""

    def __init__(self):
        self.events = []
        self.running = self.most = 0

    def started(self, job):
        self.running += 1
        self.most = max(self.most, self.running)
        self.events.append(("started", job.title))

    def ended(self, outcome):
        self.running -= 1
        self.events.append(("ended", outcome.job.title))

    def tick(self):
        pass


@pytest.fixture
def job(tmp_path):
    def make(title, code):
        return Job(title, (sys.executable, "-S", "-c", code), tmp_path / "logs" / title)

    return make


def test_one_after_the_other(job):
    watcher = Watcher()
    result = run_jobs([job("a", "print(1)"), job("b", "")], side_by_side=1, watcher=watcher)
    assert [outcome.status for outcome in result.outcomes] == [0, 0]
    assert not result.interrupted
    assert [title for _, title in watcher.events] == ["a", "a", "b", "b"]
    assert result.outcomes[0].job.printed.read_text() == "1\n"


def test_side_by_side_with_a_share_of_the_cores(job, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    watcher = Watcher()
    code = "import os, time; time.sleep(0.3); print(os.environ['OMP_NUM_THREADS'])"
    result = run_jobs([job(c, code) for c in "abc"], side_by_side=2, watcher=watcher)
    assert watcher.most == 2
    shares = {outcome.job.printed.read_text().strip() for outcome in result.outcomes}
    assert shares == {str(max(1, cores() // 2))}


@pytest.mark.parametrize(("own", "share"), [("1", 1), ("999", 4), ("", 4), ("many", 4)])
def test_fewer_threads_of_the_users_own_stay(own, share, monkeypatch):
    monkeypatch.setattr("metablocks.compare.processes.cores", lambda: 8)
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
    result = run_jobs([job("bad", code), job("good", "")], side_by_side=1, watcher=Watcher())
    bad, good = result.outcomes
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


class Interrupter(Watcher):
    """Sends this process a signal once the jobs are ready, as often as asked."""

    def __init__(self, jobs, number, times=1):
        super().__init__()
        self.jobs, self.number, self.times = jobs, number, times

    def tick(self):
        ready = [job for job in self.jobs if job.printed.exists() and job.printed.read_text()]
        if len(ready) == len(self.jobs) and self.times:
            self.times -= 1
            threading.Timer(0.01, os.kill, (os.getpid(), self.number)).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_the_children_cleanly(number, job):
    before = signal.getsignal(signal.SIGINT)
    jobs = [job("a", STOPPABLE), job("b", STOPPABLE), job("later", "")]
    result = run_jobs(jobs, side_by_side=2, watcher=Interrupter(jobs[:2], number))
    assert result.interrupted
    assert [outcome.status for outcome in result.outcomes] == [130, 130, None]
    assert [each.printed.read_text() for each in jobs[:2]] == ["ready\nsaved\n"] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_kills(job):
    stubborn = job(
        "a",
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(60)",
    )
    watcher = Interrupter([stubborn], signal.SIGINT, times=2)
    (outcome,) = run_jobs([stubborn], side_by_side=1, watcher=watcher).outcomes
    assert outcome.status == -signal.SIGKILL


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (0, "done in"),
        (130, "stopped after"),
        (-signal.SIGINT, "stopped after"),
        (1, "FAILED after"),
    ],
)
def test_a_job_that_was_stopped_before_it_began_has_not_failed(status, told, job, capsys):
    only = job("a", "")
    display = Display([only], quiet=False)
    display.started(only)
    display.ended(Outcome(only, status, 1.0))
    said = capsys.readouterr().err
    assert f"1 of 1, a: {told}" in said
    assert ("exit status" in said or "ended by" in said) == (told == "FAILED after")

"""Tasks in several processes: their order, their environment, and what becomes of them if one fails or is killed."""

import multiprocessing
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from helpers import Losing

from kure_lib import engine
from kure_lib.paths import KureError

TASKS = '''
"""What the tests do in other processes, which can import no test file."""

import io
import os
import sys
import time
from pathlib import Path

from kure_lib import progress


def note(folder, name, needs, report):
    """Reports what was finished before it began, and its place and process."""
    finished = {file.name for file in Path(folder).iterdir()}
    report(needs <= finished, os.environ.get("PLACE"), os.getpid())
    time.sleep(0.2)
    (Path(folder) / name).touch()


def fail(report, about=""):
    raise ValueError(f"in a worker: {about}")


def search(report):
    sys.stderr = Terminal()
    with progress.bar(9, "LAPQ", "loss") as bar:
        bar.update(9)
    report(sys.stderr.getvalue())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait(report):
    report(os.getpid())
    time.sleep(600)
'''


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A module that the workers can import too: they inherit the path of this process."""
    (tmp_path / "tasks_of_the_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__("tasks_of_the_test")


@pytest.fixture
def noting(tasks, tmp_path):
    """Makes tasks that report whether those they wait for were finished."""
    folder = tmp_path / "finished"
    folder.mkdir()

    def make(name, after=None, known=True):
        return engine.Task(name, partial(tasks.note, folder, name, {after} if after and known else set()), after)

    return make


def test_a_task_begins_after_the_one_it_waits_for_and_each_place_is_taken_once(noting):
    tasks = [noting("second", after="first"), noting("first"), noting("third", after="second"),
             noting("other"), noting("free", after="no task", known=False)]  # fmt: skip
    reports = []
    engine.run(tasks, engine.Pool([{"PLACE": "a"}, {"PLACE": "b"}]), lambda *values: reports.append(values))
    assert {name for name, *_ in reports} == {task.name for task in tasks} and len(reports) == len(tasks)
    assert all(in_order for _, in_order, *_ in reports)
    assert len({(place, process) for *_, place, process in reports}) == 2
    assert {place for *_, place, _ in reports} == {"a", "b"}
    assert not multiprocessing.active_children()


def test_a_task_that_fails_spares_those_that_do_not_wait_for_it(tasks, noting, tmp_path):
    broken, child = engine.Task("broken", tasks.fail), noting("child", after="broken", known=False)
    grandchild = noting("grandchild", after="child", known=False)
    others = [noting("other"), noting("its child", after="other")]
    with pytest.raises(ValueError, match="in a worker: "):
        engine.run([grandchild, child, broken, *others], engine.Pool([{}]), lambda *values: None)
    assert {file.name for file in (tmp_path / "finished").iterdir()} == {"other", "its child"}
    assert not multiprocessing.active_children()


def test_what_several_tasks_say_is_told_once_each(tasks):
    failing = [engine.Task(f"broken {i}", partial(tasks.fail, about=about)) for i, about in enumerate("aba")]
    with pytest.raises(KureError) as error:
        engine.run(failing, engine.Pool([{}, {}]), lambda *values: None)
    assert sorted(str(error.value).splitlines()) == ["in a worker: a", "in a worker: b"]


def test_a_worker_with_a_bar_says_nothing_on_the_terminal_and_leaves_nothing_behind(tasks, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import tasks_of_the_test as tasks
from kure_lib import engine
if __name__ == "__main__":
    engine.run([engine.Task("a", tasks.search)], engine.Pool([{{}}]), lambda *values: print(values))
"""
    (tmp_path / "driver.py").write_text(script)
    process = subprocess.run([sys.executable, tmp_path / "driver.py"], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("('a', '')\n", "")


def test_a_killed_process_is_one_sentence_that_names_its_task(tasks, noting):
    begun = time.monotonic()

    def kill(name, *values):
        if name == "long":
            psutil.Process(values[0]).kill()

    sentence = "The process of long was killed, perhaps for want of memory: start again with a smaller --jobs"
    with pytest.raises(KureError, match=sentence) as error:
        engine.run([noting("short"), engine.Task("long", tasks.wait, after="short")], engine.Pool([{}]), kill)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()
    assert time.monotonic() - begun < 600  # the time for which the task would have gone on


def numbered(name, after=None):
    """A task that begins with the number of its attempt, reports it and gives it back."""
    attempts = iter(range(10))
    return engine.Task(name, lambda report, n: report(n) or n, after, lambda: (next(attempts),))


def test_a_task_whose_process_is_lost_begins_again_with_the_inputs_of_then():
    losing, reports, results = Losing(a=3, b=1), [], []
    tasks = [numbered("a"), numbered("b"), numbered("c", after="a")]
    engine.run(tasks, losing, lambda *report: reports.append(report), lambda *result: results.append(result))
    assert sorted(results) == sorted(reports) == [("a", 3), ("b", 1), ("c", 0)]
    assert [name for name, _ in losing.begun].index("c") > losing.begun.index(("a", 3))
    assert losing.ended


def test_a_task_that_is_lost_too_often_is_one_sentence_and_spares_the_others():
    losing, results = Losing(a=4), []
    tasks = [numbered("a"), numbered("b"), numbered("c", after="a")]
    with pytest.raises(KureError, match="The process of a was killed"):
        engine.run(tasks, losing, lambda *report: None, lambda *result: results.append(result))
    assert results == [("b", 0)] and losing.ended


def test_a_task_for_which_nothing_is_left_to_do_is_not_begun():
    losing, results = Losing(), []
    tasks = [engine.Task("done", None, inputs=lambda: None), numbered("next", after="done")]
    engine.run(tasks, losing, lambda *report: None, lambda *result: results.append(result))
    assert results == [("next", 0)] and losing.begun == [("next", 0)]


def test_without_ray_a_cluster_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KureError, match=r"needs Ray, which is not installed: run, .* -m pip install '.\[cluster\]'"):
        engine.Cluster("auto")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a process that was killed")
def test_the_workers_of_a_killed_process_end_with_it(tasks, tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import tasks_of_the_test as tasks
from kure_lib import engine, notebooks
if __name__ == "__main__":
    with notebooks.running(["sleep", "600"]):
        engine.run([engine.Task("long", tasks.wait)], engine.Pool([{{}}]), lambda *values: print("at work", flush=True))
"""
    (tmp_path / "driver.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "driver.py"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert len(children) >= 3 and [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []

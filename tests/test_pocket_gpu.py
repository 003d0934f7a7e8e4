"""The plan that trains the pocket checkpoint on one GPU: its time limits, and resuming after an interruption."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from tools.pocket.train import gpu


def arguments(folder, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"work_dir": folder, "device": "cpu", "dry_run": False, **changes})


def test_a_stage_takes_at_most_9_minutes_and_all_stages_at_most_25():
    longest = [max((job.minutes or 0) for job in stage) for stage in gpu.STAGES]
    assert max(longest) <= gpu.LONGEST
    # jobs without a time limit: assembling the checkpoint, and training five encoders for 5,000 steps
    assert sum(longest) <= 25 - 1 - 5
    assert len({job.name for stage in gpu.STAGES for job in stage}) == sum(map(len, gpu.STAGES))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("job", [job for stage in gpu.STAGES for job in stage], ids=lambda job: job.name)
def test_every_job_has_valid_options_for_its_script(job, dry_run, monkeypatch, tmp_path):
    line = job.command(arguments(tmp_path, dry_run=dry_run))
    monkeypatch.setattr(sys, "argv", line[2:])
    parse, parsed = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, *args):
        parsed.append(parse(parser, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(line[2]).main()
    assert parsed[0].work_dir == tmp_path
    if not dry_run and job.minutes:
        assert parsed[0].minutes == job.minutes and parsed[0].max_train_steps == 1_000_000


class Script(gpu.Job):
    """A job that runs Python code."""

    def command(self, args):
        return [sys.executable, "-c", self.options, str(args.work_dir)]


WRITE = "import sys; open(sys.argv[1] + '/{name}', 'a').write('x')"


def test_a_stage_runs_only_unfinished_jobs(tmp_path, monkeypatch):
    good, bad = Script("good", "", WRITE.format(name="good")), Script("bad", "", "raise SystemExit(3)")
    monkeypatch.setattr(gpu, "STAGES", ((good, bad),))
    with pytest.raises(SystemExit, match="bad failed"):
        gpu.run(1, arguments(tmp_path, dry_run=True))
    monkeypatch.setattr(gpu, "STAGES", ((good, Script("bad", "", WRITE.format(name="bad"))),))
    gpu.run(1, arguments(tmp_path))
    assert [Path(tmp_path / name).read_text() for name in ("good", "bad")] == ["x", "x"]


def test_a_stage_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", ((Script("slow", "", "import time; time.sleep(60)"),),))
    monkeypatch.setattr(gpu, "LONGEST", 0.01)
    with pytest.raises(SystemExit, match="goes on"):
        gpu.run(1, arguments(tmp_path))

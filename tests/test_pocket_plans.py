"""The plans that train the pocket checkpoint, `make pocket` and `make pocket-gpu`: the options of their commands, the
time limits on a GPU, and resuming after an interruption."""

import argparse
import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tools import gpu_report
from tools.pocket.train import gpu


def arguments(folder, **changes) -> argparse.Namespace:
    return argparse.Namespace(
        **{"work_dir": folder, "comparison_dir": folder / "comparison", "device": "cpu", "dry_run": False, **changes}
    )


JOBS = [job for stage in gpu.STAGES + gpu.FURTHER for job in stage]


def test_the_plan_takes_two_calls():
    """The first two stages fill the first call. The jobs of the other stages have no time limit, but an SSR-Encoder has a
    number of steps."""
    longest = [max((job.minutes or 0) for job in stage) for stage in gpu.STAGES]
    assert sum(longest) <= gpu.LONGEST - 1 and longest[2:] == [0, 0, 0]
    assert len({job.name for job in JOBS}) == len(JOBS)


def test_the_base_is_tested_before_the_ssr_encoder_is_trained():
    order = [job.name for stage in gpu.STAGES for job in stage]
    assert order.index("base") < order.index("stop rule") < order.index("shipped")
    assert not any(
        job.module in ("adapters", "controlnet", "motion", "look") for job in JOBS[: order.index("stop rule")]
    )


class Parsed(Exception):
    pass


def parse(module: str, options: list[str], monkeypatch) -> argparse.Namespace:
    """Returns the options that the script `module` parses, without running it."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser, *args):
        raise Parsed(parse_args(parser, *args))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(sys, "argv", [module, *options])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        importlib.import_module(module).main()
    return parsed.value.args[0]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_has_valid_options_for_its_script(job, dry_run, monkeypatch, tmp_path):
    _, _, module, *options = job.command(arguments(tmp_path, dry_run=dry_run))
    module += ".__main__" * (job.module == "measure")
    parsed = parse(module, options, monkeypatch)
    assert parsed.work_dir == tmp_path
    if not dry_run and job.minutes:
        assert parsed.minutes == job.minutes and parsed.max_train_steps == 1_000_000


@pytest.mark.skipif(shutil.which("make") is None, reason="requires make; the scripts have tests of their own")
def test_every_command_of_make_pocket_has_valid_options(monkeypatch):
    """Each encoder is trained on pairs and on a checkpoint that an earlier command writes, and the last one is
    shipped."""
    made = subprocess.run(["make", "-n", "pocket"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in made.replace("\\\n", " ").splitlines() if " -m tools.pocket." in line]
    written = set()
    for _, _, module, *options in lines:
        parsed = parse(module, options, monkeypatch)
        if module.endswith(".adapters"):
            assert (parsed.pairs_dir or parsed.work_dir / "pairs") in written
            assert Path(parsed.checkpoint) in written
        name = module.rpartition(".")[2]
        written.add(getattr(parsed, "output_dir", None) or parsed.work_dir / name)
    assert module.endswith(".assemble") and parsed.work_dir / "shipped" in written
    assert len(lines) == 15


def test_the_gpu_jobs_write_where_the_last_step_reads(tmp_path):
    """`assemble` reads `shipped/ssr` and `adapters/<method>`, and the adapters are trained on `base` and on pairs that
    another job writes."""
    jobs = {job.name: job.command(arguments(tmp_path)) for job in JOBS}
    written = {line[line.index("--output_dir") + 1] for line in jobs.values() if "--output_dir" in line}
    assert {str(tmp_path / name) for name in ("shipped", "adapters", "base", "pairs", "single-pairs")} <= written
    for name, line in jobs.items():
        if "--pairs_dir" in line:
            assert line[line.index("--pairs_dir") + 1] in written and line[line.index("--checkpoint") + 1] in written
            single = name.startswith("adapters")
            assert line[line.index("--pairs_dir") + 1].endswith("single-pairs") == single
    trained = {line[line.index("--methods") + 1] for name, line in jobs.items() if name.startswith("adapters")}
    assert trained == set(gpu.METHODS)


def test_a_dry_run_does_not_touch_the_checkpoint(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(gpu, "download_designs", lambda folder: None)
    monkeypatch.setattr(gpu, "download_icons", lambda folder: None)
    monkeypatch.setattr(gpu, "run", lambda jobs, args, begun: lines.extend(job.command(args) for job in jobs))
    monkeypatch.setattr(gpu.subprocess, "run", lambda line, check: lines.append(line))
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry_run", "--further", "--work_dir", str(tmp_path)])
    gpu.main()
    folders = [line[index + 1] for line in lines for index, each in enumerate(line) if each.endswith("_dir")]
    assert len(lines) == 1 + len(JOBS) and len(folders) > len(lines)
    assert all(folder.startswith(str(tmp_path / "dry-run")) for folder in folders)


class Script(gpu.Job):
    """A job that runs Python code."""

    def command(self, args):
        return [sys.executable, "-c", self.options, str(args.work_dir)]


WRITE = "import sys; open(sys.argv[1] + '/{name}', 'a').write('x')"


def test_a_stage_runs_only_unfinished_jobs(tmp_path, monkeypatch):
    good, bad = Script("good", "", WRITE.format(name="good")), Script("bad", "", "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="bad failed"):
        gpu.run((good, bad), arguments(tmp_path, dry_run=True), time.monotonic())
    gpu.run((good, Script("bad", "", WRITE.format(name="bad"))), arguments(tmp_path), time.monotonic())
    assert [Path(tmp_path / name).read_text() for name in ("good", "bad")] == ["x", "x"]


def test_a_stage_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST", 0.01)
    with pytest.raises(SystemExit, match="goes on"):
        gpu.run((Script("slow", "", "import time; time.sleep(60)"),), arguments(tmp_path), time.monotonic())


def test_every_part_of_the_gpu_report_has_valid_options(monkeypatch):
    for dry_run in (False, True):
        for command in gpu_report.commands(dry_run).values():
            if command[1].startswith("examples/"):
                parse(Path(command[1]).stem, command[2:], monkeypatch)


def test_the_gpu_report_goes_on_after_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "REPORT", tmp_path / "report.md")
    monkeypatch.setattr(gpu_report, "FAILED", [])
    ends = time.monotonic() + 60
    for title, code in (("bad", "raise SystemExit('broken')"), ("good", "print('| 1 |')")):
        gpu_report.run(title, [sys.executable, "-c", code], ends)
    gpu_report.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], time.monotonic())
    written = (tmp_path / "report.md").read_text()
    assert gpu_report.FAILED == ["bad", "slow"]
    assert "broken" in written and "| 1 |" in written and "the time is over" in written

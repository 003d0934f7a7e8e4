"""Tests of small shared functions, of versions of libraries, and of the modules' imports."""

import ast
import logging
import math
import os
import resource
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import diffusers_ssr
import pytest
import torch
from conftest import ROOT, make_picture, quiet, subject_args
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from diffusers_ssr import (
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    internals_ssr,
    ssr_pipeline_class,
)
from diffusers_ssr.files_ssr import atomic_file
from diffusers_ssr.internals_ssr import is_finite
from test_chains import make_controlnet


# Files that are written whole or not at all


@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_a_file_is_replaced_when_it_is_complete(tmp_path, error, written):
    file = tmp_path / ("a" * 255)  # the longest possible name
    file.write_text("old")
    try:
        with atomic_file(file) as partial:
            if written or error is None:
                partial.write_text("new")
            assert file.read_text() == "old"
            if error:
                raise error
    except (OSError, KeyboardInterrupt):
        assert error
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == ("old" if error else "new")


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with atomic_file(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "new"


def test_a_missing_folder_raises_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`path`.*{tmp_path}/missing/a"):
        with atomic_file(tmp_path / "missing" / "a"):
            pytest.fail("the block must not run")


def test_a_full_disk_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(OSError, match="[Ff]ile too large"), atomic_file(tmp_path / "a") as partial:
            partial.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_threads_can_write_the_same_file(tmp_path):
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        for _ in range(20):
            with atomic_file(tmp_path / "a") as partial, partial.open("w") as file:
                for _ in range(50):
                    file.write(str(number))
                    file.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    (file,) = tmp_path.iterdir()
    assert len(file.read_text()) == 50 and len(set(file.read_text())) == 1


# Numbers


NAN, INF = math.nan, math.inf
TENSORS = {
    "finite": (torch.tensor([1.0, 2.0]), True),
    "nan": (torch.tensor([1.0, NAN]), False),
    "inf in half precision": (torch.tensor([1.0, -INF]).half(), False),
    "meta": (torch.tensor([1.0, NAN], device="meta"), True),
    "integers": (torch.tensor([1, 2]), True),
    "nan in 8 bits": (torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn), False),
    "8 bits": (torch.tensor([1.0, 2.0]).to(torch.float8_e5m2), True),
    "empty": (torch.zeros(0, 3), True),
    "inf of both signs": (torch.tensor([INF, -INF]).bfloat16(), False),
    "a sum that overflows": (torch.tensor([65504.0, 65504.0]).half(), True),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_is_finite(kind):
    tensor, finite = TENSORS[kind]
    assert is_finite(tensor) is finite


# Versions


OLD = {"torch": "2.3.1+cu121", "diffusers": "0.30.3", "transformers": "4.43.0", "PIL": "10.0.1"}


@pytest.mark.parametrize("name", OLD)
def test_old_versions_raise_an_error(name, monkeypatch):
    library = getattr(internals_ssr, name)
    monkeypatch.setattr(library, "__version__", OLD[name])
    shown, oldest = name.replace("PIL", "pillow"), internals_ssr.OLDEST[library]
    with pytest.raises(ImportError) as raised:
        internals_ssr.check_versions()
    assert str(raised.value) == f"diffusers-ssr needs {shown} {oldest} or newer, but {OLD[name]} is installed."
    assert f'"{shown}>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("version", ["2.4", "2.10.0", "3.0.0.dev0", "2.15.0a0+git"])
def test_versions_are_compared_as_numbers(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    internals_ssr.check_versions()


@pytest.mark.parametrize("given", [{"dtype": torch.float16}, {"torch_dtype": torch.float16}, {"dtype": None}, {}])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("expected", ["dtype", "torch_dtype"])
def test_dtype_argument_has_the_name_that_the_library_expects(given, library, expected, monkeypatch):
    monkeypatch.setattr(internals_ssr, f"_{library.upper()}_DTYPE", expected)
    dtype = torch.float16 if any(given.values()) else torch.float32
    arguments = internals_ssr.precision_arguments({**given, "variant": "x"}, library, torch.float32)
    assert arguments == {"variant": "x", expected: dtype}
    assert internals_ssr.precision_arguments({}, library) == {}


def test_no_deprecation_warnings(pipe, tmp_path):
    """Checks Python warnings and the log, because transformers logs deprecations."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "torch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe.save_pretrained(tmp_path / "whole")
            loaded = StableDiffusionSSRPipeline.from_pretrained(tmp_path / "whole", dtype=torch.float32)
            loaded.load_ssr(tmp_path / "whole")
            other = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(loaded, dtype=torch.float32)
            quiet(other)(**subject_args(image=make_picture(11, (16, 16)), subject_end=0.5))
            control = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
            control(**subject_args(image=make_picture(1, (16, 16)), subject_in_controlnet=True))
            subject = pipe.encode_subject(make_picture(), "cat")
            subject.save(tmp_path / "cat.safetensors")
            pipe.subject_attention_map(make_picture(), "cat").overlay()
            pipe.drop_ssr_encoders()
            pipe.unload_ssr()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    deprecations = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
    assert [str(warning.message) for warning in caught if issubclass(warning.category, deprecations)] == []
    # diffusers before 0.40 uses deprecated names of transformers
    if internals_ssr._DIFFUSERS_DTYPE == "dtype":
        assert [message for message in messages if "deprecat" in message] == []


# Imports


def test_tab_completion_shows_the_public_names():
    public = [name for name in dir(diffusers_ssr) if not name.startswith("_")]
    assert public == sorted(diffusers_ssr.__all__) and len(public) == 10
    assert all(hasattr(diffusers_ssr, name) for name in public)


def test_entry_files_import_every_module():
    """diffusers only copies the relative imports of the entry file, not the relative imports of these files. When it
    loads from the Hub, it requests each relative import of each file again, so only the entry files may have relative
    imports."""
    entries = {"pipeline_ssr", "pipeline_ssr_animatediff", "pipeline_ssr_controlnet"}
    modules = {file.stem for file in ROOT.glob("*.py")} - entries - {"__init__", "setup", "pipeline"}
    for entry in entries:
        assert set(get_relative_imports(ROOT / f"{entry}.py")) == modules
    assert set(get_relative_imports(ROOT / "pipeline.py")) == modules | {"pipeline_ssr"}
    for module in modules:
        assert not get_relative_imports(ROOT / f"{module}.py"), module


def test_only_internals_ssr_imports_private_names_of_libraries():
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and file.stem != "internals_ssr":
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [part for part in parts if part.startswith("_")], f"{file.name} imports {parts}"


IMPORTS = """
import sys
for name in ("peft", "accelerate", "datasets", "gradio", "tqdm.notebook"):
    sys.modules[name] = None
import diffusers
version, diffusers.__version__ = diffusers.__version__, "0.30.3"
for module in ("diffusers_ssr", "copied.pipeline", "copied.pipeline_ssr", "copied.pipeline_ssr_controlnet"):
    try:
        __import__(module)
    except ImportError as error:
        assert str(error) == "diffusers-ssr needs diffusers 0.31 or newer, but 0.30.3 is installed.", error
    else:
        raise AssertionError(module)
diffusers.__version__ = version
import diffusers_ssr
"""


def test_imports_in_a_new_process(tmp_path):
    """Each entry file checks the versions before it imports other modules, which may not be possible to import. The
    package needs no optional packages. `copied` is what `custom_pipeline=` imports."""
    (tmp_path / "copied").mkdir()
    for file in ROOT.glob("*.py"):
        if file.stem not in ("__init__", "setup"):
            (tmp_path / "copied" / file.name).symlink_to(file)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]

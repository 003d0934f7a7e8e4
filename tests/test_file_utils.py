"""Tests of files and folders that are written completely or not at all."""

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import make_components
from diffusers import StableDiffusionPipeline
from diffusers_ssr.internals_ssr import atomic_file, atomic_folder, check_regular_file


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_folder(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_file_is_replaced_when_it_is_complete(tmp_path):
    file = tmp_path / "a"
    for text in ("old", "new"):
        with atomic_file(file) as partial:
            partial.write_text(text)
            assert not file.exists() or file.read_text() == "old"
        assert contents(tmp_path) == {"a": text.encode()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_error_keeps_the_old_file_and_removes_the_partial_file(tmp_path, error, written):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a") as partial:
        if written:
            partial.write_text("half")
        raise error
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize(
    "place,error", [("missing/a", FileNotFoundError), ("file/a", NotADirectoryError), ("folder", IsADirectoryError)]
)
def test_a_place_without_a_folder_raises_an_error_before_anything_is_written(tmp_path, place, error):
    """The error names the path and the folder, and not the temporary file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=f"`path`.*{tmp_path / place}") as caught, atomic_file(tmp_path / place):
        pytest.fail("the block must not run")
    assert ".part" not in str(caught.value)
    assert contents(tmp_path) == {"file": b"old"}


def test_target_of_a_symlink_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with atomic_file(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "new"


def test_the_longest_possible_name_can_be_written(tmp_path):
    with atomic_file(tmp_path / ("a" * 255)) as partial:
        partial.write_text("new")
    assert contents(tmp_path) == {"a" * 255: b"new"}


def test_threads_can_write_the_same_file(tmp_path):
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        for _ in range(20):
            with atomic_file(tmp_path / "a") as partial:
                for _ in range(50):
                    with partial.open("a") as file:
                        file.write(str(number))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(8)))
    (text,) = contents(tmp_path).values()
    assert len(text) == 50 and len(set(text)) == 1


OLD = {
    "model_index.json": "old",
    "README.md": "mine",
    ".git/HEAD": "mine",
    "unet/config.json": "old",
    "unet/weights.safetensors": "old",
    "unet/weights.fp16.safetensors": "another variant",
    "vae/config.json": "old",
    "vae/weights-00001-of-00002.safetensors": "old",
    "vae/weights-00002-of-00002.safetensors": "old",
    "vae/weights.safetensors.index.json": "old",
}
NEW = {"model_index.json": "new", "unet/config.json": "new", "unet/weights.safetensors": "new", "code.py": "new",
       "vae/config.json": "new", "vae/weights.safetensors": "new", "scheduler/config.json": "new"}  # fmt: skip


def test_folder_gets_the_new_files_and_keeps_other_files(tmp_path):
    folder = tmp_path / "pipeline"
    write_folder(folder, OLD)
    with atomic_folder(folder) as partial:
        assert partial.name == folder.name and not list(partial.iterdir())
        write_folder(partial, NEW)
        assert {name: text for name, text in contents(folder).items() if ".saving" not in name} == {
            name: text.encode() for name, text in OLD.items()
        }
    kept = {name: text for name, text in OLD.items() if not name.startswith("vae/weights")}
    assert contents(folder) == {name: text.encode() for name, text in {**kept, **NEW}.items()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_error_keeps_the_old_folder(tmp_path, error):
    write_folder(tmp_path / "old", OLD)
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(error), atomic_folder(folder) as partial:
            write_folder(partial, NEW)
            raise error
    assert contents(tmp_path) == {f"old/{name}": text.encode() for name, text in OLD.items()}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails_at", range(1, 17))
def test_error_while_moving_files_is_rolled_back(tmp_path, monkeypatch, fails_at):
    """Ten files are replaced or removed, and seven files are moved."""
    write_folder(tmp_path, OLD)
    replace, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError("cannot move")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    try:
        with atomic_folder(tmp_path) as partial:
            write_folder(partial, NEW)
    except OSError:
        assert contents(tmp_path) == {name: text.encode() for name, text in OLD.items()}
    else:
        assert len(calls) < fails_at


@pytest.mark.parametrize("second", range(1, 10))
@pytest.mark.parametrize("late", [False, True], ids=["before the move", "after the move"])
def test_a_second_interrupt_while_moving_back_changes_nothing(tmp_path, monkeypatch, second, late):
    """The 9th move is interrupted, and then a move of the rollback, before or after the file is moved."""
    write_folder(tmp_path, OLD)
    replace, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if late:
            replace(*args)
        if len(calls) in (9, 9 + second):
            raise KeyboardInterrupt
        if not late:
            replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path) as partial:
        write_folder(partial, NEW)
    assert contents(tmp_path) == {name: text.encode() for name, text in OLD.items()}


def test_files_that_cannot_be_moved_back_are_kept(tmp_path, monkeypatch, caplog):
    """If the rollback fails, the old files remain in a folder that an error message names."""
    write_folder(tmp_path, OLD)
    replace, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 8:
            raise OSError("cannot move")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="cannot move"), atomic_folder(tmp_path) as partial:
        write_folder(partial, NEW)
    (replaced,) = tmp_path.glob(".saving-*/replaced")
    assert str(replaced) in caplog.text
    for name, text in OLD.items():
        assert text.encode() in (contents(tmp_path).get(name), contents(replaced).get(name))


def test_atomic_folder_raises_an_error_if_the_path_is_a_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError, match="is a file, not a folder"), atomic_folder(tmp_path / "a"):
        pass


@pytest.fixture
def full_disk():
    """Writing more than 2 KB to a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_the_old_pipeline(tmp_path, request):
    pipe = StableDiffusionPipeline(**make_components(), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    before = contents(tmp_path)
    other = StableDiffusionPipeline(**make_components(seed=3), requires_safety_checker=False)
    request.getfixturevalue("full_disk")
    with pytest.raises(Exception, match="[Ff]ile too large|large"), atomic_folder(tmp_path) as partial:
        other.save_pretrained(partial)
    assert contents(tmp_path) == before


def test_irregular_files_raise_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="`table`: .* is not a regular file"):
            check_regular_file(file, "table")
    with pytest.raises(ValueError, match="`table`: .*cannot be the name of a file"):
        check_regular_file("a\0b", "table")
    with pytest.raises(FileNotFoundError):
        check_regular_file(tmp_path / "nowhere", "table")

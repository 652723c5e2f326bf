"""Builds of the package: editable, wheel and source distribution."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import REPOSITORY


def build(kind: str, checkout: Path, target: Path) -> Path:
    """Call a hook of setuptools' build backend; return the archive."""
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", script, target]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (archive,) = target.iterdir()
    return archive


def install(wheel: Path, environment: Path) -> Path:
    """Unpack a wheel in a new environment next to this one's packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site_packages)
    (site_packages / "others.pth").write_text(str(site_packages_of("typer")))
    return environment / "bin/python"


def site_packages_of(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


@pytest.mark.slow
def test_an_editable_install_can_be_imported_next_to_the_clone(tmp_path: Path) -> None:
    clone = tmp_path / "llmtrain"
    clone.mkdir()
    names = ("llmtrain", "cli", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    for name in names:
        (clone / name).symlink_to(REPOSITORY / name)
    (tmp_path / "wheel").mkdir()
    python = install(build("editable", clone, tmp_path / "wheel"), tmp_path / "environment")
    script = "import llmtrain.cli.main, llmtrain; print(llmtrain.__file__, llmtrain.cli.__file__)"
    for folder in (tmp_path, clone, Path("/")):
        done = subprocess.run(
            [python, "-c", script], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = [Path(path).resolve() for path in done.stdout.split()]
        assert found == [REPOSITORY / "llmtrain/__init__.py", REPOSITORY / "cli/__init__.py"]


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_is_complete(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((REPOSITORY / name).read_bytes())
    for folder in ("sdist", "wheel"):
        (tmp_path / folder).mkdir()
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("llmtrain-*")
    names = zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")).namelist()
    expected = {path.relative_to(REPOSITORY) for path in REPOSITORY.glob("llmtrain/**/*.py")}
    expected |= {"llmtrain" / path.relative_to(REPOSITORY) for path in REPOSITORY.glob("cli/*.py")}
    assert {Path(name) for name in names if name.endswith(".py")} == expected
    assert "llmtrain/configs/demo.yaml" in names
    assert "llmtrain.pth" not in names

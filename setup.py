"""Let an editable install import llmtrain from any folder; pyproject.toml has the rest."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Adds the checkout to the import path of an editable install.

    Why: setuptools' import hook alone comes after the search of `sys.path`. From the parent of a
    clone named `llmtrain`, that search finds the clone itself, as a namespace package.
    """

    def run(self) -> None:
        """Build; in editable mode, also write a .pth file next to setuptools' own."""
        super().run()
        if self.editable_mode:
            site_packages = Path(self.get_finalized_command("install").install_lib)
            (site_packages / "llmtrain.pth").write_text(f"{Path(__file__).parent.resolve()}\n")


setup(cmdclass={"build_py": BuildPy})

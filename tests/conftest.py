import os
import subprocess
import sys
import venv
from pathlib import Path
from site import getsitepackages

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the package `lab`, for the tests and for the trials they start
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
pytest_plugins = ["lab.browser"]


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """No test reads or writes the developer's own journal."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("COUNTERPROOF_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def plugin(tmp_path_factory):
    """The command line of an environment in which a third party's package with one paper is installed.

    The paper is the one `counterproof new` writes, so its claim takes no time and needs no extra.
    """
    folder = tmp_path_factory.mktemp("plugin")
    package = folder / "src" / "elsewhere" / "papers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "elsewhere"\nversion = "1"\n'
        '[project.entry-points."counterproof.papers"]\nelsewhere = "elsewhere.papers"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["src/elsewhere"]\n'
    )
    new = [sys.executable, "-m", "counterproof", "new", "shrunken-mean", "--room", "rewards", "--into", str(package)]
    subprocess.run(new, check=True, capture_output=True)
    environment = folder / "env"
    venv.create(environment, with_pip=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "parent.pth").write_text(
        "\n".join(f"import site; site.addsitedir({p!r})" for p in getsitepackages())
    )
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", folder]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Plugin(folder, python)


class Plugin:
    def __init__(self, folder, python):
        self.folder = folder
        self.python = python

    def __call__(self, *words, **environment):
        """Run a command; its own home unless told otherwise."""
        return subprocess.run(
            [self.python, "-m", "counterproof", *map(str, words)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            cwd=self.folder,
        )

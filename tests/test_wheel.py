"""What is installed without the source tree: the package, its scripts and recipes, and one command for them."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def test_every_folder_with_code_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hnml_hf").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == names | {"hnml_hf.scripts"}


def test_the_quickstart_runs_from_the_sdist_and_its_wheel(tmp_path):
    """Built from the sdist of a copy of the sources, installed beside the packages it needs, started far from them."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout.split("\n")
    for name in filter(None, files):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pack = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", pack, tmp_path], cwd=tmp_path / "source", check=True)
    (sdist,) = tmp_path.glob("hnml_hf-*.tar.gz")
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sdist]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("hnml_hf-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, text=True, capture_output=True).stdout.strip())
    needed = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (site / "needed.pth").write_text(f"{needed}\n")  # not `addsitedir`, which would bring the editable install along
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--ignore-installed", wheel], check=True)
    place = tmp_path / "elsewhere"
    place.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["train", "--recipe", "quickstart", "--max_steps", "4", "--report_to", "none", "--use_cpu", "true"]
    run = [environment / "bin" / "hnml", *options]
    subprocess.run(run, cwd=place, env=variables, check=True)
    results = json.loads((place / "outputs" / "quickstart" / "all_results.json").read_text())
    assert results["objective"] == "hnml"
    from_wheel = "import hnml_hf, sys; sys.exit('site-packages' not in hnml_hf.__file__)"
    subprocess.run([python, "-c", from_wheel], cwd=place, env=variables, check=True)
    done = subprocess.run([environment / "bin" / "hnml", "benchmark"], env=variables, capture_output=True, text=True)
    assert done.returncode and "needs the source tree" in done.stderr

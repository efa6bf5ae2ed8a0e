"""Run the test suite under every supported interpreter on this machine, each in a fresh environment.

    python tools/all_pythons.py [--only 3.12] [pytest arguments]

Prints one line per interpreter with its JAX version and exits with 1 if any failed.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13")


def interpreters() -> dict[str, str]:
    """Version -> path of the first interpreter found on the path or under pyenv."""
    found: dict[str, str] = {}
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
        for path in filter(None, candidates):
            # A shim on the path may name an interpreter that is not installed.
            if subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
                found[version] = path
                break
    return found


def run(version: str, path: str, arguments: list[str]) -> tuple[bool, str]:
    """(passed, one line) for one interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(pathlib.Path(folder) / "bin" / "python")
        subprocess.run([path, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[dev]"], check=True)
        jax = subprocess.run([python, "-c", "import jax; print(jax.__version__)"], capture_output=True, text=True, check=True)
        done = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
        if done.returncode:
            print(done.stdout[-6000:])
        return done.returncode == 0, f"Python {version}  JAX {jax.stdout.strip()}  {last}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=VERSIONS, help="this version; may repeat")
    options, pytest_arguments = parser.parse_known_args()
    found = {v: path for v, path in interpreters().items() if not options.only or v in options.only}
    results = []
    for version, path in found.items():
        results.append(run(version, path, pytest_arguments))
        print(results[-1][1], flush=True)
    sys.exit(not all(passed for passed, _ in results))

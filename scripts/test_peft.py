"""Run the tests of the pinned PEFT on MixLoRA: scripts/test_peft.py [--update] [FILE ...] (`make test-peft`).

They come with PEFT's source distribution. What they load from the hub is made here, random and tiny. Nothing
is installed into the environment: what else they need lies in the cache. `--update` writes what came out into
expected.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "peft_suite"
EXPECTED = SUITE / "expected.json"
CACHE = ROOT / ".cache" / "peft-suite"
PACKAGES = ("parameterized==0.9.0", "attrs==26.1.0")
"""What PEFT's tests import and PEFT does not ask for."""
FILES = (
    "auto",
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "helpers",
    "hub_features",
    "initialization",
    "low_level_api",
    "mapping",
    "mixed",
    "other",
    "seq_classifier",
    "token_classification_qa",
    "tuners_utils",
)
"""Its test files that every method has a part in: not those of one method, of GPUs or of diffusers."""
UNCOUNTED = ("skipped", "not about the method", "failed")
"""Not compared with what is expected: they depend on the machine, are not ours, or are told anyway."""

Outcomes = dict[str, dict[str, int]]
"""By test function, how often it ended how."""


def pip(*arguments: str) -> None:
    """Run this environment's pip."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def pinned_version() -> str:
    """PEFT's version in constraints.txt."""
    found = re.search(r"^peft==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, "constraints.txt does not name peft"
    return found[1]


def fetch_tests(version: str) -> Path:
    """PEFT's tests of that version as a package `peft_tests`; returns the folder around it."""
    folder = CACHE / version
    package = folder / "peft_tests"
    if not (package / "__init__.py").exists():
        source = f"peft=={version}"
        pip("download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder), source)
        package.mkdir(exist_ok=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            for member in archive:
                if re.fullmatch(r"[^/]+/tests/[^/]+\.py", member.name):
                    data = archive.extractfile(member)
                    assert data is not None
                    (package / Path(member.name).name).write_bytes(data.read())
        pip("install", "--target", str(folder / "packages"), "--no-deps", *PACKAGES)
        (package / "__init__.py").touch()
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the tests run: offline, with the hub made here."""
    paths = [ROOT / "src", SUITE, folder / "packages"]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HOME": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_file(folder: Path, name: str) -> tuple[Outcomes, list[str]]:
    """Run one test file; returns what came of it, and its failures in words."""
    results = folder / f"{name}.json"
    results.unlink(missing_ok=True)
    options = ["-c", os.devnull, "--rootdir", str(folder), "-p", "plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-q", "--tb=no", "--no-summary", "-W", "ignore"]
    done = subprocess.run(
        [*command, f"peft_tests/test_{name}.py"],
        cwd=folder,
        env=environment(folder) | {"PEFT_SUITE_RESULTS": str(results)},
        capture_output=True,
        text=True,
    )
    if not results.exists() or done.returncode > 1:
        return {}, [f"test_{name}.py did not run:\n{(done.stdout + done.stderr)[-2000:]}"]
    found = json.loads(results.read_text())
    return found["outcomes"], found["failures"]


def counted(outcomes: Outcomes) -> Outcomes:
    """Without what depends on the machine."""
    kept = {
        test: {outcome: n for outcome, n in counts.items() if outcome not in UNCOUNTED}
        for test, counts in outcomes.items()
    }
    return {test: counts for test, counts in kept.items() if counts}


def differences(expected: Outcomes, found: Outcomes) -> list[str]:
    """Tests that came out otherwise: newly passing, newly excepted, gone or new."""
    return [
        f"{test}: expected {expected.get(test, {})}, found {found.get(test, {})}"
        for test in sorted({*expected, *found})
        if expected.get(test) != found.get(test)
    ]


def table(outcomes: Outcomes) -> str:
    """How many tests ended how, over all files."""
    total: Counter[str] = Counter()
    for counts in outcomes.values():
        total.update(counts)
    plain = ("passed", "failed", "skipped", "not about the method")
    excepted = [outcome for outcome, _ in total.most_common() if outcome not in plain]
    rows = [f"| passed | {total['passed']:,} |"]
    rows += [f"| excepted: {reason} | {total[reason]:,} |" for reason in excepted]
    rows += [f"| {outcome} | {total[outcome]:,} |" for outcome in plain[1:]]
    return "\n".join(["| outcome | tests |", "| --- | ---: |", *rows])


def main() -> int:
    """Run, print, compare; 1 where a test failed or came out otherwise than expected."""
    update = "--update" in sys.argv
    names = [name for name in sys.argv[1:] if name != "--update"] or list(FILES)
    version = pinned_version()
    print(f"==> Fetching the tests of PEFT {version}")
    folder = fetch_tests(version)
    print("==> Making random models for them")
    make_hub = [sys.executable, "-W", "ignore", str(SUITE / "local_hub.py")]
    subprocess.run(make_hub, check=True, env=environment(folder), stdout=subprocess.DEVNULL)
    outcomes: Outcomes = {}
    failures: list[str] = []
    for name in names:
        print(f"==> test_{name}.py", flush=True)
        found, failed = run_file(folder, name)
        outcomes |= found
        failures += failed
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    kept = {test: counts for test, counts in expected.items() if test[5:].split(".py")[0] in names}
    changed = differences(kept, counted(outcomes))
    if update:
        rest = {test: counts for test, counts in expected.items() if test not in kept}
        EXPECTED.write_text(json.dumps(rest | counted(outcomes), indent=1, sort_keys=True) + "\n")
    print(table(outcomes))
    for title, lines in (("Failed", failures), ("Otherwise than expected.json says", changed)):
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")
    return int(bool(failures or (changed and not update)))


if __name__ == "__main__":
    sys.exit(main())

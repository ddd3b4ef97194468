"""`benchmarks.gpu` without a GPU: a dry run of everything, failures that it survives, and its
tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import aims as gpu_aims
from benchmarks.gpu import sanitizer
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.__main__ import file_name
from benchmarks.gpu.cases import SECTIONS, Case, Settings, Skip
from benchmarks.gpu.gpu_tests import run_file
from benchmarks.gpu.section import measure, read_state, without_paths
from benchmarks.gpu.watch import Child, run
from benchmarks.gpu.wheels import unpack
from benchmarks.markdown import write_into

ROOT = Path(__file__).parents[2]


@pytest.fixture(
    scope="module", params=["sections here", pytest.param("command", marks=pytest.mark.slow)]
)
def dry_run(request, tmp_path_factory) -> tuple[dict, str]:
    """The JSON and the printed summary of a dry run.

    Every section has a process of its own, most of which import for seconds: the command itself
    runs a light one, unless all are wanted, and the others are measured in this process.
    """
    here = request.param == "sections here"
    out = tmp_path_factory.mktemp("gpu")
    command = [
        *(sys.executable, "-m", "benchmarks.gpu", f"--out={out}"),
        *("--device=cpu", "--tiny", "--minutes=60"),
        *(["--only=build"] if here else []),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "gpu_dry_run.json").read_text())
    assert "a dry run: nothing here is a result" in done.stdout
    if not here:
        return result, done.stdout
    measured = result["sections"]
    settings = Settings("cpu", True, time.time() + 3600)
    for name in {*SECTIONS} - {*measured}:
        assert measure(SECTIONS[name].cases(settings), settings, out / name) == 0
        measured[name] = measured["build"] | {"cases": read_state(out / name)}
    result["sections"] = {name: measured[name] for name in SECTIONS}
    return json.loads(without_paths(json.dumps(result))), gpu_tables.summary(result)


def test_every_case_of_a_dry_run_is_measured_or_says_what_is_missing(dry_run):
    result, _ = dry_run
    assert list(result["sections"]) == list(SECTIONS)
    records = {
        (section, name): record
        for section, content in result["sections"].items()
        for name, record in content["cases"].items()
    }
    for key, record in records.items():
        assert record["status"] != "failed", (key, record)
        if record["status"] == "skipped":
            assert any(
                word in record["reason"] for word in ("dry run", "sjlt", "fast_jl", "triton")
            ), (key, record)
    own = [r for (section, _), r in records.items() if section == "micro" and r.get("ours")]
    pytest.importorskip("triton")
    assert {r["group"] for r in own} == {
        "sjlt",
        "kronecker",
        "rademacher",
        "response_logp_grad",
        "rank_update",
    }
    assert all(r["error"] < 1e-2 for r in own)  # the bfloat16 gradient of logits is the least exact


def test_peers_that_share_our_tables_give_the_same(dry_run):
    result, _ = dry_run
    peers = [
        r
        for r in result["sections"]["micro"]["cases"].values()
        if r["status"] == "ok" and "group" in r and not r["ours"]
    ]
    assert len(peers) >= 6 and all(r["error"] < 2e-2 for r in peers)


def test_selections_of_a_dry_run_agree(dry_run):
    cases = dry_run[0]["sections"]["selection"]["cases"]
    for record in cases.values():
        assert record["repeats_agree"]
        if "same_first_picks" in record:
            assert record["same_first_picks"] == record["picks"]
    assert sum("same_first_picks" in record for record in cases.values()) == 2


def test_a_dry_run_says_so_and_is_no_result(dry_run, tmp_path):
    result, printed = dry_run
    assert "a dry run: nothing here is a result" in printed
    assert len(printed.splitlines()) <= 60
    (tmp_path / "gpu_dry_run.json").write_text(json.dumps(result))
    assert gpu_tables.load(tmp_path) == []
    assert str(ROOT) not in json.dumps(result)


def test_tables_of_a_run(dry_run):
    """Tables can be made from everything a run can contain, here from a dry run with the name of a
    GPU."""
    result = json.loads(json.dumps(dry_run[0]))
    result |= {
        "dry_run": False,
        "device": {
            "name": "NVIDIA H100 80GB HBM3",
            "capability": "9.0",
            "multiprocessors": 132,
            "l2_mib": 50.0,
            "memory_gib": 79.2,
            "driver": "580.1",
        },
    }
    result["sections"]["micro"]["cases"]["odd | case"] = {
        "status": "failed",
        "traceback": "Traceback\n  RuntimeError: a | b",
    }
    found = gpu_tables.tables([result])
    assert "NVIDIA H100 80GB HBM3" in found["gpu machine"]
    assert "failed: RuntimeError: a / b" in found["gpu micro"]
    assert "not measured" in found["gpu aims"]
    assert "pairs a second" in found["gpu end to end"] and "| kronecker" in found["gpu end to end"]
    assert gpu_tables.NONE not in "".join(found.values())
    result["sections"] = {}
    assert "not run" in gpu_tables.tables([result])["gpu tests"]


def test_documents_have_the_tables_of_the_committed_runs():
    found = gpu_tables.tables(gpu_tables.load(), gpu_tables.load(gpu_tables.BEFORE, "*.json"))
    for document in gpu_tables.DOCUMENTS:
        text = document.read_text()
        assert write_into(text, found) == text, "run `python -m benchmarks.gpu.tables --write`"
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"<!-- benchmark: {name} -->" in page for name in found)


def test_sections_measured_before_stay(dry_run, tmp_path):
    result, _ = dry_run
    path = tmp_path / "found.json"
    path.write_text(json.dumps(result))
    described = {name: result[name] for name in ("dry_run", "device", "versions")} | {"minutes": 1}
    assert gpu.begun(path, described)["sections"] == result["sections"]
    assert gpu.begun(path, described | {"device": {"name": "another"}})["sections"] == {}
    assert gpu.begun(tmp_path / "none.json", described)["sections"] == {}


def test_where_no_gpu_has_run_the_tables_say_so():
    found = gpu_tables.tables([])
    assert gpu_tables.NONE not in found.pop("gpu host time")  # measured on a CPU
    assert all(gpu_tables.NONE in table for table in found.values())


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "met"),
    [
        (0.02, 0.03, True, True),
        (0.04, 0.03, True, False),
        (0.5, 0.5, False, True),
        (0.4, 0.5, False, False),
        (None, 0.5, False, None),
    ],
)
def test_aims(value, limit, at_most, met):
    assert gpu_aims._aim("", value, limit, at_most=at_most)["met"] is met


def test_aims_of_a_run():
    micro = {
        "a": {
            "status": "ok",
            "group": "rademacher",
            "ours": True,
            "useful_share": 0.3,
            "executed_share": 0.6,
        },
        "b": {
            "status": "ok",
            "group": "rademacher",
            "ours": False,
            "useful_share": 0.9,
            "executed_share": 0.9,
        },
    }
    selection = {
        "ours, float32 rows": {"status": "ok", "seconds": 0.2},
        "torch loop, V⁻¹ in place": {"status": "ok", "seconds": 1.0},
    }
    tests = {
        "x": {"status": "ok", "counts": {"passed": 3, "failed": 1}},
        "y": {"status": "ok", "counts": {}, "complaint": "pytest ended with 2"},
    }
    sections = {
        name: {"cases": cases}
        for name, cases in {"micro": micro, "selection": selection, "tests": tests}.items()
    }
    found = {aim["aim"]: (aim["value"], aim["met"]) for aim in gpu_aims.aims(sections)}
    assert found["tests marked gpu that fail"] == (2, False)
    share = "lora_grad_rademacher, share of the bf16 rate, "
    assert found[share + "operations carried out"] == (0.6, True)
    assert found[share + "operations of the definition"] == (0.3, False)
    assert found["selection, float32 rows, seconds"] == (0.2, True)
    assert found["selection, bfloat16 rows, seconds"] == (None, None)
    assert found["torch loop / selection"] == (5.0, False)
    assert found["capture and sjlt over the backward pass"] == (None, None)


# -- what a section survives -----------------------------------------------------------------------


def _raise(error: BaseException):
    raise error


def test_cases_are_independent(tmp_path):
    state = tmp_path / "state.json"
    cases = [
        Case("fails", lambda _: _raise(ValueError("so it is"))),
        Case("lacks", lambda _: _raise(ModuleNotFoundError("No module named 'peft'"))),
        Case("skips", lambda _: _raise(Skip("too small"))),
        Case("long", lambda _: {}, expected=1e6),
        Case("sees", lambda found: {"before": sorted(found)}),
    ]
    settings = Settings("cpu", True, time.time() + 3600)
    assert measure(cases, settings, state) == 0
    found = read_state(state)
    assert {name: record["status"] for name, record in found.items()} == {
        "fails": "failed",
        "lacks": "skipped",
        "skips": "skipped",
        "long": "skipped",
        "sees": "ok",
    }
    assert "ValueError: so it is" in found["fails"]["traceback"]
    assert str(ROOT) not in found["fails"]["traceback"]
    assert found["lacks"]["reason"] == "No module named 'peft'"
    assert "takes about 1000000 s" in found["long"]["reason"]
    assert found["sees"]["before"] == ["fails", "lacks", "long", "skips"]


def test_cases_with_a_record_are_not_measured_again(tmp_path):
    state = tmp_path / "state.json"
    settings = Settings("cpu", True, time.time() + 3600)
    measure([Case("first", lambda _: {"value": 1})], settings, state)
    measure([Case("first", lambda _: {"value": 2}), Case("second", lambda _: {})], settings, state)
    found = read_state(state)
    assert found["first"]["value"] == 1 and "second" in found


# The process of a section, which reads from its state how far it is; without torch, so that it
# starts at once.
PROCESS = """
import json, os, sys, time
from pathlib import Path
LIMIT = float(os.environ["CASE_LIMIT"])
path = Path(sys.argv[1])
state = json.loads(path.read_text()) if path.exists() else {"cases": {}, "running": None}
def write(running=None):
    state["running"] = running and {"name": running, "until": time.time() + LIMIT, "limit": LIMIT}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state))
    new.replace(path)
for name in sys.argv[2:]:
    if name in state["cases"]:
        continue
    if name == "unable":
        sys.exit("no such device")
    write(name)
    if name == "hangs":
        time.sleep(1000)
    if name == "dies":
        print("a last word", file=sys.stderr, flush=True)
        os.abort()
    state["cases"][name] = {"status": "failed" if name == "breaks" else "ok"}
    write()
    if name == "breaks":
        sys.exit(3)
"""


def _watched(
    tmp_path: Path, cases: Sequence[str], seconds: float = 600.0, limit: float = 3.0
) -> tuple[dict, list]:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    state = tmp_path / "state.json"
    environment = {**os.environ, "CASE_LIMIT": str(limit)}
    child = Child(
        [sys.executable, str(script), str(state), *cases], environment, state, tmp_path / "log"
    )
    heard: list[list[str]] = []
    found = run(child, time.time() + seconds, lambda records: heard.append(list(records)))
    return found, heard


def test_a_case_that_hangs_dies_or_breaks_the_device_costs_itself_only(tmp_path):
    found, heard = _watched(tmp_path, ["one", "hangs", "dies", "breaks", "last"])
    assert {name: record["status"] for name, record in found.items()} == {
        "one": "ok",
        "hangs": "failed",
        "dies": "failed",
        "breaks": "failed",
        "last": "ok",
    }
    assert found["hangs"]["traceback"] == "ended after 3 s, its limit"
    assert "the process ended with -6" in found["dies"]["traceback"]
    assert "a last word" in found["dies"]["traceback"]
    assert heard[-1] == ["one", "hangs", "dies", "breaks", "last"]


def test_a_section_that_cannot_begin_says_so_once(tmp_path):
    found, _ = _watched(tmp_path, ["unable", "one"])
    assert list(found) == ["start"] and "no such device" in found["start"]["traceback"]


def test_a_section_ends_at_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.watch._GRACE", 0.0)
    # Long enough that the process has reached the hanging case, however slow the machine is.
    started = time.monotonic()
    (tmp_path / "before").mkdir()
    _watched(tmp_path / "before", ["one"])
    seconds = 1 + 10 * (time.monotonic() - started)
    found, _ = _watched(tmp_path, ["one", "hangs", "last"], seconds=seconds, limit=1000)
    assert "last" not in found
    assert found["hangs"]["traceback"].startswith("ended")


# Written in two parts because `benchmarks.gpu.gpu_tests` finds files with such tests by these
# words.
MARK = "pytestmark = pytest.mark." + "gpu\n"


# -- parts -----------------------------------------------------------------------------------------


def test_gpu_tests_are_counted_as_they_end(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n" + MARK + "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_skips(): pytest.skip('nothing here')\n"
        "def test_ends(): os._exit(7)\n"
        "def test_after(): pass\n"
    )
    record = run_file(file, 600)
    assert record["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert record["collected"] == 5
    assert "assert 1 == 2" in record["failures"][0]["message"]
    assert record["complaint"].startswith("pytest ended with 7")
    assert [name.split("::")[1] for name in record["unfinished"]] == ["test_ends"]


def test_gpu_tests_end_at_their_limit(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text("import time, pytest\n" + MARK + "def test_hangs(): time.sleep(100)\n")
    record = run_file(file, 3)
    assert record["complaint"] == "ended after 3 s"
    assert record["counts"] == {}


# Runs what comes after its options and gives the summary that TOOL's name is told to have.
SANITIZER = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --tool=*) tool=${1#*=} ;; --log-file=*) log=${1#*=} ;; esac
  shift
done
echo "========= COMPUTE-SANITIZER" > "$log"
[[ $tool == initcheck ]] && exit 255
"$@"
status=$?
if [[ $tool == racecheck ]]; then
  echo "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)" >> "$log"
else
  echo "========= ERROR SUMMARY: 0 errors" >> "$log"
fi
exit $status
"""


def test_tests_under_a_sanitizer(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n" + MARK + "def test_small(): pass\ndef test_too_large(): assert False\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    clean = sanitizer.run_under("memcheck", file, 600, "small")
    assert clean["counts"] == {"passed": 1} and clean["errors"] == 0 and not clean["said"]
    assert "complaint" not in clean
    races = sanitizer.run_under("racecheck", file, 600)
    assert races["counts"] == {"passed": 1, "failed": 1} and races["errors"] == 3
    assert "3 hazards" in races["said"]
    assert gpu_aims._sanitizer({"one": clean, "two": races})["met"] is False
    broken = sanitizer.run_under("initcheck", file, 600)
    assert broken["errors"] is None and "initcheck" not in broken.get("said", "")
    assert "complaint" in broken

    monkeypatch.setenv("PATH", "/none")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        with pytest.raises(Skip, match="compute-sanitizer is neither"):
            sanitizer.run_under("memcheck", file, 600)


@pytest.mark.slow
def test_what_runs_under_the_sanitizer_exists():
    for file, only in sanitizer.SMALL.items():
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", file, "-m", "gpu", "-k", only),
                *("-q", "--collect-only", "-p", "no:cacheprovider"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_wheels_of_missing_packages_are_unpacked(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("notthere_at_all-1.0", "torch-99.0"):
        with ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name.split('-')[0]}/__init__.py", "")
    assert unpack(wheels, site) == ["notthere_at_all 1.0"]
    assert (site / "notthere_at_all" / "__init__.py").exists() and not (site / "torch").exists()


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the package's sources are not here")
def test_the_kernels_are_importable_from_a_checkout_that_is_not_installed(tmp_path):
    """-S: without site-packages, so without an installation; the package needs none so far."""
    code = (
        "import benchmarks.gpu.checkout\n"
        "import activedpo_fast.kernels as kernels\n"
        "print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    # A developer may have linked activedpo_fast/kernels to kernels/.
    found = Path(done.stdout.strip()).resolve()
    assert found == ROOT / "kernels" / "__init__.py", done.stderr


def test_missing_packages_are_one_line():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "benchmarks.gpu needs what is not installed: torch, numpy, typer\n"


def test_file_names_and_paths():
    assert file_name("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3.json"
    assert without_paths(f"at {ROOT}/kernels/x.py") == "at ./kernels/x.py"
    assert without_paths(f"at {sys.base_prefix}/lib/x.py") == "at python/lib/x.py"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "micro,nothing", "--device", "cpu", "--tiny"],
        ["--device", "cpu"],
        ["--device", "tpu"],
        ["--wheels", "/nowhere"],
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, tmp_path):
    app = typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "out").exists()

"""The doctor: facts in words, abilities that are tried, and a diagnosis where something is missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twofold import doctor, kernels
from twofold.cli import app
from twofold.doctor import AbsentError, Check, Diagnosis


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    return doctor.diagnose(tmp_path_factory.mktemp("runs") / "not" / "there" / "yet")


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments], prog_name="twofold")


def test_this_machine_works(diagnosis: Diagnosis):
    assert diagnosis.works, [check for check in diagnosis.checks if check.outcome == "fails"]
    names = [check.name for check in diagnosis.checks]
    assert len(names) == len(set(names))
    assert {f"backend {name}" for name in kernels.BACKENDS} <= {*names}
    assert {"torch", "attention", "Transformers", "checkpoints", "folder"} == {
        c.name for c in diagnosis.checks if c.is_core
    }
    assert all(check.detail and check.seconds >= 0 for check in diagnosis.checks)


def test_the_cache_is_measured(diagnosis: Diagnosis):
    detail = next(check.detail for check in diagnosis.checks if check.name == "Transformers")
    # 5 tokens of text and 3 of 4 written ones are held; 2 layers of one tensor of 4 heads of 32 floats.
    assert f"{8 * 2 * 4 * 32 * 4:,} bytes, measured" in detail


def test_facts(diagnosis: Diagnosis):
    assert all(diagnosis.machine.values())
    assert diagnosis.packages["torch"] == torch.__version__
    assert "GiB free" in diagnosis.machine["disk"]
    told = json.loads(json.dumps(diagnosis.to_dict()))
    assert told["works"] is True
    assert told["checks"][0]["name"] == "torch"


def test_a_missing_gpu_is_absent_and_no_failure(diagnosis: Diagnosis, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for check in doctor.checks(Path()):
        if check.name in ("GPU", "Triton"):
            assert (check.outcome, check.is_core) == ("absent", False)


def test_a_trial_that_raises_is_a_result():
    def broken() -> str:
        raise RuntimeError("two\nlines")

    def missing() -> str:
        raise AbsentError("none here")

    check = doctor._check("it", broken, is_core=True)
    assert (check.outcome, check.detail) == ("fails", "RuntimeError: two lines")
    assert doctor._check("it", missing, is_core=False).outcome == "absent"
    assert doctor._check("it", lambda: "fine", is_core=True).outcome == "works"


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch):
    right = kernels.BACKENDS["sdpa"]
    wrong = kernels.Backend(attend=lambda inputs: right.attend(inputs) * 1.1, supports=right.supports)
    monkeypatch.setattr(kernels, "BACKENDS", {**kernels.BACKENDS, "sdpa": wrong})
    with pytest.raises(ArithmeticError, match="wrong by"):
        doctor._try_backend("sdpa")
    assert "codes of 8 bits too" in doctor._try_backend("reference")


def test_a_kernel_that_reads_codes_as_floats_is_found_out(monkeypatch: pytest.MonkeyPatch):
    right = kernels.BACKENDS["sdpa"]
    wrong = kernels.Backend(
        attend=lambda inputs: right.attend(replace(inputs, key_scales=None, value_scales=None)),
        supports=right.supports,
    )
    monkeypatch.setattr(kernels, "BACKENDS", {**kernels.BACKENDS, "sdpa": wrong})
    with pytest.raises(ArithmeticError, match="wrong by"):
        doctor._try_backend("sdpa")


def test_a_backend_that_does_not_serve_says_why(monkeypatch: pytest.MonkeyPatch):
    choosy = kernels.Backend(attend=kernels.BACKENDS["sdpa"].attend, supports=lambda problem: "only on Sundays")
    monkeypatch.setattr(kernels, "BACKENDS", {**kernels.BACKENDS, "sdpa": choosy})
    check = doctor._check("backend sdpa", lambda: doctor._try_backend("sdpa"), is_core=False)
    assert check.outcome == "absent"
    assert "only on Sundays" in check.detail


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    check = doctor._check("folder", lambda: doctor._try_folder(tmp_path), is_core=True)
    assert (check.outcome, check.detail) == ("fails", "PermissionError: [Errno 13] Permission denied")


def test_features_are_read_from_flags():
    assert doctor.cpu_features({"avx2", "avx512f", "avx512_bf16", "sse"}) == ["AVX2", "AVX-512", "AVX-512 BF16"]
    assert doctor.cpu_features({"asimd", "bf16", "sve"}) == ["NEON", "BF16", "SVE"]
    assert doctor.cpu_features({"sse"}) == []


def test_importing_the_doctor_imports_no_torch():
    check = "import sys, twofold.doctor; sys.exit(','.join({'torch', 'transformers'} & {*sys.modules}) or 0)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("outcome", ["works", "fails"])
def test_the_command_and_its_exit_code(monkeypatch: pytest.MonkeyPatch, outcome: str):
    parts = (
        Check(name="torch", outcome=outcome, detail="so it is", seconds=0.0, is_core=True),
        Check(name="GPU", outcome="absent", detail="none", seconds=1.25, is_core=False),
    )
    monkeypatch.setattr(doctor, "checks", lambda folder: parts)
    for done in (invoke(), invoke("--json")):
        assert done.exit_code == (0 if outcome == "works" else 1)
        assert not done.stderr
    assert json.loads(done.stdout)["works"] is (outcome == "works")
    page = invoke().stdout
    assert "extra data" in page
    assert ("First mend: torch." in page) == (outcome == "fails")


def test_a_diagnosis_without_torch(tmp_path: Path):
    """Where torch cannot be imported, the doctor says so and goes on."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    run = "import sys; sys.argv = ['twofold', 'doctor', '--json']; from twofold.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run],
        capture_output=True,
        text=True,
        check=False,
        env=doctor.os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    told = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert told["torch"]["detail"] == "ImportError: libtorch is broken"
    assert told["folder"]["outcome"] == "works"

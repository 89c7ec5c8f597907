"""What this machine has, and what works on it: facts are looked up, abilities are tried.

Nothing is imported before it is tried, so that a machine without a working torch gets a diagnosis too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from twofold._version import __version__
from twofold.lazy import Lazy
from twofold.study.provenance import usable_cores

if TYPE_CHECKING:
    import torch
    import transformers

    from twofold import cache, cost, kernels, models, presets
    from twofold.models import quiet
else:
    torch, transformers = Lazy("torch"), Lazy("transformers")
    cache, cost, kernels = Lazy("twofold.cache"), Lazy("twofold.cost"), Lazy("twofold.kernels")
    models, presets, quiet = Lazy("twofold.models"), Lazy("twofold.presets"), Lazy("twofold.models.quiet")

PACKAGES = ("torch", "transformers", "accelerate", "triton", "numpy", "pandas", "safetensors", "pydantic")
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "data": ("datasets", "pillow", "pyarrow", "scikit-learn"),
    "tensorboard": ("tensorboard",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "docs": ("mkdocs", "mkdocs-material", "mkdocstrings"),
    "dev": ("hypothesis", "mypy", "playwright", "pytest", "ruff"),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
# The names that Linux (x86 and ARM) and macOS give to what attention can use.
CPU_FEATURES: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX BF16": ("amx_bf16",),
    "NEON": ("asimd", "neon", "advsimd"),
    "BF16": ("bf16", "feat_bf16"),
    "SVE": ("sve",),
}

Outcome = Literal["works", "fails", "absent"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One ability, tried. ``is_core``: Twofold is of no use without it."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    is_core: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Facts and checks. ``works`` is whether every core check passed."""

    version: str
    machine: Mapping[str, str]
    packages: Mapping[str, str]
    extras: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def works(self) -> bool:
        """Whether everything that Twofold cannot do without works."""
        return all(check.outcome == "works" for check in self.checks if check.is_core)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"works": self.works}


def diagnose(folder: Path) -> Diagnosis:
    """Look at the machine and try everything; ``folder`` is where runs would be kept, whether or not it is there yet."""
    return Diagnosis(
        version=__version__,
        machine=machine(folder),
        packages={name: _version_of(name) for name in PACKAGES},
        extras={name: _extra(parts) for name, parts in EXTRAS.items()},
        checks=checks(folder),
    )


# Facts


def machine(folder: Path) -> dict[str, str]:
    """Hardware and operating system, in words."""
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(_nearest(folder))
    return {
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "processor": _processor(),
        "features": ", ".join(cpu_features(_flags())) or "none that matters here",
        "cores": f"{usable_cores()} usable of {os.cpu_count()}",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "disk": f"{disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} GiB",
        "graphics": _graphics(),
        "browser": browser() or "none found",
    }


def browser() -> str:
    """The path of a browser that can be driven without a screen; empty where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), "")


def cpu_features(flags: set[str]) -> list[str]:
    """Which of :data:`CPU_FEATURES` a processor with these flags has."""
    return [name for name, known in CPU_FEATURES.items() if flags & set(known)]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def _flags() -> set[str]:
    text = " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)[:1])
    if platform.system() == "Darwin":
        told = _output("sysctl", "hw.optional", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        switches = re.findall(r"hw\.optional\.(?:arm\.)?(\w+): 1", told)
        text = " ".join([*switches, *re.findall(r"machdep\.cpu\.\w+: (.*)", told)])
    return set(text.lower().split())


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if found:
        return found.group(1)
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _graphics() -> str:
    found = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if found:
        return "; ".join(
            f"{name}, {memory}, driver {driver}"
            for name, memory, driver in (line.split(", ") for line in found.splitlines())
        )
    return "none found"


def _output(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extra(parts: tuple[str, ...]) -> str:
    missing = [name for name in parts if _version_of(name) == "not installed"]
    return f"missing: {', '.join(missing)}" if missing else "installed"


# Abilities


class AbsentError(Exception):
    """Raised by a trial of something that this machine does not have: that is no failure."""


def checks(folder: Path) -> tuple[Check, ...]:
    """Try everything that Twofold needs or can use; no trial stops the next."""
    trials: list[tuple[str, Callable[[], str], bool]] = [
        ("torch", _try_torch, True),
        ("attention", _try_attention, True),
        ("Transformers", _try_transformers, True),
        ("checkpoints", _try_checkpoint, True),
        ("folder", partial(_try_folder, folder), True),
        ("bf16 on CPU", _try_bf16, False),
        *((f"backend {name}", partial(_try_backend, name), False) for name in _backends()),
        ("GPU", _try_gpu, False),
        ("Triton", _try_triton, False),
        ("browser", _try_browser, False),
    ]
    return tuple(_check(name, trial, is_core=is_core) for name, trial, is_core in trials)


def _check(name: str, trial: Callable[[], str], *, is_core: bool) -> Check:
    began = time.perf_counter()
    outcome: Outcome = "works"
    try:
        detail = trial()
    except AbsentError as reason:
        outcome, detail = "absent", str(reason)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in a trial is its result
        outcome, detail = "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Check(name=name, outcome=outcome, detail=detail, seconds=time.perf_counter() - began, is_core=is_core)


def _require(holds: bool, what: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not holds:
        raise ArithmeticError(what)


def _try_torch() -> str:
    matrix = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    _require(float((matrix @ matrix).sum()) == 486.0, "a product of matrices came out wrong")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _try_bf16() -> str:
    exact = _noise(64, 64)
    error = (exact.bfloat16() @ exact.bfloat16()).float() - exact @ exact
    _require(float(error.abs().max()) < 1.0, f"products are wrong by {float(error.abs().max()):.2g}")
    return "products are right; how fast they are depends on AVX-512 BF16, AMX or their like"


def _backends() -> tuple[str, ...]:
    try:
        return tuple(kernels.BACKENDS)
    except Exception:  # noqa: BLE001 - the trial of attention says what is wrong
        return ()


def _try_attention() -> str:
    inputs = _attention_inputs("cpu")
    choice = kernels.choose(inputs.problem)
    _compare(kernels.attend(inputs), inputs)
    return f"{choice.name}, {choice.why}; agrees with the reference in float64"


def _try_backend(name: str) -> str:
    """In float32 or, where a backend has only that, in bfloat16; over a whole text, or where that is not what it is for, for the next token of one."""
    device, backend = "cuda" if torch.cuda.is_available() else "cpu", kernels.BACKENDS[name]
    for dtype, (what, num_queries) in product(("float32", "bfloat16"), (("a text", 19), ("a token", 1))):
        inputs = _attention_inputs(device, num_queries, dtype)
        if not (reason := backend.supports(inputs.problem)):
            _compare(backend.attend(inputs), inputs)
            coded = _of_codes(inputs)
            if is_for_codes := not backend.supports(coded.problem):
                _compare(backend.attend(coded), coded)
            codes = ", codes of 8 bits too" * is_for_codes
            used = f", instructions up to {kernels.native.levels()[-1]}" if name == kernels.native.NAME else ""
            return f"agrees with the reference in float64, {dtype} on {device}, {what} at a time{codes}{used}"
    raise AbsentError(f"not on {device}: {reason}")


def _try_gpu() -> str:
    if not torch.cuda.is_available():
        raise AbsentError("torch finds none: everything runs on the CPU")
    inputs = _attention_inputs("cuda")
    _compare(kernels.attend(inputs), inputs)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; attention there agrees with the reference"


def _try_triton() -> str:
    if not torch.cuda.is_available():
        raise AbsentError("needs a GPU")
    if _version_of("triton") == "not installed":
        raise AbsentError("not installed")
    numbers = torch.arange(1000, device="cuda")
    _require(bool((torch.compile(_twice)(numbers) == 2 * numbers).all()), "a compiled kernel gave something else")
    return f"{_version_of('triton')} compiles a kernel"


def _twice(numbers: torch.Tensor) -> torch.Tensor:
    return numbers + numbers


def _try_transformers() -> str:
    """A small model by its configuration alone generates, and its cache holds one tensor where the tie says one."""
    spec = presets.PRESETS["tiny"].with_changes(tie="(Q, K=V)", num_hidden_layers=2)
    config = models.TwofoldConfig.from_spec(spec)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    held = cache.TiedCache(spec)
    text = torch.arange(1, 6)[None]
    with torch.random.fork_rng(devices=[]):
        written = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=4,
            do_sample=False,
            **{models.causal_lm.CACHE_FIELD: held},
        )
    wanted = cost.cache_bytes(spec, written.shape[1] - 1, "fp32")
    _require(held.nbytes == wanted, f"the cache of {written.shape[1] - 1} tokens is {held.nbytes} bytes, not {wanted}")
    return f"{transformers.__version__} generates; the cache of {spec.tie} is {held.nbytes:,} bytes, measured, as calculated"


def _try_checkpoint() -> str:
    spec = presets.PRESETS["tiny"].with_changes(num_hidden_layers=1)
    model = models.build_model(spec, seed=0)
    with tempfile.TemporaryDirectory() as folder, quiet.without_bars():
        model.save_pretrained(folder)
        read = models.load_model(folder).state_dict()
    _require(all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items()), "weights changed")
    return "a model is written as safetensors and read back the same"


def _try_folder(folder: Path) -> str:
    place = _nearest(folder)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())
    return f"{place.resolve()} can be written to"


def _try_browser() -> str:
    path = browser()
    if not path:
        raise AbsentError("none found: reports can still be opened elsewhere")
    return _output(path, "--version") or path


def _nearest(folder: Path) -> Path:
    """The folder, or that of its parents which is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _attention_inputs(device: str, num_queries: int = 19, dtype: str = "float32") -> kernels.Inputs:
    """A causal call with grouped heads and one tensor as key and value, of odd lengths."""
    stream, query = (_noise(2, *size, 32).to(device, getattr(torch, dtype)) for size in ((2, 19), (4, num_queries)))
    return kernels.Inputs(query=query, key=stream, value=stream, mask=kernels.Mask(causal=True), scale=32**-0.5)


def _of_codes(inputs: kernels.Inputs) -> kernels.Inputs:
    """The same call, its stream held as codes of 8 bits."""
    codes, scales = kernels.codes.encoded(inputs.key)
    return replace(inputs, key=codes, value=codes, key_scales=scales, value_scales=scales)


def _compare(output: torch.Tensor, inputs: kernels.Inputs) -> None:
    """Raise where an output is not what the readable reference gives in float64."""
    stream = inputs.plain.key.double().cpu()
    exact = kernels.Inputs(
        query=inputs.query.double().cpu(), key=stream, value=stream, mask=inputs.mask, scale=inputs.scale
    )
    error = float((output.double().cpu() - kernels.attend(exact, "reference")).abs().max())
    _require(error < max(1e-2, 8 * torch.finfo(output.dtype).eps), f"the output is wrong by {error:.2g}")

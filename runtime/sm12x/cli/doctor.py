"""``python -m sm12x doctor``: what keeps this machine from using the kernels, and what to do about it.

Checks, in the order in which a user meets them: the package, its dependencies, the cubins, the driver, the
devices. Each goes through the same functions as a launch, so what it reports is what a launch would run into.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from sm12x import abi, driver, manifest
from sm12x.errors import CubinError, CudaError, DriverError

OLDEST_BINDINGS = {"cu12": "12.9", "cu13": "13.0"}
FRAMEWORKS = ("torch", "cupy-cuda13x", "cupy-cuda12x", "cupy", "jax")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A `problem` stops every GPU call; a `warning` does not; `remedy` says what to
    do."""

    check: str
    status: Literal["ok", "warning", "problem"]
    detail: str
    remedy: str = ""

    @property
    def is_about_the_machine(self) -> bool:
        """Whether driver or devices are at fault, not the installation."""
        return self.check.startswith(("driver", "device"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    findings = diagnose()
    ok = not any(finding.status == "problem" for finding in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return 0 if ok else 1
    marks = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
    for finding in findings:
        print(f"{marks[finding.status]}  {finding.check}: {finding.detail}")
        if finding.remedy:
            print(f"{' ' * 9}-> {finding.remedy}")
    if ok:
        print("sm12x can use the GPU of this machine.")
    else:
        print("sm12x cannot use a GPU here; NumPy arrays work without one.")
    return 0 if ok else 1


def diagnose() -> list[Finding]:
    """All findings for this machine and process. Never raises for what it is there to find."""
    findings = [*_package(), *_dependencies(), *_cubins()]
    found_driver = _driver()
    findings += found_driver
    if all(finding.status != "problem" for finding in found_driver):
        findings += _devices()
    return [*findings, *_frameworks()]


def problems() -> list[Finding]:
    """What stops GPU use here, a broken installation first, then driver and devices."""
    return [finding for finding in diagnose() if finding.status == "problem"]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package() -> list[Finding]:
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    installed = [
        f"{name} {found}" for name in ("sm12x-cu12", "sm12x-cu13") if (found := _version(name)) is not None
    ]
    both = "python -m pip uninstall -y sm12x-cu12 sm12x-cu13, then install the one that fits your driver"
    try:
        wheel = manifest.wheel_major()
    except ImportError as error:
        return [Finding("package", "problem", str(error), both)]
    if len(installed) > 1:
        return [
            Finding("package", "problem", f"{' and '.join(installed)} overwrite each other's files", both)
        ]
    what = f"{installed[0]}" if installed else "a checkout that is not installed"
    cubins = f"{wheel} cubins" if wheel else "a checkout's cubins"
    return [Finding("package", "ok", f"{what}, {cubins}, in {manifest.PACKAGE}; {machine}")]


def _major() -> str | None:
    """The CUDA major that would be used, or None where that cannot be told; `_dependencies` says why."""
    try:
        return manifest.cuda_major()
    except (ImportError, ValueError, CubinError):
        return None


def _dependencies() -> list[Finding]:
    findings = []
    have = _version("cuda-bindings")
    try:
        major = manifest.cuda_major()
        _import_bindings()
    except ImportError as error:
        needed = "cuda-bindings 12.9 or 13" if have is None else f"a working cuda-bindings (found {have})"
        remedy = (
            "python -m pip install 'cuda-bindings>=13,<14' (driver 580 or newer) or 'cuda-bindings>=12.9,<13'"
        )
        findings.append(
            Finding("cuda.bindings", "problem", f"cannot be imported ({error}); {needed} is needed", remedy)
        )
    except (ValueError, CubinError) as error:
        findings.append(
            Finding("cuda.bindings", "problem", str(error), "unset SM12X_CUDA_MAJOR, or reinstall sm12x")
        )
    else:
        findings.append(_bindings_version(have, major))
    for name in ("numpy", "ml_dtypes"):
        found = _version(name)
        if found is None:
            findings.append(Finding(name, "problem", "is not installed", f"python -m pip install {name}"))
        else:
            findings.append(Finding(name, "ok", found))
    return findings


def _import_bindings() -> None:
    importlib.import_module("cuda.bindings.driver")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _bindings_version(have: str | None, major: str) -> Finding:
    oldest = OLDEST_BINDINGS[major]
    if have is not None and (have.split(".")[0] != oldest.split(".")[0] or _numbers(have) < _numbers(oldest)):
        following = int(major[2:]) + 1
        return Finding(
            "cuda.bindings",
            "problem",
            f"version {have}, where the {major} cubins need {oldest} or newer of the same major",
            f"python -m pip install 'cuda-bindings>={oldest},<{following}'",
        )
    return Finding("cuda.bindings", "ok", f"{have or 'version unknown'}, for {major} cubins")


def _cubins() -> list[Finding]:
    reinstall = "reinstall: python -m pip install --force-reinstall --no-deps sm12x-cu13 (or sm12x-cu12)"
    try:
        held = manifest.load(manifest.find_root())
        wheel = manifest.wheel_major()
    except CubinError as error:
        return [Finding("cubins", "problem", str(error), reinstall)]
    except ImportError:  # both wheels, which `_package` reports
        return []
    wrong = abi.mismatches(held.abi)
    if wrong:
        detail = f"the manifest was built against another abi.h: {'; '.join(wrong)}"
        return [Finding("cubins", "problem", detail, reinstall)]
    broken, good = [], 0
    for variant in held.variants.values():
        for arch, target in variant.targets.items():
            for major in target.cubins:
                if wheel in (None, major):
                    try:
                        manifest.read_cubin(held, variant, arch, major)
                        good += 1
                    except CubinError as error:
                        broken.append(str(error))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return [Finding("cubins", "problem", broken[0] + more, reinstall)]
    if not good:
        return [Finding("cubins", "problem", f"{held.root} lists none for {wheel}", reinstall)]
    return [Finding("cubins", "ok", f"all {good} match their sha256, of {len(held.variants)} kernels")]


def _driver() -> list[Finding]:
    major = _major()
    try:
        opened = driver.get_driver()
        version = f"supports CUDA {opened.version // 1000}.{opened.version % 1000 // 10}"
        if major is not None:
            driver.check_driver_version(opened.version, major)
    except CudaError as error:
        return [Finding("driver", "problem", str(error), _driver_remedy(error, major))]
    return [Finding("driver", "ok", version)]


NO_DEVICE = 100


def _driver_remedy(error: CudaError, major: str | None) -> str:
    if error.code == NO_DEVICE:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which may hide every GPU: unset it"
        return "no NVIDIA GPU is visible; in a container, start it with --gpus all"
    if not isinstance(error, DriverError):
        return "start sm12x in a process of its own"
    release = driver.OLDEST_DRIVER[major or "cu13"][2]
    return (
        f"driver {release} or newer is needed; in a container, install the NVIDIA Container Toolkit on the "
        "host and start the container with --gpus all"
    )


def _devices() -> list[Finding]:
    try:
        count = int(driver.call("cuDeviceGetCount"))
    except CudaError as error:
        return [Finding("devices", "problem", str(error), "check `nvidia-smi`")]
    findings = [_device(ordinal) for ordinal in range(count)]
    if any(finding.status == "ok" for finding in findings):
        return [
            finding
            if finding.status == "ok"
            else Finding(finding.check, "warning", finding.detail, finding.remedy)
            for finding in findings
        ]
    return findings or [Finding("devices", "problem", "the driver reports no device", _no_device())]


def _no_device() -> str:
    return "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"


def _device(ordinal: int) -> Finding:
    """Opens the device and loads every GEMM kernel it has, as launches would."""
    check = f"device {ordinal}"
    try:
        device = driver.get_device(ordinal)
        usable = [v for v in manifest.default().gemms() if device.major in _majors(v, device.arch)]
        for variant in usable:
            driver.get_function(device, variant)
    except CubinError as error:
        return Finding(check, "problem", str(error), "reinstall sm12x")
    except ValueError as error:  # SM12X_CUDA_MAJOR
        return Finding(check, "problem", str(error), "unset SM12X_CUDA_MAJOR")
    except CudaError as error:
        return Finding(check, "problem", str(error), _device_remedy(error))
    capability = ".".join(map(str, device.capability))
    twin = "; the sm_90a build is a twin for testing, not a product" if device.arch == "sm_90a" else ""
    return Finding(
        check,
        "ok",
        f"{device.name}, compute capability {capability}, {device.sm_count} SMs: "
        f"{len(usable)} GEMM kernels of {device.major}/{device.arch} load{twin}",
    )


def _majors(variant: manifest.Variant, arch: str) -> Any:
    return variant.targets[arch].cubins if arch in variant.targets else ()


def _device_remedy(error: CudaError) -> str:
    if type(error) is CudaError:
        return "check `nvidia-smi` for free memory, other users (exclusive mode) and errors of the GPU"
    return "use a device that the kernels are built for (`python -m sm12x kernels` lists them)"


def _frameworks() -> list[Finding]:
    found = [f"{name} {version}" for name in FRAMEWORKS if (version := _version(name)) is not None]
    none = "none of torch, CuPy and JAX is installed; any DLPack or __cuda_array_interface__ array works, too"
    return [Finding("frameworks", "ok", ", ".join(found) if found else none)]

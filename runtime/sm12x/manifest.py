"""cubins/manifest.json: the contract between the build and the runtime, as dataclasses.

`load` reads and checks a manifest, `read_cubin` returns the bytes of one cubin after its size and sha256
matched. Nothing here touches a GPU or imports CUDA.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import CubinError

SCHEMA = 1
PACKAGE = Path(__file__).resolve().parent
MAJORS = ("cu12", "cu13")
GRID_AXES = ("x", "y")
# Tensor maps that the params struct of a GEMM kernel begins with, in its order. Of b there may be several.
# A kernel of a whole expert layer has those of both GEMMs' weights, in the structs inside of its own.
_PACKED_GEMMS = ("sm12x_packed_params", "sm12x_up_params", "sm12x_down_params")
_PACKED_LAYER = (*_PACKED_GEMMS, "sm12x_layer_params")
TENSOR_MAPS = {
    "sm12x_ptr_array_params": ("a", "b", "d"),
    **dict.fromkeys(_PACKED_GEMMS, ("a", "b")),
    "sm12x_layer_params": ("b", "b2"),
}
# grouped_gemm's kernels, the two of an expert layer, and those that do all of a layer.
GEMM_ROLES = ("gemm", "up", "down", "layer")
# Kernels that wait for what is ahead of them where they are launched so that they may begin before.
_PDL_PARAMS = (
    *_PACKED_LAYER,
    "sm12x_route_params",
    "sm12x_quantize_params",
    "sm12x_maxima_params",
    "sm12x_combine_params",
)
REINSTALL = "reinstall sm12x"


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor map of a kernel: `box` in elements, innermost first, 1 in dimensions that it does not name;
    `swizzle` in bytes, 0 for none."""

    rank: int
    box: tuple[int, ...]
    swizzle: int
    element_bytes: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """One cubin file; `path` is relative to the manifest. `spill_bytes` and `stack_bytes` are per thread."""

    path: str
    size: int
    sha256: str
    assembler: str
    registers: int
    spill_bytes: int
    stack_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture of a variant: the PTX it came from, as recorded, and its cubins by CUDA major."""

    ptx: Mapping[str, Any]
    cubins: Mapping[str, Cubin]


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel. `tile` is (M, N, K) of the kernel's own sides: under `swap_ab` M is features, N tokens.

    `threads` per CTA; `shared_memory` is dynamic, in bytes; `grid_axis` carries the CTAs; `workspace_per_cta`
    is bytes of tensor maps, or of split-K partials in the family fp8_packed. There `mma_warps` counts the
    warps that share a tile, each of which finishes its part of it, and `weight_maps` the tensor maps of b (a
    kernel of a whole layer: and of b2): each has boxes of twice as many features as the one before, the first
    those of `tensor_maps`.
    Preparation kernels (`role` "prepare_packed", "prepare_list") have no tile, types or tensor maps. `outs`:
    types of D that it can write. `pdl`: launched so that it may begin before what is ahead of it in the
    stream has ended. `token_step`: a tile computes its tokens in steps of so many and skips those past the
    group's end; 0 means that it computes the whole tile. `gated`: its GEMM1 is of gates and ups.
    """

    key: str
    family: str
    role: str
    params: str
    symbol: str
    threads: int
    shared_memory: int
    targets: Mapping[str, Target]
    grid_axis: str = "x"
    workspace_per_cta: int = 0
    tile: tuple[int, int, int] = (0, 0, 0)
    schedule: str = ""
    swap_ab: bool = False
    a: str = ""
    b: str = ""
    outs: tuple[str, ...] = ()
    mma: str = ""
    pdl: bool = False
    stages: int = 0
    tensor_maps: Mapping[str, TensorMap] | None = None
    token_step: int = 0
    mma_warps: int = 0
    weight_maps: int = 0
    gated: bool = False

    @property
    def out(self) -> str:
        """The type of D where a kernel writes one, else the first that it can write; "" without any."""
        return self.outs[0] if self.outs else ""

    @property
    def token_tile(self) -> int:
        """Rows of one tile on the token side."""
        return self.tile[1] if self.swap_ab else self.tile[0]

    @property
    def feature_tile(self) -> int:
        """Output features of one tile."""
        return self.tile[0] if self.swap_ab else self.tile[1]


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """A checked manifest; `root` is its folder. One is only equal to itself, so that caches may be kept by
    it."""

    root: Path
    toolchain: Mapping[str, str]
    abi: Mapping[str, Any]
    variants: Mapping[str, Variant]

    def gemms(self, family: str | None = None, role: str = "gemm") -> tuple[Variant, ...]:
        """The GEMM kernels in the manifest's order: grouped_gemm's, or with `role` "up" or "down" those of an
        expert layer, with "layer" those that do all of one."""
        return tuple(
            v for v in self.variants.values() if v.role == role and (family is None or v.family == family)
        )

    def only(self, family: str, role: str) -> Variant:
        """The one kernel of `role` in `family`. Raises CubinError where there is none or more than one."""
        found = [v for v in self.variants.values() if v.family == family and v.role == role]
        if len(found) != 1:
            raise CubinError(
                f"{self.root}: expected one {role} kernel of family {family}, found {len(found)}"
            )
        return found[0]

    def architectures(self, major: str) -> tuple[str, ...]:
        """The architectures that have a cubin for `major`, sorted."""
        return tuple(
            sorted(
                {arch for v in self.variants.values() for arch, t in v.targets.items() if major in t.cubins}
            )
        )


def find_root() -> Path:
    """The folder of manifest.json: in the installed package, or beside `runtime/` in a checkout.

    Raises CubinError where neither is.
    """
    for root in (PACKAGE / "cubins", PACKAGE.parents[1] / "cubins"):
        if (root / "manifest.json").is_file():
            return root
    raise CubinError(
        f"manifest.json is neither in {PACKAGE / 'cubins'} nor in a checkout around it: {REINSTALL}"
    )


def load(root: Path) -> Manifest:
    """Read and check `root`/manifest.json. Raises CubinError where it is missing, broken or newer."""
    path = root / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CubinError(f"{path} is missing: {REINSTALL}") from None
    except (OSError, ValueError) as error:
        raise CubinError(f"{path} cannot be read ({error}): {REINSTALL}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise CubinError(f"{path}: expected a schema number, got {schema!r}: {REINSTALL}")
    if schema > SCHEMA:
        raise CubinError(
            f"{path}: schema {schema} is newer than {SCHEMA}, the newest this sm12x reads: upgrade sm12x"
        )
    try:
        variants = {key: _variant(key, value) for key, value in raw["variants"].items()}
        manifest = Manifest(root, dict(raw["toolchain"]), dict(raw["abi"]), variants)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CubinError(
            f"{path}: not a manifest of schema {schema} ({type(error).__name__}: {error})"
        ) from error
    return manifest


@lru_cache(maxsize=1)
def default() -> Manifest:
    """The manifest of this installation, read once."""
    return load(find_root())


def wheel_major(package: Path = PACKAGE) -> str | None:
    """The CUDA major ("cu12" or "cu13") an installed wheel was built for; None in a checkout.

    Raises ImportError where both were installed: they are one package and overwrite each other's files.
    """
    found = [major for major in MAJORS if (package / f"_cuda_major_{major[2:]}").exists()]
    if len(found) > 1:
        raise ImportError(
            "sm12x-cu12 and sm12x-cu13 are both installed and overwrite each other's files: run "
            "`python -m pip uninstall -y sm12x-cu12 sm12x-cu13`, then install the one for your driver "
            "(sm12x-cu13: driver 580 or newer, sm12x-cu12: 570 or newer)"
        )
    return found[0] if found else None


def cuda_major() -> str:
    """The CUDA major whose cubins are used: a wheel's own; in a checkout SM12X_CUDA_MAJOR (12 or 13), else
    that of the installed cuda-bindings.

    Raises ValueError for another SM12X_CUDA_MAJOR, or one that the wheel does not hold.
    """
    wheel = wheel_major()
    asked = os.environ.get("SM12X_CUDA_MAJOR")
    if asked is not None:
        if f"cu{asked}" not in MAJORS:
            raise ValueError(f"SM12X_CUDA_MAJOR: expected 12 or 13, got {asked!r}")
        if wheel is not None and wheel != f"cu{asked}":
            raise ValueError(
                f"SM12X_CUDA_MAJOR: expected {wheel[2:]}, which sm12x-{wheel} holds, got {asked}"
            )
        return f"cu{asked}"
    if wheel is not None:
        return wheel
    import cuda.bindings  # here, not above: `import sm12x` must not import it

    major = f"cu{cuda.bindings.__version__.split('.')[0]}"
    if major not in MAJORS:
        raise CubinError(
            f"cuda-bindings {cuda.bindings.__version__}: expected 12.9 or 13; install sm12x's own dependency"
        )
    return major


def find_cubin(manifest: Manifest, variant: Variant, arch: str, major: str) -> Cubin:
    """The record of one cubin. Raises CubinError that lists what exists where there is none."""
    target = variant.targets.get(arch)
    cubin = None if target is None else target.cubins.get(major)
    if cubin is None:
        have = sorted(f"{m}/{a}" for a, t in variant.targets.items() for m in t.cubins)
        raise CubinError(f"{variant.key}: no cubin for {major}/{arch}; there are {', '.join(have) or 'none'}")
    return cubin


def read_cubin(manifest: Manifest, variant: Variant, arch: str, major: str) -> bytes:
    """The bytes of one cubin. Raises CubinError where it is missing, truncated or altered."""
    cubin = find_cubin(manifest, variant, arch, major)
    path = manifest.root / cubin.path
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        wheel = "" if manifest.root != PACKAGE / "cubins" else f" (sm12x-{major} has it)"
        raise CubinError(f"{variant.key}: {path} is missing{wheel}: {REINSTALL}") from None
    except OSError as error:
        raise CubinError(f"{variant.key}: {path} cannot be read ({error}): {REINSTALL}") from error
    if len(data) != cubin.size:
        raise CubinError(
            f"{variant.key}: {path} is truncated or altered: expected {cubin.size} bytes, got {len(data)}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != cubin.sha256:
        raise CubinError(f"{variant.key}: {path} is altered: expected sha256 {cubin.sha256}, got {digest}")
    return data


def _variant(key: str, raw: Mapping[str, Any]) -> Variant:
    gemm = raw["role"] in GEMM_ROLES
    variant = Variant(
        key=key,
        family=str(raw["family"]),
        role=str(raw["role"]),
        params=str(raw["params"]),
        symbol=str(raw["symbol"]),
        threads=_number(raw, "threads", 1),
        shared_memory=_number(raw, "shared_memory", 0),
        targets={arch: _target(target) for arch, target in raw["targets"].items()},
        grid_axis=str(raw.get("grid_axis", "x")),
        workspace_per_cta=int(raw.get("workspace_per_cta", 0)),
        pdl=bool(raw.get("pdl", False)),
    )
    if variant.grid_axis not in GRID_AXES:
        raise ValueError(f"{key}: grid_axis {variant.grid_axis!r}")
    if variant.pdl and variant.params not in _PDL_PARAMS:
        raise ValueError(f"{key}: programmatic dependent launch needs a newer sm12x")
    if variant.workspace_per_cta % 128:
        raise ValueError(f"{key}: workspace_per_cta {variant.workspace_per_cta} is not a multiple of 128")
    if not gemm:
        return variant
    packed = variant.params in _PACKED_LAYER
    return Variant(
        **{name: getattr(variant, name) for name in _COMMON},
        tile=_three(raw["tile"]),
        schedule=str(raw["schedule"]),
        swap_ab=bool(raw["swap_ab"]),
        token_step=int(raw.get("token_step", 0)),
        gated=bool(raw.get("gated", False)),
        a=str(raw["a"]),
        b=str(raw["b"]),
        outs=_outs(raw),
        mma=str(raw["mma"]),
        stages=_number(raw, "stages", 1),
        tensor_maps={name: _tensor_map(raw["tensor_maps"][name]) for name in TENSOR_MAPS[variant.params]},
        mma_warps=_number(raw, "mma_warps", 1) if packed else 0,
        weight_maps=_weight_maps(raw) if packed else 0,
    )


_COMMON = (
    "key",
    "family",
    "role",
    "params",
    "symbol",
    "threads",
    "shared_memory",
    "targets",
    "grid_axis",
    "workspace_per_cta",
    "pdl",
)


def _number(raw: Mapping[str, Any], name: str, least: int) -> int:
    value = raw[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def _weight_maps(raw: Mapping[str, Any]) -> int:
    from .abi import SM12X_WEIGHT_MAPS  # here, not above: `import sm12x` does without

    count = _number(raw, "weight_maps", 1)
    if count > SM12X_WEIGHT_MAPS:
        raise ValueError(f"weight_maps: expected at most {SM12X_WEIGHT_MAPS}, got {count}")
    return count


def _outs(raw: Mapping[str, Any]) -> tuple[str, ...]:
    outs = tuple(str(each) for each in raw["outs"]) if "outs" in raw else (str(raw["out"]),)
    if not outs:
        raise ValueError("outs: expected at least one type")
    return outs


def _three(tile: Any) -> tuple[int, int, int]:
    m, n, k = (int(x) for x in tile)
    if min(m, n, k) < 1:
        raise ValueError(f"tile: expected three positive numbers, got {tile!r}")
    return m, n, k


def _tensor_map(raw: Mapping[str, Any]) -> TensorMap:
    return TensorMap(
        _number(raw, "rank", 1),
        tuple(int(x) for x in raw["box"]),
        _number(raw, "swizzle", 0),
        _number(raw, "element_bytes", 1),
    )


def _target(raw: Mapping[str, Any]) -> Target:
    return Target(
        dict(raw.get("ptx", {})), {major: Cubin(**_cubin(cubin)) for major, cubin in raw["cubins"].items()}
    )


def _cubin(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": str(raw["path"]),
        "size": _number(raw, "size", 1),
        "sha256": str(raw["sha256"]),
        "assembler": str(raw["assembler"]),
        "registers": _number(raw, "registers", 0),
        "spill_bytes": _number(raw, "spill_bytes", 0),
        "stack_bytes": _number(raw, "stack_bytes", 0),
    }

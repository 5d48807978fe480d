"""An engine bundle: open, verify, hash and sign. engines/README.md tells the format.

Order of trust: the manifest's signature, then its format, then its schema, then every file's hash.
Nothing of a bundle is parsed, and no network is loaded, before the step that vouches for it has
passed. `Bundle.read` hashes the very bytes that it returns.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from daemon.errors import BundleError
from daemon.keys import TrustedKey, foreign_hands
from daemon.types import Limits

FORMAT = 1
NETWORKS, BANK, CALIBRATION = "networks.onnx", "bank.safetensors", "calibration.safetensors"
QUALITY = "quality.safetensors"  # optional: bundles of before have none, and no check of the camera's set-up
FP16_NETWORKS = "networks.fp16.onnx"  # what plans are built of; there with targets for a GPU
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
_MAX_MANIFEST_BYTES = 4 << 20
_MAX_FILE_BYTES = 4 << 30

Branch = Literal["ldknn", "repair", "map"]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]
Side = Annotated[int, Field(ge=32, le=8192)]
_STRIDE = 32  # of our own networks: what their inputs are multiples of


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocessing(_Strict):
    """Frame -> network input. mean and std are on the scale 0..255; `area` averages when it shrinks."""

    size: tuple[Side, Side]  # (h w)
    color: Literal["rgb"] = "rgb"
    resize: Literal["area"] = "area"
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Positive, Positive, Positive]
    roi: None = None
    # The next two are done inside networks.onnx; they stand here for people.
    tiles: Literal["none", "2x2"] = "none"  # 2x2: the network sees four quarters of `size`, side by side
    exposure: Literal["as-is", "levelled"] = "as-is"  # levelled: every frame is brought to one mean brightness


class Standardisation(_Strict):
    """A branch's map is brought to (value - centre) / scale, robustly estimated on the select split."""

    centre: Finite
    scale: Positive


class Fusion(_Strict):
    weights: dict[str, Finite]
    standardisation: dict[str, Standardisation]
    smoothingSigma: NotNegative  # pixels of the network's input; 0: the map is as smooth as it shall be


class Product(_Strict):
    """What a product is judged by. bound95: 95 % upper bound of the false-reject rate, given n scores."""

    limit: Finite
    mapLimit: Finite
    targetFalseReject: Annotated[Finite, Field(gt=0, lt=1)]
    supportedFalseReject: Annotated[Finite, Field(gt=0, lt=1)]
    n: Annotated[int, Field(ge=1)]
    bound95: Annotated[Finite, Field(gt=0, le=1)]
    medianGood: Finite

    @property
    def limits(self) -> Limits:
        return Limits(self.limit, self.mapLimit)


class GoldenFrame(_Strict):
    file: str
    product: str
    score: Finite
    outcome: Literal["PASS", "REJECT"]


class Golden(_Strict):
    """Frames with their scores; tolerance is a fraction of (limit - medianGood), for each precision."""

    frames: Annotated[list[GoldenFrame], Field(min_length=1)]
    tolerance: dict[str, Finite]


class Manifest(_Strict):
    format: Literal[1]
    kind: Literal["fused", "crr", "foreign"]
    name: str
    version: str
    created: str
    preprocessing: Preprocessing
    branches: Annotated[list[Branch], Field(min_length=1, max_length=2)]
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    k: Annotated[int, Field(ge=1)]
    alpha: Finite
    distance: Literal["squared-l2"]
    fusion: Fusion
    scoreRule: Literal["max", "top1pct"]
    products: Annotated[dict[str, Product], Field(min_length=1)]
    metrics: dict[str, Any]
    training: dict[str, Any]
    golden: Golden
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]

    @model_validator(mode="after")
    def _is_complete(self) -> Manifest:
        wanted = {NETWORKS, CALIBRATION} | {frame.file for frame in self.golden.frames}
        wanted |= {BANK} if "ldknn" in self.branches else set()
        problems = [f"files: {name} is not listed" for name in sorted(wanted - set(self.files))]
        problems += [
            f"files: {name!r} is not a plain path inside the bundle" for name in self.files if not _is_plain(name)
        ]
        for branch in self.branches:
            if branch not in self.fusion.weights or branch not in self.fusion.standardisation:
                problems.append(f"fusion: nothing for the branch {branch}")
        # A network that gives the map itself is the whole engine: there is nothing beside it that it could join.
        is_map = self.branches == ["map"]
        if is_map == (self.kind == "fused") or (not is_map and "map" in self.branches):
            fitting = "ldknn, repair or both" if self.kind == "fused" else "map alone"
            problems.append(f"branches: found {', '.join(self.branches)}, kind {self.kind} wants {fitting}")
        for index, side in enumerate(self.preprocessing.size):
            if self.kind == "fused" and side % _STRIDE:
                problems.append(f"preprocessing.size.{index}: found {side}, kind fused wants multiples of {_STRIDE}")
        strangers = {frame.product for frame in self.golden.frames} - set(self.products)
        problems += [f"golden: no such product {name!r}" for name in sorted(strangers)]
        for name, product in self.products.items():
            # Else a part could be a DEFECT without a region: no mean of pixels is above their maximum.
            if product.limit != product.mapLimit:
                problems.append(f"products.{name}: the limit and the mapLimit are one")
            if product.limit <= product.medianGood:
                problems.append(f"products.{name}: the limit is not above the median good score")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `digest` is the SHA-256 of the manifest, and so of everything in it."""

    folder: Path
    manifest: Manifest
    digest: str

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, hashed as read. Raises BundleError if they are not what was signed."""
        wanted = self.manifest.files.get(name)
        if wanted is None:
            raise BundleError(f"{self.folder / name}: is not listed in the manifest")
        for parent in PurePosixPath(name).parents:
            if (self.folder / parent).is_symlink():
                raise BundleError(f"{self.folder / parent}: is a link; a bundle holds plain files and folders only")
        data = _read_plain(self.folder / name, _MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise BundleError(
                f"{self.folder / name}: its content is not what was signed; build or copy the bundle again"
            )
        return data

    def product(self, name: str | None) -> str:
        """The named product, or the only one there is. Raises BundleError."""
        products = list(self.manifest.products)
        if name is None and len(products) == 1:
            return products[0]
        if name in self.manifest.products:
            return str(name)
        raise BundleError(f"{self.folder}: found product {name!r}, wanted one of {', '.join(products)} (--product)")


def open_bundle(folder: Path, trusted: Iterable[TrustedKey]) -> Bundle:
    """Verify everything and give the bundle. Raises BundleError, which names the file at fault."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise BundleError(f"{folder}: no bundle is there, wanted an engine; build one with build_engines.py")
    if not (folder / MANIFEST).exists() and (folder / "current").exists():
        raise BundleError(f"{folder}: holds the versions of an engine, wanted one of them; name {folder / 'current'}")
    manifest_bytes = _read_plain(folder / MANIFEST, _MAX_MANIFEST_BYTES)
    _check_signature(folder, manifest_bytes, list(trusted))
    manifest = _parse_manifest(folder / MANIFEST, manifest_bytes)
    bundle = Bundle(folder, manifest, hashlib.sha256(manifest_bytes).hexdigest())
    for name in manifest.files:
        bundle.read(name)
    return bundle


def _check_signature(folder: Path, manifest: bytes, trusted: list[TrustedKey]) -> None:
    path = folder / SIGNATURE
    try:
        signature = base64.b64decode(_read_plain(path, 1024), validate=True)
    except binascii.Error as error:
        raise BundleError(f"{path}: is not a signature (base64 of 64 bytes)") from error
    if not any(key.verifies(signature, manifest) for key in trusted):
        names = ", ".join(key.name for key in trusted) or "none"
        raise BundleError(
            f"{path}: does not sign {MANIFEST} with a trusted key (trusted: {names}); the manifest was changed, or its "
            "builder's public key is missing from trusted.yaml: bring that file from the building machine"
        )


def _parse_manifest(path: Path, data: bytes) -> Manifest:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is not JSON: {error}") from error
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path}: has format {found!r}, this version reads format {FORMAT}; build the engine again")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False))
        raise BundleError(f"{path}: {faults}") from error


def seal_bundle(folder: Path, fields: dict[str, Any], key: Ed25519PrivateKey) -> Manifest:
    """Hash every file below `folder`, write the manifest and sign it. Raises BundleError if it breaks the schema."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: _hash_file(folder / name) for name in names if name not in (MANIFEST, SIGNATURE)}
    data = json.dumps({**fields, "files": files}, indent=1, allow_nan=False).encode()
    manifest = _parse_manifest(folder / MANIFEST, data)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(base64.b64encode(key.sign(data)))
    for name in (*files, MANIFEST, SIGNATURE):
        path = folder / name
        path.chmod(path.stat().st_mode & ~0o022)  # whatever the builder's umask
    return manifest


def current_bundle(engines: Path, product: str) -> Path:
    """The folder that engines/<product>/current points to. Raises BundleError."""
    link = engines / product / "current"
    if not link.exists():
        raise BundleError(
            f"{link}: no current engine for {product!r}; build one with: build_engines.py {product} --good DIR"
        )
    return link.resolve()


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(name)
        and "\0" not in name
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and str(path) == name
    )


def _read_plain(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file (a link is refused: it could lead out of the bundle)."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path}: is not a plain file")
            if problem := foreign_hands(status):
                raise BundleError(f"{path}: {problem}")
            if status.st_size > most_bytes:
                raise BundleError(f"{path}: has {status.st_size} bytes, at most {most_bytes} are read")
            return file.read()
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing; a bundle is whole or worthless: copy it again, or build it") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read as a plain file: {error.strerror}") from error


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

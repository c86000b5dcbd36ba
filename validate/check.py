"""Checks a whole bundle without trusting it: no file is parsed before its digest is right, no graph runs before all are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from patchslim.errors import InputRejected, Unavailable
from patchslim.files import digest
from patchslim.packages import install_command
from patchslim.signatures import SIGNATURE, verify_folder
from validate import bundle as files
from validate.bundle import list_files, read_manifest
from validate.engine_checks import Running
from validate.engine_runs import EngineChoice, EngineRun
from validate.graph_checks import check_graphs
from validate.isolated import Limits
from validate.manifest import Manifest
from validate.parity_records import Gate
from validate.record_checks import check_engine_ran, check_records, read_parity
from validate.verdict import BundleVerdict, Check, failed

Progress = Callable[[str], None]
_MAX_TOTAL = 64 << 30  # bytes of a bundle: a file may be as large as it says and hold nothing, but it would be hashed
_ATTEMPTS = 3  # at a folder whose place other bundles take while it is read


def check_bundle(
    folder: Path,
    *,
    provider: str | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    limits: Limits | None = None,
    expect_manifest_sha256: str | None = None,
    require_executed: bool = False,
    engines: EngineChoice | None = None,
    public_key: Path | None = None,
) -> BundleVerdict:
    """Check the bundle in ``folder``: records, files, digests, figures, graphs, and the golden logits in ONNX Runtime.

    A fault of the bundle is in the verdict and never raised; later checks are left out when an earlier one makes them
    meaningless or unsafe. Models run in processes of their own, within ``limits``. ``progress`` is told what is looked at next.

    The digests prove that the files are those of the manifest, and nothing against one who can write the folder: with
    ``expect_manifest_sha256``, which came another way, they do. ``require_executed`` fails a bundle whose engine never ran
    where it was built. Where another bundle takes the folder's place meanwhile, that one is checked. ``engines`` are others
    than ONNX Runtime to run the models in as well, or in its place. With a ``public_key`` the bundle must carry its owner's
    signature.

    What a package that is not installed would be needed for is ``unchecked``. Raises ``Unavailable`` where a ``provider`` is
    asked for (None: the CPU's, if there is any) and is not here, and with ``require_executed`` where anything is unchecked.
    """
    say = progress or (lambda _: None)
    how = Running(engines or EngineChoice(), limits or Limits(), provider, threads)
    before = _identity(folder)
    for _ in range(_ATTEMPTS):
        verdict = _check_bundle(folder, say, how, Trust(expect_manifest_sha256, public_key, require_executed))
        if verdict.passed or (after := _identity(folder)) == before:
            break
        before = after
    if require_executed and verdict.passed and verdict.unchecked:
        raise Unavailable(f"{'; '.join(verdict.unchecked)}; install it: {install_command('edge')}")
    return verdict


def _identity(folder: Path) -> tuple[int, int] | None:
    """What another folder of the same name does not have; None where there is none."""
    with contextlib.suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


@dataclasses.dataclass(frozen=True)
class Trust:
    """What came another way than the bundle, and what is asked of it."""

    manifest_sha256: str | None
    public_key: Path | None
    require_executed: bool

    def check_signature(self, folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
        """The whole folder is signed by the owner of the public key; without one only that a signature is there is said."""
        signed = (folder / SIGNATURE).is_file()
        if self.public_key is None:
            if signed:
                detail = "not checked: needs the signer's public key"
                yield Check(name="signature", subject=SIGNATURE, status="not executed", detail=detail)
            return
        say(SIGNATURE)
        try:
            if not signed:
                raise InputRejected(f"{folder}: is not signed, and a public key was given")
            verify_folder(folder, self.public_key)
        except InputRejected as error:
            yield failed("signature", SIGNATURE, error)
            return
        detail = f"every file, by the owner of {self.public_key.name}"
        yield Check(name="signature", subject=SIGNATURE, status="passed", detail=detail)


def _check_bundle(folder: Path, say: Progress, how: Running, trust: Trust) -> BundleVerdict:
    checks: list[Check] = []
    runs: list[EngineRun] = []
    manifest: Manifest | None = None
    sha256: str | None = None
    gate: Gate | None = None
    say("manifest.json")
    try:
        if not folder.is_dir():
            raise InputRejected(f"{folder}: is not a folder")
        manifest, sha256 = read_manifest(folder)
        if trust.manifest_sha256 is not None and sha256 != trust.manifest_sha256.lower():
            raise InputRejected(f"{folder / files.MANIFEST}: its SHA-256 is {sha256}, not {trust.manifest_sha256.lower()}")
        known = "of the digest expected" if trust.manifest_sha256 else f"SHA-256 {sha256}"
        checks.append(Check(name="manifest", subject=files.MANIFEST, status="passed", detail=f"valid, version 1, {known}"))
        for stage in (_check_files, trust.check_signature, check_records):
            found = list(stage(folder, manifest, say))
            checks += found
            if any(check.exit_code for check in found):
                break
        else:
            checks += check_engine_ran(manifest, trust.require_executed)
            checks += check_graphs(folder, manifest, say, how, runs)
    except (InputRejected, OSError) as error:  # OSError: a file went away after it was listed
        checks.append(failed("manifest" if manifest is None else "bundle", str(folder), str(error)))
    if manifest is not None and any(check.name == "files" and check.status == "passed" for check in checks):
        with contextlib.suppress(InputRejected):  # said already
            gate = read_parity(folder, manifest).gate
    return BundleVerdict(
        folder=str(folder),
        checks=checks,
        manifest=manifest,
        manifest_sha256=sha256,
        engines=runs,
        max_top1_drop=None if gate is None else gate.max_top1_drop,
        gate_rule="point" if gate is None else gate.rule,
    )


def _check_files(folder: Path, manifest: Manifest, say: Progress) -> Iterator[Check]:
    """Every listed file is there with its size and digest, and nothing else is. All sizes are looked at before any hashing."""
    names = list_files(folder)
    present = set(names) - files.UNLISTED
    listed = {record.path for record in manifest.files}
    faults = [failed("files", name, f"{folder / name}: is not listed in manifest.json") for name in sorted(present - listed)]
    for record in manifest.files:
        path = folder / record.path
        if record.path not in present:
            faults.append(failed("files", record.path, f"{path}: is missing, but manifest.json lists it"))
        elif (size := path.lstat().st_size) != record.size:
            fault = f"{path}: has {size} bytes, not {record.size}: truncated or replaced"
            faults.append(failed("files", record.path, fault))
    total = sum(record.size for record in manifest.files)
    if total > _MAX_TOTAL:
        faults.append(failed("files", "all", f"{folder}: its files have {total} bytes, more than the {_MAX_TOTAL} allowed"))
    yield from faults
    if total > _MAX_TOTAL:
        return
    for record in manifest.files:
        if any(fault.subject == record.path for fault in faults):
            continue
        say(record.path)
        if digest(folder / record.path) != record.sha256:
            fault = f"{folder / record.path}: its SHA-256 is not the one in manifest.json: corrupt or replaced"
            faults.append(failed("files", record.path, fault))
            yield faults[-1]
    if not faults and files.SUMS in names and (fault := files.sums_fault(folder, manifest)):
        faults.append(failed("files", files.SUMS, fault))
        yield faults[-1]
    if not faults:
        yield Check(name="files", subject="all", status="passed", detail=f"{len(listed)} listed, {total} bytes")

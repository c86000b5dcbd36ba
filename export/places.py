"""Where an export reads and writes: places that would spoil each other are refused before anything is read."""

from __future__ import annotations

import os
from pathlib import Path

from export.options import ExportOptions
from export.source import data_files
from patchslim.errors import UsageError


def check_places(options: ExportOptions) -> None:
    """Raise ``UsageError`` where the bundle and the work folder are one, or where either lies among the images."""
    output, work = _real(options.bundle), _real(options.work_folder)
    if output == work or work.is_relative_to(output):
        raise UsageError(
            f"--work {options.work_folder} and --output {options.bundle}: the work folder would be part of the bundle; "
            "pass another --work or --output"
        )
    images = {"--data": options.data, "--calibration-data": options.calibration_data, "--train-data": options.train_data}
    for option, address in images.items():
        for path in data_files(address or "digits") or []:
            data = _real(path)
            for name, place, written in (("--output", options.bundle, output), ("--work", options.work_folder, work)):
                if data.is_dir() and written.is_relative_to(data):
                    raise UsageError(
                        f"{name} {place}: lies in {option} {address}, where its pictures would be read as images; "
                        f"pass a {name} outside of it"
                    )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))

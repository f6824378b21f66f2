"""What a model's safetensors files hold, from their headers: no weight is read."""

import json
from pathlib import Path

from entroray.errors import PreflightError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def model_folder(path: str) -> Path | None:
    """Where the model lies; a hub id is looked for in the hub's cache, never in the hub."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a path of no folder is no hub id either
        return None
    return Path(found).parent if isinstance(found, str) else None


def tensor_shapes(place: Path) -> dict[str, list[int]]:
    """Shape of every tensor by its name in the files of `place`; none where one of them is not there.

    Raises PreflightError where a file is something else, such as a pointer of Git LFS.
    """
    return {name: t["shape"] for f in weight_files(place) for name, t in read_header(f).items()}


def weight_files(place: Path) -> list[Path]:
    """The safetensors files of a model, all or none."""
    index = place / INDEX
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {WHOLE}
        files = sorted(place / name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreflightError(f"{index} does not list files of weights: download it again") from error
    return files if all(f.is_file() for f in files) else []


def read_header(file: Path) -> dict[str, dict]:
    """What a safetensors file says of each tensor: its first 8 bytes, little-endian, are the header's length.

    PreflightError unless the file is as long as its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header: dict[str, dict] = json.loads(opened.read(min(length, size)))
            header.pop("__metadata__", None)
            whole = size == 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
    if not whole:
        raise PreflightError(f"{file} is no safetensors file, or not a whole one: download it again")
    return header

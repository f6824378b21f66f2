"""conf/, the folder of YAML, found in a checkout and in a wheel; and the rows of conf/objective by name."""

from functools import cache
from pathlib import Path
from typing import Any

from entroray.errors import ConfigError, PreflightError, nearest

PACKAGE = Path(__file__).parent


@cache
def conf_folder() -> Path:
    """The folder of YAML: in the package of a wheel, beside it in a checkout; PreflightError without one."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise PreflightError(
        f"there is no conf/ in or beside {PACKAGE}: reinstall entroray, or run it from a checkout"
    )


def in_checkout() -> bool:
    """Whether this is a checkout, with launch/ and tests/, and not a package that was installed from one."""
    return (PACKAGE.parent / "launch" / "setup.sh").is_file()


def repository_file(path: str) -> str:
    """How a sentence names a file of the repository, which an installed package has not."""
    return path if in_checkout() else f"{path} of entroray's repository"


def objective_names() -> list[str]:
    """Every row of conf/objective."""
    return sorted(path.stem for path in (conf_folder() / "objective").glob("*.yaml"))


def objective_row(name: str) -> dict[str, Any]:
    """The row called `name`, without the control that may come with it; ConfigError if there is none."""
    if name not in objective_names():
        raise ConfigError(f"conf/objective has no row `{name}`: {nearest(name, objective_names())}")
    from omegaconf import OmegaConf  # a rank is given its objective, and reads no row

    row = OmegaConf.to_container(OmegaConf.load(conf_folder() / "objective" / f"{name}.yaml"))
    assert isinstance(row, dict)
    return {str(k): v for k, v in row.get("objective", row).items()}

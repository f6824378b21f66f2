"""A command line -> its flags and its settings; what begins with a dash and is no flag is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from entroray.errors import ConfigError


@dataclass(frozen=True)
class Flag:
    """`--name VALUE` or `--name=VALUE`; `--name` alone where nothing is taken."""

    name: str
    takes: str = ""
    """What stands for the value, in capitals, or the one word it may be."""
    short: str = ""
    """Another spelling, with one dash."""

    def __str__(self) -> str:
        return f"--{self.name} {self.takes}".rstrip()

    def fits(self, value: str) -> bool:
        """Whether `value`, empty where none is given, is one that it takes."""
        return value == self.takes if self.takes == self.takes.lower() else bool(value)


CONFIG_DIR = Flag("config-dir", "FOLDER", short="-cd")
"""A folder of one's own YAML beside conf/."""


def parse_flags(
    command: str, arguments: Sequence[str], allowed: Sequence[Flag]
) -> tuple[dict[str, str], list[str]]:
    """(value by flag, what is no flag) of a command line; the last of a repeated flag holds.

    Raises ConfigError with the flags of `command` for another flag, or for one whose value is missing or
    not what it takes.
    """
    known = {spelt: flag for flag in allowed for spelt in (f"--{flag.name}", flag.short) if spelt}
    found, others = dict[str, str](), list[str]()
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            others.append(argument)
            continue
        spelt, joined, value = argument.partition("=")
        flag = known.get(spelt)
        if flag and flag.takes and not joined:
            value = next(rest, "")
        if flag is None or not flag.fits(value):
            raise ConfigError(
                f"{command} does not take {spelt} {value}".rstrip()
                + f": it takes {', '.join(map(str, allowed))}, and settings as key=value"
            )
        found[flag.name] = value
    return found, others

"""The errors a user can meet. A leaf: every package may import it, and it imports nothing.

A ``UserError`` is shown as one clear line (what, which value, what to do) and ends the command with exit
code 1. Every other exception is a bug and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right. The message names the thing, its value and what would be right."""


class RecipeError(UserError):
    """A recipe with wrong fields; the message lists all of them."""


class SpaceError(UserError):
    """A search space with wrong fields; the message lists all of them."""


class SearchError(UserError):
    """A search that cannot begin, cannot go on, or has no result."""


class UnknownNameError(UserError):
    """A model, shipped weights or served artifact of a name that there is not (in a recipe it is a ``RecipeError``)."""


class DataError(UserError):
    """Images that are missing, damaged or unusable."""


class BudgetError(UserError):
    """A student with too many parameters."""


class RunError(UserError):
    """A run directory that is missing, unfinished, locked or holds another run."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or belongs to another model."""


class TeacherError(UserError):
    """A teacher that is missing or does not fit the data."""


class DivergedError(UserError):
    """Training whose numbers are no longer finite, or that answers no better than a guess."""


class ArtifactError(UserError):
    """An ONNX file that is empty, damaged or not made by this toolkit."""


class ParityError(UserError):
    """An artifact whose outputs are not those of PyTorch."""


class DeviceError(UserError):
    """A device or provider that was asked for and cannot be had."""


class ImageError(UserError):
    """An image that cannot be taken; where no class below says why, it is broken."""


class ImageFormatError(ImageError):
    """Not an image, or one of a format that is not taken."""


class ImageSizeError(ImageError):
    """An image that declares more pixels than are read."""


class Interrupted(UserError):
    """A run that was stopped by Ctrl-C or SIGTERM after its state had been saved."""


# What to try next, by type; printed after the message where the message does not already say it.
NEXT: dict[type[UserError], str] = {
    UnknownNameError: "`toolkit models` lists the models.",
    DivergedError: "Try a lower learning rate (--lr; muon: --set optimizer.filter_lr), --set optimizer.grad_clip=1, "
    "or --set precision=fp32.",
    DeviceError: "`toolkit doctor` shows what this machine can do.",
    ArtifactError: "`toolkit export` makes an artifact from a finished run.",
    CheckpointError: "Train again with another --run-dir, or give another checkpoint.",
}


def in_line(said: object, most: int = 400) -> str:
    """What others raised, as the end of a message: one line of at most so many characters."""
    text = " ".join(str(said).split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def listing(wrong: str, problems: Sequence[str]) -> str:
    """That something is wrong, and a line for each problem."""
    head = wrong if len(problems) == 1 else f"{wrong} in {len(problems)} places"
    return f"{head}:\n" + "\n".join(f"  {problem}" for problem in problems)


def install(extra: str) -> str:
    """How to get what an optional part of the toolkit needs."""
    return f"run pip install -e '.[{extra}]' in the toolkit's folder"


def next_step(error: UserError) -> str:
    """The line from ``NEXT`` for this error, or an empty string."""
    return next((text for kind, text in NEXT.items() if isinstance(error, kind)), "")

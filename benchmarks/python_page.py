"""Run the cells of docs/python.md and write their output below each, as a notebook does.

    python benchmarks/python_page.py docs/python.md

A cell is a block of ```python; what it prints, and the value of its last line, become the block of ```text behind it.
Nothing else of the page changes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

CELL = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def run(source: str, names: dict[str, object]) -> str:
    """What a cell prints, and the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if value is not None:
            print(repr(value))
    return printed.getvalue()


def main(page: Path) -> None:
    page, names = page.resolve(), dict[str, object]()
    text = page.read_text()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):

        def cell(match: re.Match[str]) -> str:
            output = run(match[1], names).replace(os.fspath(folder), "")
            return f"```python\n{match[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

        page.write_text(CELL.sub(cell, text))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

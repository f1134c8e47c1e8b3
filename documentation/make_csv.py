"""Write the figures of documentation/experiments/*.md as CSV beside each page: `python documentation/make_csv.py`."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

FOLDER = Path(__file__).with_name("experiments")


def tables(page: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table of a markdown page; an empty first cell repeats the one above it."""
    found = []
    for block in re.findall(r"(?:^ *\|.*\n)+", page, re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines())
        for above, row in zip(rows, rows[1:], strict=False):
            row[0] = row[0] or above[0]
        found.append(([unique(names, column) for column in range(len(names))], rows))
    return found


def unique(names: list[str], column: int) -> str:
    """The header of a column; a second one of the same name gets a 2."""
    earlier = names[:column].count(names[column])
    return (names[column] or "-") + (f" {earlier + 1}" if earlier else "")


def text(page: str) -> str:
    """One row per row of a table, one column per header of any of them; `table` counts the tables of the page."""
    found = tables(page)
    columns = dict.fromkeys(name for header, _ in found for name in header)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["table", *columns], lineterminator="\n")
    writer.writeheader()
    for number, (header, rows) in enumerate(found, 1):
        for row in rows:
            writer.writerow({"table": number} | {name: plain(cell) for name, cell in zip(header, row, strict=True)})
    return out.getvalue()


def plain(cell: str) -> str:
    """A cell without markup; a dash stands for no value."""
    cell = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell).replace("`", "").replace("**", "")
    return "" if cell == "-" else re.sub(r"(?<=\d) (?=\d{3}\b)", "", cell)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.md")):
        path.with_suffix(".csv").write_text(text(path.read_text(encoding="utf-8")), encoding="utf-8")

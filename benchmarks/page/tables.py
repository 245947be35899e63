"""How docs/results.md writes figures: Markdown tables, shares, sizes, and where a figure comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def paragraphs(*parts: str) -> str:
    """Parts with an empty line between them."""
    return "\n\n".join(part for part in parts if part)


def table(headings: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(share: float) -> str:
    """0.979 -> "97.9"."""
    return f"{100 * share:.1f}"


def percent(share: Sequence[float] | None) -> str:
    """[value, low, high] -> "97.9 (89.1 to 99.6)", or a dash."""
    if share is None or share[0] is None:
        return "-"
    value, low, high = map(number, share)
    return f"{value} ({low} to {high})"


def ratio(row: dict) -> str:
    """A row's "ratio" and "spread" -> "0.993 (0.975 to 1.008)"."""
    low, high = row["spread"]
    return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"


def count(size: int) -> str:
    """Bytes: "14.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def source(name: str, command: str, figures: dict | Sequence[dict]) -> str:
    """The file, the command that makes it, and the machine and versions that the file names."""
    rows = [figures] if isinstance(figures, dict) else figures
    machines = dict.fromkeys(row["machine"] for row in rows if row.get("machine"))
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row.get("versions", {})
    made = ["; ".join(machines), ", ".join(f"{package} {version}" for package, version in versions.items())]
    said = "; ".join(part for part in made if part) or "the file names neither machine nor versions"
    return f"[{name}](../benchmarks/results/{name}), by `{command}`; {said}."

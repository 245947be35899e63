"""`semiperm bench watermark`: its options and tables; the figures themselves are tested in tests/benchmarks."""

import json

import pytest
from semiperm.benchmarks.page import watermark as page
from semiperm.benchmarks.watermark import run as bench
from semiperm.cli import app, bench_watermark, common
from typer.testing import CliRunner

SHARE = [0.987, 0.9, 1.0]
ROWS = [
    {
        "table": "null",
        "mark": "semiperm",
        "latents": "normal, a key each",
        "shape": [4, 16, 16],
        "n": 2000,
        "rates": [{"alpha": 0.001, "count": 3, "interval": [0, 6]}],
        "ks_small": [0.01, 0.456],
        "ks_tail": None,
        "ks_single": [0.02, 0.789],
    },
    {
        "table": "classifier",
        "mark": "semiperm",
        "classifier": "pairs",
        "shape": [4, 16, 16],
        "n": 800,
        "accuracy": 0.512,
        "interval": [0.455, 0.545],
    },
    *(
        {
            "table": "channel",
            "mark": "semiperm",
            "shape": [4, 64, 64],
            "bits": bits,
            "rho": rho,
            "n": 4,
            "exact": SHARE,
            "detected": SHARE,
            "right": None,
        }
        for bits in (128, 192)
        for rho in (0.2, 0.3)
    ),
    *(
        {
            "table": "attack",
            "mark": mark,
            "attack": attack,
            "n": 4,
            "tpr": SHARE,
            "detected": SHARE,
            "exact": exact,
            "evaluations": 1.25,
        }
        for mark, exact in (("semiperm", SHARE), ("tree-ring", None))
        for attack in ("none", "jpeg:50", "mean")
    ),
    {
        "table": "guidance",
        "guidance": 2.5,
        "n": 4,
        "agreement": {"0": 0.61, "5": 0.79},
        "detected": SHARE,
        "exact": SHARE,
        "evaluations": 1.0,
    },
    {"table": "decoder", "latents": "encoder", "n": 4, "agreement": 0.791, "detected": SHARE, "exact": SHARE},
    {
        "table": "quality",
        "mark": "semiperm",
        "n": 4,
        "object": SHARE,
        "style": SHARE,
        "background": SHARE,
        "distance": 1.234,
        "interval": [1.0, 2.0],
        "p_value": 0.321,
    },
    {
        "table": "forgery",
        "attack": "reprompt",
        "n": 4,
        "authentic": SHARE,
        "forged": SHARE,
        "caught": None,
        "valid": SHARE,
        "shown": SHARE,
        "unbound": 0,
        "draws": 2.0,
    },
    *(
        {
            "table": "sampler",
            "face": face,
            "sampler": "ddim",
            "options": {"eta": eta},
            "steps": 25,
            "guidance": 4.0,
            "n": 8,
            "found": found,
            "log10_p": -41.4,
        }
        for face in ("diffusers", "comfyui")
        for eta, found in ((0.1, 8), (1.0, 3))
    ),
    {
        "table": "speed",
        "what": "bank",
        "shape": [4, 64, 64],
        "keys": 10000,
        "threads": 2,
        "rounds": 5,
        "ms": 881.9,
        "best_ms": 870.1,
        "peak_mb": 329,
        "extra_mb": 14,
    },
]


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def run(quick, parts, workers, resume, starting, world):
        assert world == "canvas"
        calls.append((quick, parts, workers, resume))
        starting("latents", 2)(1)
        return ROWS

    monkeypatch.setattr(bench, "run", run)
    return calls


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "watermark", *map(str, arguments)], env={"COLUMNS": "200"})


def test_every_table_is_printed_and_written(asked, tmp_path):
    result = invoke("--quick", "--workers", 1, "--resume", tmp_path / "units.jsonl", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert asked == [(True, list(bench.PARTS), 1, tmp_path / "units.jsonl")]
    assert json.loads((tmp_path / "rows.json").read_text()) == ROWS
    for figure in (
        "3 (0..6)",
        "0.456",
        "0.512",
        "0.99/0.99",
        "98.7%",
        "1.2",
        "0.790",
        "1.234 (1.000..2.000)",
        "881.90",
        "8/8 (-41)",
        "3/8 (-41)",
    ):
        assert figure in result.output, figure
    for heading in (
        "4x64x64, 128 bits",
        "4x64x64, 192 bits",
        "tree-ring",
        "reprompt",
        "a coin: 0.455",
        "comfyui",
        "eta=1.0",
    ):
        assert heading in result.output, heading


def test_parts_are_chosen_and_mistakes_are_one_line(asked, monkeypatch):
    assert invoke("--part", "speed", "--part", "latents").exit_code == 0
    assert asked[-1][:2] == (False, ["speed", "latents"])
    result = invoke("--part", "sped")
    assert result.exit_code == 2 and "choose among latents, linked, canvas, repaint, everyday, speed" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

    result = invoke("--comfyui", "somewhere")
    assert result.exit_code == 2 and "--part samplers" in result.stderr

    def broken(*arguments):
        raise bench.TimingError("timing sign ended with 1:\nMemoryError")

    monkeypatch.setattr(bench, "run", broken)
    result = invoke()
    assert result.exit_code == 2 and result.stderr.strip().endswith("MemoryError")


def test_comfyuis_samplers_are_measured_by_its_own_python(asked, monkeypatch, tmp_path):
    from semiperm.benchmarks import launch

    for file in (tmp_path / "ComfyUI" / "main.py", tmp_path / "venv" / "bin" / "python"):
        file.parent.mkdir(parents=True)
        file.touch()
    calls = []
    monkeypatch.setattr(launch, "run_in_comfyui", lambda *arguments: calls.append(arguments) or [ROWS[-2]])
    out = tmp_path / "rows.json"
    options = ("--part", "samplers", "--quick", "--json", out, "--resume", tmp_path / "units.jsonl")
    result = invoke(*options, "--comfyui", tmp_path / "ComfyUI")
    assert result.exit_code == 0, result.output
    ((path, python, script, resume, size),) = calls
    assert (path, python) == (tmp_path / "ComfyUI", tmp_path / "venv" / "bin" / "python") and script.is_file()
    assert (resume, size) == (f"{tmp_path / 'units.jsonl'}.comfyui", "quick")
    assert json.loads(out.read_text()) == [*ROWS, ROWS[-2]]


def test_figures_of_other_parts_stay(asked, monkeypatch, tmp_path):
    file = tmp_path / "figures.json"
    before = [
        {"table": "null", "latents": "normal, a key each", "n": 1},
        {"table": "null", "latents": "canvas pictures, a key each", "n": 2},
        {"table": "linked", "n": 3},
        {"table": "attack", "n": 4},
    ]
    fresh = [{"table": "null", "latents": "canvas pictures, a key each", "n": 5}, {"table": "attack", "n": 6}]
    file.write_text(json.dumps(before))
    assert [row["n"] for row in bench_watermark.kept(file, ["canvas"], fresh)] == [1, 3]
    assert bench_watermark.kept(file, list(bench.PARTS), fresh) == []
    assert bench_watermark.kept(tmp_path / "none.json", ["canvas"], fresh) == []
    faces = [{"table": "sampler", "face": face, "n": n} for n, face in enumerate(("diffusers", "comfyui"))]
    (tmp_path / "samplers.json").write_text(json.dumps(faces))
    kept = bench_watermark.kept(tmp_path / "samplers.json", ["samplers"], [faces[0]])
    assert kept == faces[1:], "another face's rows, which were not measured again"
    file.write_text("[1]")
    with pytest.raises(common.CliError, match="no file of this command's figures"):
        bench_watermark.kept(file, ["canvas"], fresh)


def test_the_pages_parts_are_the_commands():
    assert {name: set(tables) for name, tables in page.PARTS.items()} == {
        name: set(bench.TABLES[name]) - ({"null"} if name == "canvas" else set()) for name in bench.PARTS
    }
    assert set(page.FIELDS) == set().union(*page.PARTS.values()) and set(page.TITLES) == set(page.PARTS)


@pytest.mark.parametrize("lacks", ["table", "field"])
def test_a_part_of_an_older_form_says_what_makes_it_again(lacks):
    row = {"table": "repaint", "attack": "grey", "way": "ladder", "n": 4, "tpr": SHARE, "detected": SHARE}
    whole = page.part([row], "repaint", "canvas", page.repaint)
    assert "98.7 (90.0 to 100.0)" in whole and "--part repaint --resume" in whole
    older = [] if lacks == "table" else [{name: value for name, value in row.items() if name != "way"}]
    text = page.part(older, "repaint", "canvas-flow", page.repaint)
    command = "semiperm bench watermark --world canvas-flow --part repaint --resume watermark.jsonl"
    assert f"No figures of today's form yet; `{command} --json benchmarks/results/watermark_canvas-flow.json`" in text
    assert text.startswith("### Repainted, and grey\n\n") and page.watermark([]).count("No figures") == len(page.PARTS)


def test_every_table_has_a_part_and_a_printer():
    rows = [
        dict(
            table="linked", shape=[4, 16, 16], format=2, n=9, nonce_bits=14, largest=9.5, pairs=3, decades=4.2, ms=8.0
        ),
        dict(table="repaint", attack="grey", way="ladder", n=9, tpr=[0.5, 0.4, 0.6], detected=[0.25, 0.2, 0.3]),
        dict(table="everyday", conversion="png", n=9, detected=[1, 0.9, 1], exact=[1, 0.9, 1], seconds=0.5),
    ]
    printed = list(bench_watermark.tables(rows))
    assert [table.row_count for table in printed] == [1, 1, 1]
    assert set(bench.TABLES) == {*bench.PARTS, *bench.ON_REQUEST}

"""The benchmark's own rules: a wrong provider gets no time, records and tables are whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import machine, providers, quant_table, readme_table, record, report, run
from benchmarks.gate import Gate
from benchmarks.providers import Case
from benchmarks.timing import Quartiles, measure
from lora_kernels.testing import BudgetExceededError

ARGUMENTS = ["--shapes", "33,40,50", "--dtype", "bf16,fp32", "--rank", "4", "--rounds", "3",
             "--providers", "aten,reference", "--no-memory"]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    out, chart = folder / "result.json", folder / "chart.png"
    assert run.main([*ARGUMENTS, "--json", str(out), "--png", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "a temporary file was left"
    return json.loads(out.read_text())


def test_a_run_writes_a_whole_record(result):
    assert result["schema"] == record.SCHEMA
    assert result["command"].startswith("python -m benchmarks.run --shapes 33,40,50")
    assert "--json" not in result["command"]
    assert len(result["rows"]) == 2 * 2 * 3  # dtypes, modes, providers with the baseline
    for row in result["rows"]:
        assert row["skipped"] is None
        low, high = row["iqr_ms"]
        assert 0 < low <= row["median_ms"] <= high
        if row["provider"] == providers.BASELINE:
            assert row["ratio_iqr"] == [1.0, 1.0]
    assert (result["amx_peak"]["gflops"] is None) or result["amx_peak"]["gflops"] > 0
    assert result["amx_peak"]["reason"]


def test_every_field_of_a_record_is_documented(result):
    text = (record.RESULTS / "README.md").read_text()
    for name in {*result, *result["device"], *(key for row in result["rows"] for key in row)}:
        assert f"`{name}`" in text, f"results/README.md does not describe {name}"


def test_a_wrong_provider_is_not_timed(monkeypatch, tmp_path, capsys):
    def without_the_update(case: Case, name: str, *rest):
        built = real(case, name, *rest)
        x, w = built.x, built.inputs.weights[0]

        def layer(t):
            return torch.nn.functional.linear(t, w) + 0.0 * built.layer(t)

        return replace(built, layer=layer, x=x)

    real = providers._op
    monkeypatch.setattr(providers, "_op", without_the_update)
    out = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, "--json", str(out)]) == 1
    for row in json.loads(out.read_text())["rows"]:
        if row["provider"] in ("aten", "reference"):
            assert row["skipped"].startswith("WRONG: ")
            assert "median_ms" not in row
    assert "not timed: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["peft", "peft-fp32", "reference", "aten", "aten-fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_provider_passes_the_gate(name, dropout_p):
    if name.startswith("peft"):
        pytest.importorskip("peft")
    case = Case(65, 72, 80, 4, torch.bfloat16, dropout_p)
    margin = Gate().check(providers.build(name, case), case)
    assert 0 < margin.rms <= 1


def test_gate_notices_a_wrong_gradient():
    case = Case(65, 72, 80, 4, torch.float32)
    built = providers.build("aten", case)
    x, a, b = built.leaves
    with pytest.raises(BudgetExceededError, match=r"d[ab]"):
        Gate().check(replace(built, leaves=(x, b, a)), case)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "1,2"], "--shapes"),
        (["--shapes", "0,2,3"], "--shapes"),
        (["--dtype", "int8"], "--dtype"),
        (["--providers", "torch"], "--providers"),
        (["--modes", "bwd"], "--modes"),
        (["--rank", "0"], "--rank"),
        (["--dropout", "2"], "--dropout"),
    ],
)
def test_bad_arguments_are_refused(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        run.parse(arguments)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_turns_are_interleaved_and_rotate():
    turns: list[str] = []
    works = {name: lambda name=name: turns.append(name) for name in "abc"}
    timings = measure(works, "a", rounds=3, round_seconds=0.0, warm_up=2)
    assert "".join(turns) == "aabbcc" + "abc" + "bca" + "cab"
    assert timings["a"].ratio == Quartiles(1.0, 1.0, 1.0)


def test_every_provider_has_a_colour():
    assert set(report.COLORS) == set(providers.LABELS) - {providers.BASELINE}


def test_quartiles():
    assert Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(3.0, 2.0, 4.0)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)


def test_readme_region_is_filled_and_the_rest_kept(result, tmp_path, capsys):
    readme, source = tmp_path / "README.md", tmp_path / "r.json"
    readme.write_text(f"# A\n{readme_table.BEGIN}\nold\n{readme_table.END}\ntail\n")
    record.save(source, result)
    for _ in range(2):  # filling twice changes nothing more
        assert readme_table.main(["--readme", str(readme), "--record", str(source)]) == 0
    text = readme.read_text()
    assert text.startswith("# A\n")
    assert text.endswith(f"{readme_table.END}\ntail\n")
    assert "old" not in text
    assert text.count("| 33×40×50 |") == 4
    assert result["commit"] in text


@pytest.mark.parametrize(
    "content", ["no markers", "<!-- benchmark:end --><!-- benchmark:begin -->"]
)
def test_readme_without_markers_is_left_alone(result, tmp_path, content, capsys):
    readme, source = tmp_path / "README.md", tmp_path / "r.json"
    readme.write_text(content)
    record.save(source, result)
    assert readme_table.main(["--readme", str(readme), "--record", str(source)]) == 2
    assert readme.read_text() == content
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_generation(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks import smollm2_generate

    out = tmp_path / "generate.json"
    tiny = ["--layers", "1", "--batch", "2", "--prompt", "5", "--new", "3", "--rounds", "2"]
    assert smollm2_generate.main([*tiny, "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    assert [row["provider"] for row in made["rows"]] == list(smollm2_generate.PROVIDERS)
    assert made["rows"][0]["ratio"] == 1.0 and made["share_of_error_budget"] < 1.0
    text = (record.RESULTS / "README.md").read_text()
    assert all(f"`{key}`" in text for key in {*made, *made["rows"][0]})


@pytest.mark.slow
def test_whole_training_step(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks import smollm2_step

    out = tmp_path / "step.json"
    tiny = ["--layers", "1", "--batch", "1", "--sequence", "9", "--rounds", "2"]
    assert smollm2_step.main([*tiny, "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["fused_layers"] == made["total_layers"] == 7
    assert [row["provider"] for row in made["rows"]] == list(smollm2_step.PROVIDERS)
    assert all(len(row["losses"]) == 4 for row in made["rows"])
    text = (record.RESULTS / "README.md").read_text()
    assert all(f"`{key}`" in text for key in {*made, *made["rows"][0]})


@pytest.mark.slow
def test_memory_of_the_frozen_layer_is_its_tensors():
    from benchmarks import memory

    case = Case(1024, 512, 512, 4, torch.float32)
    used = memory.in_child("frozen", case)
    if used["peak_bytes"] is None:
        pytest.skip("this system does not tell its memory")
    outputs = 4 * (1024 * 512 + 1024 * 512)  # Y and dX
    assert 0.8 * outputs < used["peak_bytes"] < 4 * outputs  # pages are counted in batches
    assert used["saved_bytes"] == 0
    assert memory.in_child("aten", case)["saved_bytes"] == 4 * (1024 * 512 + 1024 * 4)


def test_command_drops_output_paths():
    assert machine.command("m", ["--json", "x", "--rank", "4", "--png=y"]) == "python -m m --rank 4"


def test_the_page_of_quantized_weights_shows_the_newest_record(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(quant_table.PAGE.read_text())
    assert quant_table.main(["--page", str(page)]) == 0
    assert page.read_text() == quant_table.PAGE.read_text()
    result = json.loads(record.newest("quant_linear").read_text())
    result["rows"][0]["median_us"] *= 2
    assert quant_table.render(result) not in page.read_text()
    page.write_text("no markers\n")
    assert quant_table.main(["--page", str(page)]) == 1
    assert page.read_text() == "no markers\n"

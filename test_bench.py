"""bench.py: its plain forms are the same mathematics, its counts are true, and it runs."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import evaluate
from evaluate import log_likelihood
from models import log_mixture

SCRIPT = Path(__file__).with_name("bench.py")
CASES = [(model, prior) for model in ("vae", "hvae") for prior in ("standard", "vamp")]


def run_bench(*flags):
    command = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_plain_mixture_is_the_same_density():
    z, mu, logvar = bench.mixture_inputs(7, 30)
    plain, ours = bench.broadcast_log_mixture(z, mu, logvar), log_mixture(z, mu, logvar)
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-3)


@pytest.mark.parametrize("model, prior", CASES)
def test_plain_model_has_the_same_terms(model, prior):
    ours = bench.prepare(model, prior, 20, quick=True)[1]
    x, plain = (torch.rand(5, 784) < 0.2).float(), bench.PlainModel(ours)
    torch.manual_seed(1)
    recon, kl = plain.terms(x)
    torch.manual_seed(1)        # both draw the top layer's noise first
    terms = ours.terms(x)
    torch.testing.assert_close(recon, terms["recon"][0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kl, terms["kl"][0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("model, prior", CASES)
def test_counts_are_those_of_the_operations(monkeypatch, model, prior):
    ours = bench.prepare(model, prior, 20, quick=True)[1]
    x = (torch.rand(6, 784) < 0.2).float()
    with FlopCounterMode(display=False) as counter:
        terms = ours.terms(x)
        (terms["kl"] - terms["recon"]).mean().backward()
    assert counter.get_total_flops() == bench.step_flops(ours, 6)
    # the counter sees its own thread only
    monkeypatch.setattr(evaluate, "ThreadPoolExecutor",
                        lambda n: SimpleNamespace(map=map, shutdown=lambda **flags: None))
    with FlopCounterMode(display=False) as counter:
        log_likelihood(ours, x, 30)
    assert counter.get_total_flops() == bench.likelihood_flops(ours, 6, 30)


def test_plain_form_beyond_the_limit_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", -1)
    times = bench.compare(lambda: None, lambda: None, 3)
    assert times["plain"] == [] and len(times["ours"]) == 3
    row = bench.new_row("a", "b", times)
    assert row["plain"] is row["ratio"] is None and row["ours"] > 0 and row["n"] == 3


def test_quick_run_writes_the_record(tmp_path):
    done = run_bench("--quick", "--out", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record.keys() == {"machine", "torch", "threads", "date", "gflops", "rows"}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert {row["section"] for row in record["rows"]} == set(bench.SECTIONS)
    keys = ("section case plain ours ratio ratio_low ratio_high n bound_share peak_mb "
            "plain_peak_mb error expected").split()
    for row in record["rows"]:
        assert list(row) == keys
        assert row["case"] in done.stdout
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] or row["n"] == 2
        if row["plain"]:
            assert 0 < row["bound_share"] < 2 and row["ratio"] == row["plain"] / row["ours"]


def test_bad_folder_is_said_at_once(tmp_path):
    done = run_bench("--quick", "--out", tmp_path / "missing" / "bench.json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

"""bench.py: its plain forms are the same mathematics, its counts are true, and it runs."""
import json
import subprocess
import sys

import pytest
import torch

import bench
import evaluate
import train


@pytest.mark.parametrize("model, prior", bench.CELLS)
def test_plain_forms_are_the_same_mathematics(model, prior):
    ours = bench.prepare(model, prior, 20, quick=True)[0].model
    x, plain = (torch.rand(50, 784) < 0.2).float(), bench.plain_form(ours)
    torch.manual_seed(1)
    found = bench.plain_terms(plain, x)
    torch.manual_seed(1)        # both draw the top layer's noise first
    terms = ours.terms(x)
    torch.testing.assert_close(found, (terms["recon"][0], terms["kl"][0]), rtol=1e-4, atol=1e-3)
    gap = bench.plain_log_likelihood(plain, x[0], 5000) - evaluate.log_likelihood(ours, x[:1], 5000)
    assert gap.abs() < 0.3


def test_work_of_a_step_and_of_an_image_is_that_of_a_count_by_hand(monkeypatch):
    run, args, _ = bench.prepare("vae", "standard", 20, quick=True)
    assert args.batch_size == train.RECIPES["default"]["large"][1]      # though the images are few
    sizes = {name: p.numel() for name, p in run.model.named_parameters() if p.ndim == 2}
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder"))
    decoder = sum(sizes.values()) - encoder
    monkeypatch.setattr(bench, "CELLS", [("vae", "standard")])
    monkeypatch.setattr(train, "has_bfloat16", lambda device: True)
    (*steps, large), (image,) = bench.step(True), bench.likelihood(True)
    # batch 10: forward, and as much for either gradient, of which images need none
    assert [step["bound_share"] * step["ours"] for step in steps] == [pytest.approx(
        2 * 10 * (3 * (encoder + decoder) - sizes["encoder.body.0.linear.weight"]))] * 2
    # encoded once, 200 samples of it decoded
    assert image["bound_share"] * image["ours"] == pytest.approx(2 * (encoder + 200 * decoder))


def test_times_and_work_are_those_of_one_unit_and_a_plain_form_too_long_is_left_out(monkeypatch):
    a = torch.ones(4, 4)
    plain, ours = (lambda: 6.0), (lambda: (a @ a).sum().item() / 8)         # 8 seconds, 128 FLOP
    monkeypatch.setattr(bench, "seconds", lambda form, calls=1: form())     # as the form says
    times = bench.compare(plain, ours, 3, (2, 4))
    assert times == ([3.0] * 3, [2.0] * 3, 32.0)
    rows = [bench.new_row("step", case, times) for case in ("a case", "a case, bfloat16")]
    rates = {torch.float32: [160, 40], torch.bfloat16: [80, 320]}       # before the section, after it
    monkeypatch.setattr(bench, "product_rate", lambda size, kind: rates[kind].pop())
    monkeypatch.setattr(train, "has_bfloat16", lambda device: True)
    monkeypatch.setitem(bench.SECTIONS, "step", lambda quick: rows)
    assert bench.record(["step"], True)["rows"] == [dict.fromkeys(bench.KEYS) | {
        "section": "step", "case": case, "plain": 3.0, "ours": 2.0, "n": 3, "ratio": 1.5,
        "ratio_low": 1.5, "ratio_high": 1.5, "bound_share": share}
        for case, share in (("a case", 0.1), ("a case, bfloat16", 0.05))]
    monkeypatch.setattr(bench, "SECONDS", 5)
    assert bench.compare(plain, ours, 3)[0] == bench.compare(None, ours, 3)[0] == []


def test_quick_run_writes_the_record(tmp_path):
    out = tmp_path / "bench.json"
    subprocess.run([sys.executable, bench.__file__, "--quick", "--out", out], check=True)
    record, kinds = json.loads(out.read_text()), 1 + train.has_bfloat16(torch.device("cpu"))
    assert list(record) == ["machine", "torch", "threads", "date", "gflops", "rows"]
    assert [row["section"] for row in record["rows"]] == (
        ["mixture"] * 4 + ["growth"] * 2 + ["step"] * (4 * kinds + 1) + ["likelihood"] * 4
        + ["growth", "processes"])
    for row in record["rows"]:
        assert list(row) == bench.KEYS
        assert row["ratio_low"] is row["plain"] is None or row["ratio_low"] <= row["ratio_high"]
        if row["section"] == "growth":      # ours over ours
            assert row["plain"] is row["ours"] is row["bound_share"] is None
        else:
            assert row["bound_share"] is None or 0 < row["bound_share"] < 2
            assert row["plain"] is None or row["ratio"] == row["plain"] / row["ours"]


@pytest.mark.parametrize("out", ["missing/bench.json", "."])
def test_a_bad_folder_is_said_at_once(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "record", None)
    monkeypatch.setattr(torch, "set_flush_denormal", bool)      # not for the tests that follow
    assert bench.main(["--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} cannot be written")

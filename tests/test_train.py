"""Real trainings on real JPEG files: completion, exact resume, stop signals, numbers gone bad, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, environment, settings_for, write_stripes
from torchvision_shim import import_timm

import fastrex
from fastrex import checkpoint, rundir, trainer
from fastrex import config as c
from fastrex.errors import DivergedError, FastrexError


def configuration(data: Path, *more: str) -> c.Config:
    return c.load("demo", [*SETTINGS, f"data.path={json.dumps(str(data))}", *more])


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final_hash(run: Path) -> str:
    return checkpoint.state_hash(checkpoint.load(checkpoint.folder(run, checkpoint.steps(run)[-1]))[0])


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastrex", *map(str, arguments)]


def fastrex_run(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def quiet_run(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 16 steps, by the command line."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    result = fastrex_run("train", "demo", *SETTINGS, "--data", stripes, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return out


def test_a_run_leaves_everything_behind(quiet_run: Path, stripes: Path) -> None:
    assert {p.name for p in quiet_run.iterdir()} >= {
        "config.toml", "env.json", "status.json", "metrics.jsonl", "train.log", "checkpoints", "export",
    }  # fmt: skip
    status = rundir.read_status(quiet_run)
    assert (status["state"], status["step"], status["checkpoint"]) == ("completed", 16, 16)
    train = [r for r in records(quiet_run) if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(1, 17))
    names = {"train/lr", "train/top1", "perf/images_per_s", "perf/data_wait", "bank/empty_classes", "bank/age"}
    assert names <= train[0].keys()
    last = (quiet_run / "train.log").read_text(encoding="utf-8").splitlines()[-3:]
    assert "accuracy: top-1" in last[0]
    assert last[1].endswith("export/model.safetensors")
    assert "fastrex.load_encoder(" in last[2]
    encoder = fastrex.load_encoder(quiet_run)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, encoder.num_features)
    stored = c.from_toml((quiet_run / "config.toml").read_text(encoding="utf-8"))
    assert stored.data.path == str(stripes.resolve())


def test_it_learns(stripes: Path, tmp_path: Path) -> None:
    # Four easy classes: chance is 25 %.
    plain = ("augment.jitter=0", "augment.grayscale=0", "augment.flip=0", "data.local_scale=[0.3, 0.6]")
    longer = ("optim.epochs=15", "optim.lr=1.0", "model.width=8", "model.ema_momentum=0.9")
    config = configuration(stripes, *plain, *longer)
    result = fastrex.train(config, out=tmp_path / "run", device="cpu")
    assert result.state == "completed"
    assert result.metrics["eval/top1"] >= 0.75
    assert result.metrics["eval/knn"] >= 0.75


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    quiet_run: Path, stripes: Path, tmp_path: Path
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    fastrex_run("train", "demo", *SETTINGS, "--data", stripes, "--out", again)
    fastrex_run("train", "demo", *SETTINGS, "--data", stripes, "--out", other, "run.seed=1")
    assert final_hash(again) == final_hash(quiet_run)
    assert final_hash(other) != final_hash(quiet_run)


def wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in _complete_records(run)):
            return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


def _complete_records(run: Path) -> list[dict[str, float]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("kill_at", [1, 5, 14])
def test_kill_and_resume_gives_the_same_bits(quiet_run: Path, stripes: Path, tmp_path: Path, kill_at: int) -> None:
    # checkpoint.every_steps is not part of the numbers; the quiet run saves at the ends of its epochs only.
    out = tmp_path / "run"
    arguments = ("train", "demo", *SETTINGS, "--data", stripes, "--out", out, "checkpoint.every_steps=3")
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL, text=True)
    wait_for_step(out, process, kill_at)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rundir.read_status(out)["state"] == "killed"
    resumed = fastrex_run("train", "--out", out, "--resume", "must")
    assert resumed.returncode == 0, resumed.stderr
    assert final_hash(out) == final_hash(quiet_run)
    steps = [r["step"] for r in records(out) if "train/loss" in r]
    assert steps == sorted(set(steps))
    assert steps[-1] == 16


def test_a_stop_signal_saves_and_the_run_continues_exactly(quiet_run: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("train", "demo", *SETTINGS, "--data", stripes, "--out", out)
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL, text=True)
    wait_for_step(out, process, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == rundir.EXIT_CODES["preempted"] == 75
    status = rundir.read_status(out)
    assert status["state"] == "preempted"
    assert status["checkpoint"] == status["step"] < 16
    assert "--resume must" in fastrex_run("status", out).stdout
    fastrex_run("train", "--out", out, "--resume", "auto")
    assert final_hash(out) == final_hash(quiet_run)


def test_max_steps_stops_early_and_never_rescales(quiet_run: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = configuration(stripes)
    assert trainer.train(config, out=out, max_steps=5, device="cpu").step == 5
    assert rundir.read_status(out)["state"] == "completed"
    quiet = {r["step"]: r for r in records(quiet_run) if "train/lr" in r}
    for record in records(out):
        if "train/lr" in record:
            assert record["train/lr"] == quiet[record["step"]]["train/lr"]
    # A run that was stopped early goes on to its end.
    assert trainer.train(None, out=out, resume="must", device="cpu").step == 16


def test_a_corrupt_newest_checkpoint_is_skipped(quiet_run: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("train", "demo", *SETTINGS, "--data", stripes, "--out", out)
    first = fastrex_run(*arguments, "--max-steps", "8")
    assert first.returncode == 0, first.stderr
    broken = checkpoint.folder(out, 8) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4])
    resumed = fastrex_run("train", "--out", out, "--resume", "must")
    assert resumed.returncode == 0, resumed.stderr
    assert "set aside as bad.step-00000008" in resumed.stdout
    assert final_hash(out) == final_hash(quiet_run)


def test_accumulation_moves_bank_and_weights_once_per_step(stripes: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    trainer.train(configuration(stripes), out=whole, max_steps=1, device="cpu")
    trainer.train(configuration(stripes, "optim.accumulate=2"), out=halves, max_steps=1, device="cpu")
    a = checkpoint.load(checkpoint.folder(whole, 1))[0]
    b = checkpoint.load(checkpoint.folder(halves, 1))[0]
    assert torch.equal(a["bank"]["means.labels"], b["bank"]["means.labels"])
    assert a["bank"]["means.pointer"].item() == b["bank"]["means.pointer"].item() == 16
    # The first learning rate of the warm-up is 0: no weight has moved yet, with or without accumulation.
    assert torch.equal(a["model"]["encoder.conv1.weight"], b["model"]["encoder.conv1.weight"])
    assert "per micro-batch of 8 images" in (halves / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_resumes(stripes: Path, tmp_path: Path, precision: str) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    config = configuration(stripes, f"optim.precision={precision}")
    trainer.train(config, out=straight, max_steps=6, device="cpu")
    trainer.train(config, out=cut, max_steps=3, device="cpu")
    trainer.train(None, out=cut, resume="must", max_steps=6, device="cpu")
    assert final_hash(straight) == final_hash(cut)
    losses = [r["train/loss"] for r in records(straight) if "train/loss" in r]
    assert all(loss < 10 for loss in losses)


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
def test_numbers_gone_bad_stop_the_run_and_keep_the_last_good_checkpoint(
    stripes: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    config = c.load("demo", [*settings_for(objective), f"data.path={json.dumps(str(stripes))}"])
    # Epochs have four steps: the first one ends with a checkpoint, then the weights break.
    monkeypatch.setattr("fastrex.schedule.Schedule.lr", lambda self, step: 0.0 if step < 5 else 1e30)
    with pytest.raises(DivergedError, match=r"got NaN or inf at step \d+; the last good checkpoint is step 4"):
        trainer.train(config, out=out, device="cpu")
    assert rundir.read_status(out)["state"] == "diverged"
    parts, _ = checkpoint.load(checkpoint.folder(out, 4))
    assert all(torch.isfinite(t).all() for part in parts.values() for t in part.values() if t.is_floating_point())


def test_diverged_has_its_own_exit_code(stripes: Path, tmp_path: Path) -> None:
    result = fastrex_run("train", "demo", *SETTINGS, "--data", stripes, "--out", tmp_path / "run", "optim.lr=1e38")
    assert result.returncode == 3
    assert "must be finite" in result.stderr
    assert "Traceback" not in result.stderr


def test_init_from_starts_the_encoder_elsewhere(quiet_run: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer.train(configuration(stripes), out=out, init_from=quiet_run, max_steps=1, device="cpu")
    mine = checkpoint.load(checkpoint.folder(out, 1))[0]
    theirs = checkpoint.load(checkpoint.folder(quiet_run, 16))[0]
    assert torch.equal(mine["model"]["encoder.conv1.weight"], theirs["model"]["encoder.conv1.weight"])
    assert torch.equal(mine["ema"]["encoder.conv1.weight"], theirs["model"]["encoder.conv1.weight"])
    config = configuration(stripes, "model.width=8")
    with pytest.raises(
        FastrexError,
        match=r"--init-from must hold a resnet18 \(stem small, width 8\) like .*, got resnet18 \(stem small, width 4\)",
    ):
        trainer.train(config, out=tmp_path / "wide", init_from=quiet_run, device="cpu")


def test_a_restarted_job_may_repeat_its_command(quiet_run: Path, stripes: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "run", configuration(stripes)
    trainer.train(config, out=out, init_from=quiet_run, resume="auto", max_steps=1, device="cpu")
    assert trainer.train(config, out=out, init_from=quiet_run, resume="auto", max_steps=2, device="cpu").step == 2
    with pytest.raises(FastrexError, match="cannot be combined with --resume must"):
        trainer.train(config, out=out, init_from=quiet_run, resume="must", device="cpu")


def test_a_run_that_went_on_exports_its_newest_weights(stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer.train(configuration(stripes), out=out, max_steps=4, device="cpu")
    stale = (out / "export" / "model.safetensors").read_bytes()
    trainer.train(None, out=out, resume="must", max_steps=6, device="cpu")
    # As after a kill between the checkpoint and the export.
    (out / "export" / "model.safetensors").write_bytes(stale)
    facts = out / "export" / "config.json"
    facts.unlink()
    encoder = fastrex.load_encoder(out)
    newest = checkpoint.load(checkpoint.folder(out, 6))[0]["model"]["encoder.conv1.weight"]
    assert torch.equal(encoder.conv1.weight, newest)


def test_an_evaluation_that_a_kill_swallowed_is_made_up_for(stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer.train(configuration(stripes, "eval.every_epochs=1"), out=out, max_steps=4, device="cpu")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    evaluation = [line for line in lines if "eval/knn" in line]
    (out / "metrics.jsonl").write_text("".join(x for x in lines if x not in evaluation), encoding="utf-8")
    trainer.train(None, out=out, resume="must", max_steps=5, device="cpu")
    again = [r for r in records(out) if "eval/knn" in r and r["step"] == 4]
    assert [r["eval/knn"] for r in again] == [json.loads(evaluation[0])["eval/knn"]]


def test_a_timm_encoder_trains_and_resumes(stripes: Path, tmp_path: Path) -> None:
    import_timm()
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    table = [s for s in SETTINGS if not s.startswith("model.")]
    config = c.load("demo", [*table, "model.stem=imagenet", "model.width=64", "model.arch=timm:resnet10t"])
    config = c.override(config, [f"data.path={json.dumps(str(stripes))}"])
    trainer.train(config, out=straight, max_steps=3, device="cpu")
    trainer.train(config, out=cut, max_steps=1, device="cpu")
    trainer.train(None, out=cut, resume="must", max_steps=3, device="cpu")
    assert final_hash(straight) == final_hash(cut)
    assert fastrex.load_encoder(cut)(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


def test_numbers_gone_bad_are_null_in_the_log(stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrex.schedule.Schedule.lr", lambda self, step: 1e38)
    with pytest.raises(DivergedError):
        trainer.train(configuration(stripes), out=tmp_path / "run", device="cpu")
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert any(r["train/grad_norm"] is None for r in records(tmp_path / "run"))


def test_the_remainder_can_be_padded(stripes: Path, tmp_path: Path) -> None:
    config = configuration(stripes, "data.last_batch=pad", "optim.batch_size=24")
    trainer.train(config, out=tmp_path / "run", max_steps=3, device="cpu")
    assert "repeats 8 images in every epoch" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")


def test_synthetic_data_needs_no_images(tmp_path: Path) -> None:
    config = c.load("demo", [*SETTINGS, "data.path=synthetic"])
    assert trainer.train(config, out=tmp_path / "run", max_steps=2, device="cpu").state == "completed"


def test_a_file_that_goes_bad_during_the_run_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_stripes(data / "train", 16, seed=0)
    write_stripes(data / "val", 2, seed=1)
    trainer.train(configuration(data), out=out, max_steps=4, device="cpu")
    victim = data / "train" / "class-2" / "05.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(FastrexError, match=r"class-2/05\.jpg"):
        trainer.train(None, out=out, resume="must", device="cpu")
    assert rundir.read_status(out)["state"] == "failed"
    victim.write_bytes(content)
    assert trainer.train(None, out=out, resume="must", device="cpu").state == "completed"


def test_a_resumed_run_holds_to_its_images(tmp_path: Path) -> None:
    """One that is gone stops it by name, or is replaced as it would have been in the run; new ones change nothing."""
    data, out = tmp_path / "data", tmp_path / "run"
    write_stripes(data / "train", 16, seed=0)
    trainer.train(configuration(data), out=out, max_steps=2, device="cpu")
    (data / "train" / "class-1" / "00.jpg").unlink()
    (data / "train" / "class-3" / "new.jpg").write_bytes((data / "train" / "class-3" / "00.jpg").read_bytes())
    with pytest.raises(FastrexError, match=r"class-1/00\.jpg' cannot be read .No such file or directory.; resume"):
        trainer.train(None, out=out, resume="must", device="cpu")
    go_on = configuration(data, "data.on_bad_sample=replace")
    assert trainer.train(go_on, out=out, resume="must", device="cpu").state == "completed"
    log = (out / "train.log").read_text(encoding="utf-8")
    assert 'this run has changed data.on_bad_sample: "stop" -> "replace"' in log
    assert "bad file 'train/class-1/00.jpg' cannot be read" in log
    # The same as a run that was never stopped, in which the file was gone from the first step on.
    straight = tmp_path / "straight"
    shutil.copytree(out / "checkpoints", straight / "checkpoints")
    for name in ("config.toml", "index.npz"):
        shutil.copy(out / name, straight / name)
    for step in checkpoint.steps(straight)[1:]:
        shutil.rmtree(checkpoint.folder(straight, step))
    trainer.train(None, out=straight, resume="must", device="cpu")
    assert final_hash(straight) == final_hash(out)


def test_other_images_than_those_of_the_run_are_refused(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_stripes(data / "train", 16, seed=0)
    trainer.train(configuration(data), out=out, max_steps=2, device="cpu")
    (out / "index.npz").unlink()  # as in a run of an earlier version
    (data / "train" / "class-1" / "00.jpg").unlink()
    with pytest.raises(FastrexError, match="images must be those of the run"):
        trainer.train(None, out=out, resume="must", device="cpu")


def test_the_papers_recipe_runs_on_a_cpu_with_real_imagenet_files(imagenet_sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = c.load("trex", [f"data.path={json.dumps(str(imagenet_sample))}", "optim.batch_size=4"])
    result = trainer.train(config, out=out, max_steps=2, device="cpu")
    assert result.state == "completed"
    text = (out / "train.log").read_text(encoding="utf-8")
    assert text.count("evaluation is off") == 1
    assert "crops 1x224 + 8x96" in text
    # ln(400) = 5.99, plus about 0.2 because random prototypes give logits of deviation 0.63 (recipes.md 1.5).
    assert 5.8 < records(out)[0]["train/loss"] < 6.7
    state, _ = checkpoint.load(checkpoint.folder(out, 2))
    assert sum(t.numel() for n, t in state["model"].items() if n.startswith("projector.")) > 13_125_632
    assert (out / "export" / "model.safetensors").is_file()

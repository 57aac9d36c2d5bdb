"""Configuration: recipes, overrides, round trip, and errors that name the way out."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from fastrex import config as c
from fastrex import objectives
from fastrex.errors import FastrexError

# recipes.md 1.3: what the released models were trained with.
PUBLISHED = {
    "trex": (3, (0.25, 1.0), (0.05, 0.25), "class_means"),
    "trex_star": (1, (0.40, 1.0), (0.05, 0.40), "class_means"),
    "trex_plain_3": (3, (0.25, 1.0), (0.05, 0.25), "cosine_softmax"),
    "trex_plain_1": (1, (0.40, 1.0), (0.05, 0.40), "cosine_softmax"),
}


def test_recipes_that_exist() -> None:
    assert c.recipes() == [
        "cifar10",
        "demo",
        "finetune",
        "look",
        "mochi",
        "moco",
        "ncm",
        "schane",
        "sl_mlp",
        "softmax",
        "softmax_regularized",
        "supcon",
        "supcon_queue",
        "trex",
        "trex_plain_1",
        "trex_plain_3",
        "trex_star",
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    layers, global_scale, local_scale, objective = PUBLISHED[name]
    config = objectives.resolve(c.load(name))
    data, augment, optim = config.data, config.augment, config.optim
    assert (config.projector.hidden_layers, data.global_scale, data.local_scale) == (layers, global_scale, local_scale)
    assert config.objective.name == objective
    assert config.objective.options["temperature"] == 0.1
    assert config.objective.options.get("bank_size", 8192) == 8192
    assert (data.global_crops, data.global_size, data.local_crops, data.local_size) == (1, 224, 8, 96)
    assert data.ratio == pytest.approx((3 / 4, 4 / 3))
    assert (augment.flip, augment.jitter, augment.grayscale) == (0.5, 0.8, 0.2)
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (augment.global_blur, augment.local_blur, augment.blur_radius) == (0.2, 0.5, (0.1, 2.0))
    assert (augment.global_solarize, augment.local_solarize, augment.solarize_threshold) == (0.2, 0.0, 128)
    assert (optim.batch_size, optim.epochs, optim.lr, optim.warmup_epochs, optim.min_lr) == (256, 100, 0.1, 10, 1e-6)
    assert (optim.momentum, optim.weight_decay, optim.accumulate) == (0.9, 1e-4, 1)
    assert (config.model.arch, config.model.stem, config.model.width) == ("resnet50", "imagenet", 64)
    assert (config.model.bn_eps, config.model.bn_momentum, config.model.ema_momentum) == (1e-5, 0.1, 0.999)
    assert (config.projector.hidden_dim, config.projector.out_dim, config.projector.input_norm) == (2048, 256, True)
    assert (data.eval_resize, data.eval_size, data.last_batch) == (256, 224, "drop")


@pytest.mark.parametrize("name", c.recipes())
def test_a_recipe_names_every_field_and_round_trips(name: str) -> None:
    table = tomllib.loads((c.RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    config = objectives.resolve(c.load(name))
    for section, cls in c.sections().items():
        names = {f.name for f in dataclasses.fields(cls)} - {"options"}
        if section == c.OBJECTIVE:
            names |= set(config.objective.options)
        assert set(table[section]) == names, section
    assert c.from_toml(c.to_toml(config)) == config
    assert c.diff(config, c.from_toml(c.to_toml(config))) == []


def test_every_field_has_help() -> None:
    for section, key, _, text in c.items(c.load("trex")):
        assert text or section == c.OBJECTIVE, (section, key)
    assert all(objectives.option_help(c.load("trex")).values())


def test_overrides_are_typed_and_the_last_one_wins() -> None:
    config = c.load(
        "trex", ["optim.lr=1", "optim.lr=0.5", "data.global_scale=[0.3, 0.9]", "model.arch=timm:vit", "run.wandb=x y"]
    )
    assert config.optim.lr == 0.5
    assert isinstance(c.load("trex", ["optim.lr=1"]).optim.lr, float)
    assert config.data.global_scale == (0.3, 0.9)
    assert config.model.arch == "timm:vit"
    assert config.run.wandb == "x y"


def test_strings_survive_toml() -> None:
    path = 'a "quoted" \\ back\nline é 日本'
    config = c.override(c.load("demo"), [])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
    assert c.from_toml(c.to_toml(config)).data.path == path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.batchsize=8", r"optim\.batchsize is no setting \(did you mean 'batch_size'\?\)"),
        ("optimizer.lr=8", r"section must be one of .* \(did you mean 'optim'\?\)"),
        ("optim.lr=fast", r"optim\.lr must be a number, got 'fast'"),
        ("optim.lr=nan", r"optim\.lr must be a finite number"),
        ("optim.batch_size=1.5", r"optim\.batch_size must be a whole number, got 1\.5"),
        ("optim.batch_size=true", r"optim\.batch_size must be a whole number, got True"),
        ("optim.batch_size=0", r"optim\.batch_size must be at least 1, got 0"),
        ("augment.flip=1.5", r"augment\.flip must be between 0 and 1, got 1\.5"),
        ("data.last_batch=dorp", r"data\.last_batch must be one of drop, pad, got 'dorp' \(did you mean 'drop'\?\)"),
        ("data.global_scale=0.5", r"data\.global_scale must be a list of 2 numbers"),
        ("data.global_scale=[0.9, 0.3]", r"data\.global_scale must be two rising numbers"),
        ("optim.warmup_epochs=100", r"optim\.warmup_epochs must be less than optim\.epochs"),
        ("lr", r"a setting must be section\.key=value"),
        ("recipe.x=1", r"recipe is no section"),
    ],
)
def test_bad_settings_name_the_way_out(setting: str, message: str) -> None:
    with pytest.raises(FastrexError, match=message):
        c.load("trex", [setting])


def test_objective_options_are_checked_where_they_belong() -> None:
    with pytest.raises(FastrexError, match=r"objective\.bank_sise is no setting \(did you mean 'bank_size'"):
        objectives.resolve(c.load("trex", ["objective.bank_sise=1"]))
    with pytest.raises(FastrexError, match=r"objective\.name must be one of .*did you mean 'class_means'"):
        objectives.resolve(c.load("trex", ["objective.name=class_mean"]))
    with pytest.raises(FastrexError, match=r"objective\.bank_size is no setting"):
        objectives.resolve(c.load("trex_plain_1", ["objective.bank_size=1"]))


def test_unknown_recipe_and_own_recipe(tmp_path) -> None:
    with pytest.raises(FastrexError, match=r"recipe must be one of .*did you mean 'trex_star'"):
        c.load("trexstar")
    own = tmp_path / "mine.toml"
    own.write_text("[optim]\nepochs = 20\n", encoding="utf-8")
    assert c.load(str(own)).optim.epochs == 20
    assert c.load(str(own)).recipe == "mine"
    own.write_text("[optim\n", encoding="utf-8")
    with pytest.raises(FastrexError, match="must be TOML"):
        c.load(str(own))


def test_another_objective_brings_its_own_options() -> None:
    config = objectives.resolve(c.load("trex", ["objective.temperature=0.2", "objective.name=cosine_softmax"]))
    wanted = {"temperature": 0.2, "sharded": False, "label_smoothing": 0.0, "margin": 0.0, "margin_kind": "cosface"}
    assert dict(config.objective.options) == wanted


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(FastrexError, match=r"recompute must be none or passes with run\.compile=true, got blocks"):
        c.load("demo", ["run.compile=true", "model.recompute=blocks"])

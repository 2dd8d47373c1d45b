"""Bad input to the config is told in one line: the value seen, what is wanted, the mend."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from syncbn.trainer import config
from syncbn.trainer.config import Config
from syncbn.trainer.norms import NORMS
from syncbn.trainer.option import flat
from syncbn.trainer.runs.folder import MAPPINGS, differences, is_legal, name_of
from tests.trainer.composed import CONF, composed

BAD = {
    "data.batch=3": "data.batch: no such key; did you mean data.batch_per_rank?",
    "dataa=digits": "dataa: no such key; did you mean",
    "+x=1": "x: no such key",
    "+train.speed=1": "train.speed: no such key; did you mean",
    "norm=foo": "norm=foo: no such choice; choose one of batch_renorm, evonorm_s0, frn, frozen, ghost, group, instance",
    "data=cifar": "data=cifar: no such choice; choose one of cifar10, cifar100, cityscapes, coco_detection,",
    "experiment=none": "experiment=none: no such choice; choose one of bccd, camvid, cifar10",
    "norm.name=foo": "norm=foo: choose one of sync, local, torch",
    "optim.name=lion": "optim=lion: choose one of sgd, adamw",
    "task.name=guess": "task=guess: choose one of classify",
    "norm.group=0": "norm.group=0: give world, node, a number of ranks, 1 or more, or {samples: n}",
    "norm.group=pair": "norm.group=pair: give world, node, a number of ranks",
    "norm.group=[0,1]": "norm.group=[0, 1]: give world, node, a number of ranks",
    "norm.group=1.5": "norm.group=1.5: give world, node, a number of ranks",
    "norm.group={samples: 0}": "norm.group={'samples': 0}: give world, node, a number of ranks",
    "norm.group={images: 4}": "norm.group={'images': 4}: give world, node, a number of ranks",
    "norm.group={samples: 4, images: 4}": "give world, node, a number of ranks",
    "norm.momentum=2": "norm.momentum=2: give a number above 0 up to 1, auto, or null",
    "norm.momentum=[1]": "norm.momentum",
    "norm.groups=many": "norm.groups: Value 'many' of type 'str' could not be converted to Integer",
    "norm.groups=8": "norm.groups=8 with norm=sync: only norm=group, ws_group, evonorm_s0 have that; take it, or no",
    "norm.samples=8": "norm.samples: no such key",
    "data.name=mnist": "data.name=mnist: choose one of digits",
    "data.batch_per_rank=many": "data.batch_per_rank=many: give 1 or more, or auto",
    "data.eval_batch_per_rank=many": "data.eval_batch_per_rank: Value 'many' of type 'str' could not be converted to ",
    "train.compile=perhaps": "train.compile: Value 'perhaps' is not a valid bool",
    "data.batch_per_rank=0": "data.batch_per_rank=0: give 1 or more",
    "data.batch_per_rank=-2": "data.batch_per_rank=-2: give 1 or more",
    "data.workers=-1": "data.workers=-1: give 0 or more",
    "data.augment.policy=auto": "data.augment.policy=auto: choose one of none, rand, trivial",
    "data.augment.erase=2": "data.augment.erase=2.0: give a probability",
    "data.augment.pad=-1": "data.augment.pad=-1: give 0 (off) or more",
    "data.ignore_index=256": "data.ignore_index=256: give a number from 0 to 255",
    "data.std=[0]": "give 1 or 3 of each, std above 0",
    "train.precision=fp8": "train.precision=fp8: choose one of fp32, bf16",
    "train.epochs=0": "train.epochs=0.0: give more than 0",
    "train.steps=0": "train.steps=0: give 1 or more",
    "train.accumulate=0": "train.accumulate=0: give 1 or more",
    "train.ema=1": "train.ema=1.0: give a decay from 0 up to 1",
    "train.clip_norm=-1": "train.clip_norm=-1.0: give 0 (off) or more",
    "optim.scaling=log": "optim.scaling=log: choose one of linear, sqrt, none",
    "eval.recalibrate=-1": "eval.recalibrate=-1: give 0 (off) or more batches",
    "optim.lr_batch=0": "optim.lr_batch=0: give 1 or more images; optim.scaling=none takes lr as it is",
    "optim.lr=0": "optim.lr=0.0: give a rate above 0",
    "schedule.name=step": "schedule.name=step: choose one of cosine, poly, multistep",
    "schedule.name=multistep": "schedule.name=multistep with schedule.milestones=[]: the rate falls at milestones",
    "schedule.milestones=[2]": "schedule.name=cosine with schedule.milestones=[2.0]: the rate falls at milestones",
    "schedule.gamma=2": "schedule.gamma=2.0: give a factor above 0 up to 1",
    "schedule.power=0": "schedule.power=0.0: give a power above 0",
    "++optim.lr_factors.head=0": "optim.lr_factors.head=0: give a factor above 0",
    "++optim.lr_factors={head: much}": "optim.lr_factors.head=much: give a factor above 0",
    "++optim.lr_factors={head: true}": "optim.lr_factors.head=True: give a factor above 0",
    "++optim.lr_factors={head: inf}": "optim.lr_factors.head=inf: give a finite number",
    "model.options=3": "model.options: Cannot assign int to Dict",
    "++model.options.num_classes=3": "model.options.num_classes: the data tells how many classes there are",
    "++model.options.text={a: nan}": "model.options.text.a=nan: give a finite number",
    "schedule.warmup_steps=-1": "schedule.warmup_steps=-1: give 0 or more",
    "schedule.warmup_epochs=-1": "schedule.warmup_epochs=-1.0: give 0 or more",
    "task.label_smoothing=1": "task.label_smoothing=1.0: give a share",
    "wandb.mode=maybe": "wandb.mode=maybe: choose one of offline, online, disabled",
    "launch.nproc=0": "launch.nproc=0: give the number of ranks, 1 or more, or auto",
    "launch.nproc=some": "launch.nproc=some: give the number of ranks",
    "launch.device=tpu": "launch.device=tpu: choose one of auto, cpu, cuda",
    "optim.lr=nan": "optim.lr=nan: give a rate above 0",
    "optim.lr=inf": "optim.lr=inf: give a finite number",
    "train.epochs=inf": "train.epochs=inf: give a finite number",
    "data.mean=[nan]": "data.mean=nan: give a finite number",
    "optim.betas=[0.9]": "optim.betas=[0.9]: give two decays",
    "optim.betas=[0.9,1]": "optim.betas=[0.9, 1.0]: give two decays",
    "seed=-1": "seed=-1: give 0 or more",
    "seed=9007199254740992": "seed=9007199254740992: give a number below 2**53",
    'data.root="a\tb"': "data.root=a\\tb: give a text without line breaks",
    "wandb.tags=[[a]]": "tags[0]: Cannot convert 'list' to string",
    "run.name=a/b": "run.name=a/b: give one folder's name",
    "data.batch_per_rank": "data.batch_per_rank",
}


def test_a_home_is_found_wherever_a_path_comes_from(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    paths = {"data": {"root": "~/a"}, "run": {"root": "~"}, "model": {"weights": "~/w.pt"}}
    made = config.typed({**paths, "checkpoint": {"resume": "~/runs/a"}})
    assert (made.data.root, made.run.root, made.model.weights) == ("/me/a", "/me", "/me/w.pt")
    assert (made.checkpoint.resume, config.typed({}).model.weights) == ("/me/runs/a", None)


def test_what_there_is_to_choose_from_is_told_and_no_more():
    choices = "batch_renorm, evonorm_s0, frn, frozen, ghost, group, instance, layer, local, none, sync, torch, ws_group"
    assert composed("norm=foo") == f"norm=foo: no such choice; choose one of {choices}"
    line = composed("hydra/launcher=pbs")
    assert line.startswith("hydra/launcher=pbs: no such choice; choose one of basic")
    assert "path" not in line


@pytest.mark.parametrize(
    ("group", "choice", "extra"),
    [
        ("hydra/launcher", "joblib", "sweep"),
        ("hydra/sweeper", "optuna", "sweep"),
        ("hydra/launcher", "submitit_slurm", "slurm"),
    ],
)
def test_what_is_not_installed_is_told_with_its_extra(group, choice, extra):
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as raised:
        compose("config", overrides=[f"{group}=absent"])
    line = config.explain(HydraException(str(raised.value).replace("absent", choice)))
    asked = "hydra/launcher=submitit" if choice.startswith("submitit") else f"{group}={choice}"
    assert line == f"{asked} is not installed: pip install -e '.[{extra}]'"


@pytest.mark.parametrize(("override", "said"), BAD.items(), ids=BAD)
def test_bad_input_is_told_in_one_line(override, said):
    line = composed(override)
    assert isinstance(line, str), "this override was accepted"
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize("data", sorted(p.stem for p in (CONF / "data").glob("*.yaml")))
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_every_choice_composes(data, optim):
    built = composed(f"data={data}", f"optim={optim}", "norm=local")
    assert isinstance(built, Config), built
    assert (built.data.name, built.optim.name, built.norm.name) == (data, optim, "local")


RECIPES = sorted(str(p.relative_to(CONF / "experiment").with_suffix("")) for p in (CONF / "experiment").rglob("*.yaml"))


@pytest.mark.parametrize("experiment", RECIPES)
def test_every_recipe_composes_and_yields_to_overrides(experiment):
    built = composed(f"experiment={experiment}", "data.batch_per_rank=3")
    assert isinstance(built, Config), built
    assert built.data.batch_per_rank == 3


def test_a_config_survives_the_way_to_the_ranks():
    built = composed("train.steps=7", "data.augment.mixup=0.2", "launch.nproc=3", "wandb.tags=[a,b]")
    assert isinstance(built, Config), built
    assert config.from_yaml(config.to_yaml(built)) == built


WORDS = sorted(p.stem for p in (CONF / "norm").glob("*.yaml"))


@pytest.mark.parametrize("word", WORDS)
def test_every_norm_composes_and_says_in_a_line_what_it_is(word):
    assert composed(f"norm={word}").norm.name == word
    (line,) = (CONF / "norm" / f"{word}.yaml").read_text().splitlines()
    assert line.startswith(f"name: {word}  # ")


def test_there_is_a_choice_for_every_norm():
    assert set(WORDS) == set(NORMS)


@pytest.mark.parametrize(
    ("override", "group"),
    [
        ("norm.group={samples: 16}", {"samples": 16}),
        ("norm.group={samples:16}", {"samples": 16}),
        ("norm.group.samples=16", None),
        ("norm.group=node", "node"),
        ("norm.group=4", 4),
    ],
)
def test_a_group_is_a_word_a_number_or_so_many_samples(override, group):
    built = composed(override)
    if group is None:
        assert isinstance(built, str)
        return
    assert built.norm.group == group
    assert config.from_yaml(config.to_yaml(built)) == built


@pytest.mark.parametrize(("word", "momentum"), [("null", None), ("auto", "auto"), ("0.3", 0.3), ("1", 1)])
def test_a_momentum_is_a_number_a_word_or_none(word, momentum):
    built = composed(f"norm.momentum={word}")
    assert built.norm.momentum == momentum
    assert config.from_yaml(config.to_yaml(built)) == built


def test_a_key_that_is_newer_than_a_run_makes_no_other_run_of_it():
    now = config.as_dict(composed("norm=sync"))
    before = {**now, "norm": {key: value for key, value in now["norm"].items() if key != "reduction"}}
    assert differences(before, now) == []
    assert differences({**before, "seed": 1}, now) == ["seed 1 -> 0"]
    assert differences({}, now)


def test_a_group_of_samples_makes_another_run_by_another_name():
    one, other = (config.as_dict(composed(f"norm.group={{samples: {n}}}")) for n in (16, 32))
    assert differences(one, other) == ["norm.group.samples 16 -> 32"]
    names = {name_of(one, None, [f"norm.group={group}"]) for group in ("{samples: 16}", "{samples: 32}", "2", "world")}
    assert len(names) == 4
    assert all(is_legal(name) for name in names)


def test_the_word_on_a_group_replaces_that_of_an_earlier_run():
    earlier = config.as_dict(composed("norm.group={samples: 16}"))
    for word, group in (("world", "world"), ("{samples: 4}", {"samples": 4}), ("2", 2)):
        merged = OmegaConf.merge(OmegaConf.create(earlier), OmegaConf.from_dotlist([f"norm.group={word}"]))
        assert config.typed(merged).norm.group == group


MAPPED = {
    "++model.options.width=32": ("model", "options", {"width": 32}),
    "++model.options={width: 32, blocks: [1, 2]}": ("model", "options", {"width": 32, "blocks": [1, 2]}),
    "++model.options.encoder.name=a": ("model", "options", {"encoder": {"name": "a"}}),
    "++optim.lr_factors.classifier=10": ("optim", "lr_factors", {"classifier": 10}),
    "++optim.lr_factors={head.0: 10}": ("optim", "lr_factors", {"head.0": 10}),
    "++optim.lr_factors.head.conv=0.5": ("optim", "lr_factors", {"head.conv": 0.5}),
}


@pytest.mark.parametrize(("word", "want"), MAPPED.items(), ids=MAPPED)
def test_a_mapping_takes_any_names_and_survives_the_way_to_the_ranks(word, want):
    built = composed(word)
    section, key, value = want
    assert getattr(getattr(built, section), key) == value
    assert config.from_yaml(config.to_yaml(built)) == built


def test_the_keys_that_are_mappings_are_listed():
    assert sorted(key for key, value in flat(config.as_dict(Config())).items() if value == {}) == sorted(MAPPINGS)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {}, []),
        ({}, {"width": 8}, ["model.options {} -> {'width': 8}"]),
        ({"width": 8}, {}, ["model.options {'width': 8} -> {}"]),
        ({"width": 8}, {"width": 8, "depth": 2}, ["model.options {'width': 8} -> {'width': 8, 'depth': 2}"]),
        (None, {"width": 8}, []),  # a run from before there was the key
    ],
)
def test_another_option_makes_another_run(before, now, said):
    old, new = ({"seed": 0, "model": {"name": "unet", "options": options}} for options in (before, now))
    if before is None:
        del old["model"]["options"]
    assert differences(old, new) == said


def test_every_key_has_its_help():
    lines = [*config.described(Config())]
    assert len(lines) > 70
    assert [line for line in lines if " " not in line] == []

"""Settings: what wins over what, and what a user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError, field_validator

from shapeloom.config import Config, check_config, load_config, preset_names, preset_path
from shapeloom.errors import UserError


class Optim(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 100

    @field_validator("lr")
    @classmethod
    def _positive(cls, lr: float) -> float:
        if lr <= 0:
            raise ValueError("must be more than 0")
        return lr


class Run(Config):
    steps: int = 1000
    name: str = "x"
    ema: bool = True
    kind: Literal["a", "b"] = "a"
    optim: Optim = Optim()
    second: Optim | None = None
    anything: dict[str, int] = {}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text("train:\n  steps: 10\n  optim: {lr: 1e-2, warmup_steps: 5}\nother:\n  size: 3\n")
    return path


def test_order_of_precedence(preset: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"steps": 20, "optim": {"lr": 0.5}}')
    run = load_config(Run, preset, "train", file, ["optim.lr=1e-4", "name=hello"])
    assert run == Run(steps=20, name="hello", optim=Optim(lr=1e-4, warmup_steps=5))


def test_values_of_options_are_taken_as_they_are(preset: Path) -> None:
    run = load_config(Run, preset, "train", values={"name": "2024", "steps": None}, overrides=["ema=false"])
    assert (run.name, run.steps, run.ema) == ("2024", 10, False)
    assert load_config(Run, values={"steps": 1}, overrides=["steps=2"]).steps == 2


def test_a_written_config_is_read_back_the_same(tmp_path: Path) -> None:
    run = Run(steps=7, second=Optim(betas=(0.5, 0.6)))
    file = tmp_path / "config.json"
    file.write_text(run.model_dump_json())
    again = load_config(Run, None, "train", file)
    assert again == run and again.sha256() == run.sha256() != Run().sha256()


def test_a_file_of_sections_serves_as_config_file(preset: Path) -> None:
    assert load_config(Run, None, "train", preset).steps == 10


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=1e3", "steps", 1000),
        ("steps=1_000", "steps", 1000),
        ("name=on", "name", "on"),
        ("name='3'", "name", "3"),
        ("ema=false", "ema", False),
        ("kind=b", "kind", "b"),
        ("second={lr: 2}", "second", Optim(lr=2.0)),
        ("optim.betas=[0.5, 1]", "optim", Optim(betas=(0.5, 1.0))),
        ("anything.b=2", "anything", {"b": 2}),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_overrides_are_read_as_yaml(override: str, key: str, value: object) -> None:
    assert getattr(load_config(Run, overrides=[override]), key) == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("stepz=1", "unknown key 'stepz'; did you mean 'steps'?"),
        ("second.warmup=1", "unknown key 'second.warmup'; did you mean 'second.warmup_steps'?"),
        ("zzzz=1", "unknown key 'zzzz'"),
        ("optim.lr=fast", "key 'optim.lr' should be a valid number, got 'fast'"),
        ("optim.lr=-1", "key 'optim.lr': must be more than 0"),
        ("optim.lr=true", "key 'optim.lr' should be a valid number, got True"),
        ("steps=1.5", "key 'steps' should be a valid integer, got 1.5"),
        ("kind=c", "key 'kind' should be 'a' or 'b', got 'c'"),
        ("steps", "'steps' is not an override: write key=value, for example optim.lr=1e-4"),
        ("a..b=1", "'a..b=1' is not an override: write key=value, for example optim.lr=1e-4"),
        ("name={", "the value of the override 'name={' is not valid YAML"),
        ("optim=3", "key 'optim' should be an object, got 3"),
    ],
)
def test_wrong_overrides_get_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Run, overrides=[override])
    assert str(caught.value) == sentence


def test_unknown_key_in_a_preset_names_the_file(preset: Path) -> None:
    preset.write_text("train:\n  optim: {lrr: 1}\n")
    with pytest.raises(UserError, match=r"unknown key 'optim.lrr' in section 'train' of .*p.yaml; did you mean"):
        load_config(Run, preset, "train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "holds a list, expected keys and values"),
        ("steps: 1\nsteps: 2\n", r"line 1: key 'steps' is given twice"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(Run, config_file=file)


def test_missing_things(preset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config file .*no.json does not exist"):
        load_config(Run, config_file=tmp_path / "no.json")
    with pytest.raises(UserError, match=r"has no section 'nope' \(its sections: other, train\)"):
        load_config(Run, preset, "nope")
    with pytest.raises(UserError, match="unknown preset 'tinny'"):
        preset_path("tinny")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Run().steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Run(stepz=3)  # type: ignore[call-arg]


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(UserError, match=r"^key 'steps' in x.json should be .* \(and 1 more mistake\)$"):
        check_config(Run, {"steps": "a", "name": 3}, " in x.json")


def test_presets_of_the_package_are_found() -> None:
    for name in preset_names():
        assert preset_path(name).is_file()

"""Go's syntax of flags, on a command made for the tests."""

import click
import pytest
from click.testing import CliRunner, Result

from udptun.cli.goflags import Bool, Collected, GoCommand, Int, Level


@click.command(cls=GoCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--name", envvar=["OURS_NAME", "THEIRS_NAME"])
@click.option("--mask", type=Bool(), default=False, envvar=["OURS_MASK", "THEIRS_MASK"])
@click.option("--rules", type=Bool(), default=True)
@click.option("--count", type=Int(0), default=5, envvar="OURS_COUNT")
@click.option("--iface", cls=Collected, envvar="OURS_IFACE")
@click.option("-v", "--v", "level", cls=Level, type=Int(0), default=0)
@click.option("--log_at", default="")
def command(**values: object) -> None:
    click.echo(repr({name: value for name, value in values.items() if value != DEFAULTS[name]}))


DEFAULTS = {
    "name": None, "mask": False, "rules": True, "count": 5, "iface": (), "level": 0, "log_at": "",
}


def invoke(*argv: str, **env: str) -> Result:
    return CliRunner().invoke(command, argv, env=env, prog_name="x")


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ([], {}),
        (["--name=a"], {"name": "a"}),
        (["-name=a"], {"name": "a"}),
        (["--name", "a"], {"name": "a"}),
        (["-name", "a"], {"name": "a"}),
        (["--name=a=b"], {"name": "a=b"}),
        (["--name", "a=b"], {"name": "a=b"}),
        (["--name="], {"name": ""}),
        (["--name", ""], {"name": ""}),
        (["--name", "--mask"], {"name": "--mask"}),  # Go takes the next word, even with dashes
        (["--name", "-1"], {"name": "-1"}),
        (["--name", "a", "--name", "b"], {"name": "b"}),
        (["--name", "--"], {"name": "--"}),
        (["--log_at=f:1"], {"log_at": "f:1"}),
        (["--mask"], {"mask": True}),
        (["-mask"], {"mask": True}),
        (["--mask", "--name", "a"], {"mask": True, "name": "a"}),
        (["--mask=true", "--rules=false"], {"mask": True, "rules": False}),
        (["-mask=T", "-rules=F"], {"mask": True, "rules": False}),
        (["--mask=1", "--rules=0"], {"mask": True, "rules": False}),
        (["--mask", "--mask=false"], {}),
        (["--count", "7"], {"count": 7}),
        (["--count=0x1f"], {"count": 31}),
        (["--count=010"], {"count": 8}),
        (["--count=0"], {"count": 0}),
        (["--iface", "a", "-iface=b"], {"iface": ("a", "b")}),
        (["--iface=a b"], {"iface": ("a b",)}),
        (["-v=6"], {"level": 6}),
        (["-v", "6"], {"level": 6}),
        (["--v", "6", "--mask"], {"level": 6, "mask": True}),
        (["-v"], {"level": 1}),
        (["-v", "--mask"], {"level": 1, "mask": True}),
        (["--mask", "--"], {"mask": True}),
    ],
)
def test_spellings(argv: list[str], values: dict[str, object]) -> None:
    result = invoke(*argv)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{values}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--mask", "true"], "'true' is not a flag. Write the value of a flag as --flag=value."),
        (["--name", "a", "b", "--mask"], "'b' is not a flag."),
        (["--", "--mask"], "'--' is not a flag."),
        (["-"], "'-' is not a flag."),
        (["--name"], "--name needs a value."),
        (["-count"], "-count needs a value."),
        (["--nam", "a"], "No such option '--nam'"),
        (["--nam=a"], "No such option '--nam'"),
        (["---name=a"], "No such option '---name'"),
        (["--=a"], "No such option '--'"),
        (["-vv"], "No such option '-vv'"),
        (["-vmask"], "No such option '-vmask'"),
        (["--mask=yes"], "'yes' is not valid: expected true or false"),
        (["--mask="], "'' is not valid: expected true or false"),
        (["--count=ten"], "'ten' is not valid: expected a whole number"),
        (["--count="], "'' is not valid: expected a whole number"),
        (["--count=08"], "'08' is not valid: expected a whole number"),
        (["--count=-1"], "'-1' is not valid: expected at least 0"),
    ],
)
def test_mistakes_exit_2_and_are_named(argv: list[str], says: str) -> None:
    result = invoke(*argv)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_similar_flag_is_suggested() -> None:
    assert "Did you mean '--iface'" in invoke("--ifac=eth0").stderr


@pytest.mark.parametrize("word", ["-h", "--help", "-help"])
def test_help(word: str) -> None:
    result = invoke(word)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: x [OPTIONS]")


@pytest.mark.parametrize(
    ("env", "argv", "values"),
    [
        ({"THEIRS_NAME": "a"}, [], {"name": "a"}),
        ({"THEIRS_NAME": "a", "OURS_NAME": "b"}, [], {"name": "b"}),
        ({"THEIRS_NAME": "a", "OURS_NAME": "b"}, ["-name=c"], {"name": "c"}),
        ({"THEIRS_NAME": "a", "OURS_NAME": ""}, [], {"name": "a"}),  # empty means "not set"
        ({"OURS_MASK": "true"}, [], {"mask": True}),
        ({"OURS_MASK": "true"}, ["--mask=false"], {}),
        ({"OURS_COUNT": "6"}, [], {"count": 6}),
        ({"OURS_IFACE": "a b"}, [], {"iface": ("a b",)}),
        ({"OURS_IFACE": "a"}, ["--iface=b"], {"iface": ("b",)}),
    ],
)
def test_variables(env: dict[str, str], argv: list[str], values: dict[str, object]) -> None:
    result = invoke(*argv, **env)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{values}\n"


def test_a_wrong_variable_exits_2() -> None:
    result = invoke(OURS_MASK="on")
    assert result.exit_code == 2
    assert "'on' is not valid: expected true or false" in result.stderr

"""One command line for all scripts: flags, `--config YAML`, mistakes in one line."""

import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.general import REPOSITORY

from vla0_trl.command_line import ScriptParser, as_flags, option, parse

FOREIGN = "vla_eval_server.py"  # its command line is vla-eval's, which is not among our packages
SCRIPTS = [path for folder in ("data_prep", "eval", "recipes") for path in sorted((REPOSITORY / folder).glob("*.py"))]
SCRIPTS = [path for path in SCRIPTS if path.name != FOREIGN]


@dataclass(kw_only=True)
class Arguments:
    source: Path = option(help="what to read")
    count: int = option(3, "(default: %(default)s)")
    span: str = option("min_max")
    use_state: bool = option(True)
    dry: bool = option(False)
    names: list[str] = option([])
    state: str = option("agent", choices=["agent", "full"])
    json: Path | None = option(None)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--count {self.count} must be at least 1")


def read(*words: str) -> Arguments:
    return parse(Arguments, "what it does", ["--source", "data", *words])


def test_flags_in_every_form():
    assert read() == Arguments(source=Path("data"))
    assert read("--span", "-1,1").span == read("--span=-1,1").span == "-1,1"
    assert read("--span", "-1e-3").span == "-1e-3" and read("--span", "-inf").span == "-inf"
    for words in (["--no-use_state"], ["--no-use-state"], ["--use_state", "false"]):
        assert read(*words).use_state is False
    assert read("--dry").dry and read("--dry", "true").dry and not read("--dry", "false").dry
    assert read("--names", "a", "b").names == ["a", "b"]


def test_help_of_the_flag_that_turns_a_field_off(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    assert re.search(r"--no_use_state, --no-use-state\s+the same as --use_state false\n", capsys.readouterr().out)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("source: elsewhere\ncount: 5\nuse_state: false\nnames: [a]\nspan: 2026-01-01\n")
    expected = Arguments(source=Path("elsewhere"), count=7, use_state=False, names=["a"], span="2026-01-01")
    for words in (["--config", str(path)], [f"--config={path}"]):
        assert parse(Arguments, "", [*words, "--count", "7"]) == expected


@pytest.mark.parametrize(
    ("words", "yaml", "message"),
    [
        (["--cuont", "4"], "", "unknown argument --cuont: did you mean --count?"),
        ([], "cuont: 4", "unknown argument cuont: did you mean --count?"),
        (["--count", "0"], "", "--count 0 must be at least 1"),
        ([], "state: agnt", "argument --state: invalid choice: 'agnt' (choose from"),
        (["--count", "many"], "", "argument --count: invalid int value: 'many'"),
        (["--config"], "", "argument --config: expected one argument"),
        ([], "- a", "found ['a'], wanted an object with fields"),
        ([], "count: 1.5", "argument --count: invalid int value: '1.5'"),
        ([], "count: true", "argument --count: invalid int value: 'true'"),
        ([], "count: -5", "--count -5 must be at least 1"),
        ([], "count: [4]", "count is [4], wanted what --count takes"),
        ([], "span: {a: 1}", "span is {'a': 1}, wanted what --span takes"),
        ([], "names: [a, [b]]", "names is ['a', ['b']], wanted what --names takes"),
        ([], "dry: 3", "argument --dry: Truthy value expected: got 3"),
        ([], "3: 1", "unknown argument 3"),
        ([], "cou: 4", "unknown argument cou: did you mean --count?"),
        (
            ["--json", "absent/folder/x.json"],
            "",
            "--json absent/folder/x.json can't be written: name a file in a folder",
        ),
        (["--json", "/"], "", "--json / can't be written"),
        ([], "env: 3", "env is 3, wanted an object with fields"),
        ([], "a: [", "is not YAML"),
        ([], "a: " + "[" * 5000, "is nested too deep"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, yaml, message):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml or "{}")
    with pytest.raises(SystemExit) as error:
        read("--config", str(path), *words)
    printed = capsys.readouterr().err
    assert error.value.code == 2 and printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_as_flags_gives_back_what_was_asked():
    words = ["--count", "7", "--use_state", "false", "--dry", "--names", "a", "b"]
    flags = as_flags(read(*words), leave_out=["source"])
    assert flags == [["--count", "7"], ["--use_state", "false"], ["--dry"], ["--names", "a", "b"]]
    assert read(*(word for flag in flags for word in flag)) == read(*words)


def test_words_that_are_no_field():
    parser = ScriptParser(Arguments, "")
    parser.add_argument("files", nargs="+", type=Path)
    arguments, others, unknown = parser.parse(["x", "y", "--source", "data", "--other", "1"], unknown_allowed=True)
    assert others.files == [Path("x"), Path("y")] and unknown == ["--other", "1"] and arguments.source == Path("data")


@pytest.mark.slow  # a process per script
@pytest.mark.skipif(find_spec("vla_eval") is not None, reason="vla-eval is installed here")
def test_a_script_on_a_package_that_is_not_there_is_one_line():
    with pytest.raises(SystemExit, match=r"error: No module named 'vla_eval'.* pip install vla-eval==0.8.0"):
        runpy.run_path(str(REPOSITORY / "eval" / FOREIGN))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_and_a_typo_are_answered_before_anything_heavy_is_imported(script):
    code = (
        "import runpy, sys\n"
        "script, *words = sys.argv[1:]\n"
        "sys.argv = [script, *words]\n"
        "try:\n"
        "    runpy.run_path(script, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    status = end.code\n"
        "heavy = {'torch', 'peft', 'accelerate', 'mujoco'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    for word, statuses in (("--help", [0]), ("--no_such_flag", [1, 2])):
        command = [sys.executable, "-c", code, script, word]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode in statuses and "Traceback" not in done.stderr, done.stderr

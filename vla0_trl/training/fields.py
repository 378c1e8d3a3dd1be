"""All fields of a recipe by name, without the seconds that importing TRL's trainer and torch takes.

TRL's `SFTConfig` imports both. So `--help` and a look for mistyped flags read the dataclasses' sources instead; a
recipe's real parser, [`parse_recipe`], comes after that look, and has the last word on values.
"""

import argparse
import ast
import re
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from vla0_trl.command_line import separated, unknown_flag
from vla0_trl.limits import check_limits
from vla0_trl.schema import checked, is_number, parse_yaml, short
from vla0_trl.streams import prepare_streams

# Package, file and classes, the most derived first: what [`parse_recipe`] parses, and what those classes inherit from.
_SOURCES = (
    ("vla0_trl", "training/arguments.py", ("DataArguments", "VLASFTConfig")),
    ("vla0_trl", "execution_arguments.py", ("ExecutionArguments",)),
    ("trl", "trainer/model_config.py", ("ModelConfig",)),
    ("trl", "trainer/sft_config.py", ("SFTConfig",)),
    ("trl", "trainer/base_config.py", ("_BaseConfig",)),
    ("transformers", "training_args.py", ("TrainingArguments",)),
)


class RecipeField(NamedTuple):
    """What --help says of a field: its default as source text, and its description."""

    default: str
    help: str
    kind: str  # its annotation


def recipe_fields() -> dict[str, RecipeField]:
    """Every field that a recipe can set."""
    found: dict[str, RecipeField] = {}
    for package, file, names in _SOURCES:
        tree = ast.parse((Path(find_spec(package).origin).parent / file).read_text())
        classes = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
        for node in chain.from_iterable(classes):
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                found.setdefault(node.target.id, _described(node.value, ast.unparse(node.annotation)))
    return {name: field for name, field in found.items() if field is not None}


def _described(value: ast.expr | None, kind: str) -> RecipeField | None:
    """None for a field that is not an argument (`init=False`)."""
    if not isinstance(value, ast.Call):
        return RecipeField(ast.unparse(value) if value else "required", "", kind)
    words = {word.arg: word.value for word in value.keywords}
    if ast.unparse(value.func) == "option":
        return RecipeField(ast.unparse(value.args[0]), _text(value.args[1]), kind)
    if "init" in words and ast.unparse(words["init"]) == "False":
        return None
    default = ast.unparse(words["default"]) if "default" in words else "empty"
    metadata = words.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    texts = [text for key, text in pairs if ast.unparse(key) == "'help'"]
    return RecipeField(default, _text(texts[0]) if texts else "", kind)


def _text(node: ast.expr) -> str:
    """A string as it is written; the parts of it that are computed are left out."""
    return " ".join(
        part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def _number(word: str) -> float | str:
    try:
        return int(word) if word.lstrip("-").isdecimal() else float(word)
    except ValueError:
        return word


def check_recipe_words(default_config: Path, description: str, words: list[str] | None = None) -> None:
    """Answer --help, and end the program with one line where a flag, or a key of the YAML, does not exist."""
    prepare_streams()
    names = recipe_fields()
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config YAML] [--FIELD VALUE …]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help=f"a file with any of these (default: {default_config})")
    for name, field in names.items():
        text = f"{field.help} (default: {field.default})".replace("%", "%%")
        flags = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*flags, nargs="*", metavar="VALUE", help=text)
        for negated in {f"--no_{name}", f"--no-{name.replace('_', '-')}"}:
            parser.add_argument(negated, action="store_true", help=argparse.SUPPRESS)
    arguments, unknown = parser.parse_known_args(separated(sys.argv[1:] if words is None else words))
    path = Path(arguments.config or default_config)
    given = {name: list(map(_number, found)) for name, found in vars(arguments).items() if isinstance(found, list)}
    try:
        keys = checked(str(path), parse_yaml(str(path), path.read_bytes()) or {}, {})
        for name in keys.keys() & names.keys():
            kind, value = names[name].kind, keys[name]
            fits = re.search(r"\b(int|float)\b" if is_number(value) else type(value).__name__, kind)
            if not fits and (is_number(value) or isinstance(value, list | dict)):
                raise ValueError(f"{path}: {name} is {short(value)}, wanted {kind}")
        check_limits({"num_train_epochs": 1} | keys | given)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    unknown += [key for key in keys if key not in names and key != "env"]
    if unknown:
        sys.exit(f"error: {unknown_flag(str(unknown[0]), names.keys())}")

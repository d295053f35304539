"""What the documents show runs: code blocks, commands, and the examples in docstrings."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest

import hf_curriculum


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (f"{path.name}-{number}", language, text)
    for path in DOCUMENTS
    for number, (language, text) in enumerate(re.findall(r"```(\w+)\n(.*?)```", path.read_text(), re.DOTALL))
]
COMMANDS = [
    (name, line)
    for name, language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SCRIPT_LINES = [
    line.strip()
    for path in [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "recipes").glob("*.py")]
    for line in path.read_text().replace("\\\n#", " ").replace("\\\n", " ").splitlines()
    if "accelerate launch" in line
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [pytest.param(text, id=name) for name, language, text in BLOCKS if language == "python"]
)
def test_code_block_runs(code):
    exec(compile(code, "<document>", "exec"), {"__name__": "__document__"})


def recipe_parser(path):
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.make_parser()


def check_launch(words):
    """Parses `accelerate launch [--config_file X] recipes/x.py ...` with the recipe's own parser."""
    script = next(word for word in words if word.endswith(".py"))
    options, arguments = words[2 : words.index(script)], words[words.index(script) + 1 :]
    for option, value in zip(options[::2], options[1::2], strict=True):
        if option == "--config_file":
            assert (ROOT / value).is_file(), value
    arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
    recipe_parser(ROOT / script).parse_args_and_config(arguments)


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{name}: {line[:40]}") for name, line in COMMANDS])
def test_command_is_one_that_exists(line):
    words = shlex.split(line, comments=True)
    words = [word for word in words if "=" not in word or word.startswith("-")]
    if words[:2] == ["accelerate", "launch"]:
        check_launch(words)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("pip", "hf-curriculum")


@pytest.mark.parametrize("line", SCRIPT_LINES)
def test_command_in_a_recipe_parses(line):
    words = shlex.split(line.lstrip("# "), comments=True)
    check_launch([word for word in words if word != "\\"])


MODULES = [module.name for module in pkgutil.walk_packages(hf_curriculum.__path__, "hf_curriculum.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    module = importlib.import_module(name)
    for found in finder.find(module, globs={}):
        # The closing fence of a code block would be read as expected output.
        stripped = doctest.DocTestParser().get_doctest(
            re.sub(r"^\s*```\w*$", "", found.docstring or "", flags=re.MULTILINE), {}, found.name, name, found.lineno
        )
        result = runner.run(stripped, clear_globs=False)
        assert result.failed == 0, found.name

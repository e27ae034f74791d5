"""The documents hold what they say: snippets run and print what they say, commands exist, generated parts are current.

A fenced `python` block is run, all of a document's in one process and one fresh folder; "no-run" behind the word
leaves one out (it needs the network). `print(x)  # text` must print that text. In a `console` block each line that
begins with `$` must be a command that exists; where output follows it, the command must print just that.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launcher import python
from zoo import cards, cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]

RUNNER = """
import contextlib, io, json, sys
for line, source in json.load(sys.stdin):
    code = compile("\\n" * line + source, sys.argv[1], "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, globals())
    print(json.dumps([line, printed.getvalue()]))
"""


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """(line number of the fence, content) of a document's blocks in `language`, but for those marked no-run."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fences = re.finditer(rf"^```{language}$\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start()) + 1, fence[1]) for fence in fences]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_snippets_run_and_print_what_they_say(document, tmp_path):
    snippets = blocks(document, "python")
    assert snippets
    run = python("-c", RUNNER, document, input=json.dumps(snippets), cwd=tmp_path, env=environment())
    assert run.returncode == 0, run.stderr
    printed = dict(json.loads(line) for line in run.stdout.splitlines())
    for line, source in snippets:
        promised = re.findall(r"^print\(.*\)  # (.*)$", source, re.MULTILINE)
        if promised:
            said = [text for text in printed[line].splitlines() if text]
            assert [text for text in said if text in promised] == promised, f"{document}:{line} printed {said}"


def test_the_check_of_printed_comments_can_fail(tmp_path):
    """A guard for the guard: the runner reports a snippet's error with its document and line."""
    run = python("-c", RUNNER, "README.md", input='[[41, "1 / 0"]]', cwd=tmp_path)
    assert run.returncode == 1
    assert 'File "README.md", line 42' in run.stderr


def commands(document: str) -> list[tuple[str, str]]:
    """(command, output shown) of a document's console blocks."""
    found = []
    for _, content in blocks(document, "console"):
        parts = re.split(r"^\$ ", content, flags=re.MULTILINE)
        assert parts[0] == "", f"a console block of {document} does not begin with `$ `"
        for part in parts[1:]:
            command, _, output = part.partition("\n")
            found.append((command.partition("  # ")[0].strip(), output))
    return found


ALL_COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


@pytest.mark.parametrize("command", sorted({command for command, _ in ALL_COMMANDS}))
def test_commands_exist(command, monkeypatch):
    from zoo.evaluation.config import parse_evaluation
    from zoo.training import parse_training_config

    program, *arguments = shlex.split(command)
    if program == "torchrun":
        arguments = arguments[arguments.index("train.py") :]
    if program == "zoo":
        assert callable(cli.parse(arguments).run)
    elif program == "make":
        run = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    elif arguments[:1] == ["-m"]:
        assert (ROOT / (arguments[1].replace(".", "/") + ".py")).exists(), f"{command}: no such module"
    elif arguments[:1] == ["train.py"]:
        monkeypatch.chdir(ROOT)
        parse_training_config(arguments[1:], prog="train.py")
    elif arguments[:1] == ["eval.py"]:
        assert parse_evaluation(arguments[1:]).model
    else:
        pytest.fail(f"{program} is no command of this project")


@pytest.mark.parametrize(("command", "output"), [(c, o) for c, o in ALL_COMMANDS if o.strip()])
def test_commands_print_what_is_shown(command, output, tmp_path):
    program, *arguments = shlex.split(command)
    assert program == "zoo"
    run = python("-m", "zoo", *arguments, cwd=tmp_path, env=environment())
    assert run.returncode == 0, run.stderr
    assert [line.rstrip() for line in run.stdout.splitlines() if line] == [
        line.rstrip() for line in output.splitlines() if line
    ]


@pytest.mark.parametrize("name", sorted(cli.build_parser()[1]))
def test_every_command_has_help_with_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    examples = re.findall(r"^  zoo (.*)$", capsys.readouterr().out.partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        assert cli.parse(shlex.split(example)).command == name


def test_generated_documents_are_current():
    stale = [path for path, text in cards.generate(ROOT).items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python -m zoo.cards`"


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "model_cards/metaformer.md"])
def test_links_to_files_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    missing = [target for target in targets if not (ROOT / document).parent.joinpath(target).exists()]
    assert not missing


def test_speeds_in_the_readme_are_those_on_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"(\w+_s\d+)'s (?:fast form runs )?([\d.]+) times", text)
    assert [name for name, _ in said] == ["poolformer_s12", "convformer_s18"]
    record = json.loads((ROOT / "benchmarks" / "results" / "vision_inference.json").read_text(encoding="utf-8"))
    for name, times in said:
        spent = {who: found["cpu_ms"] for who, found in record["groups"][f"{name}/8/float32"]["contenders"].items()}
        assert f"{spent['timm'] / spent['zoo optimized']:.2f}" == times


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_worked_example_holds_the_contract_of_a_vision_model(tmp_path):
    """The model file of CONTRIBUTING.md, as a file, under every check that shipped models are held to."""
    (example,) = [source for _, source in blocks("CONTRIBUTING.md", "python") if source.startswith('"""PlainNet')]
    (tmp_path / "plainnet.py").write_text(example, encoding="utf-8")
    env = environment()
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    contract = ["tests/test_vision_contract.py", "-k", "plainnet", "-p", "plainnet", "-p", "no:cacheprovider"]
    run = python("-m", "pytest", "-q", *contract, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stdout
    assert re.search(r"\d\d passed", run.stdout)

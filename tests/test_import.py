"""What loads what: facts without torch, and the arrows between the parts of the package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from tests.launcher import python

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "timm", "numpy", "matplotlib", "datasets", "accelerate", "sklearn", "fvcore")

FACTS = {
    "import": "import zoo; dir(zoo)",
    "list_models": "import zoo; assert zoo.list_models('poolformer*', task='vision', pretrained=True)",
    "search": "import zoo; assert zoo.search(max_params=30e6, min_top1=70, license='apache*', sort='top1')",
    "model_info": "import zoo; assert zoo.model_info('poolformer_s12').macs",
    "model_info of a tag": "import zoo; assert zoo.model_info('poolformer_s12.sail_in1k').weights",
    "pareto": "import zoo; assert zoo.pareto()",
    "an unknown name": "import zoo\ntry: zoo.model_info('poolformer_s13')\nexcept zoo.ZooError: pass",
    "zoo list": "from zoo.cli import main; assert main(['list', '--pretrained']) == 0",
    "zoo search": "from zoo.cli import main; assert main(['search', '--max-params', '30M']) == 0",
    "zoo info": "from zoo.cli import main; assert main(['info', 'poolformer_s12']) == 0",
    "zoo pareto": "from zoo.cli import main; assert main(['pareto', '--json']) == 0",
    "zoo card": "from zoo.cli import main; assert main(['card', 'metaformer']) == 0",
}


@pytest.mark.parametrize("what", FACTS)
def test_facts_load_neither_torch_nor_timm(what):
    code = f"{FACTS[what]}\nimport sys\nsys.exit(', '.join(set({HEAVY}) & set(sys.modules)) or 0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_texts_need_neither_images_nor_the_compiler(tmp_path):
    code = """
import sys
import zoo, zoo.data
from zoo.cli import main

zoo.data.train_tokenizer(["some words"] * 9, 300)
small = {"dim": 64, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 128, "vocab_size": 300}
model = zoo.create_model("mobilellm_125m", **small)
zoo.save_pretrained(zoo.quantize(model, "int8"), "quantized")
zoo.save_pretrained(model, "saved")
turned = zoo.create_model("mobilellm_r1_140m", **small)
zoo.save_pretrained(zoo.quantize(turned, "int4"), "turned")
for folder in ("saved", "quantized", "turned"):
    assert main(["generate", "--model", folder, "--tokenizer", "bytes", "--max-new-tokens", "2", "One"]) == 0
sys.exit(", ".join({"torchvision", "timm", "matplotlib", "sympy", "torch._dynamo"} & set(sys.modules)) or 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", ["zoo", "zoo.data", "zoo.sparsity"])
def test_every_public_name_is_there(package):
    run = python("-c", f"import {package} as package\nfor name in package.__all__: getattr(package, name)", cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_names_that_are_imported_on_first_use_are_seen_before():
    code = """
import zoo.data, zoo.sparsity
for package in (zoo, zoo.data, zoo.sparsity):
    assert set(package.__all__) <= set(dir(package)), package
assert zoo.data.transforms.eval_transform is zoo.data.eval_transform
"""
    run = python("-c", code, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        zoo.creat_model  # noqa: B018
    assert set(dir(zoo)) >= {"create_model", "list_models", "__version__"}


# what each part may import of the package; imports inside functions count too
BASE = ("errors", "files", "units", "registry")
ARROWS = {
    "errors": (),
    "units": (),
    "files": ("errors",),
    "registry": ("errors", "files", "index"),  # measures a user's own model at the first question about it
    "layers": ("layers", *BASE),
    "models": ("models", "layers", *BASE),
}
TRAINING_MUST_NOT = ("models", "cli", "cards")


def package_imports(path: Path) -> set[str]:
    """The parts of the package that a file imports: `from zoo.layers.init import x` is `layers`."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("zoo.")}


def files_of(part: str) -> list[Path]:
    single = ROOT / "zoo" / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / "zoo" / part).rglob("*.py"))


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_downwards(part):
    assert files_of(part)
    for path in files_of(part):
        beyond = package_imports(path) - set(ARROWS[part])
        assert not beyond, f"{path.relative_to(ROOT)} imports {', '.join(sorted(beyond))}"


@pytest.mark.parametrize("part", ["training", "evaluation", "data"])
def test_tasks_know_no_family(part):
    assert files_of(part)
    for path in files_of(part):
        assert not package_imports(path) & set(TRAINING_MUST_NOT), path.relative_to(ROOT)


@pytest.mark.parametrize("part", ["registry", "errors", "units", "files", "cli", "cards"])
def test_light_modules_import_no_torch_at_the_top(part):
    (path,) = files_of(part)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:  # blocks under `if TYPE_CHECKING` are not run
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & {*HEAVY, "rich"}


def test_the_package_runs_from_elsewhere(tmp_path):
    """An installed package finds its index wherever it is called from."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "zoo", "list", "poolformer_s12", "--json"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["[", '"poolformer_s12"', "]"], run.stderr

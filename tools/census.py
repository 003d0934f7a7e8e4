"""Prints the sizes of the modules, scripts and docs, and exits with status 1 if a limit is exceeded."""

import ast
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# The functions that the reference image, the query, and what is computed from them pass through in a call with one of each,
# in order. A call runs about 100: those that only check, count, look something up or register hooks are not listed.
WALK = """
mixin_ssr:SSRPipelineMixin.__call__ mixin_ssr:SSRPipelineMixin._encode_for_prompts encoding_ssr:parse_references
images_ssr:to_pil images_ssr:_upright images_ssr:_to_rgb encoding_ssr:SubjectEncodingMixin._encode_references
images_ssr:preprocess images_ssr:_to_square encoding_ssr:SubjectEncodingMixin._encode_queries
encoding_ssr:_vision_levels modeling_ssr:SSREncoder.forward modeling_ssr:SSREncoder.attention_probs
arguments_ssr:parse_subjects arguments_ssr:_parse_row arguments_ssr:without_disabled_subjects
mixin_ssr:SSRPipelineMixin._generate hooks_ssr:subject_in_unet hooks_ssr:_before_unet
request_ssr:SubjectRequest.conditions request_ssr:SubjectRequest._prepare request_ssr:SubjectRequest._embeds
modeling_ssr:SSREncoder.project modeling_ssr:_Layers.forward hooks_ssr:_TransformerHook.__call__
attention_processors:SubjectConditions.for_transformer attention_processors:SSRAttnProcessor2_0.enter
attention_processors:SSRAttnProcessor2_0.add_subject attention_processors:attend_to_subject
""".split()
SCRIPTS = ("generate_batch", "prepare_dataset", "evaluate", "benchmark")


def num_lines(*files: Path) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def imports(file: Path) -> set[str]:
    """Returns the names of the modules beside a file that it imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            names.update([node.module] if node.module else [alias.name for alias in node.names])
    return names


def circles(modules: dict[str, Path]) -> list[str]:
    """Returns the modules that import themselves through other modules."""
    known = {name: imports(file) & modules.keys() for name, file in modules.items()}
    for _ in known:
        known = {name: direct.union(*(known[other] for other in direct)) for name, direct in known.items()}
    return sorted(name for name in known if name in known[name])


def functions(file: Path) -> set[str]:
    """Returns the qualified names of the functions of a module."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    for owner in (node for node in body if isinstance(node, ast.ClassDef)):
        names.update(f"{owner.name}.{node.name}" for node in owner.body if isinstance(node, ast.FunctionDef))
    return names


def census() -> list[tuple[str, int, int]]:
    """Returns what was counted, the counts and their limits."""
    modules = {file.stem: file for file in ROOT.glob("*.py") if file.stem != "setup"}
    names = {"__init__", "modeling_ssr", "attention_processors"}
    foreign = [name for name in modules if not ("ssr" in name or name.startswith("pipeline") or name in names)]
    public = next(
        node.value.elts
        for node in ast.parse(modules["__init__"].read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    missing = [step for step in WALK if step.split(":")[1] not in functions(modules[step.split(":")[0]])]
    examples = ROOT / "examples"
    return [
        ("lines in the root", num_lines(*ROOT.glob("*.py")), 4400),
        ("modules in the root", len(modules), 19),
        ("lines of the longest module", max(map(num_lines, modules.values())), 450),
        (f"modules in circles of imports {circles(modules)}", len(circles(modules)), 0),
        (f"modules with other names {foreign}", len(foreign), 0),
        ("public names", len(public), 10),
        ("functions from the image to the attention", len(WALK), 30),
        ("files with these functions", len({step.split(":")[0] for step in WALK}), 8),
        (f"of these functions, missing {missing}", len(missing), 0),
        ("lines of the training", num_lines(examples / "train_ssr.py", *examples.glob("training_*.py")), 1000),
        *((f"lines of {name}.py", num_lines(examples / f"{name}.py"), 250) for name in SCRIPTS),
        ("words of docs/reliability.md", len((ROOT / "docs" / "reliability.md").read_text().split()), 800),
    ]


if __name__ == "__main__":
    counted = census()
    for name, count, limit in counted:
        print(f"{name}: {count:,} of at most {limit:,}{'' if count <= limit else '  TOO MANY'}")
    sys.exit(any(count > limit for _, count, limit in counted))

"""Model cards: what a generator is, how good it was measured to be, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vardistill.errors import UsageError, first_line
from vardistill.export import lora, whole_pipelines
from vardistill.export.pipelines import makes_latents, usage
from vardistill.files import write_whole
from vardistill.reports.contents import metrics_lines
from vardistill.reports.formats import duration, metric_of, sentence_case
from vardistill.training import identity
from vardistill.training.folder import RunFolder

Table = Mapping[str, Any]

TAG = "diffusion-distillation"

OBJECTIVES = {
    "diff-instruct": "Diff-Instruct",
    "DiffInstruct": "Diff-Instruct",
    "dmd": "DMD",
    "dmd2": "DMD2",
    "sds": "SDS",
    "sid": "SiD",
    "sim": "SiM",
    "vardiu": "VarDiU",
    "varflow": "VarFlow",
}
"""What papers call the objectives that configurations, and classes, name."""


def model_card(run: RunFolder, library: str = "vardistill", lines: str | None = None) -> str:
    """The card of a run's generator, in Markdown, from the files of the run; those that are missing are left out.

    It names no path of this machine: of the teacher's only the last part is kept.

    Args:
        run: its folder.
        library: what loads the folder with the card, "vardistill", "diffusers" or, of adapters, "lora".
        lines: Python that loads a whole pipeline's folder; default by the student's configuration.

    Raises:
        UsageError: for files that cannot be read.
    """
    config = configuration(run)
    steps = steps_of(run)
    sections = (front_matter(config, library, steps), introduction(run, config, steps), measured(run, config, steps))
    return "\n\n".join(part for part in (*sections, loading(run, library, lines), training(run, config)) if part) + "\n"


def write_card(run: RunFolder) -> None:
    """Write the card into the folder of the finished generator, as README.md."""
    write_whole(run.generator / "README.md", model_card(run))


def steps_of(run: RunFolder) -> int:
    """n of the run's generator."""
    times = mapping(run.generator / "config.json", json.loads).get("times")
    return len(times) if times else configured_steps(configuration(run))


def configuration(run: RunFolder) -> dict[str, Any]:
    """What the run is made of: its configuration or, of a run in Python, its identity; {} without either."""
    return mapping(run.config, yaml.safe_load) or identity.read(run)


def counted(steps: int) -> str:
    """The number of steps in words."""
    return "one step" if steps == 1 else f"{steps} steps"


def front_matter(config: Table, library: str, steps: int) -> str:
    """What the Hugging Face hub sorts models by."""
    tags = [f"{'one' if steps == 1 else 'few'}-step-generation", TAG]
    head: dict[str, Any] = {"library_name": "diffusers" if library == "lora" else library}
    if of_text(config):
        head["pipeline_tag"] = "text-to-image"
        teacher = str(part(config, "domain").get("teacher"))
        head |= {} if Path(teacher).is_absolute() else {"base_model": teacher}
    elif of_pictures(config):
        head["pipeline_tag"] = "unconditional-image-generation"
    head["tags"] = [*tags, "lora"] if library == "lora" else tags
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def introduction(run: RunFolder, config: Table, steps: int) -> str:
    """What the generator is."""
    objective = objective_name(config.get("objective"))
    domain = part(config, "domain")
    if not domain:
        teacher = own_teacher(config)
        source = f"distilled from {teacher}" if teacher else "trained on data alone"
        what = f"It makes a sample of shape {shape_of(config)} in {counted(steps)}. It was {source}"
    elif of_pictures(config) or of_text(config):
        teacher = last_part(str(domain.get("teacher") or domain.get("data") or ""))
        guidance = domain.get("guidance", 1)
        guided = f" with guidance {guidance:g}" if guidance != 1 else ""
        if of_text(config) and (count := prompts_of(run)):
            guided += f" on {count:,} prompt{'s' if count > 1 else ''}"
        what = f"It makes a picture in {counted(steps)}. It was distilled from the diffusion model `{teacher}`{guided}"
    else:
        teacher = part(domain, "teacher").get("teacher", "")
        of = f"the {teacher} denoiser of `{domain.get('problem')}`"
        what = f"It makes a sample in {counted(steps)}. It was distilled from {of}"
    kind = "A one-step generator" if steps == 1 else f"A generator of {steps} steps, each one evaluation of its network"
    if of_text(config) and (rank := rank_of(config)):
        kind += f", as adapters of rank {rank} on its teacher"
    return f"# {run.path.resolve().name}\n\n{kind}. {what}, by {objective}."


def own_teacher(config: Table) -> str | None:
    """The teacher of a run in Python, in words; None for a run without one."""
    teacher = part(config, "teacher")
    if not teacher:
        return None
    inner = teacher.get("module") or teacher.get("denoiser") or teacher.get("network")
    name = inner.get("kind") if isinstance(inner, dict) else inner
    facts = [teacher.get("kind") if name else None, teacher.get("predicts"), part(teacher, "schedule").get("kind")]
    facts.append(f"SHA-256 {teacher['digest']}" if "digest" in teacher else None)
    known = ", ".join(str(fact) for fact in facts if fact)
    return f"{name or teacher.get('kind')} ({known})" if known else str(name)


def shape_of(config: Table) -> str:
    """The shape of a run in Python's samples, in words."""
    return " × ".join(map(str, part(config, "student").get("data_shape") or ()))


def measured(run: RunFolder, config: Table, steps: int) -> str:
    """The table of metrics, beside the teacher's own where they are there."""
    own = numbers(mapping(run.path / "evaluation.json", json.loads))
    if not own:
        return ""
    columns = {f"this generator, {steps} step{'s' if steps > 1 else ''}": own, **teachers(run, config)}
    rows = [["", *columns, "meaning"], ["---"] * (len(columns) + 2)]
    for name in own:
        metric = metric_of(name, name.replace("_", " "))
        values = [metric.show(column[name]) if name in column else "" for column in columns.values()]
        rows.append([metric.title, *values, sentence_case(metric.meaning)])
    return "## Measured\n\n" + table(rows)


def teachers(run: RunFolder, config: Table) -> dict[str, dict[str, float]]:
    """The metrics of a teacher of `vardistill teach`, by its number of steps, and of held-out data."""
    if not of_pictures(config):
        return {}
    source = part(config, "domain").get("teacher")
    kept = mapping((Path(source) if source else run.teacher) / "evaluation.json", json.loads)
    titles = {name: f"teacher, {name}" if name.endswith(" steps") else name for name in kept}
    return {titles[name]: numbers(row) for name, row in kept.items() if isinstance(row, dict)}


def loading(run: RunFolder, library: str, lines: str | None = None) -> str:
    """How to load the generator, here and in diffusers."""
    config = mapping(run.generator / "config.json", json.loads)
    if not config:
        return code_section(
            "import safetensors.torch",
            'safetensors.torch.load_model(student, "FOLDER/model.safetensors")  # a student built as for the run',
            "samples = student.eval().sample(16)",
        )
    if of_text(run_config := configuration(run)):
        return loading_text(config, library, bool(rank_of(run_config)), lines)
    if "network" not in config:
        kind = "DenoisingMLP" if "times" in config else "MLP"
        return code_section(
            f"from vardistill.students import {kind}", f'samples = {kind}.from_pretrained("FOLDER").sample(16)'
        )
    classes = int(config.get("classes", 0))
    labels = f", labels=torch.arange(16) % {classes}" if classes else ""
    what, ranged = ("latents", "") if makes_latents(config) else ("pictures", "  # in [-1, 1]")
    own = [
        *(["import torch"] if classes else []),
        "from vardistill.students import NetworkStudent",
        f'{what} = NetworkStudent.from_pretrained("FOLDER").sample(16{labels}){ranged}',
    ]
    alone = usage(config, steps_of(run))
    ours = f"With vardistill, from the folder `generator` of its run:\n\n{code(*own)}"
    exported = "" if library == "diffusers" else ", after `vardistill export RUN --to diffusers --out FOLDER`"
    theirs = f"With diffusers alone{exported}:\n\n{code(alone)}"
    return "## Loading\n\n" + "\n\n".join([theirs, ours] if library == "diffusers" else [ours, theirs])


def loading_text(student: Table, library: str, adapters: bool, lines: str | None) -> str:
    """How to load a text-to-image student of this configuration, as a pipeline and in the teacher's."""
    sampling = code_block("console", '$ vardistill sample RUN --prompt "a red dog" --out dogs.png')
    parts = {"vardistill": f"With vardistill, from its run:\n\n{sampling}"}
    prompt = 'prompt = "a red dog"'
    try:
        exported = {"diffusers": lines or whole_pipelines.usage(student), "lora": lora.usage(student)}
    except UsageError:  # no scheduler of diffusers takes its path
        exported = {}
    load = 'from diffusers import DiffusionPipeline\npipeline = DiffusionPipeline.from_pretrained("TEACHER")'
    heads = {"diffusers": ("With diffusers alone", prompt), "lora": ("In the teacher's pipeline", f"{load}\n{prompt}")}
    for name, usage_lines in exported.items():
        what, before = heads[name]
        after = f", after `vardistill export RUN --to {name} --out FOLDER`" if library == "vardistill" else ""
        parts[name] = f"{what}{after}:\n\n{code(before, usage_lines)}"
    shown = [name for name in parts if library in ("vardistill", name) and (name != "lora" or adapters)]
    return "## Loading\n\n" + "\n\n".join(parts[name] for name in shown)


def training(run: RunFolder, config: Table) -> str:
    """Seed, length and hardware."""
    settings, facts = config.get("training") or {}, mapping(run.environment, json.loads)
    last = max(metrics_lines(run), key=lambda line: float(line["step"]), default={})
    rows = {
        "seed": settings.get("seed"),
        "steps": f"{last['step']:,}" if last else None,
        "batch": settings.get("batch"),
        "time": duration(last["seconds"]) if last else None,
        "hardware": facts.get("accelerator") or facts.get("processor"),
        "processes": facts.get("processes"),
        "threads": facts.get("threads"),
        **{name: facts.get(name) for name in ("python", "vardistill", "torch")},
    }
    known = [[name, str(value)] for name, value in rows.items() if value is not None]
    return "## Training\n\n" + table([["", ""], ["---", "---"], *known]) if known else ""


def of_pictures(config: Table) -> bool:
    """Whether this is the configuration of a run on pictures."""
    return part(config, "domain").get("kind") == "pictures"


def of_text(config: Table) -> bool:
    """Whether this is the configuration of a run on text to image."""
    return part(config, "domain").get("kind") == "text"


def rank_of(config: Table) -> int:
    """Of a student's adapters; 0 for a student without."""
    return int(part(part(config, "domain"), "student").get("lora_rank") or 0)


def prompts_of(run: RunFolder) -> int:
    """How many prompts a run on text to image has; 0 where its file is not there."""
    path = run.path / "prompts.txt"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def configured_steps(config: Table) -> int:
    """Network evaluations of a sample; 1 where the configuration does not tell."""
    steps = part(part(config, "domain"), "student").get("steps_per_sample") or part(config, "student").get("steps")
    return steps if isinstance(steps, int) else 1


def part(config: Table, name: str) -> Table:
    """A part of a configuration; {} where there is none of the name."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def objective_name(objective: object) -> str:
    """The objective of a configuration, in words."""
    if not isinstance(objective, dict):
        return "an objective of its own"
    if isinstance(terms := objective.get("parts"), list | tuple):
        return " + λ·".join(objective_name(term.get("objective")) for term in terms if isinstance(term, dict))
    if isinstance(source := objective.get("source"), str):
        return f"`{last_part(source)}`"
    kind = str(objective.get("kind", "vardiu"))
    return OBJECTIVES.get(kind, kind)


def last_part(path: str) -> str:
    """The last component of a path or hub id that is no part of a teacher's own folder."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "pipeline")]
    return parts[-1] if parts else "unknown"


def numbers(table: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers."""
    return {name: v for name, v in table.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def mapping(path: Path, reader: Any) -> dict[str, Any]:
    """A file's mapping, {} without the file; raises UsageError where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        content = reader(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}") from error
    return dict(content) if isinstance(content, dict) else {}


def table(rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def code(*lines: str) -> str:
    """A block of Python."""
    return code_block("python", *lines)


def code_block(language: str, *lines: str) -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def code_section(*lines: str) -> str:
    """The section on loading of a generator that only this library loads."""
    return f"## Loading\n\n{code(*lines)}"

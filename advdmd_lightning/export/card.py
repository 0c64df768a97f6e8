"""The model card beside exported weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError

from advdmd_lightning.embedded import EMBEDDED, locate
from advdmd_lightning.export.checkpoint import TrainedGenerator
from advdmd_lightning.export.recipe import Recipe

SEEDING = (
    "Between its steps the pipeline draws noise from torch's global generator and not from `generator=`: for the same "
    "image again, call `torch.manual_seed` before it."
)


@dataclass(frozen=True)
class Export:
    """One export, in words.

    Attributes:
        recipe: The parts of the recipe.
        trained: The weights.
        config: File or name of the recipe.
        base: The teacher's folder or hub id as the recipe names it; None = the backbone does not say.
        out: The folder.
        lora: Whether it holds a LoRA file, and not a pipeline.
    """

    recipe: Recipe
    trained: TrainedGenerator
    config: str
    base: str | None
    out: Path
    lora: bool


def usage(export: Export) -> str:
    """Return the lines of Python that sample as in training."""
    use, steps = export.recipe.backbone.stock_use(), export.recipe.num_steps
    out = json.dumps(str(export.out))
    source = json.dumps(locate(export.base, "--config") if export.base else "BASE MODEL") if export.lora else out
    load = ", ".join([source, *(f"{name}={value!r}" for name, value in use.load.items())])
    call = ", ".join(f"{name}={value!r}" for name, value in use.call.items())
    scheduler = "FlowMatchEulerDiscreteScheduler"
    adapter = [
        f"pipe.load_lora_weights({out})",
        f'pipe.scheduler = {scheduler}.from_pretrained({out}, subfolder="scheduler")',
    ]
    return "\n".join(
        [
            f"from diffusers import DiffusionPipeline{f', {scheduler}' if export.lora else ''}",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({load})",
            *(adapter if export.lora else ()),
            f'image = pipe("a prompt", num_inference_steps={steps}, {call}).images[0]',
        ]
    )


def sampler(recipe: Recipe) -> str:
    """Return what the exported scheduler does, and whether that is what was trained."""
    if recipe.renoises:
        return f"re-noising, as in training (`stochastic_sampling`). {SEEDING}"
    if recipe.has_stock_sampler:
        return "Euler steps of the flow, without noise, as in training."
    return (
        f"**not the one of the training**, `{recipe.transition}`, which no stock scheduler has. This one takes the "
        "same times without noise; images differ from those that `advdmd validate` measures."
    )


def write_card(export: Export, folder: Path) -> None:
    """Write ``README.md`` into a folder."""
    recipe, trained = export.recipe, export.trained
    licence = licence_of(export.base)
    data = ModelCardData(
        base_model=export.base if export.base and not _is_local(export.base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["advdmd", "few-step", *(["lora"] if export.lora else [])],
        **licence,
    )
    kind = "average" if trained.averaged else "as trained, no average"
    named = licence.get("license_name") or licence.get("license")
    facts = {
        "Base model": f"`{export.base}`" if export.base else "not named by the recipe",
        "Licence": f"that of the base model, {named or f'which could not be read: see {export.base}'}",
        "Recipe": f"`{export.config}`",
        "Steps": f"{recipe.num_steps}, without guidance, at the times of shift {recipe.backbone.shift:g}",
        "Sampler": sampler(recipe),
        "Weights": f"{kind}, after {trained.step} generator updates",
        "Made by": f"advdmd-lightning {version('advdmd-lightning')}",
    }
    what = "LoRA weights" if export.lora else "pipeline"
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {export.out.name}", ""),
        f"A {recipe.num_steps}-step text-to-image student, distilled with AdvDMD: {what} for diffusers.",
        *("", "```python", usage(export), "```", ""),
        "The scheduler is made for this call: for another number of steps its times are not those of the shift.",
        *("", *(f"- {name}: {value}" for name, value in facts.items()), ""),
    ]
    ModelCard("\n".join(lines)).save(folder / "README.md")


def licence_of(base: str | None) -> dict[str, Any]:
    """Return what the base model's own card says of its licence, as a card's fields; empty if it cannot be read."""
    if base is None:
        return {}
    if base in EMBEDDED:
        return {"license": "apache-2.0"}
    card = Path(base).expanduser() / "README.md"
    if _is_local(base) and not card.is_file():
        return {}
    try:
        data = ModelCard.load(card if card.is_file() else base, ignore_metadata_errors=True).data.to_dict()
    except (OSError, HFValidationError):  # no network, or a model that is no longer there
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}


def _is_local(base: str) -> bool:
    return base in EMBEDDED or Path(base).expanduser().is_dir()

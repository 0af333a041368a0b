"""Settings of a curation: which stages judge, with which backends and parameters, and the rules that keep a clip.

A YAML file with a section a stage, and `rules`; everything has a default that needs no weights:

    shots:      {backend: adaptive, min_content_val: 21.0}     # shots.py
    stitch:     {backend: layout, similarity: 0.6}             # stitch.py
    motion:     {backend: raft, model: /models/raft-things.pth}
    aesthetics: {clip: /models/clip-vit-large-patch14, head: /models/sac+logos+ava1-l14-linearMSE.pth}
    text:       off                                            # a stage that is on by default, switched off
    caption:    {backend: openai, url: http://localhost:8000/v1, model: Qwen2.5-VL-7B}
    rules:      {aesthetics.score: ">= 5", motion.dynamic: off}

A section switches its stage on. An unknown name is a UserError with the nearest known one; nothing is ignored.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from vchitect_fast.config import read_yaml, typed
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.shots import ShotSettings
from vchitect_fast.curation.stage import SignalStage, Stage
from vchitect_fast.curation.stitch import StitchSettings
from vchitect_fast.errors import UserError, unknown_name

# Stage -> backend -> where it is; the first backend is the default one. Modules are imported when asked for.
STAGES: dict[str, dict[str, str]] = {
    "length": {"frames": "cheap:Length"},
    "static": {"luma": "cheap:Static"},
    "looks": {"thumb": "cheap:Looks"},
    "motion": {"dis": "cheap:DisMotion", "raft": "raft:RaftMotion"},
    "signature": {"layout-hash": "cheap:Signature"},
    "aesthetic_proxy": {"pixel-statistics": "aesthetics:AestheticProxy"},
    "aesthetics": {"clip-vit-l14-laion-linear": "aesthetics:Aesthetics"},
    "watermark": {"laion-efficientnet-b3": "watermark:Watermark"},
    "text": {"rapidocr": "text:RapidText", "easyocr": "text:EasyText"},
    "caption": {"openai": "caption:Caption", "transformers": "caption_local:LocalCaption"},
}
DEFAULT = ("length", "static", "looks", "motion", "signature", "aesthetic_proxy", "text")
# Rules on what duplicates.py finds, beside those of the stages.
DUPLICATE = Rule("duplicate", "unique", "==", True)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a curation, except the videos."""

    shots: ShotSettings
    stitch: StitchSettings
    stages: tuple[Stage, ...]  # in cascade order: those that read signals first, then by cost
    rules: tuple[Rule, ...]

    @property
    def signal_stages(self) -> tuple[Stage, ...]:
        """Stages that need no picture."""
        return tuple(stage for stage in self.stages if isinstance(stage, SignalStage))

    @property
    def frame_stages(self) -> tuple[Stage, ...]:
        """Stages that look at frames, without captioning."""
        return tuple(s for s in self.stages if not isinstance(s, SignalStage) and s.name != "caption")

    @property
    def caption_stages(self) -> tuple[Stage, ...]:
        """The captioner, or nothing: it waits for a server or a large model, and so runs last and by itself."""
        return tuple(stage for stage in self.stages if stage.name == "caption")

    def check(self) -> None:
        """UserError, before any work, where a stage cannot do its part."""
        for stage in self.stages:
            stage.check()
        if self.stitch.backend in ("clip", "viclip"):
            from vchitect_fast.curation.embedding import ClipEmbedding, ViclipEmbedding

            {"clip": ClipEmbedding, "viclip": ViclipEmbedding}[self.stitch.backend](self.stitch.weights).check()
        if self.shots.backend == "transnet":
            from vchitect_fast.curation.transnet import TransNet

            TransNet()

    def shot_weights(self) -> str:
        """What decides TransNetV2's probabilities, "" for the other backend."""
        if self.shots.backend != "transnet":
            return ""
        from vchitect_fast.curation.transnet import VERSION, transnet_weights

        return f"{VERSION} {transnet_weights()}"

    def stitch_weights(self) -> str:
        """Key of the embedding, "" where nothing is stitched; the folder of its weights is not in it."""
        if self.stitch.backend == "none":
            return ""
        from vchitect_fast.curation.embedding import ClipEmbedding, LayoutEmbedding, ViclipEmbedding

        if self.stitch.backend == "layout":
            return LayoutEmbedding().key()
        return {"clip": ClipEmbedding, "viclip": ViclipEmbedding}[self.stitch.backend](self.stitch.weights).key()

    def keys(self) -> dict[str, str]:
        """Stage name -> its key."""
        found: dict[str, str] = {}
        for stage in self.stages:
            found[stage.name] = stage.key([found.get(name, "") for name in stage.reads])
        return found


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file (None: the defaults), then `section.name=value` overrides, whose values are YAML too."""
    values: Any = {}
    if path is not None:
        try:
            values = read_yaml(str(path), Path(path).read_bytes()) or {}
        except OSError as error:
            raise UserError(f"cannot read the settings {path} ({error.strerror}); give a YAML file.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `stage: {{...}}` lines, got {type(values).__name__}; see curate --help.")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set takes section.name=value, got {override!r}; for example motion.backend=raft.")
        section, dot, field_name = name.strip().partition(".")
        # A rule starts with < or >, which YAML would read as something else.
        value = text.strip() if section == "rules" and text.strip()[:1] in "<>=!" else read_yaml(repr(override), text)
        if not dot:
            values[section] = value
        else:
            if not isinstance(values.get(section), dict):
                values[section] = {}
            values[section][field_name] = value
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Settings:
    """Checked settings of plain values, as YAML gives them."""
    for name in values:
        if name not in {"shots", "stitch", "rules", *STAGES}:
            raise unknown_name("section", str(name), {"shots", "stitch", "rules", *STAGES})
    chosen: list[Stage] = []
    for name, backends in STAGES.items():
        section = values.get(name, name in DEFAULT)
        if section is False:
            continue
        section = dict(_mapping(name, {} if section is True else section))
        backend = section.pop("backend", next(iter(backends)))
        if not isinstance(backend, str) or backend not in backends:
            raise unknown_name(f"{name}.backend", str(backend), backends)
        module, _, cls = backends[backend].partition(":")
        chosen.append(_built(getattr(importlib.import_module(f"vchitect_fast.curation.{module}"), cls), name, section))
    # Signals before frames before captions; what reads other stages' scores behind them, whatever it costs.
    chosen.sort(key=lambda s: (s.name == "caption", not isinstance(s, SignalStage), bool(s.reads), s.cost))
    stages = tuple(chosen)
    return Settings(
        _built(ShotSettings, "shots", _mapping("shots", values.get("shots"))),
        _built(StitchSettings, "stitch", _mapping("stitch", values.get("stitch"))),
        stages,
        _rules(stages, _mapping("rules", values.get("rules"))),
    )  # fmt: skip


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    value = {} if value is None else value  # "text:" with nothing behind it
    if not isinstance(value, Mapping):
        more = ", or off" if name in STAGES else ""
        raise UserError(f"{name} must be a section of `name: value`{more}, got {value!r}; see curate --help.")
    return value


def _built(cls: Any, section: str, values: Mapping[str, Any]) -> Any:
    """A settings dataclass of a section's values: names, types and missing ones checked."""
    known = {field.name: field for field in fields(cls)}
    for name in values:
        if name not in known:
            raise unknown_name(f"setting of {section}", str(name), known)
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            raise UserError(f"{section} needs {name}, got none; give it as {section}.{name}=...")
    return cls(**{name: typed(f"{section}.{name}", str(known[name].type), value) for name, value in values.items()})


def _rules(stages: Sequence[Stage], asked: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The stages' own rules, replaced or switched off by those asked for, in cascade order."""
    texts = {f"{stage.name}.{score}": text for stage in stages for score, text in stage.rules.items()}
    names = {f"{s.name}.{score}" for s in stages for score, kind in s.columns.items() if kind in (float, int, bool)}
    for name, text in asked.items():
        full = next((f"{stage.name}.{stage.main}" for stage in stages if stage.name == name), str(name))
        if full not in names:
            raise unknown_name("score in rules", full, names)
        if text is None or text is False:
            texts.pop(full, None)
        else:
            texts[full] = str(text)
    rules = [Rule.parse(*full.split(".", 1), text) for full, text in texts.items()]  # type: ignore[call-arg]
    order = [stage.name for stage in stages]
    return tuple(sorted(rules, key=lambda rule: order.index(rule.stage)))


def on_gpu(stages: Sequence[Stage]) -> bool:
    """Whether a model of these stages runs on a GPU here."""
    devices = [stage.device for stage in stages if hasattr(stage, "device")]
    if not devices:
        return False
    from vchitect_fast.curation.clip_model import pick_device

    return any(pick_device(device).startswith("cuda") for device in devices)

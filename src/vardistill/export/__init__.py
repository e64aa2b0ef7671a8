"""Trained generators for other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardistill.lazy import attach

if TYPE_CHECKING:
    from vardistill.export.lora import export_lora as export_lora
    from vardistill.export.onnx import export_diffusers as export_diffusers, export_onnx as export_onnx
    from vardistill.export.pipelines import save_pipeline as save_pipeline
    from vardistill.export.whole_pipelines import export_whole as export_whole

__getattr__, __all__ = attach(__name__)

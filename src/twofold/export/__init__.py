"""A decoder as an ONNX file, with one cache input and output for each cached tensor of its ties: one per layer where V = cK."""

from __future__ import annotations

from twofold.export.decoder import OnnxDecoder
from twofold.export.onnx_file import OnnxExport, export_onnx
from twofold.export.sampling import Sampling

__all__ = ["OnnxDecoder", "OnnxExport", "Sampling", "export_onnx"]

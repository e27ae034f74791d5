"""Models in the formats of other programs: transformers, llama.cpp, ONNX."""

from zoo.exporting.checked import FORMATS, Export, Format, export

__all__ = ["FORMATS", "Export", "Format", "export"]

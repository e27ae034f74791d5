"""Generation: text, or tokens, that a language model adds to a prompt."""

from zoo.generation.decoding import Decoding
from zoo.generation.prompts import Generation, generate, prepare
from zoo.generation.sampling import Sampling

__all__ = ["Decoding", "Generation", "Sampling", "generate", "prepare"]

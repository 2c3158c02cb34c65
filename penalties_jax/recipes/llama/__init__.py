"""Pretrained language models of the Llama family: load, run, adapt, and let them write.

Files are read by `gguf`, `safetensors` and `tokenizers`, the extra `llm`.
"""

from penalties_jax.recipes.llama.checkpoint import Checkpoint as Checkpoint
from penalties_jax.recipes.llama.checkpoint import build as build
from penalties_jax.recipes.llama.files import PACKAGED as PACKAGED
from penalties_jax.recipes.llama.files import Loaded as Loaded
from penalties_jax.recipes.llama.files import load as load
from penalties_jax.recipes.llama.files import open_checkpoint as open_checkpoint
from penalties_jax.recipes.llama.generation import generate as generate
from penalties_jax.recipes.llama.generation import write as write
from penalties_jax.recipes.llama.memory import adapters as adapters
from penalties_jax.recipes.llama.memory import fine_tuning as fine_tuning
from penalties_jax.recipes.llama.memory import parameters as parameters
from penalties_jax.recipes.llama.memory import writing as writing
from penalties_jax.recipes.llama.model import Llama as Llama
from penalties_jax.recipes.llama.model import LlamaConfig as LlamaConfig
from penalties_jax.recipes.llama.model import with_adapters as with_adapters
from penalties_jax.recipes.llama.tokens import in_tokens as in_tokens

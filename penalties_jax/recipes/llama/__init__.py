"""Pretrained language models of the Llama family: load, run, adapt, and let them write.

Files are read by `gguf`, `safetensors` and `tokenizers`, the extra `llm`.
"""

from penalties_jax.recipes.llama.files import PACKAGED as PACKAGED
from penalties_jax.recipes.llama.files import Loaded as Loaded
from penalties_jax.recipes.llama.files import load as load
from penalties_jax.recipes.llama.generation import generate as generate
from penalties_jax.recipes.llama.generation import write as write
from penalties_jax.recipes.llama.model import Llama as Llama
from penalties_jax.recipes.llama.model import LlamaConfig as LlamaConfig
from penalties_jax.recipes.llama.model import with_adapters as with_adapters

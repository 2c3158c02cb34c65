"""What `transformers` makes of SmolLM2's GGUF file, for tests that can't install it.

pip install torch transformers gguf
python tools/smollm2_reference.py SmolLM2-135M-Instruct.Q4_1.gguf tests/recipes/smollm2.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import Digits, Sequence

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in 1984,")
# Of logits, every so many classes.
STRIDE = 509
LENGTH = 60
TEXT = (
    "It's 12,345.67 at  3am\n\n\tif x<=10**6:  # naïve — 你好 🙂\r\n"
    "<|im_start|>user\nWe'll DON'T\u00a0\u200b x² ½ ٣٤<|im_end|> _foo__bar "
)


def main(file: str, into: str) -> None:
    """Write what there is to compare with."""
    path = Path(file)
    names = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**names)
    # As in the model's own tokenizer.json; transformers passes over tokenizer.ggml.pre.
    byte_level = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), byte_level]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval()
    prompts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(tokens).logits[0, :, ::STRIDE]
            text = model.generate(
                tokens, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        prompts.append(
            {
                "prompt": prompt,
                "tokens": tokens[0].tolist(),
                "logits": [[round(x, 5) for x in row] for row in logits.tolist()],
                "continuation": text[0, tokens.shape[1] :].tolist(),
            }
        )
    text = {"text": TEXT, "tokens": tokenizer(TEXT, add_special_tokens=False).input_ids}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = versions | {"stride": STRIDE, "prompts": prompts, "tokenized": text}
    Path(into).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

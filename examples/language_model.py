"""A language model in less memory than its weights take.

    python examples/language_model.py --model Llama-3.1-8B --allocation "cuda:0,6gb;cpu,*"

Any directory of transformers, or a GGUF file. Expect each token to bring what does not rest on the
device once; several prompts at once share that.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Continue two prompts at once."""
    asked = shared.arguments(__doc__, tiny.language_model, "cpu,4mb;disk,*")
    model = distorch.load(asked.model, asked.allocation)
    tokenizer = distorch.load_tokenizer(asked.model)
    watch = shared.Watch(distorch.handle_of(model))
    inputs = tokenizer([asked.prompt] * 2, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for line in tokenizer.batch_decode(tokens, skip_special_tokens=True):
        print(repr(line))
    watch.report()


if __name__ == "__main__":
    main()

"""What transformers makes of an exported folder, asked in a process of its own (L3).

    python -m megagpt.hub.answers FOLDER QUESTIONS.json ANSWERS.pt

The process knows nothing of megagpt's model: it reads the folder as anyone would.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch


@torch.no_grad()
def answer(folder: Path, questions: dict[str, list[list[int]]]) -> dict[str, object]:
    """logits (windows, positions, V) fp32, the greedy continuation of each prompt with the cache
    (prompts, n_ctx), and the ids of each text or image; questions as compare.py asks them."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    windows, prompts = (torch.tensor(questions[key]) for key in ("windows", "prompts"))
    logits = torch.stack(
        [model(w[None]).logits[0, questions["positions"]].clone() for w in windows]
    )
    # No end: the continuation reaches the full context whatever it says.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_length=windows.shape[1],
        eos_token_id=None,
        pad_token_id=0,
    )
    greedy = model.generate(prompts, attention_mask=torch.ones_like(prompts))
    found: dict[str, object] = {"logits": logits.float(), "greedy": greedy, "texts": []}
    if questions["images"]:
        from PIL import Image

        pictures = [Image.fromarray(np.array(one, np.uint8)) for one in questions["images"]]
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        found["texts"] = processor(pictures, return_tensors="pt")["input_ids"].tolist()
    if questions["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(t, split_special_tokens=True)["input_ids"] for t in questions["texts"]]
        found["texts"] = ids
    return found


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text())
    torch.save(answer(Path(sys.argv[1]), asked), sys.argv[3])

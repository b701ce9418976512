"""Makes expected.npz: what transformers 5.23.0 does to logits, and its greedy answers under a repetition penalty.

Run with torch 2.13.0 on a CPU as ``python make.py OUTPUT.npz``; nothing of mole_jax is imported.
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

FOLDER = pathlib.Path(__file__).parents[1] / "tiny_llava"
# temperature, top_k (0: off), top_p, repetition_penalty
SETTINGS = [
    (1.0, 0, 1.0, 1.0),
    (0.7, 0, 1.0, 1.0),
    (1.0, 5, 1.0, 1.0),
    (1.0, 0, 0.9, 1.0),
    (1.0, 0, 0.5, 1.0),
    (1.0, 0, 0.01, 1.0),
    (1.0, 0, 1.0, 1.3),
    (1.0, 0, 1.0, 0.8),
    (0.2, 50, 0.95, 1.1),
    (1.7, 7, 0.6, 1.9),
    (0.5, 1, 0.9, 1.2),
    (1.0, 1000, 0.999, 2.0),
]

model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
generator = torch.Generator().manual_seed(0)
logits = 3 * torch.randn(len(SETTINGS), 4, 96, generator=generator)
logits[:, 3] = logits[:, 3].round()  # many ties
tokens = torch.randint(0, 96, (len(SETTINGS), 4, 24), generator=generator)
scores = torch.empty_like(logits)
for i, (temperature, top_k, top_p, penalty) in enumerate(SETTINGS):
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=24, device="cpu")
    scores[i] = processors(tokens[i], logits[i].clone())

given = dict(np.load(FOLDER / "expected.npz"))
prompt = torch.from_numpy(given["generate_prompt"]).long()
with torch.no_grad():
    answer = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=torch.from_numpy(given["pixel_values"][:1]),
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1.5,
    )
np.savez_compressed(
    sys.argv[1],
    settings=np.asarray(SETTINGS),
    logits=logits.numpy(),
    tokens=tokens.numpy(),
    scores=scores.numpy(),
    penalised_answer=answer[0, prompt.shape[1] :].numpy(),
)
print(answer[0, prompt.shape[1] :].tolist(), given["generated"][0, prompt.shape[1] :].tolist())

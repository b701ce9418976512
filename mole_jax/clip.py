"""Constants of CLIP's image preparation (openai/CLIP), which data, model and weights share."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue over CLIP's training images, of values in [0, 1]."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the same."""

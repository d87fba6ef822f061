"""Yi-VL: CLIP ViT-H/14 at 448 px, a two-layer projector with norms, and Yi (plain Llama) as language model."""
